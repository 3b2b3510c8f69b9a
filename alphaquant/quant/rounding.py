"""GPTQ and RTN over every format, on batches of matrices of one shape.

GPTQ (Frantar et al. 2022, arXiv 2210.17323, algorithm 1 and section 3.3): columns are rounded one
after the other; each column's error is spread over the columns not yet rounded, through the upper
Cholesky factor of the inverse Hessian. Scales of a group are chosen from the compensated weights
when the loop reaches its first column. RTN is the same with no error spread: with a Hessian equal
to the identity both give the same result.

This is the plain version, column by column with the inverse Hessian: the reference of
`descent.py`, which the engine runs. Round-to-nearest also packs single matrices by hand.

Letters (those of the paper's code in the loop): B matrices, N rows, K columns; W weights, H
Hessian, U upper Cholesky factor of its inverse, Err1 scaled errors of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant.codecs import (
    Codec,
    GroupScales,
    choose_super_scales,
    fit,
    make_codec,
    nv_global_scale,
    rebuild,
    snap,
)
from alphaquant.quant.factor import MAX_DAMP_RETRIES
from alphaquant.quant.factor import dampen as dampen_one
from alphaquant.quant.matrix import RoundedBatch
from alphaquant.spaces.formats import Format
from alphaquant.specs.scale_search import ScaleSearch

# Weights near the end of bfloat16's range saturate; their errors must not become infinite.
_ERROR_MAX = 2.0**100


@dataclass(frozen=True)
class Factor:
    """The inverse Hessian's upper Cholesky factor, shared by all formats of a batch.

    Attributes:
        upper: float32 [B, K, K], upper triangular, U'U = (H + damp I)^-1.
        damp: fraction of mean(diag H) that was added, per matrix, [B] (retries included).
        order: int64 [B, K], the column at each place of `upper` (activation ordering); None for
            the natural order.
    """

    upper: Tensor
    damp: tuple[float, ...]
    order: Tensor | None = None

    def select(self, members: Sequence[int]) -> "Factor":
        """The factor of some of its matrices."""
        if len(members) == len(self.damp):
            return self
        order = None if self.order is None else self.order[list(members)]
        damp = tuple(self.damp[b] for b in members)
        return Factor(self.upper[list(members)], damp, order)


def dampen(hessian: Tensor, damp: Sequence[float]) -> Tensor:
    """H + damp * mean(diag H) * I, float32 [B, K, K].

    Args:
        hessian: [B, K, K], symmetric.
        damp: fraction for each matrix, [B].
    """
    return torch.stack([dampen_one(h, d) for h, d in zip(hessian, damp, strict=True)])


def factorize(hessian: Tensor, percdamp: float, *, actorder: bool = False) -> Factor:
    """Dampen Hessians and factorize their inverses.

    A matrix whose factorization fails is tried again with ten times the damping, at most five
    times.

    Args:
        hessian: float32 [B, K, K], symmetric, sums over tokens (any positive scale).
        percdamp: fraction of mean(diag H) added to the diagonal.
        actorder: process columns by descending diag(H), the most used inputs first.

    Raises:
        ModelError: a Hessian is not positive definite even with 10^5 * percdamp.
    """
    n_batch, n_cols, _ = hessian.shape
    order = None
    if actorder:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        hessian = _permute(hessian, order)
    upper = torch.empty(hessian.shape, device=hessian.device)
    damp = [percdamp] * n_batch
    pending = list(range(n_batch))
    for _ in range(MAX_DAMP_RETRIES + 1):
        H = dampen(hessian[pending], [damp[b] for b in pending])
        lower, info = torch.linalg.cholesky_ex(H)
        inverse, failed = _invert(lower, info)
        for position, b in enumerate(pending):
            if not failed[position]:
                upper[b] = inverse[position]
        pending = [b for position, b in enumerate(pending) if failed[position]]
        if not pending:
            return Factor(upper, tuple(damp), order)
        for b in pending:
            damp[b] *= 10
    raise ModelError(
        f"{len(pending)} Hessians of size {n_cols} are not positive definite even with damping "
        f"{percdamp * 10**MAX_DAMP_RETRIES:g}; use more or "
        "other calibration text, a larger --percdamp, or --method rtn"
    )


def quantize_gptq(
    weight: Tensor,
    factor: Factor,
    fmt: Format,
    search: ScaleSearch,
    blocksize: int = 32,
    row_counts: tuple[int, ...] = (),
    *,
    static_groups: bool = False,
) -> RoundedBatch:
    """Round a batch of matrices with error compensation.

    Args:
        weight: float32 [B, N, K].
        factor: from `factorize` on their Hessians.
        fmt: a quantized format.
        search: how scales are chosen; `hessian` weights each column by 1 / U_cc^2, its cost in
            the GPTQ loss.
        blocksize: columns whose errors are spread lazily in one matrix product; changes speed, not
            the result.
        row_counts: rows of each matrix where several are stacked along N (nvfp4 has one global
            scale per matrix).
        static_groups: choose all scales from the original weights before the loop, as RTN does.
            Always so with activation ordering: groups stay runs of neighbouring inputs, and no
            index has to be stored.

    Returns:
        The rounded batch, in the natural order of columns.
    """
    W = weight.to(torch.float32).clone()
    U = factor.upper
    shared = _share(W, fmt, search, row_counts, _column_costs(factor, fmt, search))
    group_size = fmt.columns_per_scale(W.shape[-1])
    collected: list[GroupScales] = []
    fixed = None
    if static_groups or factor.order is not None:
        groups = enumerate(torch.split(W, group_size, -1))
        collected = [fit(shared.codec(i * group_size), group) for i, group in groups]
        fixed = _column_scales(collected, group_size, factor.order, W)
    if factor.order is not None:
        W = W.gather(-1, factor.order[:, None, :].expand_as(W))
    values = torch.empty_like(W)
    for start, stop in _blocks(W.shape[-1], group_size, blocksize):
        W1 = W[..., start:stop].clone()
        Err1 = torch.zeros_like(W1)
        U1 = U[:, start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            if fixed is None and column % group_size == 0:
                end = column + group_size
                ahead = (
                    W1[..., i : end - start]
                    if end <= stop
                    else torch.cat([W1[..., i:], W[..., stop:end]], -1)
                )
                cost = _importance(U, column, end) if search == "hessian" else None
                collected.append(fit(shared.codec(column), ahead, cost))
            scales = collected[-1] if fixed is None else fixed[column]
            w = W1[..., i]
            value = snap(shared.codec(0).grid, w, scales.scale, scales.zero)
            values[..., column] = value
            error = (w - rebuild(value, scales.scale, scales.zero)) / U1[:, i, i, None]
            error.clamp_(-_ERROR_MAX, _ERROR_MAX)
            Err1[..., i] = error
            W1[..., i + 1 :].addcmul_(error.unsqueeze(-1), U1[:, i, None, i + 1 :], value=-1.0)
        if stop < W.shape[-1]:
            W[..., stop:] -= Err1 @ U[:, start:stop, stop:]
    if factor.order is not None:
        place = factor.order[:, None, :].expand_as(values)
        values = torch.empty_like(values).scatter_(-1, place, values)
    return _collect(fmt, values, collected, shared)


def quantize_rtn(
    weight: Tensor, fmt: Format, search: ScaleSearch, row_counts: tuple[int, ...] = ()
) -> RoundedBatch:
    """Round a batch of matrices to nearest, group by group; needs no data.

    Args:
        weight: float32 [B, N, K].
        fmt: a quantized format.
        search: how scales are chosen.
        row_counts: rows of each stacked matrix, as in `quantize_gptq`.

    Returns:
        The rounded batch.
    """
    W = weight.to(torch.float32)
    shared = _share(W, fmt, search, row_counts, None)
    values = torch.empty_like(W)
    collected = []
    group_size = fmt.columns_per_scale(W.shape[-1])
    for start in range(0, W.shape[-1], group_size):
        group, codec = W[..., start : start + group_size], shared.codec(start)
        scales = fit(codec, group)
        zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
        values[..., start : start + group_size] = snap(
            codec.grid, group, scales.scale.unsqueeze(-1), zero
        )
        collected.append(scales)
    return _collect(fmt, values, collected, shared)


def hessian_error(original: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """Rows' shares of tr((W - Q) H (W - Q)'), [B, N].

    With H = sum of c^2 x x' it is the squared output error over the tokens.
    """
    delta = (original - rounded).to(torch.float32)
    return ((delta @ hessian) * delta).sum(-1)


def _permute(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of each Hessian in the given order."""
    rows = hessian.gather(-2, order[:, :, None].expand_as(hessian))
    return rows.gather(-1, order[:, None, :].expand_as(hessian))


