"""A packed checkpoint as exports read it: a matrix at a time, from mapped files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaquant.models.ends import ends_named
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.models.quantization_config import PackedFormats, read_formats
from alphaquant.models.sites import ModelMap
from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.runtime.checkpoint_files import damaged, tensor_files
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.json_files import read_object


@dataclass(frozen=True)
class PackedSource:
    """A packed checkpoint of `aq-quantize`.

    Attributes:
        directory: where its files are.
        model_map: its model without weights: inventory, layers, sites.
    """

    directory: Path
    model_map: ModelMap

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json, without `quantization_config`."""
        content = read_object(self.directory / "config.json")
        return {key: value for key, value in content.items() if key != "quantization_config"}

    @cached_property
    def formats(self) -> PackedFormats:
        """Formats of the matrices, their inputs, and what is carried along."""
        entry = read_object(self.directory / "config.json")["quantization_config"]
        return read_formats(entry, str(self.directory))

    @property
    def assignment(self) -> Assignment:
        """The plan that it was made of."""
        return Assignment({name: fmt.name for name, fmt in self.formats.weights.items()})

    @cached_property
    def places(self) -> Mapping[str, Path]:
        """The file of every tensor."""
        found: dict[str, Path] = {}
        for file in tensor_files(self.directory):
            with _opened(file) as opened:
                found |= dict.fromkeys(opened.keys(), file)
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor of the files.

        Raises:
            StoreError: it is not there, or its file is damaged.
        """
        if name not in self.places:
            raise damaged(self.directory, f"{name} is missing")
        with _opened(self.places[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def matrix(self, name: str) -> PackedMatrix:
        """One packed matrix.

        Raises:
            StoreError: a tensor of it is missing, or its file is damaged.
        """
        fmt, known = self.formats.weights[name], self.model_map.inventory.by_name[name]
        parts = packed_shapes(fmt, known.rows, known.cols)
        tensors = {part: self.tensor(f"{name}.{part}") for part in parts}
        return PackedMatrix(fmt, known.rows, known.cols, tensors)

    def others(self) -> Iterator[str]:
        """Names of the tensors that are no part of a packed matrix, in the order of the files."""
        parts = {
            f"{matrix.name}.{part}"
            for matrix in self.model_map.inventory.matrices
            for part in packed_shapes(self.formats.weights[matrix.name], matrix.rows, matrix.cols)
        }
        return (name for name in self.places if name not in parts)


def open_packed(directory: Path) -> PackedSource:
    """The packed checkpoint in a directory.

    Raises:
        ModelError: its model cannot be built.
        StoreError: it is damaged.
    """
    skeleton = load_skeleton(directory)
    entry = read_object(directory / "config.json")["quantization_config"]
    include = ends_named(skeleton, read_formats(entry, str(directory)).weights)
    return PackedSource(directory, map_model(skeleton, include=include))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise damaged(file, error) from error
