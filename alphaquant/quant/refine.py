"""Refinement after GPTQ: coordinate descent on the codes, least squares on the scales.

GPTQ decides each column once, knowing only the columns before it. Its objective
f(Q) = tr((W - Q) H (W - Q)') can be lowered further from where it ends, row by row and exactly:

    codes   With everything else fixed f is a parabola in one weight, with its minimum at
            q + ((W - Q) H)_k / H_kk; the nearest grid value is the best one. A sweep visits all
            columns in order (cyclic coordinate descent; QuantEase, Behdin et al. 2023,
            arXiv 2309.01885, algorithm 1, here over every format).
    scales  With codes v fixed, Q = sum_g s_g v_g is linear in a row's scales, so the best ones
            are a step d away that solves the G x G system  d_g' v_g H v_g'' = v_g R'.  Rounded to
            float16 and kept for rows where f falls. Only for int and fp: mxfp and nvfp4 scales
            are not free numbers.

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
    R = residual(weight, hessian, rounded)
    for _ in range(n_sweeps):
        rounded, R = fit_scales(hessian, rounded, R)
        rounded, R = sweep_codes(hessian, rounded, R, blocksize)
    return rounded


def residual(weight: Tensor, hessian: Tensor, rounded: RoundedBatch) -> Tensor:
    """R = (W - Q) H, [B, N, K]; each step is handed it and hands on the one after it."""
    return (weight - rounded.weights()) @ hessian


def sweep_codes(
    hessian: Tensor, rounded: RoundedBatch, R: Tensor, blocksize: int = 32
) -> tuple[RoundedBatch, Tensor]:
    """One pass of coordinate descent over the columns; scales stay.

    Rows whose errors are beyond float32 (weights near the end of bfloat16's range) stay as they
    are.

    Args:
        hessian: as in `refine`.
        rounded: where to start.
        R: its residual.
        blocksize: as in `refine`.

    Returns:
        The batch after the pass, and its residual.
    """
    grid, n_cols = make_grid(rounded.format), R.shape[-1]
    scales = _by_column(rounded, rounded.scales, n_cols)
    zeros = None if rounded.zeros is None else _by_column(rounded, rounded.zeros, n_cols)
    values, Q, R = rounded.values.clone(), rounded.weights(), R.clone()
    curvature = hessian.diagonal(dim1=-2, dim2=-1)  # [B, K]
    for start in range(0, n_cols, blocksize):
        stop = min(n_cols, start + blocksize)
        R1, H1 = R[..., start:stop].clone(), hessian[:, start:stop, start:stop]
        steps = torch.zeros_like(R1)
        for i in range(stop - start):
            k = start + i
            zero = None if zeros is None else zeros[..., k]
            best = Q[..., k] + R1[..., i] / curvature[:, k, None]
            values[..., k] = snap(grid, best, scales[..., k], zero)
            steps[..., i] = rebuild(values[..., k], scales[..., k], zero) - Q[..., k]
            R1[..., i + 1 :].addcmul_(steps[..., i, None], H1[:, i, None, i + 1 :], value=-1.0)
        R -= steps @ hessian[:, start:stop, :]
    is_finite = torch.isfinite(R).all(-1, keepdim=True)  # what overflowed once stays so
    return replace(rounded, values=torch.where(is_finite, values, rounded.values)), R


def fit_scales(hessian: Tensor, rounded: RoundedBatch, R: Tensor) -> tuple[RoundedBatch, Tensor]:
    """The best scales for the codes, in rows where they help after rounding to float16.

    With a step d of the scales, f changes by d'A d - 2 d'r, A_gg' = v_g H v_g'', r_g = v_g R'.

    Args:
        hessian: as in `refine`.
        rounded: where to start.
        R: its residual.

    Returns:
        The batch with these scales, and its residual.
    """
    if not rounded.format.has_groups:
        return rounded, R
    n_cols = R.shape[-1]
    codes = rounded.values
    if rounded.zeros is not None:
        codes = codes - _by_column(rounded, rounded.zeros, n_cols)
    A = torch.stack(
        [_group_sums(rounded, part, codes) for part in _group_products(rounded, codes, hessian)],
        -2,
    )  # [B, N, G, G]
    r = _group_sums(rounded, R, codes)  # [B, N, G]
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    # A group whose codes are all zero has no say; a small ridge keeps its row solvable.
    ridge = 1e-6 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny ** 0.5
    solved = rounded.scales + torch.linalg.solve(A + torch.diag_embed(ridge.expand_as(r)), r)
    usable = torch.isfinite(solved) & (solved != 0)
    fitted = round_scale(torch.where(usable, solved, rounded.scales))
    step = fitted - rounded.scales
    change = (((A @ step.unsqueeze(-1)).squeeze(-1) - 2 * r) * step).sum(-1, keepdim=True)
    scales = torch.where(change < 0, fitted, rounded.scales)
    R = R - (codes * _by_column(rounded, scales - rounded.scales, n_cols)) @ hessian
    return replace(rounded, scales=scales), R


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
