"""The bank: every matrix in every candidate format, quantized once and packed on disk.

A trial only swaps.

Layout::

    <root>/<key>/bank.json                        what the bank belongs to (model, data, settings)
    <root>/<key>/.lock                            while a process fills it
    <root>/<key>/<format>/layer-003.safetensors   packed tensors, <matrix>.<codes|scales|zeros|...>
    <root>/<key>/<format>/layer-003.json          sha256 of that file, records of its matrices

The key is a digest of the model's weights, the calibration tokens and the settings, not of the
formats: another menu on the same model adds files. A layer's file is written under another name
and renamed when complete, so a run that was killed resumes with the first missing file. The walk
goes layer by layer over the original model's hidden states.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.errors import ModelError, StoreError
from alphaquant.files import locked, whole_file
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import batches_of, check_walk, observe_layer, walk
from alphaquant.progress import Progress
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import LayerHessians
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
    """An open file of the bank.

    Attributes:
        path: of the file.
        format: its format's name.
        file: the memory-mapped safetensors file.
        names: of its tensors.
    """

    path: Path
    format: str
    file: Any
    names: frozenset[str]

    def read(self, matrix: Matrix) -> PackedMatrix:
        """One packed matrix.

        Raises:
            StoreError: its tensors are missing or of the wrong shape.
        """
        fmt = parse_format(self.format)
        keys = [f"{matrix.name}.{part}" for part in packed_shapes(fmt, matrix.rows, matrix.cols)]
        tensors = {k.rsplit(".", 1)[-1]: self.file.get_tensor(k) for k in keys if k in self.names}
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
    """

    path: Path
    inventory: Inventory
    facts: Mapping[str, Any]

    def file(self, format_name: str, layer: int) -> Path:
        """The safetensors file of one layer in one format."""
        return self.path / format_name / f"layer-{layer:03d}.safetensors"

    def has(self, format_name: str, layer: int) -> bool:
        """Whether that file is complete."""
        return (
            self.file(format_name, layer).exists()
            and self.file(format_name, layer).with_suffix(".json").exists()
        )

    def formats(self) -> list[str]:
        """Formats in which every layer is present."""
        names = [d.name for d in sorted(self.path.iterdir()) if d.is_dir()]
        return [n for n in names if all(self.has(n, i) for i in range(self.inventory.n_layers))]

    def records(self, format_name: str, layer: int) -> list[dict[str, Any]]:
        """Records of one file's matrices, as `MatrixRecord` has them."""
        rows: list[dict[str, Any]] = self._sidecar(format_name, layer)["records"]
        return rows

    def utilization(self, layer: int) -> dict[str, list[int]]:
        """Calibration tokens per expert of a layer's experts modules; empty for dense layers."""
        counts: dict[str, list[int]] = self._sidecar(self.formats()[0], layer)["utilization"]
        return counts

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
        path = self.file(format_name, layer)
        try:
            file = safe_open(path, "pt")
            names = frozenset(file.keys())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise damaged(path, str(error)) from error
        return BankLayer(path, format_name, file, names)

    def verify(self, format_names: Sequence[str]) -> None:
        """Compare every file with its stored sha256.

        Raises:
            StoreError: naming the first damaged file.
        """
        for name in format_names:
            for layer in range(self.inventory.n_layers):
                path = self.file(name, layer)
                if _sha256(path) != self._sidecar(name, layer)["sha256"]:
                    raise damaged(path, "its sha256 differs from the one written with it")

    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.stat().st_size for f in self.path.rglob("*.safetensors"))

    def _sidecar(self, format_name: str, layer: int) -> dict[str, Any]:
        path = self.file(format_name, layer).with_suffix(".json")
        try:
            content = read_object(path)
            return {key: content[key] for key in ("sha256", "utilization", "records")}
        except (OSError, JsonError, KeyError) as error:
            raise damaged(path, str(error)) from error