def _column_scales(
    groups: list[GroupScales], group_size: int, order: Tensor | None, like: Tensor
) -> list[GroupScales]:
    """The scales of each column in the order of processing; `like` is [B, N, K]."""
    n_cols = like.shape[-1]

    def spread(parts: list[Tensor]) -> Tensor:
        columns = torch.stack(parts, -1).repeat_interleave(group_size, -1)[..., :n_cols]
        return columns if order is None else columns.gather(-1, order[:, None, :].expand_as(like))

    scale = spread([g.scale for g in groups])
    zeros = [g.zero for g in groups if g.zero is not None]
    zero = spread(zeros) if zeros else None
    return [
        GroupScales(scale[..., k], None if zero is None else zero[..., k]) for k in range(n_cols)
    ]


def _importance(U: Tensor, start: int, stop: int) -> Tensor:
    """Cost of columns' squared errors, 1 / U_cc^2, relative to the first column's; [B, columns].

    Relative, so that it is exactly one where all are equal and GPTQ with H = I is exactly RTN.
    """
    diagonal = U.diagonal(dim1=-2, dim2=-1)[:, start:stop]
    return (diagonal / diagonal[:, :1]).pow(-2)


def _column_costs(factor: Factor, fmt: Format, search: ScaleSearch) -> Tensor | None:
    """What each column's squared errors cost in choosing super-scales, in the natural order."""
    if not fmt.super_size or search != "hessian":
        return None
    costs = _importance(factor.upper, 0, factor.upper.shape[-1])
    return (
        costs
        if factor.order is None
        else torch.empty_like(costs).scatter_(-1, factor.order, costs)
    )


