"""Rounding an assignment layer after layer into a bank that holds nothing else.

So what the sequential mode makes is measured like everything that a search makes.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.files import locked
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.quant.bank import LOCK_FILE, Bank
from alphaquant.quant.filling import BATCH_WINDOWS, BankRequest, write_items
from alphaquant.quant.layerwise import QuantizedLayer, quantize_layers
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.assignment import Assignment


@torch.no_grad()
def fill_sequentially(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    request: BankRequest,
    progress: Progress = no_progress,
) -> int:
    """Quantize what the bank lacks, each layer on what the quantized ones before it give.

    Args:
        bank: from `open_bank`, of this assignment alone.
        model_map: the original model.
        tokens: calibration windows, int64 [N, T].
        request: settings that are `sequential`, and one format for every matrix.
        progress: called with ("bank", layers done, layers).

    Returns:
        Number of files written; 0 when all were there.

    Raises:
        ModelError: a matrix has no format or more than one, or what the engine raises.
        StoreError: another process fills this bank.
    """
    assignment = _assignment_of(bank, request)
    if not request.missing(bank):
        return 0
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        missing, n_layers = request.missing(bank), len(model_map.parts)
        finished = {
            layer: partial(_read, bank, layer, assignment)
            for layer in range(n_layers)
            if layer not in missing
        }
        progress(Stage.BANK, len(finished), n_layers)
        n_written = 0
        for done in quantize_layers(
            *(model_map, assignment, request.settings, tokens, BATCH_WINDOWS, finished),
            outputs=request.outputs,
        ):
            for name, items in _by_format(done):
                lacking = missing[done.layer.index].get(name, frozenset())
                kept = [item for item in items if item.matrix.name in lacking]
                if kept:
                    part = len(bank.parts(name, done.layer.index))
                    path = bank.file(name, done.layer.index, part)
                    write_items(path, kept, done.utilization)
                    n_written += 1
            progress(Stage.BANK, done.layer.index + 1, n_layers)
        return n_written


def _assignment_of(bank: Bank, request: BankRequest) -> Assignment:
    """The one format that every matrix is wanted in."""
    formats: dict[str, str] = {}
    for matrix in bank.inventory.matrices:
        wanted = [name for name in request.formats if request.wanted(matrix, name)]
        if len(wanted) != 1:
            raise ModelError(
                f"{matrix.name} is wanted in {len(wanted)} formats, and rounding layer after "
                "layer needs one for each matrix; use sequential=False"
            )
        formats[matrix.name] = wanted[0]
    return Assignment(formats)


def _read(bank: Bank, layer: int, assignment: Assignment) -> Mapping[str, PackedMatrix]:
    """The matrices of a layer that is there."""
    return {
        m.name: bank.read(m, assignment.formats[m.name])
        for m in bank.inventory.matrices
        if m.layer == layer
    }


def _by_format(done: QuantizedLayer) -> Iterator[tuple[str, list[QuantizedMatrix]]]:
    """The items of a layer, by format."""

    def name_of(item: QuantizedMatrix) -> str:
        return item.record.format

    for name, items in groupby(sorted(done.items, key=name_of), name_of):
        yield name, list(items)
