"""The tables of a grouped MoE layer in one launch against those that torch makes.

Without a GPU the kernel runs in Triton's interpreter; with one, the same tests run on it. What
sm_90 gets is compiled in a process of its own, because the interpreter replaces the compiler where
it is on. Run as a program, this file prints what the compiler makes for numbers of experts:

    python tests/kernels/moe/test_slots_triton.py 64 128 256
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alphaquant.kernels.moe.plan import FormatOrder, order_by_format
from alphaquant.kernels.moe.slots import BlockTable, cut_blocks, sort_slots
from alphaquant.testing.machine_code import claimed_gpu, registers_of, spilled_bytes_of

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GARBAGE = -(1 << 20)


@pytest.fixture(scope="module")
def planner() -> ModuleType:
    interpreted = {} if DEVICE.type == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        return importlib.import_module("alphaquant.kernels.moe.slots_triton")


def order_of(formats: Sequence[int]) -> FormatOrder:
    """Any numbers of formats, as they may be drawn."""
    distinct = sorted(set(formats))
    return order_by_format([distinct.index(number) for number in formats], DEVICE)


def memory_is_garbage() -> Any:
    """Make torch fill what the kernel has to write."""
    make = torch.empty

    def make_garbage(*shape: Any, **options: Any) -> Tensor:
        return make(*shape, **options).fill_(GARBAGE)

    return mock.patch.object(torch, "empty", make_garbage)


def check(
    planner: ModuleType,
    ids: Tensor,
    first_expert: int,
    orders: Sequence[FormatOrder],
    block_slots: Sequence[int],
) -> None:
    """Every entry that means something is torch's, and every other one is a valid index."""
    ids, n_experts = ids.to(DEVICE), len(orders[0].order)
    with memory_is_garbage():
        plan = planner.plan_slots(ids, first_expert, n_experts, orders, block_slots)
    order = sort_slots(ids, n_experts, first_expert)
    assert plan.order.slots.dtype == torch.int32 and plan.order.starts.dtype == torch.int64
    assert plan.order.starts.tolist() == order.starts.tolist()
    used = slice(int(order.starts[0]), int(order.starts[-1]))
    assert plan.order.slots[used].tolist() == order.slots[used].tolist()
    assert sorted(plan.order.slots.tolist()) == list(range(ids.numel()))
    assert len(plan.blocks) == len(orders)
    for found, formats, size in zip(plan.blocks, orders, block_slots, strict=True):
        check_blocks(found, cut_blocks(order, formats, size))


def check_blocks(found: BlockTable, expected: BlockTable) -> None:
    assert found.most == expected.most
    assert found.starts.tolist() == expected.starts.tolist()
    n_blocks = int(expected.starts[-1])
    for name in ("places", "firsts", "ends", "starts"):
        made, wanted = getattr(found, name), getattr(expected, name)
        assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape), name
        if name != "starts":
            assert made[:n_blocks].tolist() == wanted[:n_blocks].tolist(), name
            assert not made[n_blocks:].any(), name


def test_the_worked_example_of_the_file(planner: ModuleType) -> None:
    ids = torch.tensor([[0, 1], [2, 0], [0, 9]], device=DEVICE)
    plan = planner.plan_slots(ids, 0, 3, [order_of([0, 1, 0])], [2])
    assert plan.order.slots.tolist() == [0, 3, 4, 1, 2, 5]
    assert plan.order.starts.tolist() == [0, 3, 4, 5]
    (table,) = plan.blocks
    assert table.starts.tolist() == [0, 3, 4] and table.most == (4, 3)
    assert table.places.tolist() == [0, 0, 1, 0]
    assert table.firsts.tolist() == [0, 2, 4, 3] and table.ends.tolist() == [2, 3, 5, 4]


