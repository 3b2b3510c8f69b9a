# mypy: ignore-errors
"""The tables of `alphaquant.kernels.moe.slots` in one launch, for few slots, in Triton.

Sorting the slots and cutting the blocks of two products is 57 operations of torch, views not
counted, each at least one launch. Here it is one: a program per product cuts its blocks, and a
program per 64 slots sorts them. No program needs what another one writes, because each counts what
it needs by comparing ids:

    position of slot s    slots t with id t < id s, or id t = id s and t < s
    first of expert e     slots with ids < e; its end: as many more as have id e
    first block           sum of ceil(slots / Z) of the experts before it in the order of formats
    format                experts with place 0 up to this one, less one

Worked example, that of `alphaquant.kernels.moe.slots`: ids 0 1 2 0 0 9 of E = 3 experts, blocks of
2 slots, order of formats 0 2 | 1. Slot 3 comes after slot 0 and before all others: position 1.
Experts 0 2 1 have firsts 0 4 3 and ends 3 5 4, so 2 1 1 blocks, of which the first ones are
0 2 3; places 0 1 | 0 say that experts 0 and 1 are the first ones of formats 0 and 1, which
start at blocks 0 and 3 and end at 4. The table has room for four blocks and has four.

The work grows with n k (E + n k), so that many slots are planned by torch. The kernel is compiled
once per E, rounded up to a power of two, number of products and type of ids, not per number of
slots. Entries of a table that mean nothing are zero; skipped slots are ordered by their numbers
before and after the others, not by their ids.

What every token chose and how many experts there are stay single arguments: in a named tuple they
would be specialized, which made six binaries of two (18 routings of three layers), and a launch
took about 3 us more on the host.

Nothing here was run on a GPU: the tests run it in Triton's interpreter and compile it for sm_90.

Letters: n tokens, k experts per token, E experts of this rank, F formats, Z slots of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.kernels.moe.plan import FormatOrder
from alphaquant.kernels.moe.slots import (
    BlockTable,
    SortedSlots,
    cut_blocks,
    most_blocks,
    sort_slots,
)
from alphaquant.kernels.order import padded

MOST_SLOTS = 1024
"""Up to so many slots, n k, one launch makes the tables; a guess, not measured."""

MOST_EXPERTS = 512
"""Up to so many experts of a rank, likewise."""

PROGRAM_SLOTS = 64
"""Slots that a program sorts, and at most so many are compared at a time."""

N_WARPS = 8
"""Warps of a program."""

# Made anew, because triton's own are compiled ones where it was imported before the interpreter
# was asked for.
_sum = triton.jit(tl.sum.fn)
_cumsum = triton.jit(tl.cumsum.fn)
_max = triton.jit(tl.max.fn)

_SLOTS = tl.constexpr(PROGRAM_SLOTS)
_COMPARED = 8192  # pairs of an expert and a slot at a time: 32 of each thread, counted twice


@dataclass(frozen=True)
class SlotPlan:
    """Sorted slots, and how each product of a layer cuts them.

    Attributes:
        order: the slots of all products.
        blocks: per product.
    """

    order: SortedSlots
    blocks: tuple[BlockTable, ...]


@triton.jit
def _load_experts(ids_ptr, slots, n_slots, first_expert, n_experts):
    """Experts of slots, int32: -1 below this rank's, E above them and where there is no slot."""
    is_slot = slots < n_slots
    ids = tl.load(ids_ptr + slots, mask=is_slot, other=0).to(tl.int64) - first_expert
    # before they are narrowed: ids of any width may be padding
    experts = tl.minimum(tl.maximum(ids, -1), n_experts)
    return tl.where(is_slot, experts, n_experts).to(tl.int32)


@triton.jit
def _sort_slots(ids_ptr, slots_ptr, program, n_slots, first_expert, n_experts):
    """Write 64 slots to where they belong."""
    columns = tl.arange(0, _SLOTS)
    slots = program * _SLOTS + columns  # [64]
    # Experts, then slots; what is no slot comes after all.
    keys = _load_experts(ids_ptr, slots, n_slots, first_expert, n_experts) * n_slots + slots
    n_before = tl.full((_SLOTS, _SLOTS), 0, tl.int32)
    for start in range(0, n_slots, _SLOTS):
        others = start + columns
        experts = _load_experts(ids_ptr, others, n_slots, first_expert, n_experts)
        n_before += ((experts * n_slots + others)[None, :] < keys[:, None]).to(tl.int32)
    tl.store(slots_ptr + _sum(n_before, 1), slots, mask=slots < n_slots)


