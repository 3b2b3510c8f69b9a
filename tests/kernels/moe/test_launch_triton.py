"""The grouped MoE kernels against dense experts in float32: mixed formats, ids, sizes, types.

Without a GPU they run in Triton's interpreter, where they unpack without PTX; with one, the same
tests run on it. What sm_90 gets is compiled in a process of its own, because the interpreter
replaces the compiler where it is on. Run as a program, this file prints what the compiler makes:

    python tests/kernels/moe/test_launch_triton.py 16 64 int4-g128 mxfp4
"""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.moe.config import GroupedConfig, stages_of, warps_of
from alphaquant.kernels.moe.plan import ExpertWeights, GroupedExperts, stack_experts
from alphaquant.kernels.moe.slots import order_rows, sort_slots
from alphaquant.kernels.order import TILE_COLS, KernelWeight, order_bfloat16
from alphaquant.kernels.parts import put_together, take_apart
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights
from alphaquant.testing.machine_code import (
    Launched,
    claimed_gpu,
    main_loop_of,
    registers_of,
    spilled_bytes_of,
)
from tests.interpreted import DEVICE, import_kernels

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")


MIXED = (  # gate and up, down: every expert another pair, and some formats several times
    *(("int2-g64", "int8-row"), ("int2-g32-asym", "mxfp4"), ("int3-g128", "int2-g64-asym")),
    *(("int3-g64-asym", "nvfp4"), ("int4-g128", "int3-g64"), ("int4-g64-asym", "fp8-e4m3-row")),
    *(("int8-row", "int4-g32"), ("int8-g64-asym", "int4-g128"), ("mxfp4", "int8-g128-asym")),
    *(("fp8-e4m3-row", "int4-g128-asym"), ("nvfp4", "int3-g128-asym")),
    *(("bf16", "bf16"), ("int3-g32-s256", "nl4-g32-s256"), ("nl2-g64", "int4-g16-s256")),
    ("nl3-g64", "nl2-g16-s256"),
    # no new formats from here on
    *(("int4-g128", "nvfp4"), ("nvfp4", "int2-g64"), ("int2-g64", "nvfp4")),
)

NEVER = 1 << 30
# Of the largest output. Where a type is narrow, a scale or a scaled weight, the gated row, the
# weighted output and the sum are each rounded once: 4 half units, twice that with second orders.
# In float32 what differs is the order of sums.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_kernels("moe.launch_triton")


