"""Quantizing a model decoder layer by decoder layer, each matrix in the format assigned to it.

In the default mode the inputs of every layer are those of the original model, as in the bank. In
the sequential mode (GPTQ, arXiv 2210.17323, section 4, "Setup") they are the outputs of the
quantized layers before it; memory then holds one layer's original weights more.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import LayerStep, batches_of, check_walk, observe_layer, walk
from alphaquant.quant.engine import QuantizedMatrix, quantize_layer
from alphaquant.quant.hessian import HessianBatch, observer_of
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import QuantSettings

Finished = Mapping[int, Callable[[], Mapping[str, PackedMatrix]]]
NONE_FINISHED: Finished = {}


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer's result.

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
) -> Iterator[QuantizedLayer]:
    """Quantize every matrix to its format; the model has its original weights after every layer.

    What is finished is not quantized again: the hidden states go through it as before.

    Args:
        model_map: the original model.
        assignment: format of every matrix.
        settings: method and options; `rtn` needs no tokens.
        tokens: calibration windows, int64 [N, T].
        batch_size: windows per forward pass.
        finished: layers that are quantized already, by number, each with what reads its matrices.

    Yields:
        The other layers, first to last.

    Raises:
        ModelError: GPTQ without tokens, or what the engine raises.
    """
    if settings.method == "gptq" and tokens is None:
        raise ModelError(
            "GPTQ needs calibration text; give --calibration, or --method rtn which needs none"
        )
    last = max((x.index for x in model_map.layers if x.index not in finished), default=-1)
    if last < 0:
        return
    for layer, step in _steps(model_map, settings, tokens, batch_size):
        if layer.index > last:
            break
        if layer.index in finished:
            if step is not None:
                weights = finished[layer.index]() if settings.sequential else {}
                with written(model_map, weights):
                    step.run()
            continue
        started = time.perf_counter()
        hessians: list[HessianBatch] | None = None
        used: dict[str, list[int]] = {}
        if step is not None:
            hessians, used = _observe(step, settings)
        items = _quantize(model_map, layer, assignment, settings, hessians)
        if step is not None and settings.sequential:
            with written(model_map, {item.matrix.name: item.packed for item in items}):
                step.run()
        yield QuantizedLayer(layer, items, used, time.perf_counter() - started)


@contextmanager
def written(model_map: ModelMap, weights: Mapping[str, PackedMatrix]) -> Iterator[None]:
    """Quantized weights, by matrix name, in the model; the original ones come back on leaving."""
    original = {name: model_map.view(name).clone() for name in weights}
    try:
        for name, packed in weights.items():
            model_map.view(name).copy_(packed.dequantize())
        yield
    finally:
        for name, weight in original.items():
            model_map.view(name).copy_(weight)


def _steps(
    model_map: ModelMap, settings: QuantSettings, tokens: Tensor | None, batch_size: int
) -> Iterator[tuple[LayerSite, LayerStep | None]]:
    """The layers, with a walk over the calibration windows where the method needs data."""
    if settings.method != "gptq" or tokens is None:
        yield from ((layer, None) for layer in model_map.layers)
        return
    batches = batches_of(tokens, batch_size)
    check_walk(model_map, batches)
    for step in walk(model_map, batches):
        yield step.layer, step


def _observe(
    step: LayerStep, settings: QuantSettings
) -> tuple[list[HessianBatch], dict[str, list[int]]]:
    """Hessians and tokens per expert of a layer."""
    observer = observer_of(settings)
    with observe_layer(step.layer, observer):
        step.run()
    return observer.batches(step.layer), observer.utilization()


def _quantize(
    model_map: ModelMap,
    layer: LayerSite,
    assignment: Assignment,
    settings: QuantSettings,
    hessians: list[HessianBatch] | None,
) -> list[QuantizedMatrix]:
    formats = sorted({assignment.formats[m.name] for m in layer.matrices()})
    items = quantize_layer(
        model_map,
        layer,
        hessians,
        formats,
        settings,
        lambda m, name: assignment.formats[m.name] == name,
    )
    return list(items)
