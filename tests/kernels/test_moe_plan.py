"""Blocks of a grouped MoE layer against plain Python, and stacks against their matrices."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.moe_plan import (
    BlockTable,
    ExpertWeights,
    cut_blocks,
    default_block_slots,
    most_blocks,
    order_by_format,
    sort_slots,
    stack_experts,
)
from alphaquant.kernels.order import KernelWeight
from alphaquant.quant.gptq import quantize_rtn
from alphaquant.quant.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights

CPU = torch.device("cpu")
Block = tuple[int, list[int]]


def drawn(name: str, rows: int, cols: int, seed: int) -> KernelWeight:
    weight = draw_weights(rows, cols, seed)[None]
    return order_matrix(quantize_rtn(weight, parse_format(name), "minmax").pack(0, slice(None)))


def drawn_expert(gate_up: str, down: str, seed: int) -> ExpertWeights:
    """H is 171, I is 70: both have tails."""
    return ExpertWeights(
        drawn(gate_up, 70, 171, seed),
        drawn(gate_up, 70, 171, seed + 1),
        drawn(down, 171, 70, seed),
    )


def blocks_of(table: BlockTable, slots: Tensor) -> list[list[Block]]:
    """What a table says: per format its blocks, each a place and slots."""
    starts, found = table.starts.tolist(), []
    for first, last in zip(starts, starts[1:], strict=False):
        found.append(
            [
                (int(table.places[b]), slots[table.firsts[b] : table.ends[b]].tolist())
                for b in range(first, last)
            ]
        )
    return found


def expected_blocks(
    ids: list[int], formats: list[int], block_slots: int, first_expert: int
) -> list[list[Block]]:
    """The same, one slot after the other."""
    found: list[list[Block]] = [[] for _ in range(max(formats) + 1)]
    for expert, number in enumerate(formats):
        slots = [slot for slot, e in enumerate(ids) if e - first_expert == expert]
        place = formats[:expert].count(number)
        for start in range(0, len(slots), block_slots):
            found[number].append((place, slots[start : start + block_slots]))
    return found


def test_the_worked_example_of_the_file() -> None:
    order = sort_slots(torch.tensor([[0, 1], [2, 0], [0, 9]]), n_experts=3)
    assert order.slots.tolist() == [0, 3, 4, 1, 2, 5]
    assert order.starts.tolist() == [0, 3, 4, 5]
    formats = order_by_format([0, 1, 0], CPU)
    assert formats.order.tolist() == [0, 2, 1] and formats.places.tolist() == [0, 1, 0]
    table = cut_blocks(order, formats, block_slots=2)
    assert table.starts.tolist() == [0, 3, 4]
    assert table.places.tolist() == [0, 0, 1, 0]
    assert list(zip(table.firsts.tolist(), table.ends.tolist(), strict=True)) == [
        *((0, 2), (2, 3), (4, 5), (3, 4))
    ]
    assert table.most == (4, 3)


@pytest.mark.parametrize(
    ("purpose", "ids", "n_experts", "first_expert"),
    [
        ("one token, one choice", [[2]], 4, 0),
        ("all tokens to one expert", [[1]] * 37, 4, 0),
        ("experts without tokens at both ends", [[1, 2], [2, 1]], 5, 0),
        ("one token twice to one expert", [[3, 3]], 4, 0),
        ("only padding", [[4, 9], [4, 5]], 4, 0),
        ("ids of other ranks on both sides", [[0, 4, 7], [5, 3, 8]], 4, 4),
        ("negative ids", [[-1, 0]], 2, 0),
        ("one expert", [[0]] * 17, 1, 0),
    ],
)
def test_blocks_hold_every_slot_of_the_rank_once(
    purpose: str, ids: list[list[int]], n_experts: int, first_expert: int
) -> None:
    formats = [expert % 2 for expert in range(n_experts)]
    order = sort_slots(torch.tensor(ids), n_experts, first_expert)
    table = cut_blocks(order, order_by_format(formats, CPU), 16)
    flat = [expert for row in ids for expert in row]
    expected = expected_blocks(flat, formats, 16, first_expert)
    assert blocks_of(table, order.slots) == expected, purpose


@given(
    ids=st.lists(st.integers(-1, 9), min_size=1, max_size=60),
    choices=st.lists(st.integers(0, 2), min_size=1, max_size=8),
    block_slots=st.sampled_from([1, 2, 3, 16]),
    first_expert=st.integers(0, 3),
)
def test_blocks_of_any_routing_are_those_of_plain_python(
    ids: list[int], choices: list[int], block_slots: int, first_expert: int
) -> None:
    formats = [sorted(set(choices)).index(number) for number in choices]
    order = sort_slots(torch.tensor(ids)[:, None], len(formats), first_expert)
    table = cut_blocks(order, order_by_format(formats, CPU), block_slots)
    found = blocks_of(table, order.slots)
    assert found == expected_blocks(ids, formats, block_slots, first_expert)
    assert all(len(blocks) <= most for blocks, most in zip(found, table.most, strict=True))
    assert sum(len(blocks) for blocks in found) <= len(table.places)


def test_the_most_blocks_are_reached_and_never_exceeded() -> None:
    def partitions(n_slots: int, n_experts: int) -> list[list[int]]:
        if n_experts == 1:
            return [[n_slots]]
        rest = range(n_slots + 1)
        return [[c, *more] for c in rest for more in partitions(n_slots - c, n_experts - 1)]

    for n_slots in range(1, 8):
        for n_experts in range(1, 5):
            for z in (1, 2, 3, 4):
                counts = [[-(-c // z) for c in p] for p in partitions(n_slots, n_experts)]
                assert max(map(sum, counts)) == most_blocks(n_slots, n_experts, z)


def test_integers_of_any_width_are_taken() -> None:
    ids = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    assert sort_slots(ids, 2).slots.tolist() == [1, 2, 0, 3]


def plan(ids: Tensor) -> list[Tensor]:
    """All of the planning that happens in every call."""
    order = sort_slots(ids, 3, 1)
    table = cut_blocks(order, order_by_format([0, 1, 0], ids.device), 16)
    tables = [table.places, table.firsts, table.ends, table.starts]
    return [order.slots, order.starts, *tables]


def test_planning_never_looks_at_a_value() -> None:
    """Meta tensors have shapes and no values: whatever would wait for the device fails."""
    shapes = [t.shape for t in plan(torch.zeros(5, 2, dtype=torch.int64, device="meta"))]
    one_expert, mixed = torch.full((5, 2), 2), torch.arange(10).reshape(5, 2)
    assert shapes == [t.shape for t in plan(one_expert)] == [t.shape for t in plan(mixed)]


@pytest.mark.parametrize(
    "look",
    [
        lambda ids: int(ids.max()),
        lambda ids: ids.tolist(),
        lambda ids: ids[ids > 0],
        lambda ids: torch.bincount(ids.flatten(), minlength=3),
        lambda ids: ids.cpu(),
    ],
    ids=["item", "tolist", "mask", "bincount", "copy"],
)
def test_meta_tensors_show_a_look_at_a_value(look: Callable[[Tensor], object]) -> None:
    ids = torch.zeros(5, 2, dtype=torch.int64, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(ids)


@pytest.mark.parametrize(
    ("n_slots", "n_experts", "expected"),
    [(1, 64, 16), (1024, 64, 16), (1088, 64, 32), (4096, 64, 32), (4160, 64, 64), (9, 1, 16)],
)
def test_blocks_grow_with_the_slots_per_expert(
    n_slots: int, n_experts: int, expected: int
) -> None:
    assert default_block_slots(n_slots, n_experts) == expected


FORMATS = (("nvfp4", "int4-g64-asym"), ("int3-g32", "nvfp4"), ("nvfp4", "int4-g64-asym"))


def test_stacks_hold_gate_and_up_in_turns_and_down_as_it_is() -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    stacked = stack_experts(experts, first_expert=5)
    sizes = (stacked.width, stacked.hidden, stacked.n_experts, stacked.first_expert)
    assert sizes == (70, 171, 3, 5)
    assert stacked.gate_up.formats.sizes == (2, 1) and stacked.down.formats.sizes == (2, 1)
    assert (stacked.gate_up.expert_rows, stacked.down.expert_rows) == (256, 256)
    for number, members in enumerate([[0, 2], [1]]):
        stack = stacked.gate_up.stacks[number]
        halves = values_of(stack).reshape(len(members), 2, 2, 64, 171)
        for place, expert in enumerate(members):
            for side, weight in enumerate([experts[expert].gate, experts[expert].up]):
                found = halves[place, :, side].reshape(128, 171)[:70]
                assert torch.equal(found, values_of(weight)[:70]), (number, place, side)
        down = values_of(stacked.down.stacks[number]).reshape(len(members), 256, 70)
        for place, expert in enumerate(members):
            assert torch.equal(down[place, :171], values_of(experts[expert].down)[:171])


def values_of(weight: KernelWeight) -> Tensor:
    """Weights without their global scale, padding rows included."""
    rows = int(weight.words.shape[2])
    return reference.dequantize(replace(weight, rows=rows, global_scale=None))


def test_stacks_keep_a_global_scale_per_matrix() -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    stacked = stack_experts(experts)
    scales = [m.global_scale for e in (experts[0], experts[2]) for m in (e.gate, e.up)]
    found = stacked.gate_up.stacks[0].global_scale
    assert found is not None and found.tolist() == [float(s) for s in scales if s is not None]
    down = stacked.down.stacks[1].global_scale
    expected = experts[1].down.global_scale
    assert down is not None and expected is not None and torch.equal(down, expected)
    assert stacked.gate_up.stacks[1].global_scale is None


def test_formats_that_differ_in_one_thing_are_stacked_apart() -> None:
    names = ("int4-g64", "int4-g32", "int4-g64-asym", "int2-g64", "mxfp4", "fp4-e2m1-g32")
    stacked = stack_experts([drawn_expert(name, "int8-row", 0) for name in names])
    assert stacked.gate_up.formats.sizes == (1,) * 6
    assert stacked.down.formats.sizes == (6,)


def test_groups_longer_than_the_row_are_one_format() -> None:
    expert = drawn_expert("int4-g64", "int4-row", 0)
    longer = replace(expert, down=replace(expert.down, group_size=1 << 30))
    assert stack_experts([expert, longer]).down.formats.sizes == (2,)


def test_experts_that_do_not_fit_are_refused() -> None:
    good = drawn_expert("int4-g64", "int4-g64", 0)
    with pytest.raises(FormatError, match="expert 8 .*one format"):
        stack_experts([good, replace(good, up=drawn("int3-g64", 70, 171, 0))], first_expert=7)
    with pytest.raises(FormatError, match=r"expert 1 are .*\(171, 71\).*equal sizes"):
        stack_experts([good, replace(good, down=drawn("int4-g64", 171, 71, 0))])
    with pytest.raises(FormatError, match="no experts"):
        stack_experts([])
