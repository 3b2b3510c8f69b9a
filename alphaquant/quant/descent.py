"""GPTQ and coordinate descent on one matrix, organised around matrix products.

The steps are those of `rounding.quantize_gptq` (Frantar et al. 2022, arXiv 2210.17323) and of
`refine.refine` (cyclic coordinate descent; QuantEase, Behdin et al. 2023, arXiv 2309.01885), and
so is the result up to rounding errors of sums; what differs is how it is computed.

    GPTQ    Left-looking: before block b starts, all that its weights have to be compensated for is
            one product, (D_<b V_<b,b) U_bb, where D = W - Q is what was rounded so far.
    sweep   R_b = H_b D is one product per block, with D as it is by then; no residual is kept. The
            scales of a group are fitted when its block is reached, then its codes.
    errors  f = tr(D H D') of every row, from the products of the last sweep: with D_<b final
            before block b, f = sum over b of 2 D_b' (H_b,<b D_<b) + D_b' H_bb D_b.

Two starts with three sweeps are 14 N K^2 multiplications with inner dimensions up to K. Inside a
block the loops are `columns_numba.py`'s. Rows are independent, so a matrix may be cut along its
rows and the parts rounded at the same time.

Letters: N rows, K columns, G groups of columns; everything is transposed, [K, N].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphaquant.quant import columns_numba as loops
from alphaquant.quant.codecs import scale_step
from alphaquant.quant.factor import Block, DampedHessian, Factor
from alphaquant.quant.format_rules import Rule

BLOCK = 128
"""Columns of a block, at most: a tile of 64 rows of it fills two thirds of a first-level cache."""
_NOTHING = torch.empty(0)
_EXTREME = 2.0**60
"""Weights beyond this are rounded without compensation: their errors would leave float32."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ColumnPlan:
    """How the columns of a matrix are cut for a format.

    Attributes:
        n_cols: K.
        group_size: columns of a group; the last may be short.
        block_size: columns of a block, at most; speed only.
    """

    n_cols: int
    group_size: int
    block_size: int = BLOCK

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks that hold whole groups, or lie inside one.

        Example: 200 columns in groups of 96 -> (0, 96), (96, 192), (192, 200); in groups of 150 ->
            (0, 128), (128, 150), (150, 200).
        """
        groups_per_block = self.block_size // self.group_size
        run = self.group_size * max(groups_per_block, 1)
        step = run if groups_per_block else self.block_size
        return tuple(
            (start, min(run_start + run, self.n_cols, start + step))
            for run_start in range(0, self.n_cols, run)
            for start in range(run_start, min(run_start + run, self.n_cols), step)
        )

    @property
    def groups_fit(self) -> bool:
        """Whether blocks hold whole groups."""
        return self.group_size <= self.block_size

    @cached_property
    def group_of(self) -> Integers:
        """Each column's group, int64 [K]."""
        return np.arange(self.n_cols, dtype=np.int64) // self.group_size

    @cached_property
    def begins(self) -> Integers:
        """Columns of the group that begins at a column, 0 elsewhere; int64 [K]."""
        found = np.zeros(self.n_cols, dtype=np.int64)
        for start, stop in self.groups:
            found[start] = stop - start
        return found

    @property
    def groups(self) -> Iterator[Block]:
        """First column and the one after the last of every group."""
        for start in range(0, self.n_cols, self.group_size):
            yield start, min(self.n_cols, start + self.group_size)


@dataclass(frozen=True)
class Rounding:
    """A matrix rounded to a format, transposed, while it is worked on.

    Attributes:
        centred: float32 [K, N], codes less their zero points.
        delta: float32 [K, N], D, what rounding took away from the weights.
        scales: float32 [G, N].
        zeros: float32 [G, N], 0 for symmetric formats.
        objective: float32 [N], tr(D H D') of every row; squared errors of the weights without H,
            infinite for rows that GPTQ leaves out.
    """

    centred: Tensor
    delta: Tensor
    scales: Tensor
    zeros: Tensor
    objective: Tensor

    def rows(self, rows: slice) -> "Rounding":
        """Some of its rows."""
        return Rounding(*(getattr(self, f.name)[..., rows] for f in fields(self)))

    def values(self, group_size: int) -> Tensor:
        """Grid values, zero points included, [K, N]."""
        spread = self.zeros.repeat_interleave(group_size, 0)
        return self.centred + spread[: len(self.centred)]