def bank_key(weights: str, calibration: str, settings: QuantSettings) -> str:
    """Digest that names a bank: weights, calibration tokens, settings, version."""
    facts = {
        "weights": weights,
        "calibration": calibration,
        "settings": asdict(settings),
        "version": BANK_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def open_bank(root: Path, key: str, inventory: Inventory, facts: Mapping[str, Any]) -> Bank:
    """Open the bank of a key, creating its directory if there is none.

    Args:
        root: directory of all banks.
        key: from `bank_key`.
        inventory: the model's matrices.
        facts: provenance to write into `bank.json` (model, data, settings, versions).

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
    else:
        _write_text(index, json.dumps(stated, indent=1, sort_keys=True))
    return Bank(path, inventory, stated)


@torch.no_grad()
def fill_bank(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    format_names: Sequence[str],
    settings: QuantSettings,
    *,
    batch_size: int = 16,
    progress: Progress = lambda stage, done, total: None,
) -> int:
    """Quantize what the bank lacks.

    Args:
        bank: from `open_bank`.
        model_map: the original model.
        tokens: calibration windows, int64 [N, T].
        format_names: canonical names.
        settings: those of the bank's key.
        batch_size: windows per forward pass.
        progress: called with ("hessians" or "bank", layers done, layers).

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
    if not _missing(bank, format_names):
        return 0
    with locked(bank.path / LOCK_FILE, f"the bank {bank.path}", "--cache"):
        return _fill(bank, model_map, tokens, format_names, settings, batch_size, progress)


def _missing(bank: Bank, format_names: Sequence[str]) -> dict[int, list[str]]:
    """Formats that layers lack, of the layers that lack any."""
    lacking = {
        layer: [name for name in format_names if not bank.has(name, layer)]
        for layer in range(bank.inventory.n_layers)
    }
    return {layer: names for layer, names in lacking.items() if names}


def _fill(
    bank: Bank,
    model_map: ModelMap,
    tokens: Tensor,
    format_names: Sequence[str],
    settings: QuantSettings,
    batch_size: int,
    progress: Progress,
) -> int:
    """Quantize layer by layer up to the last that lacks a format; the number of files written."""
    missing = _missing(bank, format_names)
    if not missing:  # whoever had the lock before wrote them
        return 0
    last = max(missing)
    n_written, batches = 0, batches_of(tokens, batch_size)
    check_walk(model_map, batches)
    for step in walk(model_map, batches):
        layer = step.layer
        if layer.index > last:
            break
        progress("hessians", layer.index, len(model_map.layers))
        names = missing.get(layer.index, [])
        if not names:
            continue
        hessians = LayerHessians(settings.route_exponent, settings.pooled_tokens)
        with observe_layer(layer, hessians):
            step.run()
        progress("hessians", layer.index + 1, len(model_map.layers))
        progress("bank", layer.index, len(model_map.layers))
        n_written += _write_layer(bank, model_map, layer, hessians, names, settings)
    progress("bank", len(model_map.layers), len(model_map.layers))
    return n_written


def damaged(path: Path, why: str) -> StoreError:
    """The error for a file that cannot be trusted."""
    return StoreError(
        f"{path} is damaged ({why}); delete {path.parent} and run the same command again: it is "
        "made anew"
    )


def _write_layer(
    bank: Bank,
    model_map: ModelMap,
    layer: LayerSite,
    hessians: LayerHessians,
    names: list[str],
    settings: QuantSettings,
) -> int:
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for item in quantize_layer(model_map, layer, hessians.batches(layer), names, settings):
        name = item.record.format
        tensors[name] |= {
            f"{item.matrix.name}.{k}": t.cpu().contiguous() for k, t in item.packed.tensors.items()
        }
        records[name].append(asdict(item.record))
    for name in names:
        path = bank.file(name, layer.index)
        with whole_file(path) as part:
            save_file(tensors[name], part)
            sha256 = _sha256(part)
        used = hessians.utilization()
        sidecar = {"sha256": sha256, "utilization": used, "records": records[name]}
        _write_text(path.with_suffix(".json"), json.dumps(sidecar))
    return len(names)


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise damaged(path, str(error)) from error