@pytest.mark.parametrize(
    ("purpose", "ids", "n_experts", "first_expert"),
    [
        ("one token, one choice", [[2]], 4, 0),
        ("no tokens", [[], []], 4, 0),
        ("all to one expert, several blocks and programs", [[1]] * 130, 4, 0),
        ("all to the last expert, which needs all of its format's blocks", [[4]] * 70, 5, 0),
        ("experts without tokens at both ends", [[1, 2], [2, 1]], 5, 0),
        ("one token twice to one expert", [[3, 3]], 4, 0),
        ("only padding", [[4, 9], [4, 5]], 4, 0),
        ("ids of other ranks on both sides", [[0, 4, 7], [5, 3, 8], [1, 4, 4]], 4, 4),
        ("negative ids", [[-1, 0]], 2, 0),
        ("one expert", [[0]] * 17, 1, 0),
        ("padding that 32 bits would make an expert", [[1 << 32, 1, -(1 << 32), 0]], 2, 0),
    ],
)
def test_any_routing_is_planned_as_by_torch(
    planner: ModuleType, purpose: str, ids: list[list[int]], n_experts: int, first_expert: int
) -> None:
    several = [order_of([e % 2 for e in range(n_experts)]), order_of([0] * n_experts)]
    check(planner, torch.tensor(ids, dtype=torch.int64), first_expert, several, [16, 64])


