"""Whether the files of a packed checkpoint hold what its config.json says; only headers are read.

vLLM does not notice a missing tensor of a quantized model, and serves the noise that was in memory
where it would have been.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from alphaquant.quant.matrix import packed_shapes
from alphaquant.runtime.checkpoint_files import INDEX, damaged, read_headers, tensor_files
from alphaquant.spaces.formats import Format


def check_stored(directory: Path, formats: Mapping[str, Format]) -> None:
    """Check that every file and every tensor that a checkpoint names is there.

    Args:
        directory: of the checkpoint.
        formats: of its matrices, by the names in its files.

    Raises:
        StoreError: something is missing or damaged.
    """
    files = tensor_files(directory)
    found = read_headers(files, str(directory)).keys()
    wanted = {
        f"{name}.{part}" for name, fmt in formats.items() for part in packed_shapes(fmt, 1, 1)
    }
    lost = sorted((wanted | set(_indexed(directory))) - found)
    if lost:
        raise damaged(directory, f"{len(lost)} tensors are missing, e.g. {', '.join(lost[:3])}")


def _indexed(directory: Path) -> Iterable[str]:
    """Names of the tensors in the index; none where one file holds all."""
    index = directory / INDEX
    if not index.exists():
        return ()
    names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    return names
