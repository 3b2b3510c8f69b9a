"""The store of dequantized weights: the same outputs, a bound that holds, nothing stale."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.dequant_cache import DequantCache, parse_cache_size
from alphaquant.runtime.modules import PackedLinear, cache_dequantized
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens
from alphaquant.testing.packed import save_packed

TOKENS = tiny_tokens(2, 11)
KIB = 1024


def matrix(seed: int = 0) -> PackedMatrix:
    """16 x 16, a KiB in float32."""
    return pack_bf16(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(TOKENS).logits
    return made


def weights_in(model: nn.Module) -> int:
    """Weights of all packed matrices."""
    return sum(m.rows * m.cols for m in model.modules() if isinstance(m, PackedLinear))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tiny_model("olmoe"), tmp_path_factory.mktemp("cache") / "packed")


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Bytes of the dequantized weights that are still in memory."""
    made: list[weakref.ref[Tensor]] = []
    dequantize = PackedMatrix.dequantize

    def recording(self: PackedMatrix) -> Tensor:
        weight = dequantize(self)
        made.append(weakref.ref(weight))
        return weight

    def n_bytes() -> int:
        alive = [ref() for ref in made]
        return sum(w.numel() * w.element_size() for w in alive if w is not None)

    monkeypatch.setattr(PackedMatrix, "dequantize", recording)
    return n_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [("512MiB", 512 * 2**20), ("1.5GB", 1500000000), ("64 kib", 65536), (4096, 4096), (0, 0)],
)
def test_sizes_are_read(size: str | int, expected: int) -> None:
    assert parse_cache_size(size) == expected


@pytest.mark.parametrize("size", ["", "4", "4bits", "much", "-1MiB", -1, "1MiB/s"])
def test_a_size_that_cannot_be_read_is_refused(size: str | int) -> None:
    with pytest.raises(ConfigError, match="write 512MiB, 2GiB or 500MB"):
        parse_cache_size(size)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_exactly_those_without_it(family: str, tmp_path: Path) -> None:
    model = load(save_packed(tiny_model(family), tmp_path / "packed"))
    expected = logits(model)
    for share in (1.0, 0.3):
        cache = cache_dequantized(model, int(4 * share * weights_in(model)))
        for _ in range(3):
            assert torch.equal(logits(model), expected), share
        assert cache.n_found > 0, share


def test_each_matrix_is_dequantized_once_where_all_fit(packed: Path) -> None:
    model = load(packed)
    cache = cache_dequantized(model, 4 * weights_in(model))
    logits(model)
    n_made = cache.n_made
    assert n_made > 0 and cache.n_found == 0
    logits(model)
    assert cache.n_made == n_made and cache.n_found == n_made


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 1.0])
def test_memory_is_bounded_whatever_the_size(
    share: float, packed: Path, living: Callable[[], int]
) -> None:
    model = load(packed)
    bound = int(4 * share * weights_in(model))
    cache = cache_dequantized(model, bound)
    for _ in range(4):
        logits(model)
        assert living() == cache.n_bytes <= bound
    # A matrix here is at most 4 * 40 * 40 bytes, so that much of the bound can stay unused.
    assert cache.n_bytes >= min(bound, 4 * weights_in(model)) - 6400


def test_a_weight_never_takes_memory_beyond_the_bound_while_it_is_stored(
    living: Callable[[], int],
) -> None:
    cache = DequantCache(2 * KIB)
    for _ in range(4):
        for key in range(5):
            cache.weight(key, matrix(key), torch.float32)
            assert living() == cache.n_bytes <= 2 * KIB


def test_what_is_larger_than_the_bound_is_made_every_time() -> None:
    cache, given = DequantCache(KIB - 1), matrix()
    for _ in range(3):
        assert torch.equal(cache.weight(0, given, torch.float32), given.dequantize())
    assert (cache.n_bytes, cache.n_found, cache.n_made) == (0, 0, 3)


def test_bytes_are_those_of_the_dtype() -> None:
    cache = DequantCache(8 * KIB)
    assert cache.weight(0, matrix(), torch.bfloat16).dtype == torch.bfloat16
    assert cache.n_bytes == KIB // 2
    cache.weight(1, matrix(), torch.float64)
    assert cache.n_bytes == KIB // 2 + 2 * KIB


def test_matrices_used_in_turns_do_not_push_each_other_out() -> None:
    cache, given = DequantCache(3 * KIB), [matrix(i) for i in range(4)]
    for _ in range(10):
        for key, one in enumerate(given):
            cache.weight(key, one, torch.float32)
    # Three of four stay from the first turn on; the least recently used one would always be gone.
    assert (cache.n_found, cache.n_made) == (9 * 3, 3 + 10)


