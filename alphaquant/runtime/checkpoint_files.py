"""The files of a packed checkpoint: which there are, their headers, their tensors.

What the tensors mean is in `alphaquant.runtime.checkpoint`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from alphaquant.errors import StoreError

INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it.

    Attributes:
        shape: its shape.
        dtype: its dtype, as safetensors calls it.
    """

    shape: tuple[int, ...]
    dtype: str


def tensor_files(directory: Path) -> list[Path]:
    """The files with the tensors of a packed checkpoint, sorted.

    Raises:
        StoreError: one is missing or outside the directory, or their index is missing or damaged.
    """
    single = directory / _SINGLE_FILE
    if single.exists():
        return [single]
    try:
        index = json.loads((directory / INDEX).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(directory, error) from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise damaged(
            directory, f"{INDEX} must be an object whose weight_map is tensor -> name of a file"
        )
    names = sorted(set(places.values()))
    for name in names:
        if not is_inside(name):
            raise damaged(directory, f"{INDEX} names {name!r}, outside the checkpoint")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise damaged(directory, f"{', '.join(missing[:3])} missing")
    return [directory / name for name in names]


def is_inside(name: str) -> bool:
    """Whether the name of a file stays inside the directory that it is read from."""
    path = PurePath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a packed checkpoint.

    Raises:
        StoreError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(directory):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise damaged(directory, error) from error
    return tensors


def file_of(tensor: str, files: Sequence[str]) -> str:
    """The file that holds a tensor; all of them where none does under this name."""
    holding = (file for file in files if tensor in read_headers([file], file))
    return next(holding, ", ".join(files))


def read_headers(files: Iterable[str | Path], source: str) -> dict[str, StoredTensor]:
    """Shape and dtype of every tensor in some files; no tensor is read.

    Args:
        files: safetensors.
        source: the checkpoint, for messages.

    Raises:
        StoreError: a file is missing or damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise damaged(source, error) from error
    return found


def damaged(source: str | Path, reason: object) -> StoreError:
    """The error of a checkpoint, or a file of it, that cannot be used."""
    text = " ".join(str(reason).split())
    return StoreError(f"{source} is incomplete or damaged ({text}); quantize again")
