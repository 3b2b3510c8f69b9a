"""What `quantization_config` in the config.json of a packed checkpoint says.

    {"quant_method": "alphaquant", "version": 1, "formats": {"<matrix>": "<format>", ...},
     "activations": {"<matrix>": "<format>", ...}, "carried": ["<tensor>", ...]}

`activations` names what the inputs of a matrix are rounded to; it is absent where none are.
`carried` names tensors in the files that are no part of the model, absent where there are none.

Standard library only: it is read while transformers is being imported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphaquant.errors import FormatError, StoreError
from alphaquant.spaces.formats import Format, parse_format

QUANT_METHOD = "alphaquant"
CHECKPOINT_VERSION = 1
REPORT = "quantize_report.json"
"""Beside the weights: a row per matrix, provenance, and how files of another format were made."""


@dataclass(frozen=True)
class PackedFormats:
    """What a packed model is made of.

    Attributes:
        weights: format of every matrix, by name.
        activations: what the inputs of a matrix are rounded to; those not named are left alone.
        carried: tensors in the files that are no part of the model.
    """

    weights: Mapping[str, Format]
    activations: Mapping[str, Format] = field(default_factory=dict)
    carried: tuple[str, ...] = ()


def is_packed(path: str | Path) -> bool:
    """Whether a directory is a packed checkpoint of ours."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD


def is_made_by_us(path: str | Path) -> bool:
    """Whether a directory is a packed checkpoint of ours, or an export of one."""
    try:
        report = json.loads((Path(path) / REPORT).read_text())
    except (OSError, ValueError, RecursionError):
        return is_packed(path)
    return is_packed(path) or (isinstance(report, dict) and "export" in report)


def make_quantization_config(formats: PackedFormats) -> dict[str, Any]:
    """The entry for config.json."""
    entry: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        "version": CHECKPOINT_VERSION,
        "formats": _names(formats.weights),
    }
    if formats.activations:
        entry["activations"] = _names(formats.activations)
    if formats.carried:
        entry["carried"] = list(formats.carried)
    return entry


def read_formats(entry: Mapping[str, Any], source: str) -> PackedFormats:
    """The formats of every matrix and its inputs.

    Args:
        entry: `quantization_config`.
        source: the checkpoint, for messages.

    Raises:
        StoreError: it is of another version, or damaged.
    """
    if entry.get("version") != CHECKPOINT_VERSION:
        raise StoreError(
            f"{source} has format version {entry.get('version')}, this program reads "
            f"{CHECKPOINT_VERSION}; update it"
        )
    parts = [entry.get("formats"), entry.get("activations", {})]
    unknown = sorted(set(entry) - {"quant_method", "version", "formats", "activations", "carried"})
    if unknown or not all(isinstance(part, Mapping) for part in parts):
        raise StoreError(
            f"{source}: quantization_config in config.json has {', '.join(sorted(entry))}; it "
            "must have quant_method, version and formats (matrix -> format), may have activations "
            "(matrix -> format) and nothing else; quantize again"
        )
    try:
        weights, activations = (_formats(part) for part in parts)
    except FormatError as error:
        raise StoreError(f"{source}: config.json is damaged ({error}); quantize again") from error
    if not activations.keys() <= weights.keys():
        lost = sorted(activations.keys() - weights.keys())[0]
        raise StoreError(
            f"{source}: config.json is damaged (activations of {lost}, which is no matrix of it); "
            "quantize again"
        )
    carried = entry.get("carried", [])
    if not isinstance(carried, list):
        raise StoreError(f"{source}: config.json is damaged (carried); quantize again")
    return PackedFormats(weights, activations, tuple(map(str, carried)))


def _formats(names: Any) -> dict[str, Format]:
    return {name: parse_format(str(format_name)) for name, format_name in names.items()}


def _names(formats: Mapping[str, Format]) -> dict[str, str]:
    return {name: fmt.name for name, fmt in formats.items()}
