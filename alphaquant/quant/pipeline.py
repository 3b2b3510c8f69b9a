"""From a model and an assignment to a packed checkpoint, layer by layer.

A checkpoint made with a trial's settings has the trial's codes.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.quant.bank import Progress
from alphaquant.quant.checkpoint import CheckpointWriter
from alphaquant.quant.engine import QuantSettings
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.provenance import device_facts, versions
from alphaquant.quant.sites import ModelMap
from alphaquant.quant.utilization import utilization_facts
from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.formats import Format

NO_ACTIVATIONS: Mapping[str, Format] = {}


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
    activations: Mapping[str, Format] = NO_ACTIVATIONS,
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
        activations: what the inputs of matrices are rounded to at inference, by matrix name;
            calibration sees them as they are.
        tokenizer: saved beside the weights.
        overwrite: replace an existing target.
        batch_size: windows per forward pass.
        progress: called with ("quantize", layers done, layers).

    Raises:
        ModelError: GPTQ without tokens, or what the engine raises.
        StoreError: the target exists.
    """
    started = time.perf_counter()
    counts = assignment.count_bits(model_map.inventory)
    writer = CheckpointWriter(target, overwrite, activations)
    try:
        report = _start_report(model_map, settings, facts, counts)
        report["activations"] = {name: fmt.name for name, fmt in activations.items()}
        progress("quantize", 0, len(model_map.layers))
        for done in quantize_layers(model_map, assignment, settings, tokens, batch_size):
            writer.add_layer(done.layer.index, done.items)
            seconds = done.seconds / len(done.items)
            widths = {site.name: site.gate[0].cols for site in done.layer.experts}
            report["utilization"] |= utilization_facts(done.utilization, widths)
            report["matrices"] += [{**asdict(i.record), "seconds": seconds} for i in done.items]
            progress("quantize", done.layer.index + 1, len(model_map.layers))
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
