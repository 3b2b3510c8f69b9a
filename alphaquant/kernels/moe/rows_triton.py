# mypy: ignore-errors
"""What happens to rows between the products of a MoE layer, in Triton: gather, gate, weigh, add.

A row belongs to a slot. The dense path needs the rows of one format beside each other, in the
order of `alphaquant.kernels.moe.slots.RowTable`; every kernel on them has a program per possible
row, and those beyond the rows of the format, whose number only the device knows, return at once.
The tensors that name the rows of a format stay single arguments: a tuple of them could not hold
the format's number, which must not be specialized. Arithmetic is float32 and results are rounded
to the type of the output.

Letters: n tokens, k experts per token, H hidden size, I expert width, L splits of the columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.kernels.moe.plan import HALF_ROWS, GroupedExperts
from alphaquant.kernels.moe.slots import RowTable, SortedSlots

_BLOCK = 1024
_HALF = tl.constexpr(HALF_ROWS)


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up, float32, finite for finite arguments and products."""
    # e^80 is finite, and what it divides is zero in any type of x
    return gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0))) * up


@triton.jit(do_not_specialize=["number"])
def gather_rows_kernel(
    x_ptr,  # [rows, n_cols]
    out_ptr,  # [n k, n_cols]
    sources_ptr,  # int32 [n k], rows of x in the order of formats
    starts_ptr,  # int32 [F + 1]
    number,  # of the format
    n_cols,
    BLOCK: tl.constexpr,
):
    """The rows of one format, from the first on. Grid: (n k, ceil(n_cols / BLOCK))."""
    row = tl.program_id(0)
    place = tl.load(starts_ptr + number) + row
    if place >= tl.load(starts_ptr + number + 1):
        return
    source = tl.load(sources_ptr + place).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < n_cols
    values = tl.load(x_ptr + source * n_cols + columns, mask=is_inside)
    tl.store(out_ptr + row.to(tl.int64) * n_cols + columns, values, mask=is_inside)


