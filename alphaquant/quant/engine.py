"""From one layer's weights and Hessians to packed matrices with a record of how each was made.

The bank asks for every matrix in every format, the pipeline for each matrix in one; both come
through `quantize_layer`, so the same settings give the same codes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.codecs import check_finite
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import PackedMatrix, RoundedBatch, pack_bf16
from alphaquant.quant.refine import better_rows, refine
from alphaquant.quant.rounding import (
    Factor,
    dampen,
    factorize,
    hessian_error,
    quantize_gptq,
    quantize_rtn,
)
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import Method, QuantSettings

# Of Hessians and weights at once, in float32: two experts of 2048 inputs and outputs. All that is
# in use while they are quantized grows with it; `benchmarks/quantizer.py layer` prints the peak.
_CHUNK_BYTES = 64 * 2**20


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
        damp: damping fraction used, retries included; the larger one of two starts.
        weight_error: |W - Q|^2 / |W|^2.
        output_error: tr(D H D') / tr(W H W'), D = W - Q; None without data.
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


@dataclass(frozen=True)
class QuantizedMatrix:
    """A packed matrix, which one it is, and how it was made."""

    matrix: Matrix
    packed: PackedMatrix
    record: MatrixRecord


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

    Raises:
        FormatError: a weight is NaN or infinite.
        ModelError: a Hessian cannot be factorized, or holds NaN.
    """
    for batch in _without_data(layer) if hessians is None else hessians:
        _check_hessians(batch)
        for chunk in _chunks(batch):
            yield from _quantize_chunk(model_map, chunk, formats, settings, wanted)


def _quantize_chunk(
    model_map: ModelMap,
    batch: HessianBatch,
    formats: Sequence[str],
    settings: QuantSettings,
    wanted: Wanted,
) -> Iterator[QuantizedMatrix]:
    weight = torch.stack(
        [torch.cat([model_map.view(m.name) for m in stack]) for stack in batch.stacks]
    ).to(torch.float32)
    for b, stack in enumerate(batch.stacks):
        check_finite(weight[b], " + ".join(m.name for m in stack))
    factors: list[Factor] = []
    for name in formats:
        members = [
            b for b, stack in enumerate(batch.stacks) if any(wanted(m, name) for m in stack)
        ]
        if not members:
            continue
        if not parse_format(name).is_quantized:
            yield from _keep(weight, batch, members, wanted)
            continue
        if not factors and settings.method == "gptq" and any(batch.has_data):
            orders = (settings.actorder, not settings.actorder)[: settings.n_starts]
            factors = [
                factorize(batch.hessian, settings.percdamp, actorder=order) for order in orders
            ]
        chosen = [factor.select(members) for factor in factors]
        part = batch.select(members)
        for quantized in _round(weight[members], part, chosen, parse_format(name), settings):
            if wanted(quantized.matrix, name):
                yield quantized


def _round(
    weight: Tensor,
    batch: HessianBatch,
    factors: Sequence[Factor],
    fmt: Format,
    settings: QuantSettings,
) -> Iterator[QuantizedMatrix]:
    """Round all matrices of a batch to one format: GPTQ where there is data, RTN elsewhere."""
    row_counts = tuple(m.rows for m in batch.stacks[0])
    rtn = gptq = None
    has_data = batch.has_data
    for factor in factors:
        start = _start(weight, batch, factor, fmt, settings)
        if gptq is None:
            gptq = start
        else:
            gptq = better_rows(weight, dampen(batch.hessian, factors[0].damp), gptq, start)
    if gptq is None or not all(has_data):
        rtn = quantize_rtn(weight, fmt, settings.scale_search, row_counts)
    for b in range(len(batch.stacks)):
        use_gptq = gptq is not None and has_data[b]
        rounded = gptq if use_gptq else rtn
        assert rounded is not None
        damp = max(factor.damp[b] for factor in factors) if use_gptq else None
        yield from _pack_stack(weight[b], batch, b, rounded, damp, settings.method)