@dataclass(frozen=True)
class Rounder:
    """Rounds matrices of one width to one format.

    Attributes:
        rule: of the format.
        plan: of the columns.
        shared: float32 [N], nvfp4's scale per matrix; empty for all other formats.
    """

    rule: Rule
    plan: ColumnPlan
    shared: Tensor

    def nearest(self, weight: Tensor) -> Rounding:
        """Round every group to nearest; needs no Hessian.

        Args:
            weight: float32 [K, N], contiguous.
        """
        rounding = self._fit_all(weight)
        for start, stop in self.plan.blocks:
            eye = torch.eye(stop - start)
            ahead = weight[start:stop]
            self._block(rounding, ahead, weight, (start, stop), eye, self.plan.group_of, None)
        return rounding

    def gptq(
        self, weight: Tensor, factor: Factor, inverses: Sequence[Tensor], *, static: bool
    ) -> Rounding:
        """Round with error compensation, column by column.

        Args:
            weight: float32 [K, N], contiguous, in the natural order.
            factor: of the Hessian.
            inverses: U_bb of the plan's blocks, from `factor.diagonal_inverses`.
            static: choose all scales from the original weights. Always so in another order of
                columns: groups stay runs of neighbouring inputs, and no index has to be stored.
        """
        natural, is_static = weight, static or factor.order is not None
        rounding = self._fit_all(weight) if is_static else self._empty(weight)
        groups, order = self.plan.group_of, factor.order
        if order is not None:
            weight, groups = weight[order], groups[order.numpy()]
        V, D = factor.upper, rounding.delta
        half = None if factor.half is None else torch.empty_like(D, dtype=torch.bfloat16)
        for (start, stop), U in zip(self.plan.blocks, inverses, strict=True):
            importance = None
            if not is_static and self.plan.groups_fit:
                importance = self._importance(V, (start, stop))
            elif not is_static and self.plan.begins[start]:
                group = (start, start + int(self.plan.begins[start]))
                ahead = self._ahead(weight, D, V, group)
                self._fit_one(rounding, int(groups[start]), ahead, self._importance(V, group))
            ahead = weight[start:stop]
            if start:
                left, done = (V, D) if half is None or factor.half is None else (factor.half, half)
                pending = left[:start, start:stop].T @ done[:start]
                ahead = torch.addmm(ahead, U.T, pending.float())
            self._block(rounding, ahead, weight, (start, stop), U, groups, importance)
            if half is not None:
                half[start:stop] = D[start:stop]
        if order is not None:
            rounding = _natural(rounding, order)
        return self._without_extremes(rounding, natural)

    def _without_extremes(self, rounding: Rounding, weight: Tensor) -> Rounding:
        """Rows near the end of bfloat16's range, where errors overflow, rounded to nearest."""
        is_extreme = weight.abs().amax(0) > _EXTREME
        if not bool(is_extreme.any()):
            return rounding
        nearest = self.nearest(weight)
        # Its objective is of other units: whatever descent can express is better.
        beyond = torch.full_like(nearest.objective, torch.inf)
        return choose_rows(is_extreme, replace(nearest, objective=beyond), rounding)

    def refine(self, start: Rounding, hessian: DampedHessian, n_sweeps: int) -> Rounding:
        """Lower the objective by sweeps of scales and codes.

        Products of all sweeps but the last are in bfloat16 where the Hessian has them; the last is
        in float32, and so is the objective by which rows are chosen.

        Args:
            start: where to start, in the natural order.
            hessian: damped.
            n_sweeps: how often; 0 returns the start.

        Returns:
            The refined rounding, and the start in rows whose objective is not lower then (weights
            near the end of bfloat16's range, whose errors are beyond float32).
        """
        if not n_sweeps:
            return start
        found = replace(
            start,
            centred=start.centred.clone(),
            delta=start.delta.clone(),
            scales=start.scales.clone(),
            objective=torch.zeros_like(start.objective),
        )
        half = None
        if hessian.half is not None and n_sweeps > 1:
            half = _Half(hessian.half, found.delta.to(torch.bfloat16))
        for sweep in range(n_sweeps):
            is_last = sweep == n_sweeps - 1
            for block in self.plan.blocks:
                own = None if is_last else half
                self._sweep_block(found, hessian.matrix, block, own, is_last=is_last)
        return better_rows(start, found)

    def _sweep_block(
        self, rounding: Rounding, H: Tensor, block: Block, half: "_Half | None", *, is_last: bool
    ) -> None:
        """Scales and codes of one block; the last sweep also adds up the objective."""
        start, stop = block
        D, C = rounding.delta, rounding.centred
        has_begun = bool(self.plan.begins[start])
        if self.rule.fits and not self.plan.groups_fit and has_begun:
            self._fit_large(rounding, H, start)
        own = H[start:stop, start:stop].contiguous()
        if is_last:
            before = H[start:stop, :start] @ D[:start]
            residual = torch.addmm(before, H[start:stop, start:], D[start:])
        elif half is not None:
            residual = (half.hessian[start:stop] @ half.delta).float()
        else:
            residual = H[start:stop] @ D
        fits_here = self.rule.fits and self.plan.groups_fit
        loops.sweep_block(
            _flat(residual),
            _flat(own),
            _flat(self._products(own, C[start:stop], block) if fits_here else _NOTHING),
            self._runs(block, fits_here),
            self.plan.group_of[start:stop],
            D.shape[1],
            self.rule,
            _flat(rounding.scales),
            _flat(rounding.zeros),
            _flat(C[start:stop]),
            _flat(D[start:stop]),
        )
        if half is not None:
            half.delta[start:stop] = D[start:stop]
        if is_last:
            after = D[start:stop]
            rounding.objective.add_((after * (2 * before + own @ after)).sum(0))

    def _products(self, own: Tensor, centred: Tensor, block: Block) -> Tensor:
        """H_gg c_g of the groups of a block, [B, N]."""
        found = torch.empty_like(centred)
        start, stop = block
        for first in range(0, stop - start, self.plan.group_size):
            group = slice(first, min(stop - start, first + self.plan.group_size))
            torch.mm(own[group, group], centred[group], out=found[group])
        return found

    def _runs(self, block: Block, fits_here: bool) -> Integers:
        """Ends of what is gone through together: groups, or the whole block; int64 [B]."""
        start, stop = block
        ends = np.zeros(stop - start, dtype=np.int64)
        size = self.plan.group_size if fits_here else stop - start
        for first in range(0, stop - start, size):
            ends[first] = min(stop - start, first + size)
        return ends

    def _fit_large(self, rounding: Rounding, H: Tensor, start: int) -> None:
        """The best scale of a group that does not fit in a block, where it helps."""
        stop = start + int(self.plan.begins[start])
        C, D = rounding.centred[start:stop], rounding.delta
        curvature = (C * (H[start:stop, start:stop] @ C)).sum(0)  # [N]
        slope = (C * (H[start:stop] @ D)).sum(0)
        known = rounding.scales[start // self.plan.group_size]
        step = scale_step(known, curvature, slope)
        known += step
        D[start:stop] -= step * C

    def _block(
        self,
        rounding: Rounding,
        ahead: Tensor,
        weight: Tensor,
        block: Block,
        inverse: Tensor,
        groups: Integers,
        importance: Floats | None,
    ) -> None:
        """Round a block of columns; scales are chosen here where columns have an importance."""
        start, stop = block
        n_columns = stop - start
        loops.gptq_block(
            _flat(ahead),
            _flat(weight[start:stop]),
            _flat(inverse),
            np.zeros(n_columns, np.int64) if importance is None else self.plan.begins[start:stop],
            groups[start:stop],
            np.ones(n_columns, np.float32) if importance is None else importance,
            ahead.shape[1],
            self.rule,
            self.shared.numpy(),
            _flat(rounding.scales),
            _flat(rounding.zeros),
            _flat(rounding.centred[start:stop]),
            _flat(rounding.delta[start:stop]),
            rounding.objective.numpy(),
        )

    def _importance(self, upper: Tensor, block: Block) -> Floats:
        """Cost of columns' squared errors, 1 / U_cc^2 relative to their group's first; [B].

        Relative, so that it is exactly one where all are equal and GPTQ with H = I is exactly RTN.
        """
        start, stop = block
        if not self.rule.weighted:
            return np.ones(stop - start, np.float32)
        diagonal = upper.diagonal().numpy()  # V_cc = 1 / U_cc
        first = self.plan.group_of[start:stop] * self.plan.group_size
        found: Floats = np.square(diagonal[start:stop] / diagonal[first])
        return found

    def _ahead(self, weight: Tensor, delta: Tensor, upper: Tensor, group: Block) -> Tensor:
        """A large group's weights, compensated for everything before it; [g, N]."""
        start, stop = group
        if not start:
            return weight[start:stop]
        pending = upper[:start, start:stop].T @ delta[:start]  # [g, N]
        own = upper[start:stop, start:stop].T  # lower
        compensation: Tensor = torch.linalg.solve_triangular(own, pending, upper=False)
        return (weight[start:stop] + compensation).contiguous()

    def _fit_all(self, weight: Tensor) -> Rounding:
        """A rounding whose scales are chosen from the given weights, and nothing is rounded."""
        rounding = self._empty(weight)
        for index, (start, stop) in enumerate(self.plan.groups):
            self._fit_one(rounding, index, weight[start:stop], np.ones(stop - start, np.float32))
        return rounding

    def _fit_one(self, rounding: Rounding, index: int, weight: Tensor, importance: Floats) -> None:
        loops.fit_group(
            _flat(weight),
            importance,
            weight.shape[1],
            self.rule,
            self.shared.numpy(),
            rounding.scales[index].numpy(),
            rounding.zeros[index].numpy(),
        )

    def _empty(self, weight: Tensor) -> Rounding:
        n_groups = len(range(0, self.plan.n_cols, self.plan.group_size))
        return Rounding(
            torch.empty_like(weight),
            torch.empty_like(weight),
            torch.zeros(n_groups, weight.shape[1]),
            torch.zeros(n_groups, weight.shape[1]),
            torch.zeros(weight.shape[1]),
        )


@dataclass(frozen=True)
class _Half:
    """H and D in bfloat16, [K, K] and [K, N]."""

    hessian: Tensor
    delta: Tensor


def better_rows(first: Rounding, second: Rounding) -> Rounding:
    """Each row from whichever of two roundings to one format has the lower objective.

    Args:
        first: kept where both are equal, or the second's objective is no number.
        second: with the same scale per matrix (nvfp4).
    """
    return choose_rows(second.objective < first.objective, second, first)


def choose_rows(condition: Tensor, yes: Rounding, no: Rounding) -> Rounding:
    """Rows of one rounding where a condition [N] holds, of the other elsewhere."""
    pairs = [(getattr(yes, f.name), getattr(no, f.name)) for f in fields(Rounding)]
    return Rounding(*(torch.where(condition, a, b) for a, b in pairs))


def join_rows(parts: Sequence[Rounding]) -> Rounding:
    """Parts of a matrix's rows as one."""
    columns = [[getattr(part, f.name) for part in parts] for f in fields(Rounding)]
    return Rounding(*(torch.cat(tensors, -1) for tensors in columns))


def _natural(rounding: Rounding, order: Tensor) -> Rounding:
    """Columns back from the order of processing."""

    def back(columns: Tensor) -> Tensor:
        found = torch.empty_like(columns)
        found[order] = columns
        return found

    return replace(rounding, centred=back(rounding.centred), delta=back(rounding.delta))


def _flat(x: Tensor) -> Floats:
    """The numbers of a contiguous tensor, which the loops may write; never a copy."""
    found: Floats = x.view(-1).numpy()
    return found
