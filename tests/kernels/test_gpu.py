"""The kernels on a GPU, where they unpack with PTX: numbers, CUDA graphs, no waiting for it.

None of this has run yet: the project has had no GPU. `pytest -m gpu tests/kernels/test_gpu.py`.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.kernels import reference
from alphaquant.kernels.moe.config import GroupedConfig
from alphaquant.kernels.moe.plan import ExpertWeights, GroupedExperts, stack_experts
from alphaquant.kernels.order import KernelWeight
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import FORMATS, Case, check_product, pack_drawn

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CASES = (
    Case("odd sizes, a tail group", 130, 171, 3),
    Case("several tiles, split columns, a full block", 256, 1408, 16),
    Case("many tokens, blocks of 64", 384, 512, 80),
)
DTYPES = (torch.float16, torch.bfloat16)
EXPERT_FORMATS = ("int4-g128", "int2-g128", "mxfp4", "int8-g128-asym")
HIDDEN, WIDTH, N_EXPERTS, N_CHOICES = 256, 192, 8, 2


@pytest.fixture(scope="module")
def linear() -> ModuleType:
    module = importlib.import_module("alphaquant.kernels.linear.product_triton")
    assert not module.IS_INTERPRETED
    return module


@pytest.fixture(scope="module")
def grouped() -> ModuleType:
    return importlib.import_module("alphaquant.kernels.moe.launch_triton")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn(name: str, rows: int, cols: int) -> KernelWeight:
    return order_matrix(pack_drawn(name, rows, cols)).to("cuda")


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).cuda()


def packed_only(linear: ModuleType) -> Any:
    """The packed kernel, whatever a table says about dequantizing."""
    return lambda x, weight: linear.packed_linear(x, weight, dense_rows=len(x) + 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.purpose)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_reference(
    linear: ModuleType, name: str, dtype: torch.dtype, case: Case
) -> None:
    check_product(packed_only(linear), name, case, dtype, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.purpose)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_ptx_and_triton_unpack_the_same(
    linear: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    case: Case,
) -> None:
    weight = drawn(name, case.rows, case.cols)
    if not linear.can_use_asm(weight.words):
        pytest.skip("this device has no PTX bodies")
    matrix = linear.dequantize_packed(weight, dtype)
    assert torch.equal(matrix, reference.dequantize(weight).to(dtype))
    monkeypatch.setattr(linear, "can_use_asm", lambda x: False)
    assert torch.equal(linear.dequantize_packed(weight, dtype), matrix)
    check_product(packed_only(linear), name, case, dtype, "cuda")


@pytest.mark.parametrize("dense_rows", [1, 1000], ids=["dequantized", "packed"])
@pytest.mark.parametrize("name", ["int3-g128", "int4-g32-asym", "nvfp4"])
def test_a_replayed_graph_multiplies_what_x_holds_then(
    linear: ModuleType, name: str, dense_rows: int
) -> None:
    weight, x = drawn(name, 256, 1408), draw((3, 1408), 0)

    def run() -> Tensor:
        return linear.packed_linear(x, weight, dense_rows=dense_rows)

    graph, out = capture(run)
    for seed in (1, 2):
        x.copy_(draw((3, 1408), seed))
        graph.replay()
        assert torch.equal(out, run()), seed
    assert bool((out != 0).any())


def stacked_experts(*, is_apart: bool = False) -> GroupedExperts:
    """Experts of different formats, on the device; gate and up too if they are apart."""
    experts = []
    for number in range(N_EXPERTS):
        name, down, other = (EXPERT_FORMATS[(number + i) % len(EXPERT_FORMATS)] for i in range(3))
        gate = drawn(name, WIDTH, HIDDEN)
        up = drawn(other, WIDTH, HIDDEN) if is_apart else gate
        experts.append(ExpertWeights(gate, up, drawn(down, HIDDEN, WIDTH)))
    return stack_experts(experts)


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "three splits": {"config": GroupedConfig(16, 64, n_splits=3)},
    "dense": {"dense_slots": 0},
}
every_way = pytest.mark.parametrize("way", WAYS)
apart_or_not = pytest.mark.parametrize("is_apart", [False, True], ids=["together", "apart"])


def draw_routing(n_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights bfloat16, [n, k]."""
    generator = torch.Generator().manual_seed(seed)
    best = torch.rand(n_tokens, N_EXPERTS, generator=generator).topk(N_CHOICES)
    return best.indices.cuda(), best.values.to(torch.bfloat16).cuda()


@every_way
@apart_or_not
@pytest.mark.parametrize("n_tokens", [1, 17, 300])
def test_a_replayed_graph_routes_as_ids_are_then(
    grouped: ModuleType, n_tokens: int, is_apart: bool, way: str
) -> None:
    experts, x = stacked_experts(is_apart=is_apart), draw((n_tokens, HIDDEN), 0)
    ids, weights = draw_routing(n_tokens, 0)

    def run() -> Tensor:
        return grouped.grouped_moe(x, ids, weights, experts, **WAYS[way])

    graph, out = capture(run)
    all_to_one = (torch.full_like(ids, 3), weights)
    for seed, routing in enumerate((draw_routing(n_tokens, 1), all_to_one)):
        x.copy_(draw((n_tokens, HIDDEN), seed + 1))
        ids.copy_(routing[0])
        weights.copy_(routing[1])
        graph.replay()
        assert torch.equal(out, run()), seed
    assert bool((out != 0).any())


@every_way
@apart_or_not
@pytest.mark.parametrize("n_tokens", [1, 300])
def test_routing_does_not_wait_for_the_device(
    grouped: ModuleType, n_tokens: int, is_apart: bool, way: str
) -> None:
    experts, x = stacked_experts(is_apart=is_apart), draw((n_tokens, HIDDEN), 0)
    ids, weights = draw_routing(n_tokens, 0)
    expected = grouped.grouped_moe(x, ids, weights, experts, **WAYS[way])  # compiles
    with no_waiting():
        found = grouped.grouped_moe(x, ids, weights, experts, **WAYS[way])
    assert torch.equal(found, expected)


@apart_or_not
def test_all_ways_of_running_experts_agree(grouped: ModuleType, is_apart: bool) -> None:
    experts, x = stacked_experts(is_apart=is_apart), draw((33, HIDDEN), 0)
    ids, weights = draw_routing(33, 0)
    found = [grouped.grouped_moe(x, ids, weights, experts, **way).float() for way in WAYS.values()]
    # Rows between the products are rounded to bfloat16, 2^-9 of each, in other places.
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) <= 2e-2 * float(found[0].abs().max())


def test_matrices_keep_their_device(linear: ModuleType) -> None:
    weight = drawn("int4-g128-asym", 130, 300)
    parts = [getattr(weight, one.name) for one in fields(weight)]
    assert all(part.is_cuda for part in parts if isinstance(part, Tensor))


def capture(run: Any) -> tuple[Any, Tensor]:
    """A CUDA graph of a call, compiled before, and the tensor that replays write to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out