def _start(
    weight: Tensor, batch: HessianBatch, factor: Factor, fmt: Format, settings: QuantSettings
) -> RoundedBatch:
    """GPTQ in the order of a factor, then refinement."""
    rounded = quantize_gptq(
        weight,
        factor,
        fmt,
        settings.scale_search,
        settings.blocksize,
        tuple(m.rows for m in batch.stacks[0]),
        static_groups=settings.static_groups,
    )
    if not settings.refine_sweeps:
        return rounded
    hessian = dampen(batch.hessian, factor.damp)
    return refine(weight, hessian, rounded, settings.refine_sweeps, settings.blocksize)


def _pack_stack(
    weight: Tensor,
    batch: HessianBatch,
    b: int,
    rounded: RoundedBatch,
    damp: float | None,
    asked: Method,
) -> Iterator[QuantizedMatrix]:
    """Pack the matrices of one stack and write down their errors."""
    made = rounded.weights()[b]
    squared = (weight - made).square().sum(-1)  # [N]
    has_data = batch.has_data[b]
    output = hessian_error(weight, made, batch.hessian[b]) if has_data else None
    signal = (
        hessian_error(weight, torch.zeros_like(weight), batch.hessian[b]) if has_data else None
    )
    start = 0
    for matrix in batch.stacks[b]:
        rows = slice(start, start + matrix.rows)
        start += matrix.rows
        relative = None
        if output is not None and signal is not None:
            relative = float(output[rows].sum() / signal[rows].sum().clamp(min=1e-30))
        record = MatrixRecord(
            matrix.name,
            rounded.format.name,
            matrix.storage_bits(rounded.format) / matrix.n_weights,
            "rtn" if damp is None else "gptq",
            "no_tokens" if asked == "gptq" and damp is None else None,
            batch.source[b] if has_data else None,
            batch.n_tokens[b] if has_data else None,
            damp,
            float(squared[rows].sum() / weight[rows].square().sum().clamp(min=1e-30)),
            relative,
        )
        yield QuantizedMatrix(matrix, rounded.pack(b, rows), record)


def _keep(
    weight: Tensor, batch: HessianBatch, members: list[int], wanted: Wanted
) -> Iterator[QuantizedMatrix]:
    for b in members:
        start = 0
        for matrix in batch.stacks[b]:
            rows = slice(start, start + matrix.rows)
            start += matrix.rows
            if wanted(matrix, "bf16"):
                yield QuantizedMatrix(
                    matrix,
                    pack_bf16(weight[b, rows]),
                    MatrixRecord(matrix.name, "bf16", 16.0, "none"),
                )


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


def _chunks(batch: HessianBatch) -> Iterator[HessianBatch]:
    """Split a batch so that its Hessians and weights stay within `_CHUNK_BYTES`."""
    n_cols, n_rows = batch.stacks[0][0].cols, sum(m.rows for m in batch.stacks[0])
    size = max(1, _CHUNK_BYTES // (4 * n_cols * (n_cols + n_rows)))
    for start in range(0, len(batch.stacks), size):
        part = slice(start, start + size)
        hessian = batch.hessian[part]
        yield HessianBatch(batch.stacks[part], hessian, batch.n_tokens[part], batch.source[part])


def _without_data(layer: LayerSite) -> Iterator[HessianBatch]:
    """Batches with zero Hessians: linears one by one, all experts of a module at once."""
    stacks: list[tuple[tuple[Matrix, ...], ...]] = [((site.matrix,),) for site in layer.linears]
    for site in layer.experts:
        stacks.append(tuple(map(site.inner, range(site.n_experts))))
        stacks.append(tuple((m,) for m in site.down))
    for group in stacks:
        zeros = torch.zeros(1, 1, 1).expand(len(group), group[0][0].cols, group[0][0].cols)
        yield HessianBatch(group, zeros, (0,) * len(group), ("none",) * len(group))
