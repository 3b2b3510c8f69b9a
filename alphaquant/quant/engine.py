"""From one layer's weights and Hessians to packed matrices with a record of how each was made.

The bank asks for every matrix in several formats, the pipeline for each matrix in one; both come
through `quantize_layer`, so the same settings give the same codes. Matrices that share their
inputs share a Hessian and its factors. Rows are independent, so what is rounded at the same time,
one part per thread, is a run of at most `_ROWS` rows in one format; where runs are cut depends
on the matrices alone, so the result does not depend on the number of threads.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.codecs import check_finite, nv_global_scale
from alphaquant.quant.descent import ColumnPlan, Rounder, Rounding, better_rows, join_rows
from alphaquant.quant.factor import Block, DampedHessian, Factor, factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import PackedMatrix, RoundedBatch, pack_bf16
from alphaquant.quant.shrinkage import NO_SHRINKAGE, Shrinkage, choose_shrinkage, shrink
from alphaquant.spaces.formats import BF16, Format, parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings

_ROWS = 512
"""Rows that are rounded together: enough for products at full speed, few enough for caches."""
_MOSTLY_DIAGONAL = 0.5
"""Shrinkage beyond which the objective says too little of the Hessian itself; at 1 nothing."""


@dataclass(frozen=True)
class MatrixRecord:
    """How one matrix was quantized; a row of `quantize_report.json`.

    Attributes:
        matrix: its name.
        format: canonical format name.
        bits_per_weight: stored bits, scales included.
        method: `gptq`, `rtn` or `none` (bf16).
        fallback: why the method differs from the one asked for, None if it does not.
        hessian: `plain`, `routing_weighted`, `routing_weighted+pooled`, `pooled`, None without
            data.
        n_tokens: calibration tokens that reached it, None without data.
        damp: damping fraction used, retries included.
        weight_error: |W - Q|^2 / |W|^2.
        output_error: tr(D H D') / tr(W H W'), D = W - Q; None without data.
        shrinkage: how far the Hessian was drawn toward its diagonal, 0 to 1; None without data.
        heldout_gain: what that made of the error on held-back tokens, as a factor, measured on
            matrices of its kind; None where it was not tried.
    """

    matrix: str
    format: str
    bits_per_weight: float
    method: str
    fallback: str | None = None
    hessian: str | None = None
    n_tokens: int | None = None
    damp: float | None = None
    weight_error: float = 0.0
    output_error: float | None = None
    shrinkage: float | None = None
    heldout_gain: float | None = None


@dataclass(frozen=True)
class QuantizedMatrix:
    """A packed matrix, which one it is, and how it was made."""

    matrix: Matrix
    packed: PackedMatrix
    record: MatrixRecord


@dataclass(frozen=True)
class _Stack:
    """Matrices that share their inputs, with what is known of these.

    Attributes:
        matrices: in the order of their rows.
        weights: float32 [N, K] of each.
        hessian: float32 [K, K], sums over tokens; None without data.
        damped: drawn toward its diagonal, damped, with its factors; None for rounding to nearest.
        shrinkage: how far it was drawn, 0 to 1.
        heldout_gain: what that made of the error on held-back tokens.
        source: how the Hessian was made.
        n_tokens: how many the matrices saw.
    """

    matrices: tuple[Matrix, ...]
    weights: Mapping[str, Tensor]
    hessian: Tensor | None
    damped: DampedHessian | None
    shrinkage: float
    heldout_gain: float | None
    source: str
    n_tokens: int

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Of the damped Hessian, one per start; none without one."""
        return () if self.damped is None else self.damped.factors

    def signal(self, name: str) -> float:
        """tr(W H W') of a matrix, with data."""
        assert self.hessian is not None
        weight = self.weights[name]
        return float(((weight @ self.hessian) * weight).sum())

    def output_errors(self, rounding: Rounding) -> Tensor:
        """tr(D H D') of every row, [N], with data."""
        assert self.hessian is not None
        D = rounding.delta  # [K, N]
        if self.damped is None or self.shrinkage > _MOSTLY_DIAGONAL:
            return ((self.hessian @ D) * D).sum(0)
        # The objective is of the matrix with a larger diagonal and smaller correlations.
        kept = 1 - self.shrinkage
        added = self.damped.matrix.diagonal() - kept * self.hessian.diagonal()
        return (rounding.objective - added @ D.square()).clamp(min=0) / kept


Wanted = Callable[[Matrix, str], bool]


