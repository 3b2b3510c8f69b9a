"""Filling a bank: what it lacks is quantized, layer by layer over the original model's states."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.files import locked, whole_file
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import batches_of, check_walk, observe_layer, walk
from alphaquant.progress import Progress, Stage
from alphaquant.quant.bank import LOCK_FILE, Bank, file_digest, write_text
from alphaquant.quant.engine import Wanted, quantize_layer
from alphaquant.quant.hessian import EndStep, HessianBatch, observer_of, with_outputs
from alphaquant.quant.two_sided.output_hessian import Measured, OutputHessians, checked_outputs
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings


@torch.no_grad()
def fill_bank(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    format_names: Sequence[str],
    settings: QuantSettings,
    *,
    wanted: Wanted = lambda matrix, name: True,
    batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
    outputs: Measured | None = None,
) -> int:
    """Quantize what the bank lacks.

    Args:
        bank: from `open_bank`.
        model_map: the original model.
        tokens: calibration windows, int64 [N, T].
        format_names: canonical names.
        settings: those of the bank's key.
        wanted: which (matrix, format name) pairs; all by default. None that does not fit.
        batch_size: windows per forward pass.
        progress: called with ("hessians" or "bank", layers done, layers).
        outputs: gives the output Hessians, where rounding is two-sided.

    Returns:
        Number of files written; 0 when all were there.

    Raises:
        ModelError: a module was never called, a Hessian cannot be factorized, or `sequential`.
        StoreError: another process fills this bank.
    """
    if settings.sequential:
        raise ModelError(
            "a bank holds every matrix in every format, so no layer has quantized layers before "
            "it; use sequential=False, or quantize_to_checkpoint for one assignment"
        )
    if not _missing(bank, format_names, wanted):
        return 0
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        missing = _missing(bank, format_names, wanted)  # another process may have had the lock
        found = checked_outputs(settings, outputs) if missing else None
        return _fill(bank, model_map, tokens, missing, (settings, found), batch_size, progress)


Missing = Mapping[int, Mapping[str, frozenset[str]]]
"""Names of matrices that are lacking, by layer and format; nothing that lacks none."""


def _missing(bank: Bank, format_names: Sequence[str], wanted: Wanted) -> Missing:
    lacking: dict[int, dict[str, frozenset[str]]] = {}
    held = {
        (name, layer): bank.matrices(name, layer)
        for name in format_names
        for layer in range(bank.inventory.n_parts)
    }
    for matrix in bank.inventory.matrices:
        for name in format_names:
            if not parse_format(name).fits(matrix.cols):
                continue
            if wanted(matrix, name) and matrix.name not in held[name, matrix.layer]:
                of_layer = lacking.setdefault(matrix.layer, {})
                of_layer[name] = of_layer.get(name, frozenset()) | {matrix.name}
    return lacking


def _fill(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    missing: Missing,
    how: tuple[QuantSettings, OutputHessians | None],
    batch_size: int,
    progress: Progress,
) -> int:
    """Quantize layer by layer up to the last that lacks a format; the number of files written."""
    if not missing:
        return 0
    (settings, output_hessians), last, outputs = how, max(missing), []
    n_written, batches = 0, batches_of(tokens, batch_size)
    check_walk(model_map, batches)
    for step in walk(model_map, batches):
        layer = step.layer
        if layer.index > last:
            break
        progress(Stage.HESSIANS, layer.index, len(model_map.layers))
        lacking = missing.get(layer.index)
        if lacking:
            hessians = observer_of(settings)
            with observe_layer(layer, hessians):
                step.run()
            progress(Stage.HESSIANS, layer.index + 1, len(model_map.layers))
            progress(Stage.BANK, layer.index, len(model_map.layers))
            batched = with_outputs(hessians.batches(layer), layer, output_hessians)
            found = (batched, hessians.utilization())
            n_written += _write_layer(bank, model_map, layer, found, lacking, settings)
        elif layer is model_map.layers[-1]:
            step.run()
        outputs = step.outputs
    ends = model_map.ends
    if ends is not None and ends.index in missing:
        batched = EndStep(model_map, batches, outputs).hessians(settings)
        n_written += _write_layer(
            bank, model_map, ends, (batched, {}), missing[ends.index], settings
        )
    progress(Stage.BANK, len(model_map.layers), len(model_map.layers))
    return n_written


def _write_layer(
    bank: Bank,
    model_map: ModelMap,
    layer: LayerSite,
    found: tuple[list[HessianBatch], Mapping[str, list[int]]],
    lacking: Mapping[str, frozenset[str]],
    settings: QuantSettings,
) -> int:
    """Quantize a part of the model with its Hessians, and keep its tokens per expert."""
    (batches, used), names = found, list(lacking)
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for item in quantize_layer(
        model_map, layer, batches, names, settings, lambda m, name: m.name in lacking[name]
    ):
        name = item.record.format
        tensors[name] |= {
            f"{item.matrix.name}.{k}": t.cpu().contiguous() for k, t in item.packed.tensors.items()
        }
        records[name].append(asdict(item.record))
    for name in names:
        path = bank.file(name, layer.index, len(bank.parts(name, layer.index)))
        with whole_file(path) as part:
            save_file(tensors[name], part)
            sha256 = file_digest(part)
        sidecar = {"sha256": sha256, "utilization": used, "records": records[name]}
        write_text(path.with_suffix(".json"), json.dumps(sidecar))
    return len(names)