def test_what_is_used_more_replaces_what_is_used_less() -> None:
    cache, rare, common = DequantCache(KIB), matrix(1), matrix(2)
    cache.weight(1, rare, torch.float32)
    for _ in range(4):
        cache.weight(2, common, torch.float32)
    # Made at uses 1 and 2, at 3 it takes the place of the one with a single use, found at 4.
    assert (cache.n_found, cache.n_made) == (1, 4)
    cache.weight(1, rare, torch.float32)
    cache.weight(2, common, torch.float32)
    assert (cache.n_found, cache.n_made) == (2, 5)


def test_what_was_popular_long_ago_makes_room() -> None:
    cache, old, new = DequantCache(KIB), matrix(1), matrix(2)
    for _ in range(100000):
        cache.weight(1, old, torch.float32)
    n_made = cache.n_made
    for _ in range(600):
        cache.weight(2, new, torch.float32)
    assert n_made == 1 and cache.n_made < 400


def test_several_small_weights_leave_for_a_large_one() -> None:
    cache = DequantCache(2 * KIB)
    small = [matrix(1), matrix(2)]
    large = pack_bf16(torch.ones(32, 16))
    for key, one in enumerate(small):
        cache.weight(key, one, torch.float32)
    for _ in range(3):
        cache.weight(9, large, torch.float32)
    assert cache.n_bytes == 2 * KIB
    n_made = cache.n_made
    cache.weight(9, large, torch.float32)
    assert cache.n_made == n_made


def test_a_large_weight_that_finds_no_room_costs_no_small_one() -> None:
    cache, popular, rare, large = DequantCache(2 * KIB), matrix(1), matrix(2), matrix(3)
    large = pack_bf16(torch.ones(32, 16))
    for _ in range(9):
        cache.weight(1, popular, torch.float32)
    cache.weight(2, rare, torch.float32)
    for _ in range(5):
        cache.weight(9, large, torch.float32)
    assert cache.n_bytes == 2 * KIB  # room for it needs the popular one too, so the rare one stays
    n_found = cache.n_found
    cache.weight(2, rare, torch.float32)
    assert cache.n_found == n_found + 1


def write_codes(module: PackedLinear) -> None:
    module.get_buffer("codes").bitwise_xor_(torch.tensor(255, dtype=torch.uint8))


def replace_scales(module: PackedLinear) -> None:
    module.register_buffer("scales", module.get_buffer("scales") * 2)


def load_other_state(module: PackedLinear) -> None:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["scales"] *= 2
    module.load_state_dict(state)


def assign_other_state(module: PackedLinear) -> None:
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["codes"] ^= 255
    module.load_state_dict(state, assign=True)


def first_int4(model: nn.Module) -> PackedLinear:
    found = (m for m in model.modules() if isinstance(m, PackedLinear))
    return next(module for module in found if module.format.kind == "int4")


@pytest.mark.parametrize(
    "change", [write_codes, replace_scales, load_other_state, assign_other_state]
)
@torch.no_grad()
def test_changed_packed_tensors_are_seen(
    change: Callable[[PackedLinear], None], packed: Path
) -> None:
    model = load(packed)
    cache_dequantized(model, "1MiB")
    module = first_int4(model)
    x = torch.randn(3, module.cols)
    before = module(x)
    assert torch.equal(module(x), before)
    change(module)
    assert torch.equal(module(x), x @ module.packed().dequantize().T)
    assert not torch.equal(module(x), before)


def test_an_exchanged_module_is_not_taken_for_the_old_one(packed: Path) -> None:
    # Keys are addresses of modules, which a new module may get again: the tensors decide.
    cache = DequantCache(4 * KIB)
    cache.weight(0, matrix(1), torch.float32)
    assert torch.equal(cache.weight(0, matrix(2), torch.float32), matrix(2).dequantize())


@torch.no_grad()
def test_another_dtype_of_inputs_gets_its_own_weight(packed: Path) -> None:
    model = load(packed)
    module = first_int4(model)
    cache_dequantized(model, "1MiB")
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        x = torch.ones(2, module.cols, dtype=dtype)
        assert torch.equal(module(x), x @ module.packed().dequantize().to(dtype).T)


@torch.no_grad()
def test_moving_the_model_empties_it(packed: Path) -> None:
    model = load(packed)
    cache = cache_dequantized(model, "1MiB")
    logits(model)
    assert cache.n_bytes > 0
    model.to(torch.bfloat16)
    assert cache.n_bytes == 0
    assert torch.equal(logits(model), logits(load(packed).to(torch.bfloat16)))
    model.to("meta")
    assert cache.n_bytes == 0