@dataclass(frozen=True)
class Layer:
    """Experts, and what their matrices stand for."""

    experts: tuple[ExpertWeights, ...]
    dense: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def stacked(self, owned: range | None = None) -> GroupedExperts:
        owned = range(len(self.experts)) if owned is None else owned
        return stack_experts([self.experts[e] for e in owned], owned.start)

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One slot after the other, float32; ids of no expert add nothing."""
        wide = x.to(torch.float32)
        out = torch.zeros_like(wide)
        for token, chosen in enumerate(ids.tolist()):
            for j, expert in enumerate(chosen):
                if 0 <= expert < len(self.dense):
                    gate, up, down = self.dense[expert]
                    gated = torch.nn.functional.silu(gate @ wide[token]) * (up @ wide[token])
                    out[token] += weights[token, j].to(torch.float32) * (down @ gated)
        return out


def draw(name: str, rows: int, cols: int, seed: int) -> KernelWeight:
    # Wider than those of a model, so that gates bend.
    weight = 10 * draw_weights(rows, cols, seed)[None]
    if name == "bf16":
        return order_bfloat16(weight[0].bfloat16()).to(DEVICE)
    rounded = quantize_rtn(weight, parse_format(name), "minmax")
    return order_matrix(rounded.pack(0, slice(None))).to(DEVICE)


def draw_layer(names: Sequence[tuple[str, str]], hidden: int, width: int) -> Layer:
    experts = tuple(
        ExpertWeights(
            draw(gate_up, width, hidden, 3 * e),
            draw(gate_up, width, hidden, 3 * e + 1),
            draw(down, hidden, width, 3 * e + 2),
        )
        for e, (gate_up, down) in enumerate(names)
    )
    return layer_of(experts)


def layer_of(experts: tuple[ExpertWeights, ...]) -> Layer:
    dense = tuple(
        (reference.dequantize(e.gate), reference.dequantize(e.up), reference.dequantize(e.down))
        for e in experts
    )
    return Layer(experts, dense)


@pytest.fixture(scope="module")
def mixed() -> Layer:
    """H = 200 and I = 72: both end within a tile, and I within a block of 32 or 64 rows."""
    return draw_layer(MIXED, hidden=200, width=72)


@pytest.fixture(scope="module")
def small() -> Layer:
    names = (("nvfp4", "int4-g64"), ("int4-g64", "nvfp4"), ("nvfp4", "int4-g64"))
    return draw_layer(names, hidden=128, width=72)


@pytest.fixture(scope="module")
def apart() -> Layer:
    """H = 264 and I = 136; gate and up have one format in the last expert only."""
    names = (("nvfp4", "int4-g64", "mxfp4"), ("int4-g64", "int3-g128-asym", "mxfp4"))
    names += (("int2-g64-asym", "bf16", "int8-row"), ("nvfp4", "nvfp4", "int8-row"))
    experts = tuple(
        ExpertWeights(
            draw(gate, 136, 264, 3 * e), draw(up, 136, 264, 3 * e + 1), draw(down, 264, 136, 3 * e)
        )
        for e, (gate, up, down) in enumerate(names)
    )
    return layer_of(experts)


@pytest.fixture(scope="module")
def long() -> Layer:
    """H = 264 and I = 136: three and two tiles, the last ones with tails."""
    names = (("nvfp4", "int4-g64"), ("int4-g128-asym", "nvfp4"))
    return draw_layer(names, hidden=264, width=136)


def draw_tokens(ids: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Activations and routing weights for the ids, float32."""
    generator = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids), hidden, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    return x.to(DEVICE), weights.to(DEVICE)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    error = float((found.to(torch.float32) - expected).abs().max())
    assert error <= TOLERANCES[dtype] * float(expected.abs().max())


def test_mixed_experts_give_what_dense_ones_give(kernels: ModuleType, mixed: Layer) -> None:
    ids = torch.arange(len(MIXED), device=DEVICE).reshape(-1, 3)  # every expert is chosen
    x, weights = draw_tokens(ids, 200)
    x = x.to(torch.float16)
    found = kernels.grouped_moe(x, ids, weights, mixed.stacked(), config=GroupedConfig(16, 128))
    assert_near(found, mixed.expected(x, ids, weights), torch.float16)


@pytest.mark.parametrize(("gate_up", "down"), MIXED[:12], ids=lambda name: str(name))
def test_an_expert_alone_gives_what_it_gives_dense(
    kernels: ModuleType, mixed: Layer, gate_up: str, down: str
) -> None:
    """A wrong expert would hide in the tolerance of the sum over all; here it cannot."""
    expert = MIXED.index((gate_up, down))
    ids = torch.tensor([[expert]], device=DEVICE)
    x, weights = draw_tokens(ids, 200)
    stacked = mixed.stacked(range(expert, expert + 1))
    for dense_slots in (NEVER, 0):
        found = kernels.grouped_moe(x, ids, weights, stacked, dense_slots=dense_slots)
        assert_near(found, mixed.expected(x, ids, weights), torch.float32)


@pytest.mark.parametrize("dense_slots", [NEVER, 0], ids=["packed", "dense"])
@pytest.mark.parametrize(
    ("purpose", "ids"),
    [
        ("one token, one choice", [[2]]),
        ("all tokens to the same two experts, more than a block", [[0, 2]] * 17),
        (
            "twice to one expert, padding, negative ids, a token with nothing else",
            [[1, 1], [3, 1], [0, 99], [-1, 1], [3, 3], [1, 0]],
        ),
        ("nothing but padding", [[7], [3]]),
    ],
)
def test_any_routing_gives_what_dense_experts_give(
    kernels: ModuleType, small: Layer, purpose: str, ids: list[list[int]], dense_slots: int
) -> None:
    chosen = torch.tensor(ids, device=DEVICE)
    x, weights = draw_tokens(chosen, 128)
    expected = small.expected(x, chosen, weights)
    weights[(chosen < 0) | (chosen >= 3)] = torch.nan  # never to be read
    with uninitialized_memory_is_nan():
        found = kernels.grouped_moe(x, chosen, weights, small.stacked(), dense_slots=dense_slots)
    assert_near(found, expected, torch.float32)
    nothing = ((chosen < 0) | (chosen >= 3)).all(1)
    assert torch.equal(found[nothing], torch.zeros_like(found[nothing])), purpose


