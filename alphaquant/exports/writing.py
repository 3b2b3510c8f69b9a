"""The one list of exports, and how one is made of a packed checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alphaquant.exports.compressed_tensors import CompressedTensorsExport
from alphaquant.exports.contract import Exporter
from alphaquant.exports.gguf.writer import GgufExport
from alphaquant.exports.gptq import GptqExport
from alphaquant.exports.packed import open_packed
from alphaquant.files import whole_file, writing
from alphaquant.models.quantization_config import REPORT
from alphaquant.runtime.integrity import write_checksums
from alphaquant.spaces.json_files import read_object

EXPORTERS: Mapping[str, Exporter] = MappingProxyType(
    {
        exporter.name: exporter
        for exporter in (CompressedTensorsExport(), GptqExport(), GgufExport())
    }
)
"""Every export but our own format, by name."""


def export_packed(exporter: Exporter, directory: Path, out: Path) -> dict[str, Any]:
    """Write a packed checkpoint again as another program's files.

    Args:
        exporter: which files.
        directory: the packed checkpoint.
        out: an empty directory.

    Returns:
        What the report says about it.

    Raises:
        StoreError: the disk is full, or a checkpoint is damaged.
    """
    facts = {"format": exporter.name, **exporter.write(open_packed(directory), out)}
    exporter.verify(out)
    report = read_object(directory / REPORT) | {"export": facts}
    text = json.dumps(report, indent=1) + "\n"
    with writing(out / REPORT, len(text)), whole_file(out / REPORT, len(text)) as part:
        part.write_text(text)
    write_checksums(out)
    return facts
