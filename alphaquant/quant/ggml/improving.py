"""Our rounding in llama.cpp's types: coordinate descent from what its own code found.

llama.cpp rounds every weight to nearest under scales that it searches with one importance per
input. What a matrix's outputs lose is tr(D H D'), D = W - Q, with all of H: rounding one weight up
makes up for another's error. So from its blocks on, in turns,

    values    column by column, the best of each given all others (as `descent.py`)
    scales    of a part: with a step s of its factor the objective changes by s (s A - 2 r), where
              A = c' H c and r = c' R for its values c and R = H D; the best scale is the integer
              nearest to r / A further; its minimum likewise
    d, dmin   the float16 of a block, the same with scale * value as the direction

until the sweeps are done. A row keeps what it had where the end is not better than the start.

Letters: S matrices of one shape, N rows, K columns, P parts of all blocks of a row; everything is
transposed, [S, K, N], as in `quant/columns`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.quant.ggml.decoding import Levels, levels_of
from alphaquant.quant.ggml.ladders import LADDERS, Ladder, packed

_RUN = 64
"""Columns whose changes reach the others in one product."""
_TINY = 1e-30


def improve(kind: str, codes: Tensor, weight: Tensor, hessian: Tensor, n_sweeps: int) -> Tensor:
    """Lower tr(D H D') of matrices in a type of llama.cpp.

    Args:
        kind: key of `GGML_BLOCKS`; one that is no ladder is returned as it is.
        codes: uint8 [S, N, bytes of a row], where to start.
        weight: float32 [S, N, K].
        hessian: float32 [S, K, K], positive definite.
        n_sweeps: how often values and scales take turns.

    Returns:
        uint8 [S, N, bytes of a row], on the device of the codes.
    """
    if kind not in LADDERS or not n_sweeps:
        return codes
    start = codes.to(weight.device)
    work = _begin(LADDERS[kind], levels_of(kind, start.flatten(0, 1)), weight, hessian)
    before = work.objective()
    for _ in range(n_sweeps):
        work.sweep_values()
        work.sweep_scales()
        work.sweep_floats()
    work.sweep_values()
    found = packed(kind, work.levels()).view_as(start)
    is_better = (work.objective() < before).unsqueeze(-1)  # [S, N, 1]
    return torch.where(is_better, found, start).to(codes.device)


@dataclass
class _Work:
    """Matrices that are worked on.

    Attributes:
        ladder: of the type.
        weight: float32 [S, K, N].
        hessian: float32 [S, K, K].
        quantized: float32 [S, K, N], Q.
        values: float32 [S, K, N].
        d: float32 [S, blocks, N].
        scales: float32 [S, P, N].
        dmin: float32 [S, blocks, N], None where there are no minima.
        minima: float32 [S, P, N], likewise.
    """

    ladder: Ladder
    weight: Tensor
    hessian: Tensor
    quantized: Tensor
    values: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor | None
    minima: Tensor | None

    @property
    def parts_per_block(self) -> int:
        """Parts that share a float16."""
        return self.scales.shape[1] // self.d.shape[1]

    def levels(self) -> Levels:
        """The same as blocks, one row after the other."""
        n_blocks = self.d.shape[1]

        def rows(x: Tensor) -> Tensor:
            by_row = x.mT.contiguous()  # [S, N, ..]
            return by_row.view(-1, x.shape[1] // n_blocks)

        values, d, scales = rows(self.values), rows(self.d), rows(self.scales)
        if self.dmin is None or self.minima is None:
            return Levels(values, d, scales)
        return Levels(values, d, scales, rows(self.dmin), rows(self.minima))

    def objective(self) -> Tensor:
        """tr(D H D') of every row, [S, N]."""
        D = self.weight - self.quantized
        return ((self.hessian @ D) * D).sum(-2)

    def sweep_values(self) -> None:
        """Every column's best values given all others."""
        H, n_cols = self.hessian, self.weight.shape[1]
        R = H @ (self.weight - self.quantized)
        factors, offsets = self._per_column()
        for start in range(0, n_cols, _RUN):
            stop = min(n_cols, start + _RUN)
            before = self.quantized[:, start:stop].clone()
            inside = R[:, start:stop]
            for k in range(start, stop):
                own = self.quantized[:, k] + inside[:, k - start] / H[:, k, k, None]  # [S, N]
                factor = factors[:, k]
                value = self.ladder.snap((own + offsets[:, k]) / factor)
                value = torch.where(factor.abs() > _TINY, value, self.values[:, k])
                step = factor * value - offsets[:, k] - self.quantized[:, k]
                self.values[:, k] = value
                self.quantized[:, k] += step
                later = inside[:, k - start + 1 :]
                later.addcmul_(H[:, k + 1 : stop, k, None], step.unsqueeze(1), value=-1.0)
            changed = self.quantized[:, start:stop] - before
            R[:, stop:].baddbmm_(H[:, stop:, start:stop], changed, alpha=-1.0)

    def sweep_scales(self) -> None:
        """Every part's best scale and minimum given all else."""
        if self.ladder.scales[0] == self.ladder.scales[1]:
            return
        size, H = self.ladder.part, self.hessian
        R = H @ (self.weight - self.quantized)
        for p in range(self.scales.shape[1]):
            own, block = slice(p * size, (p + 1) * size), p // self.parts_per_block
            inside, direction = H[:, own, own], self.values[:, own]
            limits, known = self.ladder.scales, self.scales[:, p]
            steps = _whole_steps(direction, self.d[:, block], inside, R[:, own], known, limits)
            self.scales[:, p] += steps
            changed = direction * (steps * self.d[:, block]).unsqueeze(1)  # [S, g, N]
            if self.minima is not None and self.dmin is not None and self.ladder.minima:
                down, unit = -torch.ones_like(direction), self.dmin[:, block]
                residual, known = R[:, own] - inside @ changed, self.minima[:, p]
                steps = _whole_steps(down, unit, inside, residual, known, self.ladder.minima)
                self.minima[:, p] += steps
                changed = changed - (steps * unit).unsqueeze(1)
            R.baddbmm_(H[:, :, own], changed, alpha=-1.0)
        self._rebuild()

    def sweep_floats(self) -> None:
        """The float16 numbers of every block, each the best given all else."""
        for block in range(self.d.shape[1]):
            n_parts, size = self.parts_per_block, self.ladder.part
            parts = slice(block * n_parts, (block + 1) * n_parts)
            own = slice(block * n_parts * size, (block + 1) * n_parts * size)
            spread = self.scales[:, parts].repeat_interleave(size, 1)
            self.d[:, block] = self._float(spread * self.values[:, own], self.d[:, block], own)
            self._rebuild()
            if self.minima is not None and self.dmin is not None:
                down = -self.minima[:, parts].repeat_interleave(size, 1)
                self.dmin[:, block] = self._float(down, self.dmin[:, block], own)
                self._rebuild()

    def _float(self, direction: Tensor, known: Tensor, own: slice) -> Tensor:
        """The best float16 multiple of a direction, what it was where none is better; [S, N]."""
        H = self.hessian
        residual = H[:, own] @ (self.weight - self.quantized)
        curvature = ((H[:, own, own] @ direction) * direction).sum(-2)
        slope = (direction * residual).sum(-2)
        solved = (known + slope / curvature).to(torch.float16).float()
        step = solved - known
        gains = torch.isfinite(solved) & (step * (step * curvature - 2 * slope) < 0)
        return torch.where(gains, solved, known)

    def _rebuild(self) -> None:
        """Q of the numbers as they are; bit for bit what decoding gives."""
        factors, offsets = self._per_column()
        torch.mul(self.values, factors, out=self.quantized)
        self.quantized -= offsets

    def _per_column(self) -> tuple[Tensor, Tensor]:
        """Factors and offsets of every column, [S, K, N]."""
        n_parts, size = self.parts_per_block, self.ladder.part
        factors = self.d.repeat_interleave(n_parts, 1) * self.scales
        factors = factors.repeat_interleave(size, 1)
        if self.dmin is None or self.minima is None:
            return factors, torch.zeros_like(factors)
        offsets = self.dmin.repeat_interleave(n_parts, 1) * self.minima
        return factors, offsets.repeat_interleave(size, 1)


def _begin(ladder: Ladder, levels: Levels, weight: Tensor, hessian: Tensor) -> _Work:
    """Work on matrices whose blocks were decoded."""
    n_matrices, n_rows, _ = weight.shape

    def columns(x: Tensor) -> Tensor:
        return x.reshape(n_matrices, n_rows, -1).mT.contiguous()

    dmin, minima = levels.dmin, levels.minima
    work = _Work(
        ladder,
        weight.mT.contiguous(),
        hessian,
        columns(levels.weights()),
        columns(levels.values),
        columns(levels.d),
        columns(levels.scales),
        None if dmin is None else columns(dmin),
        None if minima is None else columns(minima),
    )
    return work


def _whole_steps(
    direction: Tensor,
    unit: Tensor,
    hessian: Tensor,
    residual: Tensor,
    known: Tensor,
    limits: tuple[int, int],
) -> Tensor:
    """By how many units to go in a direction; zero where nothing helps.

    Args:
        direction: float32 [S, g, N].
        unit: float32 [S, N], what one unit is.
        hessian: float32 [S, g, g], of these columns.
        residual: float32 [S, g, N], of these columns.
        known: float32 [S, N], units so far, whole.
        limits: fewest and most units.

    Returns:
        float32 [S, N], whole.
    """
    curvature = ((hessian @ direction) * direction).sum(-2)
    slope = (direction * residual).sum(-2)
    wanted = slope / (curvature * unit)
    wanted = torch.where(torch.isfinite(wanted), wanted, torch.zeros_like(wanted))
    steps = (known + wanted).round().clamp(*limits) - known
    moved = steps * unit
    gains = moved * (moved * curvature - 2 * slope) < 0
    return torch.where(gains, steps, torch.zeros_like(steps))