@pytest.mark.parametrize("seed", range(30))
def test_drawn_routings_are_planned_as_by_torch(planner: ModuleType, seed: int) -> None:
    draw = Random(seed)
    n_tokens, n_choices = draw.choice((1, 2, 7, 33, 100)), draw.randint(1, 8)
    n_experts, first_expert = draw.randint(1, 130), draw.choice((0, 0, 3, 64))
    # A few experts with many slots, or all with few, and ids of no expert on both sides.
    low = first_expert + draw.choice((-2, 0, n_experts // 2))
    high = low + draw.choice((1, 5, n_experts + 3))
    ids = [[draw.randrange(low, high) for _ in range(n_choices)] for _ in range(n_tokens)]
    orders, block_slots = [], []
    for _ in range(draw.randint(1, 3)):
        n_formats = draw.randint(1, 5)
        orders.append(order_of([draw.randrange(n_formats) for _ in range(n_experts)]))
        block_slots.append(draw.choice((16, 32, 64)))
    check(planner, torch.tensor(ids), first_expert, orders, block_slots)


def test_every_expert_may_have_a_format_of_its_own(planner: ModuleType) -> None:
    ids = torch.arange(12).reshape(6, 2)
    check(planner, ids, 0, [order_of(range(11)), order_of(range(10, -1, -1))], [16, 32])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_width_are_taken(planner: ModuleType, dtype: torch.dtype) -> None:
    ids = torch.tensor([[3, 2], [100, 3], [0, 2]], dtype=dtype)
    check(planner, ids, 2, [order_of([0, 1])], [16])


def test_ids_need_not_be_contiguous(planner: ModuleType) -> None:
    ids = torch.tensor([[0, 2, 1, 5], [1, 0, 9, 5]]).T[:3]
    assert not ids.is_contiguous()
    check(planner, ids, 0, [order_of([0, 1, 0])], [16])


def test_the_same_ids_give_the_same_tables(planner: ModuleType) -> None:
    ids = (torch.arange(150, device=DEVICE) * 7 % 11).reshape(50, 3)
    orders = [order_of([0, 1, 0, 2, 1, 0, 0, 1]), order_of([0] * 8)]
    plans = [planner.plan_slots(ids, 1, 8, orders, [16, 32]) for _ in range(2)]
    one, other = (
        [p.order.slots, p.order.starts, *(t.firsts for t in p.blocks), *(t.ends for t in p.blocks)]
        for p in plans
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_launch_makes_all_tables_without_a_look_at_a_value(planner: ModuleType) -> None:
    """Meta tensors have shapes and no values: whatever would wait for the device fails."""
    formats = [0, 1, 0]
    there = [order_by_format(formats, torch.device("meta"))] * 2
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    with mock.patch.object(planner, "plan_slots_kernel", mock.MagicMock()) as kernel:
        plan = planner.plan_slots(ids, 0, 3, there, [16, 32])
    assert kernel.__getitem__.return_value.call_count == 1
    made = planner.plan_slots(
        torch.zeros(5, 2, dtype=torch.int64, device=DEVICE),
        0,
        3,
        [order_of(formats)] * 2,
        [16, 32],
    )
    assert shapes_of(plan) == shapes_of(made)


def shapes_of(plan: Any) -> list[Any]:
    tables = [(t.places, t.firsts, t.ends, t.starts) for t in plan.blocks]
    tensors = [plan.order.slots, plan.order.starts, *(t for table in tables for t in table)]
    return [(t.shape, t.dtype) for t in tensors]


def test_columns_start_where_one_compilation_serves_all(planner: ModuleType) -> None:
    """Kernels that read the tables are compiled anew for pointers that are no multiple of 16."""
    for n_tokens in (1, 3, 7):
        ids = torch.zeros(n_tokens, 1, dtype=torch.int64, device=DEVICE)
        plan = planner.plan_slots(ids, 0, 3, [order_of([0, 1, 0])] * 2, [16, 16])
        for table in plan.blocks:
            for part in (table.places, table.firsts, table.ends, table.starts):
                assert part.data_ptr() % 16 == 0 and part.is_contiguous()


@pytest.mark.parametrize(
    ("n_slots", "n_experts", "n_launches"),
    [("most", "most", 1), ("more", "most", 0), ("most", "more", 0)],
)
def test_large_plans_are_left_to_torch(
    planner: ModuleType, n_slots: str, n_experts: str, n_launches: int
) -> None:
    n_tokens = planner.MOST_SLOTS + (n_slots == "more")
    n_owned = planner.MOST_EXPERTS + (n_experts == "more")
    ids = torch.arange(n_tokens, device=DEVICE)[:, None]
    order = order_of([e % 3 for e in range(n_owned)])
    kernel = mock.MagicMock(wraps=planner.plan_slots_kernel)
    kernel.__getitem__.side_effect = planner.plan_slots_kernel.__getitem__
    with mock.patch.object(planner, "plan_slots_kernel", kernel):
        plan = planner.plan_slots(ids, 0, n_owned, [order], [16])
    assert kernel.__getitem__.call_count == n_launches
    sorted_slots = sort_slots(ids, n_owned)
    assert torch.equal(plan.order.slots, sorted_slots.slots)
    assert plan.blocks[0].starts.tolist() == cut_blocks(sorted_slots, order, 16).starts.tolist()


@pytest.mark.slow
def test_sm_90_needs_few_registers_and_little_shared_memory(
    planner: ModuleType, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    n_experts = (64, 128, 256, planner.MOST_EXPERTS)
    command = [sys.executable, __file__, *map(str, n_experts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figures["experts"] for figures in found] == list(n_experts)
    for figures in found:
        assert figures["spilled_bytes"] == 0, figures
        assert figures["registers"] <= 192, figures  # of 256 that eight warps can have
        assert figures["shared_bytes"] <= 8192, figures


def figures_of(n_experts: int, n_products: int = 2) -> dict[str, int]:
    """What the compiler makes of the kernel for sm_90."""
    planner = importlib.import_module("alphaquant.kernels.moe.slots_triton")
    orders = [order_by_format([0] * n_experts, torch.device("cpu"))] * n_products
    ids = torch.zeros(4, 2, dtype=torch.int64)
    with claimed_gpu() as launched:
        planner.plan_slots(ids, 0, n_experts, orders, [16] * n_products)
    (launch,) = launched
    return {
        "experts": n_experts,
        "registers": registers_of(launch.binary),
        "spilled_bytes": spilled_bytes_of(launch.binary),
        "shared_bytes": launch.binary.metadata.shared,
    }


if __name__ == "__main__":
    for number in sys.argv[1:]:
        print(json.dumps(figures_of(int(number))))