def quantize_layer(
    model_map: ModelMap,
    layer: LayerSite,
    hessians: Sequence[HessianBatch] | None,
    formats: Sequence[str],
    settings: QuantSettings,
    wanted: Wanted = lambda matrix, name: True,
) -> Iterator[QuantizedMatrix]:
    """Quantize the matrices of one layer.

    Args:
        model_map: gives the weights, which are read and not changed.
        layer: the layer.
        hessians: from `LayerHessians.batches`; None for round-to-nearest without data.
        formats: canonical format names.
        settings: how.
        wanted: which (matrix, format name) pairs to yield; all by default.

    Yields:
        Matrices that share their inputs one format after the other.

    Raises:
        FormatError: a weight is NaN or infinite.
        ModelError: a Hessian cannot be factorized, or holds NaN.
    """
    with _threads() as over:
        for batch in _without_data(layer) if hessians is None else hessians:
            _check_hessians(batch)
            shrinkage = _shrinkage(model_map, batch, settings)
            for b, matrices in enumerate(batch.stacks):
                asked = {n: [m for m in matrices if wanted(m, n)] for n in formats}
                asked = {name: chosen for name, chosen in asked.items() if chosen}
                if asked:
                    stack = _stack(model_map, batch, b, asked, (settings, shrinkage))
                    yield from _quantize_stack(stack, asked, settings, over)


Map = Callable[..., Iterator[Any]]
"""`map`, or that of a pool of threads."""


@contextmanager
def _threads() -> Iterator[Map]:
    """A `map` over as many threads as torch would use, each of which computes alone meanwhile."""
    n_threads = torch.get_num_threads()
    if n_threads == 1:
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n_threads)


def _shrinkage(model_map: ModelMap, batch: HessianBatch, settings: QuantSettings) -> Shrinkage:
    """How far the Hessians of a batch are drawn toward their diagonals."""
    if settings.method != "gptq" or not settings.shrinkage:
        return NO_SHRINKAGE

    def weight_of(index: int) -> Tensor:
        views = [model_map.view(m.name) for m in batch.stacks[index]]
        return torch.cat(views).to("cpu", torch.float32)

    return choose_shrinkage(batch, weight_of, settings.percdamp)


def _stack(
    model_map: ModelMap,
    batch: HessianBatch,
    b: int,
    asked: Mapping[str, Sequence[Matrix]],
    how: tuple[QuantSettings, Shrinkage],
) -> _Stack:
    """The matrices of a stack that are asked for, with the factors that they need."""
    settings, shrinkage = how
    used = {m.name for chosen in asked.values() for m in chosen}
    matrices = tuple(m for m in batch.stacks[b] if m.name in used)
    weights = {m.name: model_map.view(m.name).to("cpu", torch.float32) for m in matrices}
    for name, weight in weights.items():
        check_finite(weight, name)
    hessian = batch.hessian[b].cpu() if batch.has_data[b] else None
    damped, amount = None, shrinkage.amount(batch.tokens_per_input(b))
    is_rounded = any(parse_format(name).is_quantized for name in asked)
    if hessian is not None and settings.method == "gptq" and is_rounded:
        orders = (settings.actorder, not settings.actorder)[: settings.n_starts]
        names = " + ".join(m.name for m in batch.stacks[b])
        damped = factorize(shrink(hessian, amount), settings.percdamp, orders, names)
    gain = shrinkage.heldout_gain
    return _Stack(
        matrices, weights, hessian, damped, amount, gain, batch.source[b], batch.n_tokens[b]
    )


def _quantize_stack(
    stack: _Stack,
    asked: Mapping[str, Sequence[Matrix]],
    settings: QuantSettings,
    over: Map,
) -> Iterator[QuantizedMatrix]:
    """Quantize the matrices of a stack, each in the formats that are asked for."""
    parts: list[_Part] = []
    for name, matrices in asked.items():
        fmt = parse_format(name)
        if not fmt.is_quantized:
            yield from (_keep(stack, matrix) for matrix in matrices)
            continue
        parts += _parts(stack, fmt, matrices, settings)
    inverses = {
        blocks: [f.diagonal_inverses(blocks) for f in stack.factors]
        for blocks in {part.rounder.plan.blocks for part in parts}
    }
    rounded = list(over(lambda part: _round(stack, part, inverses, settings), parts))
    jobs: list[tuple[Matrix, Format, Rounding]] = []
    for name, matrices in asked.items():
        own = [x for x, part in zip(rounded, parts, strict=True) if part.fmt.name == name]
        if own:
            jobs += _split(parse_format(name), own, matrices)
    yield from over(lambda job: _pack(stack, settings, *job), jobs)


@dataclass(frozen=True)
class _Part:
    """Rows that are rounded together.

    Attributes:
        fmt: to which format.
        rounder: of the format and the rows.
        weight: float32 [K, n].
    """

    fmt: Format
    rounder: Rounder
    weight: Tensor


