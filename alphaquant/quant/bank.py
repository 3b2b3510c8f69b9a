"""The bank: every matrix in every candidate format, quantized once and packed on disk.

A trial only swaps.

Layout::

    <root>/<key>/bank.json                        what the bank belongs to (model, data, settings)
    <root>/<key>/.lock                            while a process fills it
    <root>/<key>/<format>/layer-003.safetensors   packed tensors, <matrix>.<codes|scales|zeros|...>
    <root>/<key>/<format>/layer-003.json          sha256 of that file, records of its matrices
    <root>/<key>/<format>/layer-003-1.safetensors  matrices that were wanted later, and so on

The key is a digest of the model's weights, the calibration tokens and the settings, not of the
formats: another menu on the same model adds files. A format need not hold every matrix of a layer.
A file is written under another name and renamed when complete, so a run that was killed resumes
with the first missing file. `filling.py` writes it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alphaquant.errors import StoreError
from alphaquant.files import mark_used, whole_file
from alphaquant.models.pages.scratch import Scratch
from alphaquant.quant.matrix import PackedMatrix, check_packed, packed_shapes
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.json_files import JsonError, read_object
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.quantizer import QuantSettings

BANK_VERSION = 2
LOCK_FILE = ".lock"
"""In a bank's directory while a process fills it; a bank that lacks nothing is free for all."""


@dataclass(frozen=True)
class BankLayer:
    """One layer in one format, opened.

    Attributes:
        path: of the first file.
        format: its format's name.
        files: memory-mapped safetensors files.
        places: the number of the file in which a tensor is, by its name.
    """

    path: Path
    format: str
    files: tuple[Any, ...]
    places: Mapping[str, int]

    def read(self, matrix: Matrix) -> PackedMatrix:
        """One packed matrix.

        Raises:
            StoreError: its tensors are missing or of the wrong shape.
        """
        fmt = parse_format(self.format)
        keys = [f"{matrix.name}.{part}" for part in packed_shapes(fmt, matrix.rows, matrix.cols)]
        tensors = {
            k.rsplit(".", 1)[-1]: self.files[self.places[k]].get_tensor(k)
            for k in keys
            if k in self.places
        }
        packed = PackedMatrix(fmt, matrix.rows, matrix.cols, tensors)
        check_packed(packed, matrix.name, str(self.path))
        return packed