@triton.jit
def _cut_blocks(
    ids_ptr,  # integers [n k]
    starts_ptr,  # int64 [E + 1]
    order_ptr,  # int64 [E]
    places_ptr,  # int32 [E]
    table_ptr,  # int32 [4, width]
    block_slots,  # Z
    n_slots,
    first_expert,
    n_experts,
    width,
    WRITES_STARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the blocks of a product, and perhaps the first slot of each expert."""
    index = tl.arange(0, EXPERTS)
    columns = tl.arange(0, COLUMNS)
    is_expert = index < n_experts
    experts = tl.load(order_ptr + index, mask=is_expert, other=-2).to(tl.int32)  # no slot has -2
    places = tl.load(places_ptr + index, mask=is_expert, other=1)
    n_before = tl.full((EXPERTS, COLUMNS), 0, tl.int32)
    n_own = tl.full((EXPERTS, COLUMNS), 0, tl.int32)
    for start in range(0, n_slots, COLUMNS):
        chosen = _load_experts(ids_ptr, start + columns, n_slots, first_expert, n_experts)
        n_before += (chosen[None, :] < experts[:, None]).to(tl.int32)
        n_own += (chosen[None, :] == experts[:, None]).to(tl.int32)
    firsts = _sum(n_before, 1)  # [E]
    ends = firsts + _sum(n_own, 1)
    if WRITES_STARTS:
        tl.store(starts_ptr + experts, firsts, mask=is_expert)
        tl.store(starts_ptr + experts + 1, ends, mask=experts == n_experts - 1)

    n_blocks = (ends - firsts + block_slots - 1) // block_slots
    n_all = _sum(n_blocks, 0)
    first_blocks = _cumsum(n_blocks, 0) - n_blocks
    is_first = places == 0
    format_at = table_ptr + 3 * width + _cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(format_at, first_blocks, mask=is_first)
    tl.store(table_ptr + 3 * width + _sum(is_first.to(tl.int32), 0), n_all)

    for j in range(_max(n_blocks, 0)):
        at = table_ptr + first_blocks + j
        is_block = j < n_blocks
        starts = firsts + j * block_slots
        tl.store(at, places, mask=is_block)
        tl.store(at + width, starts, mask=is_block)
        tl.store(at + 2 * width, tl.minimum(starts + block_slots, ends), mask=is_block)
    for start in range(n_all, width, EXPERTS):
        at = table_ptr + start + index
        is_rest = start + index < width
        for row in tl.static_range(3):
            tl.store(at + row * width, 0, mask=is_rest)


@triton.jit(do_not_specialize=["n_slots", "first_expert", "n_experts", "width"])
def plan_slots_kernel(
    ids_ptr,  # integers [n k]
    slots_ptr,  # int32 [n k]
    starts_ptr,  # int64 [E + 1]
    tables_ptr,  # int32 [products, 4, width]: places, firsts, ends of blocks; starts of formats
    orders,  # per product int64 [E]
    places,  # per product int32 [E]
    block_slots,  # per product Z
    n_slots,  # n k
    first_expert,
    n_experts,  # E
    width,
    EXPERTS: tl.constexpr,  # at least E, a power of two
    COLUMNS: tl.constexpr,  # slots that are compared with experts at a time
):
    """Tables of all products. Grid: (products + ceil(n k / 64),)."""
    program = tl.program_id(0)
    if program >= len(orders):
        _sort_slots(ids_ptr, slots_ptr, program - len(orders), n_slots, first_expert, n_experts)
    for product in tl.static_range(len(orders)):
        if program == product:
            _cut_blocks(
                *(ids_ptr, starts_ptr, orders[product], places[product]),
                *(tables_ptr + product * 4 * width, block_slots[product]),
                *(n_slots, first_expert, n_experts, width, product == 0, EXPERTS, COLUMNS),
            )


def plan_slots(
    expert_ids: Tensor,
    first_expert: int,
    n_experts: int,
    orders: Sequence[FormatOrder],
    block_slots: Sequence[int],
) -> SlotPlan:
    """Sort slots by expert, and cut them into the blocks of every product.

    Shapes and launches depend on the shapes of the arguments only; nothing waits for the device.

    Args:
        expert_ids: integers [n, k]. Ids outside of this rank's experts, be they of other ranks
            or padding, are skipped. Ids that are not contiguous cost a copy.
        first_expert: number of this rank's first expert.
        n_experts: E.
        orders: of the E experts, one for each product.
        block_slots: Z of each product.

    Returns:
        What `alphaquant.kernels.moe.slots.sort_slots` and `cut_blocks` give, which make it where
        there are more than `MOST_SLOTS` or `MOST_EXPERTS`. Entries that mean nothing may differ;
        here they are skipped slots, and blocks of place 0 without slots.
    """
    n_slots = expert_ids.numel()
    products = list(zip(orders, block_slots, strict=True))
    if n_slots > MOST_SLOTS or n_experts > MOST_EXPERTS:
        order = sort_slots(expert_ids, n_experts, first_expert)
        return SlotPlan(order, tuple(cut_blocks(order, o, z) for o, z in products))
    device = expert_ids.device
    slots = torch.empty(n_slots, dtype=torch.int32, device=device)
    starts = torch.empty(n_experts + 1, dtype=torch.int64, device=device)
    # Rows start at multiples of 16 bytes: kernels are compiled anew for other pointers.
    width = padded(max(n_slots, *(len(o.sizes) + 1 for o in orders)), 4)
    tables = torch.empty(len(products), 4, width, dtype=torch.int32, device=device)
    plan_slots_kernel[(len(products) + triton.cdiv(n_slots, PROGRAM_SLOTS),)](
        *(expert_ids.reshape(-1), slots, starts, tables),
        *(tuple(o.order for o in orders), tuple(o.places for o in orders), tuple(block_slots)),
        *(n_slots, first_expert, n_experts, width),
        **sizes_of(n_experts),
        num_warps=N_WARPS,
    )
    blocks = [_table(t, n_slots, o, z) for t, (o, z) in zip(tables, products, strict=True)]
    return SlotPlan(SortedSlots(slots, starts), tuple(blocks))


def sizes_of(n_experts: int) -> dict[str, int]:
    """Compile-time arguments of the kernel, which depend on the number of experts only."""
    n_rows = triton.next_power_of_2(n_experts)
    return {"EXPERTS": n_rows, "COLUMNS": min(PROGRAM_SLOTS, _COMPARED // n_rows)}


def _table(table: Tensor, n_slots: int, formats: FormatOrder, block_slots: int) -> BlockTable:
    """The parts of int32 [4, width]."""
    n_experts = len(formats.order)
    places, firsts, ends = table[:3, : most_blocks(n_slots, n_experts, block_slots)]
    most = tuple(most_blocks(n_slots, size, block_slots) for size in formats.sizes)
    return BlockTable(places, firsts, ends, table[3, : len(formats.sizes) + 1], most)