@triton.jit(do_not_specialize=["number", "n_rows"])
def gate_kernel(
    parts_ptr,  # [L, n k, n_cols], gate and up in turns
    out_ptr,  # [n k, I], rows in sorted order
    positions_ptr,  # int32 [n k], rows of out in the order of formats; anything if IS_SORTED
    starts_ptr,  # int32 [F + 1]
    number,  # of the format
    n_rows,  # n k
    n_splits,  # L
    n_cols,  # 2 I, padded
    width,  # I
    IS_SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """silu(gate) * up of sums from first to last split. Grid: (n k, ceil(I / BLOCK)).

    Parts are the rows of one format, from the first on, or all rows in sorted order.
    """
    row = tl.program_id(0)
    place = tl.load(starts_ptr + number) + row
    if place >= tl.load(starts_ptr + number + 1):
        return
    if IS_SORTED:
        row = place
        position = place
    else:
        position = tl.load(positions_ptr + place)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    part_at = row.to(tl.int64) * n_cols + columns // _HALF * (2 * _HALF) + columns % _HALF
    gate = tl.full((BLOCK,), 0.0, tl.float32)
    up = tl.full((BLOCK,), 0.0, tl.float32)
    for _ in range(n_splits):
        gate += tl.load(parts_ptr + part_at, mask=is_inside, other=0.0)
        up += tl.load(parts_ptr + part_at + _HALF, mask=is_inside, other=0.0)
        part_at += n_rows.to(tl.int64) * n_cols
    out_at = position.to(tl.int64) * width + columns
    gated = silu_times(gate, up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at, gated, mask=is_inside)


@triton.jit(do_not_specialize=["number"])
def weigh_kernel(
    rows_ptr,  # [n k, n_cols], rows of the format
    out_ptr,  # [n k, H], rows in the order of slots
    weights_ptr,  # [n k], any float
    slots_ptr,  # int32 [n k], in the order of formats
    starts_ptr,  # int32 [F + 1]
    number,  # of the format
    n_cols,  # H, padded
    hidden,  # H
    BLOCK: tl.constexpr,
):
    """Rows times their routing weights, each to its slot. Grid: (n k, ceil(H / BLOCK))."""
    row = tl.program_id(0)
    place = tl.load(starts_ptr + number) + row
    if place >= tl.load(starts_ptr + number + 1):
        return
    slot = tl.load(slots_ptr + place).to(tl.int64)
    factor = tl.load(weights_ptr + slot).to(tl.float32)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < hidden
    values = tl.load(rows_ptr + row.to(tl.int64) * n_cols + columns, mask=is_inside)
    weighted = (values.to(tl.float32) * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot * hidden + columns, weighted, mask=is_inside)


@triton.jit(do_not_specialize=["n_rows"])
def add_slots_kernel(
    parts_ptr,  # [L, n k, H]; rows of skipped slots hold anything
    ids_ptr,  # int64 [n, k], 0 .. E - 1 where they are to be added
    out_ptr,  # [n, H]
    first_expert,
    n_experts,  # E
    n_choices,  # k
    n_rows,  # n k
    n_splits,  # L
    hidden,  # H
    BLOCK: tl.constexpr,
):
    """Sum of each token's slots from first to last, of each slot's splits from first to last.

    Grid: (n, ceil(H / BLOCK)).
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for j in range(n_choices):
        slot = token * n_choices + j
        expert = tl.load(ids_ptr + slot) - first_expert
        if (expert >= 0) & (expert < n_experts):
            at = slot * hidden + columns
            for _ in range(n_splits):
                total += tl.load(parts_ptr + at, mask=columns < hidden, other=0.0)
                at += n_rows.to(tl.int64) * hidden
    out_at = out_ptr + token * hidden + columns
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=columns < hidden)


def gather_rows(x: Tensor, sources: Tensor, table: RowTable, number: int) -> Tensor:
    """Rows of one format beside each other.

    Args:
        x: [any, K], contiguous.
        sources: int32 [n k], rows of x in the order of formats.
        table: of the product.
        number: of the format.

    Returns:
        [n k, K]; rows beyond those of the format hold anything.
    """
    out = x.new_empty(len(sources), x.shape[1])
    gather_rows_kernel[_grid(out)](
        *(x, out, sources, table.starts, number, x.shape[1]), BLOCK=_BLOCK
    )
    return out


def gate_rows(parts: Tensor, out: Tensor, table: RowTable, number: int) -> None:
    """Write silu(gate) * up of the rows of one format.

    Args:
        parts: [1, n k, 2 I padded], rows of the format, gate and up in turns of `HALF_ROWS`.
        out: [n k, I], rows in sorted order.
        table: of the product.
        number: of the format.
    """
    _gate(parts, out, table.positions, table.starts, number)


def gate_parts(parts: Tensor, out: Tensor, order: SortedSlots) -> None:
    """Write silu(gate) * up of all slots of this rank's experts.

    Args:
        parts: float32 [L, n k, 2 I padded], rows in sorted order, gate and up in turns.
        out: [n k, I], rows in sorted order; those of skipped slots are not written.
        order: of the slots.
    """
    first_and_end = order.starts[:: len(order.starts) - 1].to(torch.int32)
    _gate(parts, out, None, first_and_end, 0)


def _gate(
    parts: Tensor, out: Tensor, positions: Tensor | None, starts: Tensor, number: int
) -> None:
    n_splits, n_rows, n_cols = parts.shape
    gate_kernel[_grid(out)](
        *(parts, out, starts if positions is None else positions, starts, number),
        *(n_rows, n_splits, n_cols, out.shape[1]),
        IS_SORTED=positions is None,
        BLOCK=_BLOCK,
    )


def weigh_rows(
    rows: Tensor, out: Tensor, weights: Tensor, slots: Tensor, table: RowTable, number: int
) -> None:
    """Write the rows of one format, weighted, to their slots.

    Args:
        rows: [n k, H padded].
        out: [n k, H].
        weights: [n, k], contiguous.
        slots: int32 [n k], in the order of formats.
        table: of the product.
        number: of the format.
    """
    weigh_kernel[_grid(out)](
        *(rows, out, weights, slots, table.starts, number, rows.shape[1], out.shape[1]),
        BLOCK=_BLOCK,
    )


def add_slots(
    parts: Tensor, expert_ids: Tensor, experts: GroupedExperts, dtype: torch.dtype
) -> Tensor:
    """Sum of the slots of every token, in a fixed order.

    Args:
        parts: [L, n k, H]; rows of skipped slots are not read.
        expert_ids: int64 [n, k], contiguous.
        experts: whose ids are added.
        dtype: of the result.

    Returns:
        [n, H].
    """
    n_splits, n_rows, hidden = parts.shape
    n_tokens, n_choices = expert_ids.shape
    out = parts.new_empty(n_tokens, hidden, dtype=dtype)
    add_slots_kernel[_grid(out)](
        *(parts, expert_ids, out, experts.first_expert, experts.n_experts),
        *(n_choices, n_rows, n_splits, hidden),
        BLOCK=_BLOCK,
    )
    return out


def _grid(out: Tensor) -> tuple[int, int]:
    return (len(out), triton.cdiv(out.shape[1], _BLOCK))
