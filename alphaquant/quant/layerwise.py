"""Quantizing a model decoder layer by decoder layer, each matrix in the format assigned to it.

In the default mode the inputs of every layer are those of the original model, as in the bank. In
the sequential mode (GPTQ, arXiv 2210.17323, section 4, "Setup") they are the outputs of the
quantized layers before it; memory then holds one layer's original weights more. There weights may
be corrected for what those layers lost (`sequential/`), which walks the original model beside.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.pages.private_maps import LayerPages
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import LayerStep, batches_of, check_walk, observe_layer, walk
from alphaquant.quant.bank import Bank
from alphaquant.quant.engine import Weights, quantize_layer
from alphaquant.quant.hessian import (
    EndStep,
    HessianBatch,
    LayerHessians,
    observer_of,
    with_outputs,
)
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.sequential.correction import CorrectedWeights
from alphaquant.quant.sequential.crosses import OriginalStates, observe_both
from alphaquant.quant.stacks import MatrixRecord, QuantizedMatrix
from alphaquant.quant.two_sided.output_hessian import Measured, OutputHessians, checked_outputs
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings

Finished = Mapping[int, Callable[[], Mapping[str, PackedMatrix]]]
NONE_FINISHED: Finished = {}


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's result, or that of what is beside the layers.

    Attributes:
        layer: the layer.
        items: its matrices.
        utilization: calibration tokens per expert, by experts module; empty without data.
        seconds: wall time.
    """

    layer: LayerSite
    items: list[QuantizedMatrix]
    utilization: Mapping[str, list[int]]
    seconds: float


@torch.no_grad()
def quantize_layers(
    model_map: ModelMap,
    assignment: Assignment,
    settings: QuantSettings,
    tokens: Tensor | None,
    batch_size: int = 16,
    finished: Finished = NONE_FINISHED,
    bank: Bank | None = None,
    outputs: Measured | None = None,
) -> Iterator[QuantizedLayer]:
    """Quantize every matrix to its format; the model has its original weights after every layer.

    What is finished, or lies in a bank, is not quantized again: the hidden states go through it
    as before, up to the last layer that is.

    Args:
        model_map: the original model.
        assignment: format of every matrix.
        settings: method and options; `rtn` needs no tokens.
        tokens: calibration windows, int64 [N, T].
        batch_size: windows per forward pass.
        finished: layers that are quantized already, by number, each with what reads its matrices.
        bank: what a search quantized with the same settings and windows; None for none.
        outputs: gives the output Hessians, where rounding is two-sided.

    Yields:
        The other layers, first to last.

    Raises:
        ModelError: GPTQ without tokens, or what the engine raises.
        StoreError: a file of the bank is damaged.
    """
    if settings.method == "gptq" and tokens is None:
        raise ModelError(
            "GPTQ needs calibration text; give --calibration, or --method rtn which needs none"
        )
    banked = frozenset[int]() if bank is None else _held_layers(bank, model_map, assignment)
    done = banked | finished.keys()
    last = max((x.index for x in model_map.parts if x.index not in done), default=-1)
    output_hessians = checked_outputs(settings, outputs) if last >= 0 else None
    original = OriginalStates() if settings.sequential and settings.correction else None
    for layer, step in _steps(model_map, settings, tokens, batch_size, last):
        if bank is not None and layer.index in banked - finished.keys():
            if step is not None:
                step.run()
            yield _from_bank(bank, layer, assignment)
            continue
        if layer.index in finished:
            if step is not None:
                if original is not None and isinstance(step, LayerStep):
                    original.run(step)
                weights = finished[layer.index]() if settings.sequential else {}
                with written(model_map, weights):
                    step.run()
            continue
        started = time.perf_counter()
        hessians: list[HessianBatch] | None = None
        used: dict[str, list[int]] = {}
        crosses: Mapping[str, Tensor] = {}
        if step is not None:
            hessians, used, crosses = _observe(step, settings, output_hessians, original)
        items = _quantize(model_map, layer, assignment, settings, hessians, crosses)
        if step is not None and settings.sequential:
            with written(model_map, {item.matrix.name: item.packed for item in items}):
                step.run()
        yield QuantizedLayer(layer, items, used, time.perf_counter() - started)