def _parts(
    stack: _Stack, fmt: Format, matrices: Sequence[Matrix], settings: QuantSettings
) -> Iterator[_Part]:
    """Cut the rows of matrices, one below the other, into parts."""
    weights = [stack.weights[m.name] for m in matrices]
    rows = torch.cat(weights)
    shared = torch.empty(0)
    if fmt.shared.global_bits:
        shared = torch.cat([nv_global_scale(w[None])[0].expand(len(w)) for w in weights])
    n_cols = rows.shape[1]
    plan = ColumnPlan(n_cols, fmt.columns_per_scale(n_cols), settings.blocksize)
    rule = rule_of(fmt, settings.scale_search)
    for start in range(0, len(rows), _ROWS):
        own = slice(start, start + _ROWS)
        yield _Part(fmt, Rounder(rule, plan, shared[own]), rows[own].T.contiguous())


def _round(
    stack: _Stack,
    part: _Part,
    inverses: Mapping[tuple[Block, ...], list[list[Tensor]]],
    settings: QuantSettings,
) -> Rounding:
    """Round a part: from one or two starts where there is data, to nearest elsewhere."""
    rounder, found = part.rounder, None
    if stack.damped is None:
        return rounder.nearest(part.weight)
    for factor, own in zip(stack.factors, inverses[rounder.plan.blocks], strict=True):
        start = rounder.gptq(part.weight, factor, own, static=settings.static_groups)
        end = rounder.refine(start, stack.damped, settings.refine_sweeps)
        found = end if found is None else better_rows(found, end)
    assert found is not None, "there is at least one start"
    return found


def _split(
    fmt: Format, roundings: Sequence[Rounding], matrices: Sequence[Matrix]
) -> Iterator[tuple[Matrix, Format, Rounding]]:
    """The roundings of parts, as those of the matrices that were cut into them."""
    whole, start = join_rows(roundings), 0
    for matrix in matrices:
        yield matrix, fmt, whole.rows(slice(start, start + matrix.rows))
        start += matrix.rows


def _pack(
    stack: _Stack, settings: QuantSettings, matrix: Matrix, fmt: Format, rounding: Rounding
) -> QuantizedMatrix:
    """Pack a matrix and write down how it was made."""
    weight, delta = stack.weights[matrix.name], rounding.delta
    output = None
    if stack.hessian is not None:
        signal = max(stack.signal(matrix.name), 1e-30)
        output = float(stack.output_errors(rounding).sum()) / signal
    has_data = stack.hessian is not None
    record = MatrixRecord(
        matrix.name,
        fmt.name,
        matrix.storage_bits(fmt) / matrix.n_weights,
        "rtn" if stack.damped is None else "gptq",
        "no_tokens" if settings.method == "gptq" and stack.damped is None else None,
        stack.source if has_data else None,
        stack.n_tokens if has_data else None,
        None if stack.damped is None else stack.damped.damp,
        float(delta.square().sum() / weight.square().sum().clamp(min=1e-30)),
        output,
        stack.shrinkage if has_data else None,
        stack.heldout_gain,
    )
    values, zeros, shared = rounding.centred, None, None
    if not fmt.symmetric:
        zeros = rounding.zeros.T[None]
        values = rounding.values(fmt.columns_per_scale(matrix.cols))
    if fmt.shared.global_bits:
        shared = nv_global_scale(weight[None]).expand(1, len(weight))
    rounded = RoundedBatch(fmt, values.T[None], rounding.scales.T[None], zeros, shared)
    return QuantizedMatrix(matrix, rounded.pack(0, slice(None)), record)


def _keep(stack: _Stack, matrix: Matrix) -> QuantizedMatrix:
    record = MatrixRecord(matrix.name, BF16.name, 16.0, "none")
    return QuantizedMatrix(matrix, pack_bf16(stack.weights[matrix.name]), record)


def _check_hessians(batch: HessianBatch) -> None:
    """Inputs with NaN or infinity would otherwise look like no inputs at all."""
    sums = batch.hessian.diagonal(dim1=-2, dim2=-1).sum(-1)  # [B]
    for stack, total in zip(batch.stacks, sums.tolist(), strict=True):
        if not math.isfinite(total):
            raise ModelError(
                f"the inputs of {stack[0].name} hold NaN or infinite numbers on the calibration "
                "text; the model is broken, or its dtype too narrow: use --dtype float32 or "
                "bfloat16"
            )


def _without_data(layer: LayerSite) -> Iterator[HessianBatch]:
    """Batches with zero Hessians: linears one by one, all experts of a module at once."""
    stacks: list[tuple[tuple[Matrix, ...], ...]] = [((site.matrix,),) for site in layer.linears]
    for site in layer.experts:
        stacks.append(tuple(map(site.inner, range(site.n_experts))))
        stacks.append(tuple((m,) for m in site.down))
    for group in stacks:
        zeros = torch.zeros(1, 1, 1).expand(len(group), group[0][0].cols, group[0][0].cols)
        yield HessianBatch(group, zeros, (0,) * len(group), ("none",) * len(group))
