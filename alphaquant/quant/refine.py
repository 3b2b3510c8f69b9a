"""Refinement after GPTQ: coordinate descent on the codes, least squares on the scales.

GPTQ decides each column once, knowing only the columns before it. Its objective
f(Q) = tr((W - Q) H (W - Q)') can be lowered further from where it ends, row by row and exactly:

    codes   With everything else fixed f is a parabola in one weight, with its minimum at
            q + ((W - Q) H)_k / H_kk; the nearest grid value is the best one. A sweep visits all
            columns in order (cyclic coordinate descent; QuantEase, Behdin et al. 2023,
            arXiv 2309.01885, algorithm 1, here over every format).
    scales  With a step d of one group's scale and codes c less their zero point, f changes by
            d (d A - 2 r), A = c' H_gg c, r = c' R_g: the best scale is r / A away. Rounded to
            what is stored and kept for rows where f falls. Not for mxfp and nvfp4, whose scales
            are not free numbers. It is fitted when the sweep reaches the group's first column; a
            super-scale likewise, with multiples times codes for c, before its block's scales.

Neither step ever raises f. Where it ends depends on where it starts, again row by row, so rows are
taken from the better of two starts. H is the damped Hessian that GPTQ used: its diagonal keeps the
extra freedom from fitting noise of the calibration text.

This is the plain version, one column of the whole residual at a time: the reference of
`descent.py`, which does the same with few and large products.

Letters: B matrices, N rows, K columns, G groups; W weights, Q rounded weights, H Hessian,
R = (W - Q) H.
"""

from dataclasses import replace

import torch
from torch import Tensor

from alphaquant.quant.codecs import StoredScales, make_grid, rebuild, scale_step, snap
from alphaquant.quant.matrix import RoundedBatch
from alphaquant.spaces.formats import Format


def refine(weight: Tensor, hessian: Tensor, rounded: RoundedBatch, n_sweeps: int) -> RoundedBatch:
    """Lower the GPTQ objective of a rounded batch; the format and its bits stay as they are.

    Args:
        weight: float32 [B, N, K], the original weights.
        hessian: float32 [B, K, K], damped, with a positive diagonal.
        rounded: where to start.
        n_sweeps: rounds of scales and codes; 0 returns the start.

    Returns:
        The refined batch; its objective is at most that of the start in every row. Rows whose
        errors are beyond float32 (weights near the end of bfloat16's range) stay as they are.
    """
    start = rounded
    for _ in range(n_sweeps):
        rounded = sweep(weight, hessian, rounded)
    if not n_sweeps:
        return start
    error = ((weight - rounded.weights()) @ hessian).sum(-1, keepdim=True)
    sound = torch.isfinite(error) & torch.isfinite(rounded.values).all(-1, keepdim=True)
    supers = rounded.super_scales
    if supers is not None and start.super_scales is not None:
        supers = torch.where(sound, supers, start.super_scales)
    return replace(
        rounded,
        values=torch.where(sound, rounded.values, start.values),
        scales=torch.where(sound, rounded.scales, start.scales),
        super_scales=supers,
    )


def sweep(weight: Tensor, hessian: Tensor, rounded: RoundedBatch) -> RoundedBatch:
    """One pass over the groups: the scale of each, then its codes; super-scales before theirs.

    Args:
        weight: as in `refine`.
        hessian: as in `refine`.
        rounded: where to start.
    """
    fmt, grid, n_cols = rounded.format, make_grid(rounded.format), weight.shape[-1]
    values, scales = rounded.values.clone(), rounded.scales.clone()
    supers = None if rounded.super_scales is None else rounded.super_scales.clone()
    R = (weight - rounded.weights()) @ hessian  # [B, N, K]
    size, stored = fmt.columns_per_scale(n_cols), StoredScales(keeps_zero=fmt.is_table)
    for g, start in enumerate(range(0, n_cols, size)):
        group = slice(start, min(n_cols, start + size))
        zero = None if rounded.zeros is None else rounded.zeros[..., g]
        if supers is not None:
            p, is_first = start // fmt.super_size, start % fmt.super_size == 0
            if is_first:
                _fit_super_scale(fmt, values, scales, supers, R, hessian, p)
            stored = replace(stored, super_scale=supers[..., p])
        if fmt.has_groups:
            codes = values[..., group] - (0 if zero is None else zero.unsqueeze(-1))
            curvature = ((codes @ hessian[:, group, group]) * codes).sum(-1)
            slope = (codes * R[..., group]).sum(-1)
            step = scale_step(scales[..., g], curvature, slope, stored)
            scales[..., g] += step
            R -= (step.unsqueeze(-1) * codes) @ hessian[:, group, :]
        for k in range(group.start, group.stop):
            q = rebuild(values[..., k], scales[..., g], zero)
            best = q + R[..., k] / hessian[:, k, k, None]
            values[..., k] = snap(grid, best, scales[..., g], zero)
            change = rebuild(values[..., k], scales[..., g], zero) - q
            R -= change.unsqueeze(-1) * hessian[:, None, k, :]
    return replace(rounded, values=values, scales=scales, super_scales=supers)


def _fit_super_scale(
    fmt: Format,
    values: Tensor,
    scales: Tensor,
    supers: Tensor,
    R: Tensor,
    hessian: Tensor,
    p: int,
) -> None:
    """The best super-scale of block p for its codes and multiples, where it helps.

    What it changes, it changes in place: the block's scales, its super-scale, R.
    """
    per_super = fmt.super_size // fmt.group_size
    groups = slice(p * per_super, (p + 1) * per_super)
    own = slice(p * fmt.super_size, min(values.shape[-1], (p + 1) * fmt.super_size))
    multiples = (scales[..., groups] / supers[..., p, None]).round()  # [B, N, g]
    spread = multiples.repeat_interleave(fmt.group_size, -1)[..., : own.stop - own.start]
    codes = values[..., own] * spread
    curvature = ((codes @ hessian[:, own, own]) * codes).sum(-1)
    step = scale_step(supers[..., p], curvature, (codes * R[..., own]).sum(-1))
    supers[..., p] += step
    scales[..., groups] = multiples * supers[..., p, None]
    R -= (step.unsqueeze(-1) * codes) @ hessian[:, own, :]