@contextmanager
def written(model_map: ModelMap, weights: Mapping[str, PackedMatrix]) -> Iterator[None]:
    """Quantized weights, by matrix name, in the model; the original ones come back on leaving.

    From their files where they are mapped from such, so that nothing of them stays in memory.
    """
    pages, original = list[LayerPages](), dict[str, Tensor]()
    for part in model_map.parts:
        names = [m.name for m in part.matrices() if m.name in weights]
        own = part.fresh_pages if names else None
        if own is not None:
            pages.append(own)
        else:
            original |= {name: model_map.view(name).clone() for name in names}
    try:
        for name, packed in weights.items():
            model_map.view(name).copy_(packed.dequantize())
        yield
    finally:
        for name, weight in original.items():
            model_map.view(name).copy_(weight)
        for mapped in pages:
            mapped.restore()


def _steps(
    model_map: ModelMap, settings: QuantSettings, tokens: Tensor | None, batch_size: int, last: int
) -> Iterator[tuple[LayerSite, LayerStep | EndStep | None]]:
    """The parts, up to the last with a walk over the calibration windows where data is needed."""
    if settings.method != "gptq" or tokens is None:
        last = -1
    if tokens is not None and last >= 0:
        batches, outputs = batches_of(tokens, batch_size), []
        check_walk(model_map, batches)
        for step in walk(model_map, batches, is_rough=True):
            yield step.layer, step
            if step.layer.index >= last:
                break
            outputs = step.outputs
        if model_map.ends is not None and last >= model_map.ends.index:
            yield model_map.ends, EndStep(model_map, batches, outputs)
    yield from ((part, None) for part in model_map.parts if part.index > last)


def _held_layers(bank: Bank, model_map: ModelMap, assignment: Assignment) -> frozenset[int]:
    """Layers of which a bank has every matrix in its format."""
    return frozenset(
        layer.index
        for layer in model_map.parts
        if all(
            {m.name for m in matrices} <= bank.matrices(name, layer.index)
            for name, matrices in _by_format(layer, assignment).items()
        )
    )


def _from_bank(bank: Bank, layer: LayerSite, assignment: Assignment) -> QuantizedLayer:
    """A layer as a search quantized it."""
    started, items = time.perf_counter(), []
    for name, matrices in _by_format(layer, assignment).items():
        bank.verify([name], [layer.index])
        reader = bank.layer(name, layer.index)
        records = {row["matrix"]: row for row in bank.records(name, layer.index)}
        items += [
            QuantizedMatrix(m, reader.read(m), MatrixRecord(**records[m.name])) for m in matrices
        ]
    used = bank.utilization(layer.index)
    return QuantizedLayer(layer, items, used, time.perf_counter() - started)


def _by_format(layer: LayerSite, assignment: Assignment) -> dict[str, list[Matrix]]:
    """The matrices of a layer by the format that they get."""
    found: dict[str, list[Matrix]] = {}
    for matrix in layer.matrices():
        found.setdefault(assignment.formats[matrix.name], []).append(matrix)
    return found


def _observe(
    step: LayerStep | EndStep,
    settings: QuantSettings,
    outputs: OutputHessians | None,
    original: OriginalStates | None,
) -> tuple[list[HessianBatch], dict[str, list[int]], Mapping[str, Tensor]]:
    """Hessians and tokens per expert of a layer, and what corrects its weights."""
    if isinstance(step, EndStep):
        return step.hessians(settings), {}, {}
    crosses: Mapping[str, Tensor] = {}
    if original is not None:
        observer: LayerHessians
        observer, crosses = observe_both(step, original, settings)
    else:
        observer = observer_of(settings)
        with observe_layer(step.layer, observer):
            step.run()
    batches = with_outputs(observer.batches(step.layer), step.layer, outputs)
    return batches, observer.utilization(), crosses


def _quantize(
    model_map: ModelMap,
    layer: LayerSite,
    assignment: Assignment,
    settings: QuantSettings,
    hessians: list[HessianBatch] | None,
    crosses: Mapping[str, Tensor],
) -> list[QuantizedMatrix]:
    formats = sorted(_by_format(layer, assignment))

    def wanted(matrix: Matrix, name: str) -> bool:
        return assignment.formats[matrix.name] == name

    weights: Weights = model_map
    if hessians is not None and crosses:
        rounded = {
            name: cross
            for name, cross in crosses.items()
            if parse_format(assignment.formats[name]).is_quantized
        }
        weights = CorrectedWeights(model_map, hessians, rounded, settings)
    return list(quantize_layer(weights, layer, hessians, formats, settings, wanted))
