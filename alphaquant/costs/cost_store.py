"""Stored costs: one file per layer and format, so that another menu measures only what is new.

Layout of a store's folder, whose name is a digest of everything that costs depend on but the
formats and the layers::

    layer-003.safetensors                 what all formats share, arrays [m]: n_tokens, ...
    layer-003.int3-g64-asym.safetensors   costs in one format, arrays [m] or [m, ...]
    layer-003.int8-g128.0123456789ab.safetensors   of some matrices only, NaN for all others

A file appears whole or not at all and carries the sha256 of its arrays; a run that was killed
measures what is missing. Nothing here knows what is measured.

Letters: m matrices of a layer, in inventory order; M of the model; F formats.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from alphaquant.checksums import SUM, content_sum
from alphaquant.costs.gradients import LayerTrace
from alphaquant.errors import StoreError
from alphaquant.files import mark_used, whole_file

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LayerCosts:
    """What was measured of one layer.

    Attributes:
        shared: arrays [m] that do not depend on a format.
        formats: arrays [m, ...] by format.
    """

    shared: Arrays
    formats: Mapping[str, Arrays]


Measure = Callable[[LayerTrace, Sequence[str]], LayerCosts]
"""Costs of a traced layer in these formats, perhaps none."""


@dataclass(frozen=True)
class TableShape:
    """What a store must hold.

    Attributes:
        sizes: matrices of each layer.
        formats: F names.
        shared: names of the arrays [m] that all formats share.
        trailing: by name of the arrays of a format, their shape without [m].
        parts: names of what costs of a layer and format are of, where not of all its matrices.
        labels: what files of a layer are named after besides, by number of the layer.
    """

    sizes: Sequence[int]
    formats: Sequence[str]
    shared: Sequence[str]
    trailing: Mapping[str, tuple[int, ...]]
    parts: Mapping[tuple[int, str], str] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CostStore:
    """The files of one key.

    Attributes:
        folder: where they are; it need not exist.
    """

    folder: Path

    def file(self, layer: int, format_name: str | None = None, part: str | None = None) -> Path:
        """The file of one layer in one format, or a part of it, or of what its formats share."""
        middle = "" if format_name is None else f".{format_name}"
        middle += "" if part is None else f".{part}"
        return self.folder / f"layer-{layer:03d}{middle}.safetensors"

    def missing(self, shape: TableShape) -> dict[int, tuple[str, ...]]:
        """Layers that lack a file, each with the formats it lacks."""
        lacking = {}
        for layer in range(len(shape.sizes)):
            names = tuple(n for n in shape.formats if not self._file(shape, layer, n).exists())
            if names or not self._file(shape, layer, None).exists():
                lacking[layer] = names
        return lacking

    def fill(
        self,
        shape: TableShape,
        traces: Callable[[], Iterator[LayerTrace]],
        measure: Measure,
        progress: Callable[[int, int], None],
    ) -> None:
        """Measure what is missing.

        Args:
            shape: what must be there.
            traces: starts the walk from the last layer to the first; it is left when no layer
                lacks a file, and not called if none does.
            measure: costs of one layer.
            progress: called with (layers done, layers).
        """
        n_layers = len(shape.sizes)
        missing = self.missing(shape)
        if not missing:
            return
        left = set(missing)
        for n_done, trace in enumerate(traces()):
            index = trace.layer.index
            progress(n_done, n_layers)
            if index in missing:
                self.write(shape, index, measure(trace, missing[index]))
            left.discard(index)
            if not left:
                break
            del trace  # its memory is free before the next layer is traced
        progress(n_layers, n_layers)

    def read(self, shape: TableShape) -> Arrays:
        """All arrays, shared ones [M], those of formats [M, F, ...].

        Raises:
            StoreError: a file is missing or damaged.
        """
        mark_used(self.folder)
        parts: dict[str, list[npt.NDArray[Any]]] = {}
        for layer, size in enumerate(shape.sizes):
            found = self._read(
                self._file(shape, layer, None), {name: (size,) for name in shape.shared}
            )
            expected = {name: (size, *rest) for name, rest in shape.trailing.items()}
            by_format = [self._read(self._file(shape, layer, n), expected) for n in shape.formats]
            found |= {n: np.stack([f[n] for f in by_format], 1) for n in expected}
            for name, array in found.items():
                parts.setdefault(name, []).append(array)
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def _file(self, shape: TableShape, layer: int, format_name: str | None) -> Path:
        own = None if format_name is None else shape.parts.get((layer, format_name))
        parts = [part for part in (shape.labels.get(layer), own) if part is not None]
        return self.file(layer, format_name, "-".join(parts) or None)

    def write(self, shape: TableShape, layer: int, costs: LayerCosts) -> None:
        """Write what was measured of a layer.

        Args:
            shape: says which matrices the costs of a format are of.
            layer: number.
            costs: in some formats, perhaps none.
        """
        shards: list[tuple[str | None, Arrays]] = [(None, costs.shared), *costs.formats.items()]
        for name, arrays in shards:
            with whole_file(self._file(shape, layer, name)) as part:
                save_file(arrays, part, metadata={SUM: content_sum(sorted(arrays.items()))})

    def _read(self, file: Path, expected: Mapping[str, tuple[int, ...]]) -> Arrays:
        try:
            with safe_open(file, "np") as opened:
                stated = (opened.metadata() or {}).get(SUM)
                arrays: Arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if content_sum(sorted(arrays.items())) != stated:
                raise ValueError("its sha256 differs from the one written with it")
            shapes = {name: array.shape for name, array in arrays.items()}
            if shapes != expected:
                raise ValueError(f"it holds {shapes}, not {expected}")
        except (OSError, SafetensorError, ValueError) as error:
            raise StoreError(
                f"{file} is damaged ({error}); delete {file.parent} and run the same command "
                "again: it is measured anew"
            ) from error
        return arrays


def by_format(matrices: Sequence[Arrays], formats: Sequence[str]) -> dict[str, Arrays]:
    """Arrays [m, ...] of each format from arrays [F, ...] of each of m matrices."""
    return {
        format_name: {
            key: np.stack([arrays[key][f] for arrays in matrices]) for key in matrices[0]
        }
        for f, format_name in enumerate(formats)
    }


def costs_key(tokens: Tensor, facts: Mapping[str, Any]) -> str:
    """Digest that names a store: calibration windows [S, T] and whatever else costs depend on."""
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes())
    digest.update(json.dumps({**facts, "shape": list(tokens.shape)}, sort_keys=True).encode())
    return digest.hexdigest()[:24]
