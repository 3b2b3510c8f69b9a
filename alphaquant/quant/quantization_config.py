"""What `quantization_config` in the config.json of a packed checkpoint says.

    {"quant_method": "alphaquant", "version": 1, "formats": {"<matrix>": "<format>", ...}}

Standard library only: it is read while transformers is being imported.
"""

from collections.abc import Mapping
from typing import Any

from alphaquant.errors import FormatError, StoreError
from alphaquant.spaces.formats import Format, parse_format

QUANT_METHOD = "alphaquant"
CHECKPOINT_VERSION = 1


def make_quantization_config(formats: Mapping[str, str]) -> dict[str, Any]:
    """The entry for config.json.

    Args:
        formats: matrix name -> format name.
    """
    return {
        "quant_method": QUANT_METHOD,
        "version": CHECKPOINT_VERSION,
        "formats": dict(formats),
    }


def read_formats(entry: Mapping[str, Any], source: str) -> dict[str, Format]:
    """The format of every matrix.

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
    formats = entry.get("formats")
    unknown = sorted(set(entry) - {"quant_method", "version", "formats"})
    if unknown or not isinstance(formats, Mapping):
        raise StoreError(
            f"{source}: quantization_config in config.json has {', '.join(sorted(entry))}; it "
            "must have quant_method, version and formats (matrix -> format) and nothing else; "
            "quantize again"
        )
    try:
        return {name: parse_format(str(format_name)) for name, format_name in formats.items()}
    except FormatError as error:
        raise StoreError(f"{source}: config.json is damaged ({error}); quantize again") from error
