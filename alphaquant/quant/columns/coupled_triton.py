# mypy: ignore-errors
"""The loop over coupled rows on a GPU, in Triton: what `coupled_numba.sweep_rows` does.

A row has to know what those before it changed, so a program has a whole tile of one stack and goes
through its rows and their columns one after the other; the columns of the block are its lanes. So
it is the stacks that are done at the same time, the experts of a layer. A number of one column is
picked out of the lanes by a sum.

Without a device it runs in Triton's interpreter; it was not run on a GPU.

Letters: S stacks, B columns of a block, L lanes (the power of two from B on), n rows of a tile,
N rows.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from alphaquant.quant.columns.grids_triton import ZERO_POINT, divide, snap, store, total, zeros_of

_ERROR_MAX = tl.constexpr(2.0**100)


class RowNumbers(NamedTuple):
    """Numbers that a tile of rows reads and writes, float32.

    Attributes:
        residual: [S, n, B], brought up to date in place.
        coupling: [S, n, n].
        hessian: [S, B, B].
        products: [S, n, B], H_gg c_g of each group, or None.
        centred: [S, B, N], c.
        delta: [S, B, N], D.
        changes: [S, n, B], written.
    """

    residual: Tensor
    coupling: Tensor
    hessian: Tensor
    products: Tensor | None
    centred: Tensor
    delta: Tensor
    changes: Tensor


class RowScales(NamedTuple):
    """Scales of all groups, as `columns_triton.BlockScales`, and numbers between their stacks."""

    scales: Tensor
    zeros: Tensor
    shared: Tensor | None
    groups: Tensor
    per_shared: int
    scale_step: int
    shared_step: int
    group_step: int


@triton.jit
def _of_lane(x, lanes, k):
    """The number of one lane, in all lanes."""
    return zeros_of(x) + total(tl.where(lanes == k, x, 0.0), 0)


@triton.jit
def _fit_scale(own, codes, product, in_run, known, shared, numbers, KIND: tl.constexpr):
    """The step of a group's scale, where it helps, in all lanes; see `coupled_numba._fit_row`."""
    zero = zeros_of(own)
    curvature = zero + total(tl.where(in_run, codes * product, 0.0), 0)
    slope = zero + total(tl.where(in_run, codes * own, 0.0), 0)
    is_curved = curvature > 0.0
    solved = known + divide(slope, tl.where(is_curved, curvature, 1.0))
    is_usable = is_curved & (tl.abs(solved) < _ERROR_MAX) & (solved != 0.0)
    step = store(tl.where(is_usable, solved, known), shared, numbers, KIND) - known
    return tl.where((step * curvature - 2.0 * slope) * step < 0.0, step, 0.0)


@triton.jit(do_not_specialize=["n_tile", "start", "n_rows", "column_step"])
def sweep_rows_kernel(
    rows,
    all_scales,
    numbers,
    n_columns,  # B
    run_size,  # of a group whose scale is fitted here, else B
    n_tile,  # n
    start,  # the first row
    n_rows,  # N
    column_step,  # numbers between stacks of c and D
    KIND: tl.constexpr,
    FITS: tl.constexpr,  # whether scales are fitted here
    LANES: tl.constexpr,
):
    """One pass of scales and codes over a block of columns, row after row; grid (S,)."""
    stack = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    is_column = lanes < n_columns
    scales = all_scales.scales + stack * all_scales.scale_step
    zeros = all_scales.zeros + stack * all_scales.scale_step
    groups = all_scales.groups + stack * all_scales.group_step
    residual = rows.residual + stack * n_tile * n_columns
    changes = rows.changes + stack * n_tile * n_columns
    coupling = rows.coupling + stack * n_tile * n_tile
    hessian = rows.hessian + stack * n_columns * n_columns
    for i in range(0, n_tile):
        row = start + i
        of_row = stack * column_step + lanes.to(tl.int64) * n_rows + row
        own = tl.load(residual + i * n_columns + lanes, mask=is_column, other=0.0)
        before = own
        codes = tl.load(rows.centred + of_row, mask=is_column, other=0.0)
        delta = tl.load(rows.delta + of_row, mask=is_column, other=0.0)
        for run in range(0, n_columns, run_size):
            end = tl.minimum(run + run_size, n_columns)
            if FITS:
                products = rows.products + (stack * n_tile + i) * n_columns
                product = tl.load(products + lanes, mask=is_column, other=0.0)
                at = tl.load(groups + run) * n_rows + row
                known = zeros_of(own) + tl.load(scales + at)
                shared = zeros_of(own) + 1.0
                if all_scales.shared is not None:
                    of_shared = tl.load(groups + run) // all_scales.per_shared * n_rows + row
                    shared = zeros_of(own) + tl.load(
                        all_scales.shared + stack * all_scales.shared_step + of_shared
                    )
                in_run = (lanes >= run) & (lanes < end)
                step = _fit_scale(own, codes, product, in_run, known, shared, numbers, KIND)
                tl.store(scales + at + zeros_of(own).to(tl.int32), known + step, mask=lanes == 0)
                delta -= tl.where(in_run, step * codes, 0.0)
                for k in range(run, end):
                    line = tl.load(hessian + k * n_columns + lanes, mask=is_column, other=0.0)
                    own -= step * _of_lane(codes, lanes, k) * line
                tl.debug_barrier()
            for k in range(run, end):
                at = tl.load(groups + k) * n_rows + row
                scale = zeros_of(own) + tl.load(scales + at)
                zero = zeros_of(own)
                if KIND == ZERO_POINT:
                    zero += tl.load(zeros + at)
                line = tl.load(hessian + k * n_columns + lanes, mask=is_column, other=0.0)
                known = _of_lane(codes, lanes, k)
                curvature = zeros_of(own) + tl.load(hessian + k * n_columns + k)
                best = known * scale + divide(_of_lane(own, lanes, k), curvature)
                code = snap(divide(best, scale) + zero, numbers, KIND) - zero
                change = (code - known) * scale
                codes = tl.where(lanes == k, code, codes)
                delta -= tl.where(lanes == k, change, 0.0)
                own -= change * line
        tl.store(rows.centred + of_row, codes, mask=is_column)
        tl.store(rows.delta + of_row, delta, mask=is_column)
        changed = own - before
        tl.store(changes + i * n_columns + lanes, changed, mask=is_column)
        for j in range(i + 1, n_tile):
            at_row = residual + j * n_columns + lanes
            share = tl.load(coupling + j * n_tile + i)
            later = tl.load(at_row, mask=is_column, other=0.0)
            tl.store(at_row, later + share * changed, mask=is_column)
        tl.debug_barrier()
