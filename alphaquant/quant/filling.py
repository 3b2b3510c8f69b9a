"""Filling a bank: what it lacks is quantized, layer by layer over the original model's states.

Workers fill it by layers too (`fill_bank_by`): first they walk the windows and keep what every
layer gives, then each takes layers. The files are the same, bit for bit.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.files import locked, whole_file
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import batches_of, check_walk, observe_layer, walk
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.quant.bank import LOCK_FILE, Bank, file_digest, write_text
from alphaquant.quant.engine import Wanted, quantize_layer
from alphaquant.quant.hessian import EndStep, HessianBatch, observer_of, with_outputs
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.quant.two_sided.output_hessian import Measured, OutputHessians, checked_outputs
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.work.tasks import Workers
from alphaquant.work.walked import (
    StateFiles,
    Text,
    hands_on_more,
    steps_from,
    walk_tasks,
)

logger = logging.getLogger(__name__)

BATCH_WINDOWS = 16
"""Windows per forward pass; Hessians are summed batch by batch."""


@dataclass(frozen=True)
class BankRequest:
    """What a bank is to hold.

    Attributes:
        formats: canonical names.
        settings: those of the bank's key.
        wanted: which (matrix, format name) pairs; all by default. None that does not fit.
        outputs: gives the output Hessians, where rounding is two-sided.
    """

    formats: Sequence[str]
    settings: QuantSettings
    wanted: Wanted = lambda matrix, name: True
    outputs: Measured | None = None

    def missing(self, bank: Bank) -> "Missing":
        """What a bank has not."""
        held = {
            (name, layer): bank.matrices(name, layer)
            for name in self.formats
            for layer in range(bank.inventory.n_parts)
        }
        lacking: dict[int, dict[str, frozenset[str]]] = {}
        for matrix in bank.inventory.matrices:
            for name in self.formats:
                if not parse_format(name).fits(matrix.cols):
                    continue
                if self.wanted(matrix, name) and matrix.name not in held[name, matrix.layer]:
                    of_layer = lacking.setdefault(matrix.layer, {})
                    of_layer[name] = of_layer.get(name, frozenset()) | {matrix.name}
        return lacking


@torch.no_grad()
def fill_bank(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    request: BankRequest,
    *,
    batch_size: int = BATCH_WINDOWS,
    progress: Progress = no_progress,
) -> int:
    """Quantize what the bank lacks.

    Args:
        bank: from `open_bank`.
        model_map: the original model.
        tokens: calibration windows, int64 [N, T].
        request: what is asked for.
        batch_size: windows per forward pass.
        progress: called with ("hessians" or "bank", layers done, layers).

    Returns:
        Number of files written; 0 when all were there.

    Raises:
        ModelError: a module was never called, a Hessian cannot be factorized, or `sequential`.
        StoreError: another process fills this bank.
    """
    settings = request.settings
    if settings.sequential:
        raise ModelError(
            "a bank holds every matrix in every format, so no layer has quantized layers before "
            "it; use sequential=False, or quantize_to_checkpoint for one assignment"
        )
    if not request.missing(bank):
        return 0
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        missing = request.missing(bank)  # another process may have had the lock
        found = checked_outputs(settings, request.outputs) if missing else None
        return _fill(bank, model_map, tokens, missing, (settings, found), batch_size, progress)


@torch.no_grad()
def fill_bank_by(
    workers: Workers,
    bank: Bank,
    model_map: ModelMap,
    text: Text,
    request: BankRequest,
    progress: Progress = no_progress,
) -> int:
    """Let workers quantize what the bank lacks; arguments and results as of `fill_bank`.

    Nothing is done where layers hand on more than hidden states, which is warned of; `fill_bank`
    fills the bank then.

    Args:
        workers: have opened the same model.
        bank: from `open_bank`, in a folder that all workers see.
        model_map: the original model.
        text: the calibration windows.
        request: what is asked for; its settings are not `sequential`.
        progress: called with ("states", units of batches done, units), then ("bank", layers).
    """
    settings = request.settings
    if not request.missing(bank):
        return 0
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        missing = request.missing(bank)  # another process may have had the lock
        if not missing or not can_spread(model_map, text, "the bank is filled"):
            return 0
        found = checked_outputs(settings, request.outputs)
        check_walk(model_map, text.batches)
        states = StateFiles(text.folder / f"walk-{text.batch_size}", text)
        walks = walk_tasks(states, max(missing) - 1)
        for _ in workers.map(walks, lambda done, n: progress(Stage.STATES, done, n)):
            pass
        tasks = [
            BankTask(
                *(bank.path, layer, _places(bank, layer, lacking), states, settings),
                outputs=found,
            )
            for layer, lacking in missing.items()
        ]
        n_layers = len(model_map.layers)
        n_before = n_layers - len(tasks)

        def tell(done: int, total: int) -> None:
            progress(Stage.BANK, min(n_before + done, n_layers), n_layers)

        return sum(workers.map(tasks, tell))


def can_spread(model_map: ModelMap, text: Text, what: str) -> bool:
    """Whether layers can be worked on one by one; a warning says so where they cannot.

    Args:
        model_map: the model.
        text: its first window is looked at.
        what: is done in one process otherwise, a clause.
    """
    layer = hands_on_more(model_map, text.tokens[:1])
    if layer is not None:
        logger.warning(
            "%s hands on more than hidden states, so %s in one process, not by workers",
            *(layer, what),
        )
    return layer is None


@dataclass(frozen=True)
class _Place:
    """What is lacking of a layer in one format.

    Attributes:
        part: number of the file that gets it; fixed beforehand, so that it is written once however
            often the task is run.
        names: of the matrices.
    """

    part: int
    names: frozenset[str]


def _places(bank: Bank, layer: int, lacking: Mapping[str, frozenset[str]]) -> dict[str, _Place]:
    return {
        name: _Place(len(bank.parts(name, layer)), matrices) for name, matrices in lacking.items()
    }


@dataclass(frozen=True)
class BankTask:
    """Quantize a part of the model.

    Attributes:
        folder: of the bank.
        layer: number of the layer, or of what is beside the layers.
        places: what it lacks, by format.
        states: of the layers below.
        settings: of the quantizer.
        outputs: output Hessians of the model, in a folder that all workers see; None where
            rounding is one-sided.
    """

    folder: Path
    layer: int
    places: Mapping[str, _Place]
    states: StateFiles
    settings: QuantSettings
    outputs: OutputHessians | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"part {self.layer} of the bank"

    @torch.no_grad()
    def run(self, model_map: ModelMap) -> int:
        """See `Task.run`; the number of files written."""
        bank = Bank(self.folder, model_map.inventory, {})
        left = {
            name: place
            for name, place in self.places.items()
            if len(bank.parts(name, self.layer)) <= place.part
        }
        if not left:
            return 0
        steps = steps_from(model_map, self.states, self.layer)
        step = next(steps)
        part = model_map.parts[self.layer]
        if part is model_map.ends:
            ends = EndStep(model_map, self.states.text.batches, step.outputs)
            found: Found = (ends.hessians(self.settings), {})
        else:
            hessians = observer_of(self.settings)
            with observe_layer(part, hessians):
                step.run()
            batched = with_outputs(hessians.batches(part), part, self.outputs)
            found = (batched, hessians.utilization())
        steps.close()
        return _write_layer(bank, model_map, part, found, left, self.settings)

    def smaller(self) -> "BankTask":
        """Itself: the Hessians of a layer are needed together."""
        return self


Missing = Mapping[int, Mapping[str, frozenset[str]]]
"""Names of matrices that are lacking, by layer and format; nothing that lacks none."""

Found = tuple[list[HessianBatch], Mapping[str, list[int]]]
"""Hessians of a part of the model, and its tokens per expert by experts module."""


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
    for step in walk(model_map, batches, is_rough=True):
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
            places = _places(bank, layer.index, lacking)
            n_written += _write_layer(bank, model_map, layer, found, places, settings)
        elif layer is model_map.layers[-1]:
            step.run()
        outputs = step.outputs
    ends = model_map.ends
    if ends is not None and ends.index in missing:
        batched = EndStep(model_map, batches, outputs).hessians(settings)
        places = _places(bank, ends.index, missing[ends.index])
        n_written += _write_layer(bank, model_map, ends, (batched, {}), places, settings)
    progress(Stage.BANK, len(model_map.layers), len(model_map.layers))
    return n_written


def _write_layer(
    bank: Bank,
    model_map: ModelMap,
    layer: LayerSite,
    found: Found,
    places: Mapping[str, _Place],
    settings: QuantSettings,
) -> int:
    """Quantize a part of the model with its Hessians, and keep its tokens per expert."""
    (batches, used), names = found, list(places)
    items: dict[str, list[QuantizedMatrix]] = {name: [] for name in names}
    for item in quantize_layer(
        model_map, layer, batches, names, settings, lambda m, name: m.name in places[name].names
    ):
        items[item.record.format].append(item)
    for name in names:
        write_items(bank.file(name, layer.index, places[name].part), items[name], used)
    return len(names)


def write_items(
    path: Path, items: Sequence[QuantizedMatrix], used: Mapping[str, list[int]]
) -> None:
    """Write matrices of a layer in one format, and how they were made.

    Args:
        path: from `Bank.file`.
        items: at least one.
        used: tokens per expert, by experts module.
    """
    tensors = {
        f"{item.matrix.name}.{k}": t.cpu().contiguous()
        for item in items
        for k, t in item.packed.tensors.items()
    }
    with whole_file(path) as part:
        save_file(tensors, part)
        sha256 = file_digest(part)
    records = [asdict(item.record) for item in items]
    sidecar = {"sha256": sha256, "utilization": used, "records": records}
    write_text(path.with_suffix(".json"), json.dumps(sidecar))
