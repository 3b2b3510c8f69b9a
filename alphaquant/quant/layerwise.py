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
from alphaquant.quant.engine import QuantizedMatrix, QuantSettings, quantize_layer
from alphaquant.quant.hessian import HessianBatch, LayerHessians
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.sites import LayerSite, ModelMap
from alphaquant.quant.walk import LayerInputs, batches_of, capture_inputs, observe_layer, run_layer
from alphaquant.spaces.assignment import Assignment

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
    unfinished = [layer.index for layer in model_map.layers if layer.index not in finished]
    inputs = None
    if settings.method == "gptq":
        if tokens is None:
            raise ModelError(
                "GPTQ needs calibration text; give --calibration, or --method rtn which needs none"
            )
        if unfinished:
            inputs = capture_inputs(model_map, batches_of(tokens, batch_size))
    for layer in model_map.layers[: max(unfinished, default=-1) + 1]:
        if layer.index in finished:
            if inputs is not None:
                weights = finished[layer.index]() if settings.sequential else {}
                with written(model_map, weights):
                    _advance(layer, inputs)
            continue
        started = time.perf_counter()
        hessians: list[HessianBatch] | None = None
        used: dict[str, list[int]] = {}
        if inputs is not None:
            hessians, used = _observe(layer, settings, inputs)
        items = _quantize(model_map, layer, assignment, settings, hessians)
        if inputs is not None and settings.sequential:
            with written(model_map, {item.matrix.name: item.packed for item in items}):
                _advance(layer, inputs)
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


def _observe(
    layer: LayerSite, settings: QuantSettings, inputs: LayerInputs
) -> tuple[list[HessianBatch], dict[str, list[int]]]:
    """Hessians and tokens per expert of a layer; moves the hidden states on unless sequential."""
    observer = LayerHessians(settings.route_exponent, settings.pooled_tokens)
    with observe_layer(layer, observer):
        if settings.sequential:
            for hidden in inputs.hidden:
                run_layer(layer, hidden, inputs.arguments[layer.index])
        else:
            _advance(layer, inputs)
    return observer.batches(layer), observer.utilization()


def _advance(layer: LayerSite, inputs: LayerInputs) -> None:
    """Replace the hidden states by the layer's outputs, batch by batch."""
    arguments = inputs.arguments[layer.index]
    for i, hidden in enumerate(inputs.hidden):
        inputs.hidden[i] = run_layer(layer, hidden, arguments)


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
