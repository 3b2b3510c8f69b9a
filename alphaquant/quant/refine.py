"""Refinement after GPTQ: coordinate descent on the codes, least squares on the scales.

GPTQ decides each column once, knowing only the columns before it. Its objective
f(Q) = tr((W - Q) H (W - Q)') can be lowered further from where it ends, row by row and exactly:

    codes   With everything else fixed f is a parabola in one weight, with its minimum at
            q + ((W - Q) H)_k / H_kk; the nearest grid value is the best one. A sweep visits all
            columns in order (cyclic coordinate descent; QuantEase, Behdin et al. 2023,
            arXiv 2309.01885, algorithm 1, here over every format).
    scales  With codes v fixed, Q = sum_g s_g v_g is linear in a row's scales, so the best ones
            solve the G x G system  s_g' v_g H v_g'' = v_g H w'.  Rounded to float16 and kept for
            rows where f falls. Only for int and fp: mxfp and nvfp4 scales are not free numbers.

Neither step ever raises f. Where it ends depends on where it starts, again row by row, so rows are
taken from the better of two starts (`better_rows`). H is the damped Hessian that GPTQ used: its
diagonal keeps the extra freedom from fitting noise of the calibration text.

Letters: B matrices, N rows, K columns, G groups; W weights, Q rounded weights, H Hessian,
R = (W - Q) H.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from alphaquant.quant.codecs import make_grid, rebuild, round_scale, snap
from alphaquant.quant.matrix import RoundedBatch


def refine(
    weight: Tensor, hessian: Tensor, rounded: RoundedBatch, n_sweeps: int, blocksize: int = 32
) -> RoundedBatch:
    """Lower the GPTQ objective of a rounded batch; the format and its bits stay as they are.

    Args:
        weight: float32 [B, N, K], the original weights.
        hessian: float32 [B, K, K], damped, with a positive diagonal.
        rounded: where to start.
        n_sweeps: rounds of scales and codes; 0 returns the start.
        blocksize: columns whose changes reach the others in one matrix product; speed only.

    Returns:
        The refined batch; its objective is at most that of the start in every row.
    """
    for _ in range(n_sweeps):
        rounded = fit_scales(weight, hessian, rounded)
        rounded = sweep_codes(weight, hessian, rounded, blocksize)
    return rounded


def sweep_codes(
    weight: Tensor, hessian: Tensor, rounded: RoundedBatch, blocksize: int = 32
) -> RoundedBatch:
    """One pass of coordinate descent over the columns; scales stay. Arguments as in `refine`.

    Rows whose errors are beyond float32 (weights near the end of bfloat16's range) stay as they
    are.
    """
    grid, n_cols = make_grid(rounded.format), weight.shape[-1]
    scales = _by_column(rounded, rounded.scales, n_cols)
    zeros = None if rounded.zeros is None else _by_column(rounded, rounded.zeros, n_cols)
    values, H = rounded.values.clone(), hessian
    Q = rounded.weights()
    R = (weight - Q) @ H
    curvature = H.diagonal(dim1=-2, dim2=-1)  # [B, K]
    for start in range(0, n_cols, blocksize):
        stop = min(n_cols, start + blocksize)
        R1, H1 = R[..., start:stop].clone(), H[:, start:stop, start:stop]
        steps = torch.zeros_like(R1)
        for i in range(stop - start):
            k = start + i
            zero = None if zeros is None else zeros[..., k]
            best = Q[..., k] + R1[..., i] / curvature[:, k, None]
            values[..., k] = snap(grid, best, scales[..., k], zero)
            steps[..., i] = rebuild(values[..., k], scales[..., k], zero) - Q[..., k]
            R1.addcmul_(steps[..., i, None], H1[:, i, None, :], value=-1.0)
        R -= steps @ H[:, start:stop, :]
    is_finite = torch.isfinite(R).all(-1, keepdim=True)  # what overflowed once stays so
    return replace(rounded, values=torch.where(is_finite, values, rounded.values))


def fit_scales(weight: Tensor, hessian: Tensor, rounded: RoundedBatch) -> RoundedBatch:
    """The best scales for the codes, in rows where they help. Arguments as in `refine`."""
    if rounded.format.family not in ("int", "fp"):
        return rounded
    n_cols = weight.shape[-1]
    codes = rounded.values
    if rounded.zeros is not None:
        codes = codes - _by_column(rounded, rounded.zeros, n_cols)
    system = torch.stack(
        [_group_sums(rounded, part, codes) for part in _group_products(rounded, codes, hessian)],
        -2,
    )  # [B, N, G, G]
    target = _group_sums(rounded, weight @ hessian, codes)  # [B, N, G]
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    # A group whose codes are all zero has no say; a small ridge keeps its row solvable.
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny ** 0.5
    solved = torch.linalg.solve(system, target)
    usable = torch.isfinite(solved) & (solved != 0)
    scales = round_scale(torch.where(usable, solved, rounded.scales))
    changed = replace(rounded, scales=scales)
    helps = _objective(weight, hessian, changed) < _objective(weight, hessian, rounded)
    return replace(rounded, scales=torch.where(helps.unsqueeze(-1), scales, rounded.scales))


def better_rows(
    weight: Tensor, hessian: Tensor, first: RoundedBatch, second: RoundedBatch
) -> RoundedBatch:
    """Each row from whichever of two roundings to one format has the lower objective.

    Args:
        weight: float32 [B, N, K], the original weights.
        hessian: float32 [B, K, K], damped.
        first: kept where both are equal, or the second's objective is no number.
        second: with the same scale per matrix (nvfp4).
    """
    is_better = _objective(weight, hessian, second) < _objective(weight, hessian, first)  # [B, N]

    def choose(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(is_better.unsqueeze(-1), other, one)

    zeros = first.zeros
    if zeros is not None and second.zeros is not None:
        zeros = choose(zeros, second.zeros)
    return replace(
        first,
        values=choose(first.values, second.values),
        scales=choose(first.scales, second.scales),
        zeros=zeros,
    )


def _group_size(rounded: RoundedBatch, n_cols: int) -> int:
    return n_cols if rounded.scales.shape[-1] == 1 else rounded.format.group_size


def _by_column(rounded: RoundedBatch, per_group: Tensor, n_cols: int) -> Tensor:
    """[B, N, G] -> [B, N, K]."""
    return per_group.repeat_interleave(_group_size(rounded, n_cols), -1)[..., :n_cols]


def _group_products(rounded: RoundedBatch, codes: Tensor, hessian: Tensor) -> Iterator[Tensor]:
    """v_g H for each group g, G tensors [B, N, K]; all at once would be G times the weights."""
    size = _group_size(rounded, codes.shape[-1])
    parts = zip(torch.split(codes, size, -1), torch.split(hessian, size, -2), strict=True)
    return (part @ rows for part, rows in parts)


def _group_sums(rounded: RoundedBatch, left: Tensor, codes: Tensor) -> Tensor:
    """Products with the codes, summed within each group: [B, N, K] twice -> [B, N, G]."""
    parts = torch.split(left * codes, _group_size(rounded, codes.shape[-1]), -1)
    return torch.stack([part.sum(-1) for part in parts], -1)


def _objective(weight: Tensor, hessian: Tensor, rounded: RoundedBatch) -> Tensor:
    """F of each row, [B, N]."""
    delta = weight - rounded.weights()
    return ((delta @ hessian) * delta).sum(-1)
