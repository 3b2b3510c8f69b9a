"""Checkpoints that exist already as what a search chooses from: their matrices fill a bank.

Each quantized matrix of a candidate goes into the bank in the format of ours that holds it exactly
(`exact_formats`); nothing is rounded here. What a candidate keeps plain is the original model's.
What has no exact format is refused by name, and so are two candidates that give one matrix one
format: which of the two is meant could not be said by a format's name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.errors import ConfigError, FormatError, ModelError
from alphaquant.files import locked, sha256_of, whole_file
from alphaquant.models.quantized.compressed import PlainForm
from alphaquant.models.quantized.foreign_files import ForeignCheckpoint, open_foreign
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.bank import LOCK_FILE, Bank, file_digest, write_text
from alphaquant.quant.foreign.exact_formats import exact_packed
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.stacks import MatrixRecord
from alphaquant.spaces.formats import BF16
from alphaquant.spaces.units import Inventory, Matrix

ORIGINAL = ""
"""Where a matrix in bf16 comes from: the model itself."""

TAKEN = "taken"
"""How a matrix of a candidate was made, as a record says: not by us."""


@dataclass(frozen=True)
class Candidates:
    """Checkpoints of one model, opened and looked through.

    Attributes:
        checkpoints: by directory, as given.
        held: directory by matrix and format; `ORIGINAL` for bf16, which every matrix has.
        digest: of the files.
    """

    checkpoints: Mapping[str, ForeignCheckpoint]
    held: Mapping[str, Mapping[str, str]]
    digest: str

    @property
    def menu(self) -> tuple[str, ...]:
        """Formats that any matrix has."""
        return tuple(sorted({name for formats in self.held.values() for name in formats}))

    def packed(self, matrix: Matrix, format_name: str) -> PackedMatrix:
        """A matrix in a format that a candidate has."""
        return _packed(self.checkpoints[self.held[matrix.name][format_name]], matrix)


def find_candidates(directories: Sequence[str], inventory: Inventory) -> Candidates:
    """Open checkpoints and find the format of every matrix in each.

    Args:
        directories: of the checkpoints.
        inventory: the model's matrices.

    Raises:
        ConfigError: a matrix has no exact format, or one format from two candidates; or a
            candidate has no quantized matrix.
        ModelError: a checkpoint cannot be read, or is one of another model.
    """
    checkpoints = {name: open_foreign(Path(name)) for name in directories}
    held: dict[str, dict[str, str]] = {m.name: {BF16.name: ORIGINAL} for m in inventory.matrices}
    digest = hashlib.sha256()
    for name, checkpoint in checkpoints.items():
        found = _formats_of(name, checkpoint, inventory)
        for matrix, fmt in found.items():
            other = held[matrix].setdefault(fmt, name)
            if other != name:
                raise ConfigError(
                    f"--candidates: {other} and {name} both have {matrix} in {fmt}, and a search "
                    "names matrices by format: leave one of the two out"
                )
        for file in sorted({header.file for header in checkpoint.headers.values()}):
            digest.update(sha256_of(file).encode())
        digest.update((Path(name) / "config.json").read_bytes())
    return Candidates(checkpoints, held, digest.hexdigest())


def _formats_of(name: str, checkpoint: ForeignCheckpoint, inventory: Inventory) -> dict[str, str]:
    """The format of every quantized matrix of a candidate."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for matrix in inventory.matrices:
        if isinstance(checkpoint.find(matrix).form, PlainForm):
            continue
        try:
            found[matrix.name] = _packed(checkpoint, matrix).format.name
        except FormatError as error:
            problems.append(f"{matrix.name}: {error}")
    if problems:
        raise ConfigError(
            f"--candidates: {name} has {len(problems)} matrices that cannot be candidates, e.g. "
            f"{problems[0]}; GPTQ and AWQ without act-order, integers and mxfp4 of "
            "compressed-tensors, and fp8 by row with 16-bit scales can: leave this one out"
        )
    if not found:
        raise ConfigError(
            f"--candidates: {name} has no quantized matrix of this model; leave it out"
        )
    return found


def _packed(checkpoint: ForeignCheckpoint, matrix: Matrix) -> PackedMatrix:
    return exact_packed(checkpoint.read(checkpoint.find(matrix)))


@torch.no_grad()
def store_candidates(bank: Bank, model_map: ModelMap, candidates: Candidates) -> int:
    """Put what a bank lacks of the candidates into it.

    Args:
        bank: of these candidates.
        model_map: the original model, with its weights.
        candidates: from `find_candidates`.

    Returns:
        Number of files written.

    Raises:
        ModelError: a file of a candidate is damaged.
        StoreError: another process fills this bank.
    """
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        return sum(
            _write_layer(bank, model_map, layer, name, wanted, candidates)
            for layer in model_map.layers
            for name, wanted in _wanted(layer, candidates)
            if bank.matrices(name, layer.index) != {m.name for m in wanted}
        )


def _wanted(layer: LayerSite, candidates: Candidates) -> Iterator[tuple[str, list[Matrix]]]:
    """Formats of a layer with the matrices that candidates have in them."""
    for name in candidates.menu:
        if name != BF16.name:
            yield name, [m for m in layer.matrices() if name in candidates.held[m.name]]


def _write_layer(
    bank: Bank,
    model_map: ModelMap,
    layer: LayerSite,
    name: str,
    wanted: Sequence[Matrix],
    candidates: Candidates,
) -> int:
    """One layer in one format; the number of files written."""
    if not wanted:
        return 0
    tensors: dict[str, Tensor] = {}
    records = []
    for matrix in wanted:
        packed = candidates.packed(matrix, name)
        if packed.format.name != name:
            raise ModelError(
                f"{candidates.held[matrix.name][name]} changed while it was read: {matrix.name} "
                f"was {name} and is {packed.format.name}; run again when it is whole"
            )
        tensors |= {f"{matrix.name}.{part}": t.contiguous() for part, t in packed.tensors.items()}
        records.append(asdict(_record(matrix, packed, model_map.view(matrix.name))))
    path = bank.file(name, layer.index)
    with whole_file(path) as part:
        save_file(tensors, part)
        sha256 = file_digest(part)
    sidecar = {"sha256": sha256, "utilization": {}, "records": records}
    write_text(path.with_suffix(".json"), json.dumps(sidecar))
    return 1


def _record(matrix: Matrix, packed: PackedMatrix, weight: Tensor) -> MatrixRecord:
    """What is known of a matrix that another tool quantized."""
    original = weight.to("cpu", torch.float32)
    lost = (packed.dequantize() - original).square().sum() / original.square().sum()
    bits = matrix.storage_bits(packed.format) / matrix.n_weights
    return MatrixRecord(matrix.name, packed.format.name, bits, TAKEN, weight_error=float(lost))
