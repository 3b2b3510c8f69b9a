"""GPTQ and coordinate descent on matrices of one shape, organised around matrix products.

The steps are those of `rounding.quantize_gptq` (Frantar et al. 2022, arXiv 2210.17323) and of
`refine.refine` (cyclic coordinate descent; QuantEase, Behdin et al. 2023, arXiv 2309.01885), and
so is the result up to rounding errors of sums; what differs is how it is computed.

    GPTQ    Left-looking: before block b starts, all that its weights have to be compensated for is
            one product, (D_<b V_<b,b) U_bb, where D = W - Q is what was rounded so far.
    sweep   R_b = H_b D is one product per block, with D as it is by then; no residual is kept. The
            scales of a group are fitted when its block is reached, then its codes; before that a
            super-scale, when its first block is reached, by a product of its own.
    errors  f = tr(D H D') of every row, from the products of the last sweep: with D_<b final
            before block b, f = sum over b of 2 D_b' (H_b,<b D_<b) + D_b' H_bb D_b.

Two starts with three sweeps are 14 N K^2 multiplications with inner dimensions up to K. Products
are torch's on the device of the tensors; inside a block the loops are those of
`alphaquant.quant.columns`. Rows are independent, so a matrix may be cut along its rows and the
parts rounded at the same time. So are stacks: with a first dimension of S, every product and every
loop is one call for all of them, and how many calls there are does not depend on S or N.

Letters: S stacks, N rows, K columns, G groups of columns; everything is transposed, [.., K, N],
where the first dimension of S is optional.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from alphaquant.quant.codecs import StoredScales, choose_super_scales, scale_step
from alphaquant.quant.columns.column_loops import ColumnLoops, NumbaLoops
from alphaquant.quant.columns.state import Block, Groups, Rounding, better_rows, choose_rows
from alphaquant.quant.factor import DampedHessian, Factor
from alphaquant.quant.format_rules import TABLE, Rule

BLOCK = 128
"""Columns of a block, at most: a tile of 64 rows of it fills two thirds of a first-level cache."""
_EXTREME = 2.0**60
"""Weights beyond this are rounded without compensation: their errors would leave float32."""


@dataclass(frozen=True)
class ColumnPlan:
    """How the columns of a matrix are cut for a format.

    Attributes:
        n_cols: K.
        group_size: columns of a group; the last may be short.
        block_size: columns of a block, at most; speed only.
        super_size: columns of a super-block, a multiple of the group by a power of two; 0 without.
    """

    n_cols: int
    group_size: int
    block_size: int = BLOCK
    super_size: int = 0

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Blocks that hold whole groups, or lie inside one; none crosses a super-block.

        Example: 200 columns in groups of 96 -> (0, 96), (96, 192), (192, 200); in groups of 150 ->
            (0, 128), (128, 150), (150, 200).
        """
        groups_per_block = self.block_size // self.group_size
        if self.super_size and groups_per_block:
            most = min(groups_per_block, self.super_size // self.group_size)
            groups_per_block = 1 << most.bit_length() - 1
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

    def group_of(self, device: torch.device) -> Tensor:
        """Each column's group, int64 [K]."""
        return torch.arange(self.n_cols, device=device) // self.group_size

    @property
    def groups(self) -> Iterator[Block]:
        """First column and the one after the last of every group."""
        for start in range(0, self.n_cols, self.group_size):
            yield start, min(self.n_cols, start + self.group_size)

    @property
    def groups_per_shared(self) -> int:
        """Groups that have a scale in common where formats have such: of a super-block, or all."""
        if self.super_size:
            return self.super_size // self.group_size
        return -(-self.n_cols // self.group_size)

    def super_at(self, column: int) -> Block | None:
        """The super-block that begins at a column, None where none does."""
        if not self.super_size or column % self.super_size:
            return None
        return column, min(self.n_cols, column + self.super_size)

    def group_at(self, column: int) -> Block | None:
        """The group that begins at a column, None where none does."""
        if column % self.group_size:
            return None
        return column, min(self.n_cols, column + self.group_size)


@dataclass(frozen=True)
class Rounder:
    """Rounds matrices of one width to one format.

    Attributes:
        rule: of the format.
        plan: of the columns.
        shared: float32 [.., N], nvfp4's scale per matrix; empty for all other formats.
        loops: those of the device of all tensors.
    """

    rule: Rule
    plan: ColumnPlan
    shared: Tensor
    loops: ColumnLoops = field(default_factory=NumbaLoops)

    def nearest(self, weight: Tensor) -> Rounding:
        """Round every group to nearest; needs no Hessian.

        Args:
            weight: float32 [.., K, N], contiguous.
        """
        rounding = self._fit_all(weight, None)
        groups, n_stacks = self.groups(weight.device), weight.shape[:-2]
        for start, stop in self.plan.blocks:
            eye = torch.eye(stop - start, device=weight.device).expand(*n_stacks, -1, -1)
            ahead = weight[..., start:stop, :]
            self.loops.gptq_block(rounding, groups, (start, stop), ahead, weight, eye, None)
        return rounding

    def gptq(
        self, weight: Tensor, factor: Factor, inverses: Sequence[Tensor], *, static: bool
    ) -> Rounding:
        """Round with error compensation, column by column.

        Args:
            weight: float32 [.., K, N], contiguous, in the natural order.
            factor: of the Hessians.
            inverses: U_bb of the plan's blocks, from `factor.diagonal_inverses`.
            static: choose all scales from the original weights. Always so in another order of
                columns: groups stay runs of neighbouring inputs, and no index has to be stored.
        """
        natural, is_static = weight, static or factor.order is not None
        rounding = self._fit_all(weight, factor) if is_static else self._begun(weight, factor)
        groups, order = self.groups(weight.device), factor.order
        if order is not None:
            weight = _in_order(weight, order)
            groups = replace(groups, of_columns=groups.of_columns[order])
        importance = None if is_static else self._importance(factor.upper)
        D = rounding.delta
        half = None if factor.half is None else torch.empty_like(D, dtype=torch.bfloat16)
        for (start, stop), U in zip(self.plan.blocks, inverses, strict=True):
            own = None
            if importance is not None and self.plan.groups_fit:
                own = importance[..., start:stop]
            elif importance is not None:
                self._fit_begun(rounding, weight, factor.upper, start, importance)
            ahead = self._ahead(weight, D, factor, half, (start, stop), U)
            self.loops.gptq_block(rounding, groups, (start, stop), ahead, weight, U, own)
            if half is not None:
                half[..., start:stop, :] = D[..., start:stop, :]
        if order is not None:
            rounding = _natural(rounding, order)
        return self._without_extremes(rounding, natural)

    def _ahead(
        self,
        weight: Tensor,
        delta: Tensor,
        factor: Factor,
        half: Tensor | None,
        block: Block,
        inverse: Tensor,
    ) -> Tensor:
        """A block's weights, compensated for everything before it; [.., B, N], not shared."""
        start, stop = block
        ahead = weight[..., start:stop, :]
        if not start:
            return ahead.clone(memory_format=torch.contiguous_format)
        left, done = factor.upper, delta
        if half is not None and factor.half is not None:
            left, done = factor.half, half
        pending = _product(left[..., :start, start:stop].mT, done[..., :start, :]).float()
        return _add_product(ahead, inverse.mT, pending)

    def _without_extremes(self, rounding: Rounding, weight: Tensor) -> Rounding:
        """Rows near the end of bfloat16's range, where errors overflow, rounded to nearest."""
        is_extreme = weight.abs().amax(-2) > _EXTREME
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
            shared=start.shared.clone(),
            objective=torch.zeros_like(start.objective),
        )
        half = None
        if hessian.half is not None and n_sweeps > 1:
            half = _Half(hessian.half, found.delta.to(torch.bfloat16))
        groups = self.groups(start.delta.device)
        for sweep in range(n_sweeps):
            is_last = sweep == n_sweeps - 1
            for block in self.plan.blocks:
                own = None if is_last else half
                self._sweep_block(found, hessian.matrix, groups, block, own, is_last=is_last)
        return better_rows(start, found)

    def _sweep_block(
        self,
        rounding: Rounding,
        H: Tensor,
        groups: Groups,
        block: Block,
        half: "_Half | None",
        *,
        is_last: bool,
    ) -> None:
        """Scales and codes of one block; the last sweep also adds up the objective."""
        start, stop = block
        D = rounding.delta
        if self.rule.is_multiple:
            self._fit_super_scale(rounding, H, start, half)
        if self.rule.fits and not self.plan.groups_fit:
            self._fit_large(rounding, H, start)
        own, before = H[..., start:stop, start:stop], None
        if is_last:
            before = _product(H[..., start:stop, :start], D[..., :start, :])
            residual = _add_product(before, H[..., start:stop, start:], D[..., start:, :])
        elif half is not None:
            residual = _product(half.hessian[..., start:stop, :], half.delta).float()
        else:
            residual = _product(H[..., start:stop, :], D)
        products = None
        if self.rule.fits and self.plan.groups_fit:
            products = self.products(own, rounding.centred[..., start:stop, :])
        self.loops.sweep_block(rounding, groups, block, residual, own, products)
        after = D[..., start:stop, :]
        if half is not None:
            half.delta[..., start:stop, :] = after
        if before is not None:
            # 2 D_b' (H_b,<b D_<b) + D_b' H_bb D_b
            told = _add_product(before, own, after, beta=2.0)
            rounding.objective.add_((after * told).sum(-2))

    def products(self, own: Tensor, centred: Tensor) -> Tensor:
        """H_gg c_g of the groups of a block, [.., B, N]."""
        n_columns = centred.shape[-2]
        if n_columns <= self.plan.group_size:
            return _product(own, centred)
        found = torch.empty_like(centred, memory_format=torch.contiguous_format)
        for first in range(0, n_columns, self.plan.group_size):
            group = slice(first, min(n_columns, first + self.plan.group_size))
            into = found[..., group, :]
            torch.matmul(own[..., group, group], centred[..., group, :], out=into)
        return found

    def _fit_large(self, rounding: Rounding, H: Tensor, start: int) -> None:
        """The best scale of a group that does not fit in a block, where it helps."""
        group = self.plan.group_at(start)
        if group is None:
            return
        own = slice(*group)
        C, D = rounding.centred[..., own, :], rounding.delta
        curvature = (C * _product(H[..., own, own], C)).sum(-2)  # [.., N]
        slope = (C * _product(H[..., own, :], D)).sum(-2)
        index = start // self.plan.group_size
        known, shared = rounding.scales[..., index, :], None
        if self.rule.is_multiple:
            shared = rounding.shared[..., index // self.plan.groups_per_shared, :]
        stored = StoredScales(shared, keeps_zero=self.rule.kind == TABLE)
        step = scale_step(known, curvature, slope, stored)
        known += step
        D[..., own, :] -= step.unsqueeze(-2) * C

    def _fit_super_scale(
        self, rounding: Rounding, H: Tensor, start: int, half: "_Half | None"
    ) -> None:
        """The best super-scale of a block, where it helps; its multiples and codes stay."""
        block = self.plan.super_at(start)
        if block is None:
            return
        own, size = slice(*block), self.plan.group_size
        groups = slice(start // size, -(-block[1] // size))
        known = rounding.shared[..., start // self.plan.super_size, :].unsqueeze(-2)  # [.., 1, N]
        multiples = (rounding.scales[..., groups, :] / known).round_()
        spread = multiples.repeat_interleave(size, -2)[..., : block[1] - start, :]
        C, D = rounding.centred[..., own, :] * spread, rounding.delta
        curvature = (C * _product(H[..., own, own], C)).sum(-2, keepdim=True)
        if half is None:
            residual = _product(H[..., own, :], D)
        else:
            residual = _product(half.hessian[..., own, :], half.delta).float()
        step = scale_step(known, curvature, (C * residual).sum(-2, keepdim=True))
        known += step
        rounding.scales[..., groups, :] = multiples * known
        D[..., own, :] -= step * C
        if half is not None:
            half.delta[..., own, :] = D[..., own, :]

    def _importance(self, upper: Tensor) -> Tensor:
        """Cost of columns' squared errors, 1 / U_cc^2 relative to their group's first; [.., K].

        Relative, so that it is exactly one where all are equal and GPTQ with H = I is exactly RTN.
        """
        diagonal = upper.diagonal(dim1=-2, dim2=-1)  # V_cc = 1 / U_cc
        if not self.rule.weighted:
            return torch.ones_like(diagonal, memory_format=torch.contiguous_format)
        first = self.plan.group_of(upper.device) * self.plan.group_size
        return (diagonal / diagonal[..., first]).square()

    def _fit_begun(
        self, rounding: Rounding, weight: Tensor, upper: Tensor, start: int, importance: Tensor
    ) -> None:
        """Scales of a large group that begins here, from weights compensated up to here."""
        group = self.plan.group_at(start)
        if group is None:
            return
        own = slice(*group)
        ahead = weight[..., own, :]
        if start:
            pending = _product(upper[..., :start, own].mT, rounding.delta[..., :start, :])
            lower = upper[..., own, own].mT
            ahead = ahead + torch.linalg.solve_triangular(lower, pending, upper=False)
        index, groups = start // self.plan.group_size, self.groups(weight.device)
        self.loops.fit_groups(
            rounding, groups, index, ahead.contiguous(), importance[..., own].contiguous()
        )

    def _fit_all(self, weight: Tensor, factor: Factor | None) -> Rounding:
        """A rounding whose scales are chosen from the given weights, and nothing is rounded."""
        rounding = self._begun(weight, factor)
        ones = torch.ones(self.plan.n_cols, device=weight.device)
        self.loops.fit_groups(rounding, self.groups(weight.device), 0, weight, ones)
        return rounding

    def _begun(self, weight: Tensor, factor: Factor | None) -> Rounding:
        """A rounding with its super-scales, and with nothing else.

        These are chosen from scales that are free and fit the original weights, columns weighted
        as in GPTQ.
        """
        rounding = self._empty(weight)
        if not self.rule.is_multiple:
            return rounding
        cost = torch.ones(self.plan.n_cols, device=weight.device)
        if factor is not None and self.rule.weighted:
            cost = factor.upper.diagonal(dim1=-2, dim2=-1)  # V_cc = 1 / U_cc
            cost = (cost / cost[..., :1]).square()
            if factor.order is not None:
                cost = torch.empty_like(cost).scatter_(-1, factor.order, cost)
        free = replace(self.groups(weight.device), rule=self.rule._replace(is_multiple=False))
        self.loops.fit_groups(rounding, free, 0, weight, cost.contiguous())
        squares = weight.square() * cost.unsqueeze(-1)
        energy = torch.stack([squares[..., a:b, :].sum(-2) for a, b in self.plan.groups], -2)
        per_super = self.plan.groups_per_shared
        supers = choose_super_scales(rounding.scales, energy, per_super)
        return replace(rounding, shared=supers.contiguous())

    def groups(self, device: torch.device) -> Groups:
        """The groups of the plan, for tensors on a device."""
        plan = self.plan
        of_columns = plan.group_of(device)
        return Groups(self.rule, plan.group_size, of_columns, plan.groups_per_shared)

    def _empty(self, weight: Tensor) -> Rounding:
        *stacks, _, n_rows = weight.shape
        n_groups = len(range(0, self.plan.n_cols, self.plan.group_size))
        scales, zeros = torch.zeros(2, *stacks, n_groups, n_rows, device=weight.device)
        objective = torch.zeros(*stacks, n_rows, device=weight.device)
        codes, delta = torch.empty_like(weight), torch.empty_like(weight)
        shared = torch.zeros(*stacks, 0, n_rows, device=weight.device)
        if self.shared.numel() and not self.rule.is_multiple:
            shared = self.shared.unsqueeze(-2)
        return Rounding(codes, delta, scales, zeros, shared, objective)


@dataclass(frozen=True)
class _Half:
    """H and D in bfloat16, [.., K, K] and [.., K, N]."""

    hessian: Tensor
    delta: Tensor


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A b of every stack; of a single one as a matrix, which CPUs multiply faster.

    Measured on a CPU with AMX: a batch of one takes 1.1 to 1.5 times the time in bfloat16.
    """
    if a.dim() == 3 and len(a) == 1:
        return torch.mm(a[0], b[0]).unsqueeze(0)
    return torch.matmul(a, b)


def _add_product(x: Tensor, a: Tensor, b: Tensor, beta: float = 1.0) -> Tensor:
    """Beta x + a b of every stack."""
    if x.dim() == 2:
        return torch.addmm(x, a, b, beta=beta)
    if len(x) == 1:
        return torch.addmm(x[0], a[0], b[0], beta=beta).unsqueeze(0)
    return torch.baddbmm(x, a, b, beta=beta)


def _in_order(columns: Tensor, order: Tensor) -> Tensor:
    """Columns [.., K, N] in another order [.., K]."""
    if columns.dim() == 2:
        return columns[order]
    return columns.gather(-2, order.unsqueeze(-1).expand_as(columns))


def _natural(rounding: Rounding, order: Tensor) -> Rounding:
    """Columns back from the order of processing."""
    places = order.unsqueeze(-1).expand_as(rounding.delta)

    def back(columns: Tensor) -> Tensor:
        return torch.empty_like(columns).scatter_(-2, places, columns)

    return replace(rounding, centred=back(rounding.centred), delta=back(rounding.delta))