def uninitialized_memory_is_nan() -> Any:
    """Make torch fill what kernels have to write."""
    make = Tensor.new_empty

    def make_nan(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = make(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return mock.patch.object(Tensor, "new_empty", make_nan)


@pytest.mark.parametrize(
    "config",
    [GroupedConfig(32, 64, n_splits=3), GroupedConfig(64, 128, n_warps=8, n_splits=2)],
    ids=["three splits", "two splits"],
)
def test_splits_add_up_to_the_whole_and_always_to_the_same_bits(
    kernels: ModuleType, long: Layer, config: GroupedConfig
) -> None:
    ids = torch.tensor([[0, 1], [9, 0], [-1, 1]], device=DEVICE)
    x, weights = draw_tokens(ids, 264)
    with uninitialized_memory_is_nan():
        found = kernels.grouped_moe(x, ids, weights, long.stacked(), config=config)
    assert_near(found, long.expected(x, ids, weights), torch.float32)
    again = kernels.grouped_moe(x, ids, weights, long.stacked(), config=config)
    assert torch.equal(again, found)


@pytest.mark.parametrize(
    "options",
    [{}, {"config": GroupedConfig(32, 64, n_splits=3)}, {"dense_slots": 0}],
    ids=["default", "three splits", "dense"],
)
def test_gate_and_up_may_have_formats_of_their_own(
    kernels: ModuleType, apart: Layer, options: Any
) -> None:
    ids = torch.tensor([[0, 1], [9, 2], [3, 0], [-1, -1], [1, 3]], device=DEVICE)
    x, weights = draw_tokens(ids, 264)
    stacked = apart.stacked()
    with uninitialized_memory_is_nan():
        found = kernels.grouped_moe(x, ids, weights, stacked, **options)
    assert_near(found, apart.expected(x, ids, weights), torch.float32)
    if DEVICE == "cuda":  # the interpreter runs one program after the other
        assert torch.equal(kernels.grouped_moe(x, ids, weights, stacked, **options), found)
    assert len(stacked.gate_up) == 2 and len(apart.stacked(range(3, 4)).gate_up) == 1


def test_parts_of_ranks_add_up_to_the_whole(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 3]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    ranks = [small.stacked(owned) for owned in (range(0, 1), range(1, 3))]
    for dense_slots in (NEVER, 0):
        parts = [kernels.grouped_moe(x, ids, weights, r, dense_slots=dense_slots) for r in ranks]
        assert all(bool(part.any()) for part in parts)
        assert_near(parts[0] + parts[1], small.expected(x, ids, weights), torch.float32)


@pytest.mark.parametrize("dense_slots", [NEVER, 0], ids=["packed", "dense"])
def test_ids_and_weights_of_other_types_give_the_same(
    kernels: ModuleType, small: Layer, dense_slots: int
) -> None:
    ids = torch.tensor([[0, 1], [2, 9]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    half, stacked, options = weights.bfloat16(), small.stacked(), {"dense_slots": dense_slots}
    found = kernels.grouped_moe(x, ids.to(torch.int32), half, stacked, **options)
    assert torch.equal(found, kernels.grouped_moe(x, ids, half.float(), stacked, **options))


def test_activations_and_choices_need_not_be_contiguous(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 2, 1], [1, 0, 9]], device=DEVICE).T
    x, weights = draw_tokens(ids, 128)
    strided, turned = x.T.contiguous().T, weights.T.contiguous().T
    found = kernels.grouped_moe(strided, ids, turned, small.stacked())
    assert_near(found, small.expected(x, ids, weights), torch.float32)


def test_gates_far_from_zero_stay_finite(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 1], [2, 0]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    x *= 1000
    expected = small.expected(x, ids, weights)
    assert float(small.dense[0][0].matmul(x[0]).min()) < -1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kernels.grouped_moe(x, ids, weights, small.stacked())
    assert_near(found, expected, torch.float32)


@pytest.mark.parametrize(
    ("purpose", "dtype", "capability", "hidden", "is_dense"),
    [
        ("H100, H200", torch.bfloat16, (9, 0), 128, True),
        ("B200", torch.bfloat16, (10, 0), 128, True),
        ("elsewhere torch waits for the device", torch.bfloat16, (8, 0), 128, False),
        ("elsewhere torch waits for the device", torch.bfloat16, (12, 0), 128, False),
        ("as it does in other types", torch.float16, (9, 0), 128, False),
        ("as it does in other types", torch.float32, (9, 0), 128, False),
        ("rows of 264 bytes", torch.bfloat16, (9, 0), 132, False),
        ("tests", torch.float32, None, 132, True),
        ("rows of 520 bytes", torch.float32, None, 130, False),
        ("no CPU in 16 bits", torch.bfloat16, None, 128, False),
    ],
)
def test_the_dense_path_is_for_types_that_torch_multiplies_without_waiting(
    kernels: ModuleType,
    small: Layer,
    purpose: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    hidden: int,
    is_dense: bool,
) -> None:
    experts = replace(small.stacked(), hidden=hidden)
    x = mock.Mock(is_cuda=capability is not None, dtype=dtype, device=torch.device("cpu"))
    x.element_size.return_value = dtype.itemsize
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        assert kernels.can_multiply_dense(x, experts) == is_dense, purpose
        narrow = replace(experts, width=71)
        assert not kernels.can_multiply_dense(x, narrow)


@pytest.mark.parametrize(
    ("dense_slots", "dtype", "is_dense"),
    [(4, torch.bfloat16, True), (5, torch.bfloat16, False), (4, torch.float16, False)],
)
def test_the_dense_path_is_taken_from_an_average_of_slots_per_expert_on(
    kernels: ModuleType, small: Layer, dense_slots: int, dtype: torch.dtype, is_dense: bool
) -> None:
    ids = torch.tensor([[0, 1]] * 6, device=DEVICE)  # four slots for each of three experts
    x, weights = draw_tokens(ids, 128)
    x, stacked = x.to(dtype), small.stacked()
    with mock.patch.object(kernels, "multiply_dense", wraps=kernels.multiply_dense) as dense:
        found = kernels.grouped_moe(x, ids, weights, stacked, dense_slots=dense_slots)
    assert dense.called == is_dense
    assert_near(found, small.expected(x, ids, weights), dtype)


@pytest.mark.parametrize("name", ["long", "apart"])
@pytest.mark.parametrize(
    "options",
    [{}, {"config": GroupedConfig(32, 64, n_splits=2)}, {"dense_slots": 0}],
    ids=["default", "two splits", "dense"],
)
def test_no_path_looks_at_a_value(
    kernels: ModuleType, name: str, options: Any, request: pytest.FixtureRequest
) -> None:
    """Meta tensors have shapes and no values: whatever would wait for the device fails."""
    layer: Layer = request.getfixturevalue(name)
    tensors, facts = take_apart(layer.stacked())
    experts = put_together([t.to("meta") for t in tensors], facts)
    ids = torch.zeros(6, 2, dtype=torch.int64, device="meta")
    x = torch.zeros(6, 264, device="meta", dtype=torch.bfloat16)
    with contextlib.ExitStack() as patches:
        launched = patch_launches(patches)
        patches.enter_context(mock.patch.object(kernels, "IS_INTERPRETED", False))
        served = mock.patch.object(kernels, "can_multiply_dense", lambda *_: True)
        patches.enter_context(served)
        found = kernels.grouped_moe(x, ids, ids.float(), experts, **options)
    assert (found.shape, found.device.type, found.dtype) == (x.shape, "meta", x.dtype)
    names = {name for name, kernel in launched.items() if kernel.mock_calls}
    rows = {"gather_rows_kernel", "gate_kernel", "weigh_kernel", "dequantize_kernel"}
    products = {"plan_slots_kernel", "gate_up_kernel", "down_kernel"}
    is_apart = name == "apart"
    if "dense_slots" in options:
        assert names == (rows - {"gate_kernel"} if is_apart else rows) | {"add_slots_kernel"}
    else:
        launch = launched["plan_slots_kernel"].__getitem__.return_value
        blocks = (32 if "config" in options else 16,) * (3 if is_apart else 2)
        assert launch.call_args.args[6] == blocks
        gating = {"gate_kernel"} if "config" in options or is_apart else set()
        assert names == products | gating | {"add_slots_kernel"}


def patch_launches(patches: contextlib.ExitStack) -> dict[str, Any]:
    """Replace all kernels by ones that do nothing but count."""
    rows = importlib.import_module("alphaquant.kernels.moe.rows_triton")
    linear = importlib.import_module("alphaquant.kernels.linear.product_triton")
    planner = importlib.import_module("alphaquant.kernels.moe.slots_triton")
    products = importlib.import_module("alphaquant.kernels.moe.products_triton")
    owners = {"gate_up_kernel": products, "down_kernel": products, "dequantize_kernel": linear}
    owners |= {"plan_slots_kernel": planner}
    names = ("gather_rows_kernel", "gate_kernel", "weigh_kernel", "add_slots_kernel")
    owners |= dict.fromkeys(names, rows)
    return {
        name: patches.enter_context(mock.patch.object(owner, name, mock.MagicMock()))
        for name, owner in owners.items()
    }


def test_no_tokens_give_none(kernels: ModuleType, small: Layer) -> None:
    ids = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    assert kernels.grouped_moe(x, ids, weights, small.stacked()).shape == (0, 128)


def test_arguments_that_do_not_fit_are_refused(kernels: ModuleType, small: Layer) -> None:
    ids = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    stacked = small.stacked()
    for bad in (x[:, :127], x[0], x.double()):
        with pytest.raises(FormatError, match=r"take \[tokens, 128\]"):
            kernels.grouped_moe(bad, ids, weights, stacked)
    for bad_ids, bad_weights in ((ids[:2], weights[:2]), (ids, weights[:, :1]), (ids[:, 0],) * 2):
        with pytest.raises(FormatError, match="3 tokens"):
            kernels.grouped_moe(x, bad_ids, bad_weights, stacked)


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a kernel for sm_90; the loop is the one over tiles of columns.

    Attributes:
        kernel: its name.
        format: of its matrix.
        weights_from_registers: whether every product is wgmma with weights from registers.
        registers: per thread.
        spilled_bytes: of stack per thread.
        shared_bytes: of shared memory per program.
        instructions_per_weight: of all lanes, in the loop.
        stores_in_loop: to shared memory, other than asynchronous copies of what is loaded.
        spills_in_loop: to or from local memory.
        moves_before_gating: exchanges between lanes after the loop, before gate and up are parted.
    """

    kernel: str
    format: str
    weights_from_registers: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions_per_weight: float
    stores_in_loop: int
    spills_in_loop: int
    moves_before_gating: int


PRODUCTS = ("gate_up_kernel", "down_kernel")
COMPILED = ("int3-g128-asym", "int4-g128", "mxfp4")


def run_apart(folder: Path, *arguments: str) -> list[Figures]:
    """What this file prints for arguments, in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Figures(**json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block_slots", "block_rows", "most_registers"),
    [
        (16, 64, 128),  # four programs per multiprocessor
        (16, 128, 168),  # three
        (64, 128, 255),
    ],
)
def test_sm_90_multiplies_weights_from_registers(
    tmp_path: Path, block_slots: int, block_rows: int, most_registers: int
) -> None:
    figures = run_apart(tmp_path, str(block_slots), str(block_rows), *COMPILED)
    kernels = ("gate_up_kernel", "gate_up_kernel, split", "down_kernel")
    assert [(f.format, f.kernel) for f in figures] == [(n, k) for n in COMPILED for k in kernels]
    for found in figures:
        assert found.weights_from_registers, found
        assert found.spilled_bytes == found.spills_in_loop == 0, found
        # Scales and zero points are turned in shared memory; weights would be 8 or more.
        assert found.stores_in_loop <= 2, found
        assert found.moves_before_gating == 0, found
        assert found.registers <= most_registers, found


@pytest.mark.slow
def test_sm_90_takes_the_kernels_between_the_products(tmp_path: Path) -> None:
    assert run_apart(tmp_path, "rows") == []


def figures_of(launch: Launched, name: str, config: GroupedConfig) -> Figures:
    binary, loop = launch.binary, main_loop_of(launch.binary)
    products = [op for op in loop if "GMMA" in op]
    after_loop = binary.asm["ttgir"].rpartition("scf.yield")[2]
    before_gating, parts, _ = after_loop.partition("tt.split")
    n_weights = config.block_rows * TILE_COLS
    return Figures(
        kernel=launch.kernel + (", split" if config.n_splits > 1 else ""),
        format=name,
        weights_from_registers=all(re.search(r"GMMA\S* R\d+, R\d+, gd", op) for op in products),
        registers=registers_of(binary),
        spilled_bytes=spilled_bytes_of(binary),
        shared_bytes=binary.metadata.shared,
        instructions_per_weight=round(len(loop) * 32 * config.n_warps / n_weights, 2),
        stores_in_loop=sum(op.startswith("STS") for op in loop),
        spills_in_loop=sum(op.startswith(("STL", "LDL")) for op in loop),
        moves_before_gating=before_gating.count("convert_layout") if parts else 0,
    )


def compile_row_kernels() -> None:
    """The kernels between the products: that they compile is all there is to see."""
    rows = importlib.import_module("alphaquant.kernels.moe.rows_triton")
    ids = torch.tensor([[0, 1], [1, 0]])
    experts = stack_experts([ExpertWeights(*(draw("int4-g128", 128, 128, 0),) * 3)] * 2)
    order = sort_slots(ids, 2)
    table = order_rows(order, experts.down.formats)
    both, one = (torch.zeros(1, 4, n, dtype=torch.bfloat16) for n in (256, 128))
    with claimed_gpu() as launched:
        rows.gather_rows(one[0], table.positions, table, 0)
        rows.gate_rows(both, one[0], table, 0)
        rows.gate_parts(both.float(), one[0], order)
        rows.weigh_rows(one[0], one[0], torch.zeros(2, 2), order.slots, table, 0)
        for parts in (one, one.float()):
            rows.add_slots(parts, ids, experts, torch.bfloat16)
    assert all(launch.is_new for launch in launched) and len(launched) == 6


def main(block_slots: int, block_rows: int, names: Sequence[str]) -> None:
    """Print the figures of the products for each format, a line of JSON each."""
    grouped = importlib.import_module("alphaquant.kernels.moe.launch_triton")
    x, ids = torch.zeros(2, 256, dtype=torch.bfloat16), torch.zeros(2, 2, dtype=torch.int64)
    for name in names:
        gate, down = draw(name, 128, 256, 0), draw(name, 256, 128, 0)
        stacked, figures = stack_experts([ExpertWeights(gate, gate, down)]), []
        n_warps = warps_of(gate.scales.shape[2], block_slots, block_rows)
        for n_splits in (1, 2):
            sizes = (block_slots, block_rows, n_warps, stages_of(gate.element), n_splits)
            config = GroupedConfig(*sizes)
            with claimed_gpu() as launched:
                grouped.grouped_moe(x, ids, x[:, :2], stacked, config=config)
            products = [own for own in launched if own.kernel in PRODUCTS]
            figures += [figures_of(own, name, config) for own in products]
        gate_up, one_down, split, _ = figures
        for found in (gate_up, split, one_down):
            print(json.dumps(vars(found)))


if __name__ == "__main__":
    if sys.argv[1] == "rows":
        compile_row_kernels()
    else:
        main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
