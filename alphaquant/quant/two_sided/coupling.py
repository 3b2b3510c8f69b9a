"""GPTQ and coordinate descent on tr(O D H D'), where rows know of each other.

`descent.py` lowers f = tr(D H D'), row by row. With the output Hessian O of `output_hessian.py` an
error of one row can make up for that of another, and both steps take a second side (two-sided
rounding as of YAQA, arXiv 2505.22988; here for every format, and with descent on top):

    GPTQ    O = R'R with a lower R, so that what rows before tile t did costs it no more than a
            shift of its weights: d_t + R_tt^-1 R_t,<t D_<t takes the place of d_t. Rows of a tile
            are rounded as if they did not know of each other.
    sweep   Everything else fixed, row i sees the residual sum over j of O_ij / O_ii (D H)_j in the
            place of (D H)_i, and is swept as there. Rows come one after the other, because all at
            once would run away; what a row changed reaches the others of its tile at once, and
            all others before their tile is swept, by a product.

Rows are taken so that neighbours, which are the most alike (rows of one attention head), fall into
different tiles. Neither step raises f = tr(O D H D'); a result that is no number or worse than
where it started is not taken.

Scales of groups larger than a block, and super-scales, stay as GPTQ chose them: fitted for all
rows at once they run away, too.

Letters: S stacks, N rows, K columns, B columns of a block, n rows of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant.columns.state import Block, Rounding, choose_rows, join_rows
from alphaquant.quant.descent import Rounder
from alphaquant.quant.factor import DampedHessian
from alphaquant.spaces.formats import Format

START_ROWS = 16
"""Rows of a tile in GPTQ. In a trial that was not kept (demo, int3-g64) KL was 0.682 of that
without output Hessians with 1, 0.683 with 4, 0.704 with 16, 0.729 with 64; time 33, 12, 9, 5 s."""

SWEEP_ROWS = 64
"""Rows of a tile in sweeps; speed only."""

_DAMP = 0.02
"""Of the mean diagonal, added to it; 0.1 changed KL by 0.3 % in the same trial."""

_MOST_RETRIES = 5
"""With ten times the damping each; by then the diagonal is what is left."""


def is_coupled(fmt: Format) -> bool:
    """Whether rows of a format are rounded together.

    Not those of one bit: their errors are too large for what gradients say at the original
    weights. On the demo, all matrices in int1-g256: KL 0.384 instead of 0.197, int1-g64 0.204
    instead of 0.187.
    """
    return fmt.is_quantized and fmt.bits > 1


@dataclass(frozen=True)
class Coupling:
    """What errors of some rows cost together.

    Attributes:
        matrix: float32 [.., N, N], O, damped, rows in the order in which they are rounded.
        order: int64 [N], the row at each place.
        lower: R of `matrix` = R'R, lower triangular, [.., N, N].
        damp: fraction of each mean diagonal that was added, retries included, float32 [..].
    """

    matrix: Tensor
    order: Tensor
    lower: Tensor
    damp: Tensor

    @staticmethod
    def of(outputs: Tensor) -> "Coupling":
        """Of output Hessians [.., N, N], a mean diagonal of 1 or so.

        They are kept in float16, whose rounding of a few outputs that matter far more than all
        others may take from them that they are positive: such ones are damped ten times as much
        until they are.

        Raises:
            ModelError: one is no number, or not positive even so.
        """
        n_rows = outputs.shape[-1]
        tiles = -(-n_rows // START_ROWS)
        order = torch.arange(n_rows, device=outputs.device)
        order = torch.cat([order[start::tiles] for start in range(tiles)])
        ordered = outputs[..., order, :][..., order]
        mean = ordered.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)  # [.., 1]
        damp = torch.full_like(mean, _DAMP)
        for _ in range(_MOST_RETRIES + 1):
            matrix = ordered.clone()
            matrix.diagonal(dim1=-2, dim2=-1).add_(damp * mean)
            upper, failures = torch.linalg.cholesky_ex(matrix.flip(-1, -2))
            is_sound = failures.unsqueeze(-1) == 0
            if bool(is_sound.all()):
                return Coupling(matrix, order, upper.flip(-1, -2).mT, damp.squeeze(-1))
            damp = torch.where(is_sound, damp, 10 * damp)
        raise ModelError(
            f"the gradients at {n_rows} outputs give no positive matrix even with damping "
            f"{_DAMP * 10**_MOST_RETRIES:g}; use more or other calibration text, or --no-two-sided"
        )

    @cached_property
    def shares(self) -> Tensor:
        """O_ij / O_ii, [.., N, N]."""
        return self.matrix / self.matrix.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)

    def objective(self, hessian: Tensor, delta: Tensor) -> Tensor:
        """tr(O D H D') of D [.., K, N], float64 [..]."""
        products = (delta @ self.matrix) * (hessian @ delta)
        return products.sum((-1, -2), dtype=torch.float64)


@dataclass(frozen=True)
class Couplings:
    """What is known of the outputs of stacks.

    Attributes:
        blocks: output Hessians by stack and position, of every block of the matrix's rows.
        device: where stacks are rounded.
    """

    blocks: tuple[tuple[tuple[Tensor, ...], ...], ...]
    device: torch.device
    _made: dict[tuple[int, ...], Coupling] = field(default_factory=dict)

    def of(self, index: Tensor, position: int) -> Iterator[tuple[slice, Coupling]]:
        """The blocks of the matrices at a position of some stacks, int64 [S]; their rows."""
        stacks, start = index.tolist(), 0
        for block in range(len(self.blocks[stacks[0]][position])):
            key = (position, block, *stacks)
            if key not in self._made:  # all formats take the same
                own = [self.blocks[s][position][block] for s in stacks]
                self._made[key] = Coupling.of(torch.stack(own).to(self.device))
            coupling = self._made[key]
            yield slice(start, start + len(coupling.order)), coupling
            start += len(coupling.order)

    def damp_of(self, stack: int, position: int) -> float:
        """The largest damping of the blocks of a matrix that was rounded."""
        return max(
            float(coupling.damp[stacks.index(stack)])
            for (at, _, *stacks), coupling in self._made.items()
            if at == position and stack in stacks
        )


@dataclass(frozen=True)
class CoupledRounder:
    """Rounds matrices whose rows know of each other.

    Attributes:
        rounder: of the format and the rows, in their natural order.
        coupling: of the rows.
        damped: Hessians of the inputs.
        inverses: U_bb of the blocks of `damped.factors[0]`.
    """

    rounder: Rounder
    coupling: Coupling
    damped: DampedHessian
    inverses: tuple[Tensor, ...]

    def round(self, weight: Tensor, n_sweeps: int, *, static: bool) -> Rounding:
        """Round with both steps.

        Args:
            weight: float32 [.., K, N], contiguous.
            n_sweeps: of the descent.
            static: choose all scales from the original weights.

        Returns:
            A rounding whose objective is that of the rows alone, tr(D H D'). Matrices for which
            the steps give no number (weights near the end of bfloat16's range) are rounded
            row by row.
        """
        order = self.coupling.order
        ordered = replace(self, rounder=_some_rows(self.rounder, order))
        start = ordered._gptq(weight[..., order].contiguous(), static)
        found = ordered._better(start, ordered._swept(start, n_sweeps))
        found = _permuted(found, torch.argsort(order))
        H, D = self.damped.matrix, found.delta
        found = replace(found, objective=((H @ D) * D).sum(-2))
        if bool(torch.isfinite(found.objective).all()):
            return found
        alone = self.rounder.gptq(weight, self.damped.factors[0], self.inverses, static=static)
        alone = self.rounder.refine(alone, self.damped, n_sweeps)
        is_sound = torch.isfinite(found.objective).all(-1, keepdim=True)
        return choose_rows(is_sound.expand_as(found.objective), found, alone)

    def _gptq(self, weight: Tensor, static: bool) -> Rounding:
        """GPTQ, tile after tile."""
        factor, R = self.damped.factors[0], self.coupling.lower
        delta, parts = torch.zeros_like(weight), []
        for start in range(0, weight.shape[-1], START_ROWS):
            tile = slice(start, min(weight.shape[-1], start + START_ROWS))
            own, shift = weight[..., tile], torch.zeros(())
            if start:
                back = torch.linalg.solve_triangular(
                    R[..., tile, tile], R[..., tile, :start], upper=False
                )
                shift = delta[..., :start] @ back.mT
            rounder = _some_rows(self.rounder, tile)
            asked = (own + shift).contiguous()
            part = rounder.gptq(asked, factor, self.inverses, static=static)
            part.delta.sub_(shift)
            delta[..., tile] = part.delta
            parts.append(part)
        return join_rows(parts)

    def _swept(self, start: Rounding, n_sweeps: int) -> Rounding:
        """Sweeps over codes and the scales of groups that fit in a block."""
        found = Rounding(*(x.clone(memory_format=torch.contiguous_format) for x in start.tensors))
        for _ in range(n_sweeps):
            for block in self.rounder.plan.blocks:
                self._sweep_block(found, block)
        return found

    def _sweep_block(self, rounding: Rounding, block: Block) -> None:
        columns, rounder, shares = slice(*block), self.rounder, self.coupling.shares
        H = self.damped.matrix
        own = H[..., columns, columns].contiguous()
        residual = rounding.delta.mT @ H[..., columns]  # [.., N, B]
        products = None
        if rounder.rule.fits and rounder.plan.groups_fit:
            codes = rounding.centred[..., columns, :]
            products = rounder.products(own, codes).mT.contiguous()
        groups = rounder.groups(own.device)
        for start in range(0, residual.shape[-2], SWEEP_ROWS):
            tile = slice(start, min(residual.shape[-2], start + SWEEP_ROWS))
            changed = rounder.loops.sweep_rows(
                rounding,
                groups,
                (block, (tile.start, tile.stop)),
                shares[..., tile, :] @ residual,
                (shares[..., tile, tile].contiguous(), own),
                None if products is None else products[..., tile, :].contiguous(),
            )
            residual[..., tile, :] += changed

    def _better(self, first: Rounding, second: Rounding) -> Rounding:
        """Of every matrix the second, where its objective is lower."""
        objective, H = self.coupling.objective, self.damped.matrix
        is_better = objective(H, second.delta) < objective(H, first.delta)
        return choose_rows(is_better.unsqueeze(-1).expand_as(first.objective), second, first)


def _some_rows(rounder: Rounder, rows: slice | Tensor) -> Rounder:
    """The rounder of some of its rows."""
    if not rounder.shared.numel():
        return rounder
    return replace(rounder, shared=rounder.shared[..., rows].contiguous())


def _permuted(rounding: Rounding, order: Tensor) -> Rounding:
    """Rows in another order, contiguous."""
    return Rounding(*(x[..., order].contiguous() for x in rounding.tensors))
