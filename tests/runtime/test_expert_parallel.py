"""Experts divided among ranks: the ranks' sums are the output of a model that holds them all."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.expert_parallel import keep_rank, owned_experts
from alphaquant.runtime.modules import PackedExperts
from alphaquant.testing.models import tiny_model, tiny_tokens
from alphaquant.testing.packed import save_packed

N_EXPERTS = 8
TOKENS = tiny_tokens(2, 11)


def same(partial_sum: Tensor) -> Tensor:
    return partial_sum


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tiny_model("olmoe"), tmp_path_factory.mktemp("parallel") / "packed")


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


def ranks_of(
    path: Path, n_ranks: int, reduce: Callable[[Tensor], Tensor] = same
) -> list[nn.Module]:
    model = load(path)
    models = [copy.deepcopy(model) for _ in range(n_ranks)]
    for rank, model in enumerate(models):
        keep_rank(model, rank, n_ranks, reduce)
    return models


@pytest.mark.parametrize(
    ("n_experts", "n_ranks", "expected"),
    [
        pytest.param(8, 2, [range(0, 4), range(4, 8)], id="halves"),
        pytest.param(8, 3, [range(0, 2), range(2, 5), range(5, 8)], id="uneven"),
        pytest.param(4, 1, [range(0, 4)], id="one rank"),
        pytest.param(2, 3, [range(0, 0), range(0, 1), range(1, 2)], id="more ranks than experts"),
    ],
)
def test_ranks_hold_contiguous_parts_that_cover_all_experts(
    n_experts: int, n_ranks: int, expected: list[range]
) -> None:
    assert [owned_experts(n_experts, rank, n_ranks) for rank in range(n_ranks)] == expected


@pytest.mark.parametrize(("rank", "n_ranks"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_refused(rank: int, n_ranks: int) -> None:
    with pytest.raises(ModelError, match=f"no rank {rank} of {n_ranks}"):
        owned_experts(8, rank, n_ranks)


def routings() -> dict[str, Tensor]:
    """Expert ids, int64 [n, 3], for 8 experts."""
    mixed = torch.rand(13, N_EXPERTS, generator=torch.Generator().manual_seed(1)).topk(3).indices
    padded = mixed.clone()
    padded[::2, 1] = N_EXPERTS  # the first id that is padding
    padded[3] = N_EXPERTS + 5
    return {
        "mixed": mixed,
        "one token": mixed[:1],
        "no token": mixed[:0],
        "all on one rank": torch.tensor([[0, 1, 2]] * 5),
        "padded": padded,
    }


@pytest.mark.parametrize("n_ranks", [2, 3, 8, 9])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@torch.no_grad()
def test_sums_of_the_ranks_are_the_output_of_all_experts(
    family: str, n_ranks: int, tmp_path: Path
) -> None:
    # gpt-oss has biases per expert, which must be added once and not once per rank.
    changes = {"num_local_experts": N_EXPERTS} if family == "gpt_oss" else {}
    path = save_packed(tiny_model(family, **changes), tmp_path / "packed")
    whole = experts_of(load(path).double())
    ranks = [experts_of(model.double()) for model in ranks_of(path, n_ranks)]
    for ids in routings().values():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(len(ids), 40, generator=generator, dtype=torch.float64)
        weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        for layer, experts in enumerate(whole):
            expected = experts(x, ids, weights)
            found = torch.stack([rank[layer](x, ids, weights) for rank in ranks]).sum(0)
            # Sums of at most 3 outputs in another order: rounding of float64, 2^-53 of each. The
            # sum of all outputs is far above any of them.
            tolerance = 2**-50 * float(expected.abs().sum())
            assert torch.allclose(found, expected, rtol=0, atol=tolerance)
            assert bool(expected.any()) == bool((ids < N_EXPERTS).any())


@torch.no_grad()
def test_a_token_whose_experts_are_on_one_rank_is_exactly_that_ranks(packed: Path) -> None:
    whole, ranks = experts_of(load(packed))[0], ranks_of(packed, 2)
    first, second = (experts_of(model)[0] for model in ranks)
    x, ids = torch.randn(3, 40), torch.tensor([[0, 1, 3]] * 3)
    weights = torch.rand(3, 3)
    assert torch.equal(first(x, ids, weights), whole(x, ids, weights))
    assert not second(x, ids, weights).any()


@torch.no_grad()
def test_padding_adds_nothing(packed: Path) -> None:
    experts = experts_of(load(packed))[0]
    x, weights = torch.randn(4, 40), torch.rand(4, 3)
    ids = torch.tensor([[0, 1, 2]] * 4)
    padded = torch.cat([ids, torch.full((4, 2), N_EXPERTS)], 1)
    more = torch.cat([weights, torch.ones(4, 2)], 1)
    assert torch.equal(experts(x, padded, more), experts(x, ids, weights))
    assert not experts(x, torch.full((4, 3), N_EXPERTS), weights).any()


class Ranks:
    """As many threads as ranks; `reduce` waits for all of them and gives each the sum."""

    def __init__(self, n_ranks: int) -> None:
        self.barrier = threading.Barrier(n_ranks, timeout=60)
        self.partials: dict[int, Tensor] = {}

    def reduce(self, rank: int, partial_sum: Tensor) -> Tensor:
        self.partials[rank] = partial_sum
        self.barrier.wait()
        total = torch.stack([self.partials[r] for r in range(self.barrier.parties)]).sum(0)
        self.barrier.wait()
        return total


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_ranks_of_a_whole_model_all_give_its_logits(family: str, tmp_path: Path) -> None:
    n_ranks = 3
    path = save_packed(tiny_model(family), tmp_path / "packed")
    ranks, models = Ranks(n_ranks), [load(path) for _ in range(n_ranks)]
    for rank, model in enumerate(models):
        keep_rank(model, rank, n_ranks, partial(ranks.reduce, rank))

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(TOKENS).logits
        return logits

    expected = run(load(path))
    with ThreadPoolExecutor(n_ranks) as pool:
        found = list(pool.map(run, models))
    for logits in found:
        assert torch.equal(logits, found[0])
        # Two layers of float32 sums in another order, 2^-24 each, on logits of a common size.
        assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.std())


def test_a_rank_keeps_its_own_experts_bytes_only(packed: Path) -> None:
    whole = load(packed)
    expected = {name for name in whole.state_dict() if ".experts." in name}
    found: set[str] = set()
    for rank, model in enumerate(ranks_of(packed, 2)):
        names = {name for name in model.state_dict() if ".experts." in name}
        owned = range(4 * rank, 4 * rank + 4)
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in names} == set(owned)
        assert not names & found
        found |= names
        for experts in experts_of(model):
            assert experts.owned == owned and experts.num_experts == N_EXPERTS
    assert found == expected


@torch.no_grad()
def test_a_rank_without_a_token_still_takes_part_in_the_sum(packed: Path) -> None:
    seen: list[Tensor] = []

    def reduce(partial_sum: Tensor) -> Tensor:
        seen.append(partial_sum)
        return partial_sum + 1

    experts = experts_of(ranks_of(packed, 2, reduce)[1])[0]
    output = experts(torch.randn(2, 40), torch.tensor([[0, 1, 2]] * 2), torch.rand(2, 3))
    assert len(seen) == 1 and not seen[0].any() and torch.equal(output, torch.ones(2, 40))


def test_a_rank_is_not_divided_again(packed: Path) -> None:
    model = ranks_of(packed, 2)[0]
    before = set(model.state_dict())
    with pytest.raises(ModelError, match="holds 4 of its 8 experts only; load the checkpoint"):
        keep_rank(model, 0, 2, same)
    assert set(model.state_dict()) == before


def test_a_rank_that_does_not_exist_leaves_the_model_as_it_is(packed: Path) -> None:
    model = load(packed)
    before = set(model.state_dict())
    with pytest.raises(ModelError, match="no rank 2 of 2"):
        keep_rank(model, 2, 2, same)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("family", ["llama", "listed_moe"])
def test_a_model_without_a_module_of_packed_experts_is_refused(
    family: str, tmp_path: Path
) -> None:
    model = load(save_packed(tiny_model(family), tmp_path / "packed"))
    with pytest.raises(ModelError, match="no packed experts to divide among ranks"):
        keep_rank(model, 0, 2, same)


def test_an_unpacked_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no packed experts to divide among ranks"):
        keep_rank(tiny_model("olmoe"), 0, 2, same)


def test_a_saved_rank_is_not_taken_for_a_whole_checkpoint(packed: Path, tmp_path: Path) -> None:
    model = ranks_of(packed, 2)[0]
    model.save_pretrained(tmp_path / "rank")  # type: ignore[operator]
    with pytest.raises(StoreError, match="places stay empty"):
        load(tmp_path / "rank")