@dataclass(frozen=True)
class _Shared:
    """What scales of a batch have in common.

    Attributes:
        codecs: of the format; of each super-block where there are such.
        super_size: inputs of a super-block, 0 without them.
        global_scale: float32 [B, N], nvfp4 only.
        super_scales: float32 [B, N, P], None without super-blocks.
    """

    codecs: tuple[Codec, ...]
    super_size: int = 0
    global_scale: Tensor | None = None
    super_scales: Tensor | None = None

    def codec(self, column: int) -> Codec:
        """The codec of a column."""
        return self.codecs[column // self.super_size if self.super_size else 0]


def _share(
    W: Tensor,
    fmt: Format,
    search: ScaleSearch,
    row_counts: tuple[int, ...],
    costs: Tensor | None,
) -> _Shared:
    """Codecs with what groups share, chosen from the original weights."""
    if fmt.super_size:
        supers = _super_scales(W, fmt, search, costs)
        codecs = tuple(make_codec(fmt, search, shared) for shared in supers.unbind(-1))
        return _Shared(codecs, fmt.super_size, None, supers)
    if not fmt.shared.global_bits:
        return _Shared((make_codec(fmt, search),))
    parts = torch.split(W, list(row_counts) or [W.shape[-2]], -2)
    global_scale = torch.cat(
        [nv_global_scale(part).expand(-1, part.shape[-2]) for part in parts], -1
    )  # [B, N]
    return _Shared((make_codec(fmt, search, global_scale),), 0, global_scale)


def _super_scales(W: Tensor, fmt: Format, search: ScaleSearch, costs: Tensor | None) -> Tensor:
    """Super-scales [B, N, P] from scales that were free; `costs` of squared errors is [B, K]."""
    codec, scales, energy = make_codec(fmt, search), [], []
    for start in range(0, W.shape[-1], fmt.group_size):
        group = W[..., start : start + fmt.group_size]
        cost = None if costs is None else costs[:, start : start + fmt.group_size]
        scales.append(fit(codec, group, cost).scale)
        squares = group.square()
        energy.append((squares if cost is None else squares * cost.unsqueeze(-2)).sum(-1))
    per_super = fmt.super_size // fmt.group_size
    return choose_super_scales(torch.stack(scales, -2), torch.stack(energy, -2), per_super).mT


def _blocks(n_cols: int, group_size: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Blocks that hold whole groups, or lie inside one.

    So a group's weights are up to date when it is reached.

    Example: 200 columns, groups of 96, blocks of 128 -> (0, 96), (96, 192), (192, 200); of 32 ->
        (0, 32), (32, 64), (64, 96), ...
    """
    groups_per_block = blocksize // group_size
    run = group_size * max(groups_per_block, 1)
    step = run if groups_per_block else blocksize
    for run_start in range(0, n_cols, run):
        run_stop = min(n_cols, run_start + run)
        for start in range(run_start, run_stop, step):
            yield start, min(run_stop, start + step)


def _invert(lower: Tensor, info: Tensor) -> tuple[Tensor, list[bool]]:
    """Upper Cholesky factors of the inverses, and which matrices failed."""
    ok = info == 0
    eye = torch.eye(lower.shape[-1], device=lower.device).expand_as(lower)
    safe = torch.where(ok[:, None, None], lower, eye)
    inverse = torch.cholesky_inverse(safe)
    upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
    good = ok & (info == 0) & torch.isfinite(upper).all((-1, -2))
    return upper, [not bool(g) for g in good]


def _collect(
    fmt: Format, values: Tensor, groups: list[GroupScales], shared: _Shared
) -> RoundedBatch:
    zeros = [g.zero for g in groups if g.zero is not None]
    scales = torch.stack([g.scale for g in groups], -1)  # [B, N, G]
    return RoundedBatch(
        fmt,
        values,
        scales,
        torch.stack(zeros, -1) if zeros else None,
        shared.global_scale,
        shared.super_scales,
    )