def test_clearing_forgets_all_weights(packed: Path, living: Callable[[], int]) -> None:
    model = load(packed)
    cache = cache_dequantized(model, "1MiB")
    expected = logits(model)
    cache.clear()
    assert cache.n_bytes == living() == 0
    assert torch.equal(logits(model), expected)


def test_a_model_that_is_gone_leaves_nothing(packed: Path, living: Callable[[], int]) -> None:
    model = load(packed)
    cache_dequantized(model, "1MiB")
    logits(model)
    assert living() > 0
    del model
    gc.collect()
    assert living() == 0


def test_size_zero_turns_it_off_again(packed: Path, living: Callable[[], int]) -> None:
    model = load(packed)
    cache_dequantized(model, "1MiB")
    logits(model)
    cache = cache_dequantized(model, 0)
    assert living() == 0
    logits(model)
    assert (living(), cache.n_made) == (0, 0)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_has_an_empty_one_of_its_own(
    way: Callable[[nn.Module], nn.Module], packed: Path
) -> None:
    module = first_int4(load(packed))
    cache = cache_dequantized(module, "1MiB")
    module(torch.ones(1, module.cols))
    copied = way(module)
    assert isinstance(copied, PackedLinear) and copied.cache is not None
    assert copied.cache is not cache and copied.cache.max_bytes == 2**20
    assert cache.n_bytes > 0 and copied.cache.n_bytes == 0


def test_copied_modules_share_one(packed: Path) -> None:
    model = load(packed)
    cache = cache_dequantized(model, "1MiB")
    copied = [m.cache for m in copy.deepcopy(model).modules() if isinstance(m, PackedLinear)]
    assert len(set(map(id, copied))) == 1 and copied[0] is not cache


def test_weights_kept_in_inference_mode_serve_gradients_later(packed: Path) -> None:
    module = first_int4(load(packed))
    cache = cache_dequantized(module, "1MiB")
    with torch.inference_mode():
        module(torch.ones(1, module.cols))
    x = torch.ones(1, module.cols, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and cache.n_found == 1
    assert torch.equal(x.grad[0], module.packed().dequantize().sum(0))


def test_tensors_of_inference_mode_are_dequantized_every_time() -> None:
    # torch does not count writes to them, so a kept weight could be stale.
    cache = DequantCache(4 * KIB)
    with torch.inference_mode():
        given = matrix()
        before = cache.weight(0, given, torch.float32)
        given.tensors["weight"].mul_(2)
        after = cache.weight(0, given, torch.float32)
    assert torch.equal(after, 2 * before) and cache.n_bytes == 0


def test_a_stale_weight_is_forgotten_also_where_the_new_one_is_not_kept() -> None:
    cache = DequantCache(4 * KIB)
    cache.weight(0, matrix(1), torch.float32)
    with torch.inference_mode():
        cache.weight(0, matrix(2), torch.float32)
    assert cache.n_bytes == 0


def test_threads_may_share_a_model(packed: Path) -> None:
    model = load(packed)
    expected = logits(model)
    bound = int(4 * 0.4 * weights_in(model))
    cache = cache_dequantized(model, bound)
    n_threads = 4
    barrier = threading.Barrier(n_threads, timeout=60)

    def run(_: int) -> list[Tensor]:
        barrier.wait()
        return [logits(model) for _ in range(3)]

    with ThreadPoolExecutor(n_threads) as pool:
        for found in pool.map(run, range(n_threads)):
            assert all(torch.equal(one, expected) for one in found)
    kept = sum(entry.n_bytes for entry in cache._entries.values())
    assert cache.n_bytes == kept <= bound


def test_a_model_without_packed_matrices_is_refused() -> None:
    with pytest.raises(ModelError, match="no packed matrices to keep dequantized"):
        cache_dequantized(tiny_model("olmoe"), "1MiB")


def test_load_keeps_what_it_is_asked_to_keep(tmp_path: Path) -> None:
    path = save_packed(tiny_model("olmoe"), tmp_path / "packed")
    expected = logits(load(path))
    model = load(path, dequant_cache="1MiB")
    caches = {m.cache for m in model.modules() if isinstance(m, PackedLinear)}
    (cache,) = caches
    assert cache is not None and cache.max_bytes == 1024 * KIB
    assert torch.equal(logits(model), expected) and cache.n_bytes > 0
    with pytest.raises(ConfigError, match="much"):
        load(path, dequant_cache="much")