@dataclass(frozen=True)
class Bank:
    """An open bank.

    Attributes:
        path: its directory.
        inventory: the model's matrices.
        facts: what it belongs to, as in `bank.json`.
        scratch: copies of its files on this machine, which are read instead; None for none.
    """

    path: Path
    inventory: Inventory
    facts: Mapping[str, Any]
    scratch: Scratch | None = None

    def file(self, format_name: str, layer: int, part: int = 0) -> Path:
        """A safetensors file of one layer in one format; later parts add matrices."""
        number = f"-{part}" if part else ""
        return self.path / format_name / f"layer-{layer:03d}{number}.safetensors"

    def parts(self, format_name: str, layer: int) -> list[Path]:
        """The complete files of one layer in one format."""
        found: list[Path] = []
        while True:
            path = self.file(format_name, layer, len(found))
            if not (path.exists() and path.with_suffix(".json").exists()):
                return found
            found.append(path)

    def matrices(self, format_name: str, layer: int) -> frozenset[str]:
        """Names of the matrices that one layer has in one format."""
        return frozenset(row["matrix"] for row in self.records(format_name, layer))

    def has(self, format_name: str, layer: int) -> bool:
        """Whether one layer has every matrix in one format."""
        parts = self.parts(format_name, layer)
        return bool(parts) and self.matrices(format_name, layer) == self._names(layer)

    def formats(self) -> list[str]:
        """Formats in which every layer is present."""
        names = [d.name for d in sorted(self.path.iterdir()) if d.is_dir()]
        return [n for n in names if all(self.has(n, i) for i in range(self.inventory.n_parts))]

    def records(self, format_name: str, layer: int) -> list[dict[str, Any]]:
        """Records of one layer's matrices in one format, as `MatrixRecord` has them."""
        parts = self.parts(format_name, layer)
        return [row for path in parts for row in self._sidecar(path)["records"]]

    def utilization(self, layer: int) -> dict[str, list[int]]:
        """Calibration tokens per expert of a layer's experts modules; empty for dense layers.

        Raises:
            StoreError: the layer is in no format.
        """
        for folder in sorted(d for d in self.path.iterdir() if d.is_dir()):
            for path in self.parts(folder.name, layer)[:1]:
                counts: dict[str, list[int]] = self._sidecar(path)["utilization"]
                return counts
        raise damaged(self.path, f"layer {layer} is missing")

    def read(self, matrix: Matrix, format_name: str) -> PackedMatrix:
        """One packed matrix, memory-mapped.

        Raises:
            StoreError: the file is missing or damaged.
        """
        return self.layer(format_name, matrix.layer).read(matrix)

    def layer(self, format_name: str, layer: int) -> "BankLayer":
        """One layer in one format, opened once for many reads.

        Raises:
            StoreError: the file is missing or damaged.
        """
        paths = self.parts(format_name, layer) or [self.file(format_name, layer)]
        files: list[Any] = []
        places: dict[str, int] = {}
        for number, path in enumerate(paths):
            try:
                files.append(safe_open(self._near(path), "pt"))
                places |= dict.fromkeys(files[-1].keys(), number)
            except (OSError, SafetensorError) as error:
                raise damaged(path, str(error)) from error
        return BankLayer(paths[0], format_name, tuple(files), places)

    def verify(self, format_names: Sequence[str], layers: Sequence[int] | None = None) -> None:
        """Compare every file with its stored sha256.

        Args:
            format_names: of these formats.
            layers: of these layers; None for all.

        Raises:
            StoreError: naming the first damaged file.
        """
        for name in format_names:
            for layer in range(self.inventory.n_parts) if layers is None else layers:
                for path in self.parts(name, layer):
                    if file_digest(path) != self._sidecar(path)["sha256"]:
                        raise damaged(path, "its sha256 differs from the one written with it")

    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.path.rglob("*.safetensors"))

    def _near(self, path: Path) -> Path:
        """Where to read a file."""
        if self.scratch is None or not path.exists():
            return path
        return self.scratch.local(path, lambda: str(self._sidecar(path)["sha256"]))

    def _names(self, layer: int) -> frozenset[str]:
        return frozenset(m.name for m in self.inventory.matrices if m.layer == layer)

    def _sidecar(self, file: Path) -> dict[str, Any]:
        path = file.with_suffix(".json")
        try:
            content = read_object(path)
            return {key: content[key] for key in ("sha256", "utilization", "records")}
        except (OSError, JsonError, KeyError) as error:
            raise damaged(path, str(error)) from error


def bank_key(weights: str, calibration: str, settings: QuantSettings) -> str:
    """Digest that names a bank: weights, calibration tokens, settings that act on it, version."""
    acting = asdict(settings)
    if not settings.sequential:
        del acting["correction"]
    facts = {
        "weights": weights,
        "calibration": calibration,
        "settings": acting,
        "version": BANK_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def open_bank(
    root: Path,
    key: str,
    inventory: Inventory,
    facts: Mapping[str, Any],
    scratch: Scratch | None = None,
) -> Bank:
    """Open the bank of a key, creating its directory if there is none.

    Args:
        root: directory of all banks.
        key: from `bank_key`.
        inventory: the model's matrices.
        facts: provenance to write into `bank.json` (model, data, settings, versions).
        scratch: see `Bank`.

    Raises:
        StoreError: `bank.json` is damaged or of another inventory.
    """
    path = root / key
    path.mkdir(parents=True, exist_ok=True)
    stated = {**facts, "version": BANK_VERSION, "inventory": inventory.digest}
    index = path / "bank.json"
    if index.exists():
        try:
            found = read_object(index)
        except JsonError as error:
            raise damaged(index, str(error)) from error
        if found.get("inventory") != inventory.digest:
            raise damaged(index, "it lists another model's matrices")
        mark_used(path)
    else:
        write_text(index, json.dumps(stated, indent=1, sort_keys=True))
    return Bank(path, inventory, stated, scratch)


def find_bank(root: Path, key: str, inventory: Inventory) -> Bank | None:
    """The bank of a key that an earlier search left; None where there is none for this inventory.

    Args:
        root: directory of all banks.
        key: from `bank_key`.
        inventory: the model's matrices.
    """
    try:
        facts = read_object(root / key / "bank.json")
    except (OSError, JsonError):
        return None
    if facts.get("inventory") != inventory.digest:
        return None
    mark_used(root / key)
    return Bank(root / key, inventory, facts)


def damaged(path: Path, why: str) -> StoreError:
    """The error for a file that cannot be trusted."""
    return StoreError(
        f"{path} is damaged ({why}); delete {path.parent} and run the same command again: it is "
        "made anew"
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """Sha256 of a file of the bank.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, str(error)) from error
