"""From a model and an assignment to a packed checkpoint, layer by layer.

Inputs of every layer are those of the original model, as in the bank, so that a checkpoint made
with a trial's settings has the trial's codes.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant.bank import Progress
from alphaquant.quant.checkpoint import CheckpointWriter
from alphaquant.quant.engine import QuantizedMatrix, QuantSettings, quantize_layer
from alphaquant.quant.hessian import LayerHessians
from alphaquant.quant.provenance import device_facts, versions
from alphaquant.quant.sites import LayerSite, ModelMap
from alphaquant.quant.utilization import utilization_facts
from alphaquant.quant.walk import LayerInputs, batches_of, capture_inputs, observe_layer, run_layer
from alphaquant.spaces.assignment import Assignment, BitCount


@dataclass(frozen=True)
class PipelineResult:
    """What was written.

    Attributes:
        path: the checkpoint's directory.
        quantized_bytes: bytes of the packed matrices.
        checkpoint_bytes: bytes of all tensors.
        fallbacks: matrices quantized otherwise than asked, as name -> reason.
        seconds: wall time.
    """

    path: Path
    quantized_bytes: int
    checkpoint_bytes: int
    fallbacks: Mapping[str, str]
    seconds: float


@torch.no_grad()
def quantize_to_checkpoint(
    model_map: ModelMap,
    assignment: Assignment,
    target: Path,
    settings: QuantSettings,
    tokens: Tensor | None,
    *,
    facts: Mapping[str, Any],
    tokenizer: Any = None,
    overwrite: bool = False,
    batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> PipelineResult:
    """Quantize every matrix to its format and write a packed checkpoint.

    Args:
        model_map: the original model.
        assignment: format of every matrix.
        target: directory to write.
        settings: method and options; `rtn` needs no tokens.
        tokens: calibration windows, int64 [N, T].
        facts: provenance for the report (model, data, configuration).
        tokenizer: saved beside the weights.
        overwrite: replace an existing target.
        batch_size: windows per forward pass.
        progress: called with ("quantize", layers done, layers).

    Raises:
        ModelError: GPTQ without tokens, or what the engine raises.
        StoreError: the target exists.
    """
    if settings.method == "gptq" and tokens is None:
        raise ModelError(
            "GPTQ needs calibration text; give --calibration, or --method rtn which needs none"
        )
    started = time.perf_counter()
    counts = assignment.count_bits(model_map.inventory)
    writer = CheckpointWriter(target, overwrite)
    try:
        inputs = None
        if settings.method == "gptq" and tokens is not None:
            inputs = capture_inputs(model_map, batches_of(tokens, batch_size))
        report = _start_report(model_map, settings, facts, counts)
        for layer in model_map.layers:
            progress("quantize", layer.index, len(model_map.layers))
            layer_started = time.perf_counter()
            items, used = _quantize_one(model_map, layer, assignment, settings, inputs)
            writer.add_layer(layer.index, items)
            seconds = (time.perf_counter() - layer_started) / len(items)
            widths = {site.name: site.gate[0].cols for site in layer.experts}
            report["utilization"] |= utilization_facts(used, widths)
            report["matrices"] += [{**asdict(i.record), "seconds": seconds} for i in items]
        progress("quantize", len(model_map.layers), len(model_map.layers))
        path = writer.finish(model_map, report, tokenizer)
    except BaseException:
        writer.discard()
        raise
    fallbacks = {r["matrix"]: r["fallback"] for r in report["matrices"] if r["fallback"]}
    seconds = time.perf_counter() - started
    return PipelineResult(
        path, writer.quantized_bytes, counts.checkpoint_bytes, fallbacks, seconds
    )


def _start_report(
    model_map: ModelMap, settings: QuantSettings, facts: Mapping[str, Any], counts: BitCount
) -> dict[str, Any]:
    """What is known before the first layer; utilization and matrices are filled layer by layer."""
    return {
        "settings": asdict(settings),
        "versions": versions(),
        **device_facts(str(next(model_map.model.parameters()).device)),
        **facts,
        "bits": asdict(counts),
        "utilization": {},
        "matrices": [],
    }


def _quantize_one(
    model_map: ModelMap,
    layer: LayerSite,
    assignment: Assignment,
    settings: QuantSettings,
    inputs: LayerInputs | None,
) -> tuple[list[QuantizedMatrix], dict[str, list[int]]]:
    """Quantized matrices of one layer and the tokens per expert; moves the hidden states on."""
    formats = sorted({assignment.formats[m.name] for m in layer.matrices()})
    hessians, used = None, {}
    if inputs is not None:
        observer = LayerHessians(settings.route_exponent, settings.pooled_tokens)
        with observe_layer(layer, observer):
            arguments = inputs.arguments[layer.index]
            inputs.hidden[:] = [run_layer(layer, h, arguments) for h in inputs.hidden]
        hessians, used = observer.batches(layer), observer.utilization()
    items = quantize_layer(
        model_map,
        layer,
        hessians,
        formats,
        settings,
        lambda m, name: assignment.formats[m.name] == name,
    )
    return list(items), used
