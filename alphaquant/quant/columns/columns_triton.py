# mypy: ignore-errors
"""The column loops of GPTQ and of coordinate descent on a GPU, in Triton.

They do what `columns_numba.py` does: one block of columns, everything between blocks being
products of `descent.py`. One launch serves all stacks that are rounded together (the experts of a
layer) and all of their rows; a thread has one row, and no thread needs what another one computes.

A column cannot be chosen from registers by a number that runs, so columns are left-looking. A
panel of P columns is read once and gets what all columns before it in the block changed:

    panel[p] -= sum over j of changes[j] * matrix[j, p]        one load per P multiplications

Then its columns are rounded one after the other; each is picked out of the panel by a sum over
the columns of a thread, and its change goes to those after it in the panel. Changes are kept in
memory, from where later panels read them. Where the scales of a group depend on what the groups
before it in the block changed, all panels of the group (a run) are brought up to date first.

Worked example: a block of 64 columns, groups of 32, P = 16. Run 0: scales of group 0 from columns
0 to 31; panels 0 to 15 (nothing before it) and 16 to 31 (columns 0 to 15 before it). Run 32:
panels 32 to 47 and 48 to 63 get the changes of columns 0 to 31; then as in run 0.

Without a device the kernels run in Triton's interpreter; nothing here was run on a GPU.

Letters: S stacks, B columns of a block, N rows, G groups, P columns of a panel, R rows of a
program; x weights, q rounded weights, c centred codes (value - zero); U the diagonal block of the
inverse Hessian's upper factor, H the diagonal block of the Hessian, D = W - Q.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.quant.columns.coupled_triton import RowNumbers, RowScales, sweep_rows_kernel
from alphaquant.quant.columns.grids_triton import (
    ZERO_POINT,
    GridNumbers,
    clip,
    divide,
    snap,
    store,
    total,
    zeros_of,
)
from alphaquant.quant.columns.scales_triton import fit, fit_groups_kernel, load_panel
from alphaquant.quant.columns.state import Block, Groups, Rounding
from alphaquant.quant.format_rules import NV, Rule

PANEL = 16
"""P, columns of a panel: so many products per load of a change."""

ROWS = 64
"""R, rows of a program, one per thread: two warps."""

_SHAPE = {"PANEL": PANEL, "ROWS": ROWS, "num_warps": ROWS // 32, "maxnreg": 96}
_ERROR_MAX = tl.constexpr(2.0**100)


class BlockNumbers(NamedTuple):
    """Numbers that a block of columns reads and writes, float32; of a sweep and of GPTQ.

    Attributes:
        panels: [S, B, N], GPTQ: weights compensated for everything before the block; sweep: the
            residual R = H D. Both are brought up to date in place.
        original: [S, B, N], GPTQ: the weights; sweep: H_gg c_g of each group, or None.
        matrix: [S, B, B], GPTQ: U; sweep: H.
        importance: [S, B], GPTQ: weight of each column's squared error; sweep: None.
        centred: [S, B, N], c.
        delta: [S, B, N], D.
        changes: [S, B, N], room for what columns change.
        totals: GPTQ: the objective [S, N]; sweep: [S, B, N], room for what columns change, that
            of the scales included.
    """

    panels: Tensor
    original: Tensor | None
    matrix: Tensor
    importance: Tensor | None
    centred: Tensor
    delta: Tensor
    changes: Tensor
    totals: Tensor


class BlockScales(NamedTuple):
    """Scales of all groups.

    Attributes:
        scales: float32 [S, G, N].
        zeros: float32 [S, G, N].
        shared: float32 [S, P, N], what scales of neighbouring groups share, or None.
        groups: int64 [S, B] or [1, B], each column's group among all.
        per_shared: groups that share a number.
    """

    scales: Tensor
    zeros: Tensor
    shared: Tensor | None
    groups: Tensor
    per_shared: int


class Steps(NamedTuple):
    """Numbers from one stack to the next, and from one row of a matrix to the next.

    Attributes:
        panels: of `BlockNumbers.panels`.
        block: of a [S, B, N] that holds the block alone.
        columns: of [S, K, N], of which the block is a part.
        matrix: of the matrix.
        matrix_row: from one of its rows to the next.
        importance: of the importance.
        scales: of scales and zeros.
        shared: of what scales share.
        groups: of the groups; 0 where all stacks share them.
    """

    panels: int
    block: int
    columns: int
    matrix: int
    matrix_row: int
    importance: int
    scales: int
    shared: int
    groups: int


class GroupSteps(NamedTuple):
    """Numbers from one stack to the next, as `fit_groups_kernel` takes them."""

    columns: int
    importance: int
    shared: int
    scales: int


class GroupSizes(NamedTuple):
    """Sizes of `fit_groups_kernel`."""

    group_size: int
    n_rows: int
    first: int
    per_shared: int


@triton.jit
def _subtract(
    panel, changes, matrix, first, stop, columns, is_column, n_rows, row_size, at_rows, is_row
):
    """A panel less changes times matrix of the columns first .. stop - 1, [P, R]."""
    for j in range(first, stop):
        change = tl.load(changes + j * n_rows + at_rows, mask=is_row, other=0.0)  # [R]
        with_columns = tl.load(matrix + j * row_size + columns, mask=is_column, other=0.0)  # [P]
        panel -= with_columns[:, None] * change[None, :]
    return panel


@triton.jit
def _bring_up(
    panels, changes, matrix, run, end, n_rows, row_size, at_rows, is_row, PANEL: tl.constexpr
):
    """Bring the columns run .. end - 1 up to date with all changes before them, in place."""
    for first in range(run, end, PANEL):
        columns = first + tl.arange(0, PANEL)
        is_column = columns < end
        panel = load_panel(panels, columns, is_column, n_rows, at_rows, is_row)
        panel = _subtract(
            panel, changes, matrix, 0, run, columns, is_column, n_rows, row_size, at_rows, is_row
        )
        at = columns[:, None] * n_rows + at_rows[None, :]  # [P, R]
        tl.store(panels + at, panel, mask=is_column[:, None] & is_row[None, :])
    tl.debug_barrier()


@triton.jit
def _load_scales(scales, group, n_rows, at_rows, is_row, KIND: tl.constexpr):
    """Scales and zero points of a column, [R] each."""
    at = group * n_rows + at_rows
    scale = tl.load(scales.scales + at, mask=is_row, other=1.0)
    zero = zeros_of(scale)
    if KIND == ZERO_POINT:
        zero = tl.load(scales.zeros + at, mask=is_row, other=0.0)
    return scale, zero


@triton.jit
def _load_shared(scales, group, n_rows, at_rows, is_row):
    """What a group's scales share with others, [R]; 1 where nothing."""
    shared = tl.full(at_rows.shape, 1.0, tl.float32)
    if scales.shared is not None:
        at = scales.shared + group // scales.per_shared * n_rows + at_rows
        shared = tl.load(at, mask=is_row, other=1.0)
    return shared


