"""Blocks and rows of a grouped MoE layer against plain Python."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alphaquant.kernels.moe.plan import order_by_format
from alphaquant.kernels.moe.slots import (
    BlockTable,
    RowTable,
    cut_blocks,
    most_blocks,
    order_rows,
    sort_slots,
)

CPU = torch.device("cpu")
Block = tuple[int, list[int]]


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


def rows_of(table: RowTable, slots: Tensor) -> list[list[Block]]:
    """What a table of rows says: per format its slots, one by one, each with its place."""
    starts, found = table.starts.tolist(), []
    for first, last, ends in zip(starts, starts[1:], table.ends, strict=False):
        chosen = slots[table.positions[first:last]].tolist()
        bounds = [0, *ends.tolist()]
        assert bounds[-1] == last - first
        places = range(len(ends))
        found.append([(p, [slot]) for p in places for slot in chosen[bounds[p] : bounds[p + 1]]])
    return found


def single_slots(blocks: list[list[Block]]) -> list[list[Block]]:
    return [[(p, [slot]) for p, slots in own for slot in slots] for own in blocks]


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
    rows = order_rows(order, formats)
    assert rows.positions[:5].tolist() == [0, 1, 2, 4, 3] and rows.starts.tolist() == [0, 4, 5]
    assert [ends.tolist() for ends in rows.ends] == [[3, 4], [1]]


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
    rows = order_rows(order, order_by_format(formats, CPU))
    assert rows_of(rows, order.slots) == single_slots(expected), purpose
    assert rows.positions.min() >= 0 and rows.positions.max() < len(order.slots)


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
    rows = order_rows(order, order_by_format(formats, CPU))
    assert rows_of(rows, order.slots) == single_slots(found)


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
    order, formats = sort_slots(ids, 3, 1), order_by_format([0, 1, 0], ids.device)
    table, rows = cut_blocks(order, formats, 16), order_rows(order, formats)
    tables = [table.places, table.firsts, table.ends, table.starts]
    return [order.slots, order.starts, *tables, rows.positions, rows.starts, *rows.ends]


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