@triton.jit
def _of_stack(scales, steps):
    """The scales of a program's stack."""
    stack = tl.program_id(1).to(tl.int64)
    shared = scales.shared
    if shared is not None:
        shared += stack * steps.shared
    return BlockScales(
        scales.scales + stack * steps.scales,
        scales.zeros + stack * steps.scales,
        shared,
        scales.groups + stack * steps.groups,
        scales.per_shared,
    )


@triton.jit(do_not_specialize=["n_rows", "row_step"])
def gptq_block_kernel(
    block,
    all_scales,
    numbers,
    steps,
    n_columns,  # B
    run_size,  # of a group whose scales are chosen here, else B
    n_rows,  # N
    row_step,  # 1
    KIND: tl.constexpr,
    FLAGS: tl.constexpr,  # SEARCHES, FITS, whether scales are chosen here
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round a block of columns with error compensation inside it; grid (ceil(N / R), S)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row, at_rows = rows < n_rows, rows * row_step
    stack = tl.program_id(1).to(tl.int64)
    scales = _of_stack(all_scales, steps)
    ahead, errors = block.panels + stack * steps.panels, block.changes + stack * steps.block
    original, upper = block.original + stack * steps.columns, block.matrix + stack * steps.matrix
    centred, delta = block.centred + stack * steps.columns, block.delta + stack * steps.columns
    size, places = steps.matrix_row, tl.arange(0, PANEL)
    objective = tl.full((ROWS,), 0.0, tl.float32)
    for run in range(0, n_columns, run_size):
        end = tl.minimum(run + run_size, n_columns)
        if run > 0:
            _bring_up(ahead, errors, upper, run, end, n_rows, size, at_rows, is_row, PANEL)
        if FLAGS[2]:
            group = tl.load(scales.groups + run)
            shared = _load_shared(scales, group, n_rows, at_rows, is_row)
            fitted, fitted_zero = fit(
                ahead + run * n_rows,
                block.importance + stack * steps.importance + run,
                end - run, n_rows, at_rows, is_row, shared, numbers,
                KIND, FLAGS[0], FLAGS[1], PANEL,
            )  # fmt: skip
            of_group = group * n_rows + at_rows
            tl.store(scales.scales + of_group, fitted, mask=is_row)
            tl.store(scales.zeros + of_group, fitted_zero, mask=is_row)
            tl.debug_barrier()
        for first in range(run, end, PANEL):
            columns = first + places
            is_column = columns < end
            panel = load_panel(ahead, columns, is_column, n_rows, at_rows, is_row)
            panel = _subtract(
                panel, errors, upper, run, first, columns, is_column, n_rows, size, at_rows,
                is_row,
            )  # fmt: skip
            for k in range(first, tl.minimum(first + PANEL, end)):
                x = total(tl.where(places[:, None] == k - first, panel, 0.0), 0)  # [R]
                group = tl.load(scales.groups + k)
                scale, zero = _load_scales(scales, group, n_rows, at_rows, is_row, KIND)
                code = snap(divide(x, scale) + zero, numbers, KIND) - zero
                q = code * scale
                error = divide(x - q, zeros_of(x) + tl.load(upper + k * size + k))
                error = clip(error, -_ERROR_MAX, _ERROR_MAX)
                at = k * n_rows + at_rows
                before = tl.load(original + at, mask=is_row, other=0.0)
                tl.store(centred + at, code, mask=is_row)
                tl.store(delta + at, before - q, mask=is_row)
                tl.store(errors + at, error, mask=is_row)
                objective += error * error
                right = tl.load(upper + k * size + columns, mask=is_column, other=0.0)  # [P]
                panel -= right[:, None] * error[None, :]
            tl.debug_barrier()
    told = block.totals + stack * n_rows + at_rows
    tl.store(told, tl.load(told, mask=is_row, other=0.0) + objective, mask=is_row)


@triton.jit
def _fit_run(
    residual, products, scales, numbers, centred, delta, totals, run, end, n_rows, at_rows,
    is_row, KIND: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """The best scale for a group's codes, where it helps after rounding to what is stored.

    With a step d of the scale the objective changes by d (d A - 2 r), A = c' H c, r = c' R.
    """
    curvature = zeros_of(at_rows)
    slope = curvature
    for first in range(run, end, PANEL):
        columns = first + tl.arange(0, PANEL)
        is_column = columns < end
        code = load_panel(centred, columns, is_column, n_rows, at_rows, is_row)
        product = load_panel(products, columns, is_column, n_rows, at_rows, is_row)
        own = load_panel(residual, columns, is_column, n_rows, at_rows, is_row)
        curvature += total(code * product, 0)
        slope += total(code * own, 0)
    group = tl.load(scales.groups + run)
    shared = _load_shared(scales, group, n_rows, at_rows, is_row)
    at = group * n_rows + at_rows
    known = tl.load(scales.scales + at, mask=is_row, other=1.0)
    is_curved = curvature > 0.0
    solved = known + divide(slope, tl.where(is_curved, curvature, 1.0))
    is_usable = is_curved & (tl.abs(solved) < _ERROR_MAX) & (solved != 0.0)
    step = store(tl.where(is_usable, solved, known), shared, numbers, KIND) - known
    step = tl.where((step * curvature - 2.0 * slope) * step < 0.0, step, 0.0)
    tl.store(scales.scales + at, known + step, mask=is_row)
    for first in range(run, end, PANEL):
        columns = first + tl.arange(0, PANEL)
        is_column = columns < end
        mask = is_column[:, None] & is_row[None, :]
        places = columns[:, None] * n_rows + at_rows[None, :]  # [P, R]
        change = step[None, :] * tl.load(centred + places, mask=mask, other=0.0)
        tl.store(totals + places, change, mask=mask)
        before = tl.load(delta + places, mask=mask, other=0.0)
        tl.store(delta + places, before - change, mask=mask)
        product = tl.load(products + places, mask=mask, other=0.0)
        own = tl.load(residual + places, mask=mask, other=0.0)
        tl.store(residual + places, own - step[None, :] * product, mask=mask)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_rows", "row_step"])
def sweep_block_kernel(
    block,
    all_scales,
    numbers,
    steps,
    n_columns,  # B
    run_size,  # of a group whose scale is fitted here, else B
    n_rows,  # N
    row_step,  # 1
    KIND: tl.constexpr,
    FITS: tl.constexpr,  # whether scales are fitted here
    PANEL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One pass of scales and codes over a block of columns; grid (ceil(N / R), S)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row, at_rows = rows < n_rows, rows * row_step
    stack = tl.program_id(1).to(tl.int64)
    scales = _of_stack(all_scales, steps)
    residual, changes = block.panels + stack * steps.panels, block.changes + stack * steps.block
    totals, hessian = block.totals + stack * steps.block, block.matrix + stack * steps.matrix
    centred, delta = block.centred + stack * steps.columns, block.delta + stack * steps.columns
    size, places = steps.matrix_row, tl.arange(0, PANEL)
    for run in range(0, n_columns, run_size):
        end = tl.minimum(run + run_size, n_columns)
        if run > 0:
            _bring_up(residual, totals, hessian, run, end, n_rows, size, at_rows, is_row, PANEL)
        if FITS:
            products = block.original + stack * steps.block
            _fit_run(
                residual, products, scales, numbers, centred, delta, totals, run, end, n_rows,
                at_rows, is_row, KIND, PANEL,
            )  # fmt: skip
        for first in range(run, end, PANEL):
            columns = first + places
            is_column = columns < end
            panel = load_panel(residual, columns, is_column, n_rows, at_rows, is_row)
            panel = _subtract(
                panel, changes, hessian, run, first, columns, is_column, n_rows, size, at_rows,
                is_row,
            )  # fmt: skip
            for k in range(first, tl.minimum(first + PANEL, end)):
                own = total(tl.where(places[:, None] == k - first, panel, 0.0), 0)  # [R]
                group = tl.load(scales.groups + k)
                scale, zero = _load_scales(scales, group, n_rows, at_rows, is_row, KIND)
                at = k * n_rows + at_rows
                known = tl.load(centred + at, mask=is_row, other=0.0)
                curvature = zeros_of(own) + tl.load(hessian + k * size + k)
                best = known * scale + divide(own, curvature)
                code = snap(divide(best, scale) + zero, numbers, KIND) - zero
                change = (code - known) * scale
                before = tl.load(delta + at, mask=is_row, other=0.0)
                tl.store(centred + at, code, mask=is_row)
                tl.store(delta + at, before - change, mask=is_row)
                tl.store(changes + at, change, mask=is_row)
                if FITS:
                    by_scale = tl.load(totals + at, mask=is_row, other=0.0)
                    tl.store(totals + at, by_scale + change, mask=is_row)
                right = tl.load(hessian + k * size + columns, mask=is_column, other=0.0)  # [P]
                panel -= right[:, None] * change[None, :]
            tl.debug_barrier()


class TritonLoops:
    """The loops on the device of the tensors, one launch for all stacks; a `ColumnLoops`."""

    def fit_groups(
        self, rounding: Rounding, groups: Groups, first: int, weight: Tensor, importance: Tensor
    ) -> None:
        """Choose scales and zeros of neighbouring groups from all of their columns."""
        weight = _stacked(weight)
        scales, zeros = (_stacked(x)[:, first:] for x in (rounding.scales, rounding.zeros))
        n_stacks, n_columns, n_rows = weight.shape
        weights = importance.expand(n_stacks, -1)
        n_groups, shared = triton.cdiv(n_columns, groups.size), _shared(rounding, groups)
        fit_groups_kernel[(triton.cdiv(n_rows, ROWS), n_groups, n_stacks)](
            *(weight, weights, shared, scales, zeros),
            _numbers_of(groups.rule, weight.device),
            GroupSteps(weight.stride(0), weights.stride(0), _step_of(shared), scales.stride(0)),
            GroupSizes(groups.size, n_rows, first, groups.per_shared),
            *(n_columns, 1),
            KIND=groups.rule.kind,
            FLAGS=_flags(groups.rule),
            **_SHAPE,
        )

    def gptq_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        ahead: Tensor,
        weight: Tensor,
        upper: Tensor,
        importance: Tensor | None,
    ) -> None:
        """Round one block of columns with error compensation inside the block."""
        columns, ahead = slice(*block), _stacked(ahead)
        numbers = BlockNumbers(
            panels=ahead,
            original=_stacked(weight)[:, columns],
            matrix=_stacked(upper),
            importance=None if importance is None else _stacked(importance, 2),
            centred=_stacked(rounding.centred)[:, columns],
            delta=_stacked(rounding.delta)[:, columns],
            changes=torch.empty(ahead.shape, device=ahead.device),
            totals=_stacked(rounding.objective, 2),
        )
        flags = (*_flags(groups.rule), importance is not None)
        _launch(
            gptq_block_kernel, numbers, rounding, groups, block, FLAGS=flags, is_whole=not flags[2]
        )

    def sweep_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        residual: Tensor,
        hessian: Tensor,
        products: Tensor | None,
    ) -> None:
        """One pass of scales and codes over a block of columns."""
        columns, residual = slice(*block), _stacked(residual)
        is_fitted = products is not None
        changes = torch.empty(residual.shape, device=residual.device)
        numbers = BlockNumbers(
            panels=residual,
            original=_stacked(products) if is_fitted else None,
            matrix=_stacked(hessian),
            importance=None,
            centred=_stacked(rounding.centred)[:, columns],
            delta=_stacked(rounding.delta)[:, columns],
            changes=changes,
            totals=torch.empty_like(changes) if is_fitted else changes,
        )
        _launch(
            sweep_block_kernel,
            *(numbers, rounding, groups, block),
            FITS=is_fitted,
            is_whole=not is_fitted,
        )

    def sweep_rows(
        self,
        rounding: Rounding,
        groups: Groups,
        part: tuple[Block, Block],
        residual: Tensor,
        matrices: tuple[Tensor, Tensor],
        products: Tensor | None,
    ) -> Tensor:
        """One pass over a block of columns, coupled rows one after the other."""
        block, (start, stop) = part
        columns, residual = slice(*block), _stacked(residual)
        centred, delta = (_stacked(x)[:, columns] for x in (rounding.centred, rounding.delta))
        changes = torch.empty_like(residual)
        own, shared = _stacked(groups.of_columns, 2)[:, columns], _shared(rounding, groups)
        scales, zeros = _stacked(rounding.scales), _stacked(rounding.zeros)
        n_columns, (coupling, hessian) = block[1] - block[0], map(_stacked, matrices)
        given = None if products is None else _stacked(products)
        sweep_rows_kernel[(len(residual),)](
            RowNumbers(residual, coupling, hessian, given, centred, delta, changes),
            RowScales(
                *(scales, zeros, shared, own, groups.per_shared),
                *(scales.stride(0), _step_of(shared), own.stride(0) if len(own) > 1 else 0),
            ),
            _numbers_of(groups.rule, residual.device),
            *(n_columns, n_columns if products is None else groups.size),
            *(stop - start, start, delta.shape[-1], delta.stride(0)),
            KIND=groups.rule.kind,
            FITS=products is not None,
            LANES=triton.next_power_of_2(n_columns),
            num_warps=2,
        )
        return changes if rounding.delta.dim() == changes.dim() else changes[0]


def _launch(
    kernel: Any,
    numbers: BlockNumbers,
    rounding: Rounding,
    groups: Groups,
    block: Block,
    *,
    is_whole: bool,
    **constants: Any,
) -> None:
    """Go through a block, all at once or group after group."""
    n_stacks, n_columns, n_rows = numbers.panels.shape
    own = _stacked(groups.of_columns, 2)[:, slice(*block)]
    shared = _shared(rounding, groups)
    scales = BlockScales(
        *(_stacked(rounding.scales), _stacked(rounding.zeros)), shared, own, groups.per_shared
    )
    assert (
        numbers.matrix.stride(2) == numbers.delta.stride(2) == 1
        and numbers.changes.is_contiguous()
    )
    steps = Steps(
        panels=numbers.panels.stride(0),
        block=n_columns * n_rows,
        columns=numbers.delta.stride(0),
        matrix=numbers.matrix.stride(0),
        matrix_row=numbers.matrix.stride(1),
        importance=0 if numbers.importance is None else numbers.importance.stride(0),
        scales=scales.scales.stride(0),
        shared=_step_of(shared),
        groups=own.stride(0) if len(own) > 1 else 0,
    )
    kernel[(triton.cdiv(n_rows, ROWS), n_stacks)](
        *(numbers, scales, _numbers_of(groups.rule, rounding.delta.device), steps),
        *(n_columns, n_columns if is_whole else groups.size, n_rows, 1),
        KIND=groups.rule.kind,
        **constants,
        **_SHAPE,
    )


def _stacked(x: Tensor, n_dims: int = 3) -> Tensor:
    """With a first dimension of stacks."""
    return x if x.dim() == n_dims else x.unsqueeze(0)


def _shared(rounding: Rounding, groups: Groups) -> Tensor | None:
    has_shared = groups.rule.kind == NV or groups.rule.is_multiple
    return _stacked(rounding.shared) if has_shared else None


def _step_of(shared: Tensor | None) -> int:
    """Numbers from one stack to the next."""
    return 0 if shared is None else shared.stride(0)


def _flags(rule: Rule) -> tuple[bool, bool]:
    """SEARCHES and FITS of `fit`."""
    return len(rule.factors) > 1 or rule.weighted, bool(rule.fits)


def _numbers_of(rule: Rule, device: torch.device) -> GridNumbers:
    numbers = (rule.low, rule.high, rule.least, rule.step, rule.unit)
    factors = _numbers_on(tuple(rule.factors.tolist()), device)
    table = middles = None
    if len(rule.table):
        table = _numbers_on(tuple(rule.table.tolist()), device)
        middles = _numbers_on(tuple(rule.middles.tolist()), device)
    return GridNumbers(
        *(factors, len(factors)),
        *map(float, numbers),
        *(table, middles, len(rule.middles), 1 if rule.is_multiple else None),
    )


@lru_cache(maxsize=64)  # a copy to the device would be a launch, and a wait for it
def _numbers_on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)
