"""Packed matrices of different formats behind one another in one tensor of bytes.

An engine's layer has parameters of one shape and dtype each; ours has matrices that differ in
both. So a layer holds one uint8 tensor, and this file says where in it everything is:

    bank = MatrixBank({"model.layers.0.self_attn.q_proj": slice, ...})
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    bank.load(memory, 0, "codes", tensor)      # as a file stores it; cut for this rank
    bank.matrix(memory, 0)                     # a PackedMatrix whose tensors are views

Every tensor begins at a multiple of 16 bytes. Worked example, `int4-g32` [2, 64] then bf16 [1, 8]:
codes 0 .. 63, scales 64 .. 71, weight 80 .. 95, 96 bytes.

Operators of torch take tensors and text, so a layout is also a text (`facts`), which
`read_places` turns into places again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.runtime.vllm.slices import Slice
from alphaquant.spaces.formats import Format

TENSORS = ("codes", "scales", "super_scales", "zeros", "global_scale", "weight")
"""Everything that packed matrices can have; a format has some of them."""

_ALIGNMENT = 16


class View(NamedTuple):
    """Where one tensor of a matrix lies: first byte, shape, dtype."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, a view of the bytes."""
        flat = memory[self.start : self.start + self.n_bytes]
        return flat.view(self.dtype).view(self.shape)


class Place(NamedTuple):
    """One matrix of a bank: its format, rows, columns, and where its tensors lie."""

    format: Format
    rows: int
    cols: int
    views: Mapping[str, View]

    def matrix(self, memory: Tensor) -> PackedMatrix:
        """The matrix; its tensors are views of the bytes."""
        tensors = {name: view.of(memory) for name, view in self.views.items()}
        return PackedMatrix(self.format, self.rows, self.cols, tensors)


@lru_cache(maxsize=4096)
def read_places(facts: str) -> tuple[Place, ...]:
    """The places of a bank, from its `facts`."""
    content = json.loads(facts)
    formats = [Format(*fields) for fields in content["formats"]]
    return place([(formats[f], rows, cols) for f, rows, cols in content["matrices"]])


def place(matrices: Sequence[tuple[Format, int, int]]) -> tuple[Place, ...]:
    """Lay matrices out behind one another.

    Args:
        matrices: format, rows and columns of each.
    """
    places, start = [], 0
    for fmt, rows, cols in matrices:
        views = {}
        for name, (shape, dtype) in packed_shapes(fmt, rows, cols).items():
            views[name] = View(start, shape, dtype)
            start = _aligned(start + views[name].n_bytes)
        places.append(Place(fmt, rows, cols, views))
    return tuple(places)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class MatrixBank:
    """The matrices of a layer, or of its experts, on this rank.

    Attributes:
        slices: what is kept of each stored matrix, by the name that messages use.
        missing: tensors that were not loaded yet, by index of the matrix; `load` takes them out.
    """

    slices: Mapping[str, Slice]
    missing: set[tuple[int, str]] = field(init=False)

    def __post_init__(self) -> None:
        """Everything is missing at first."""
        wanted = {(i, name) for i, place in enumerate(self.places) for name in place.views}
        object.__setattr__(self, "missing", wanted)

    @cached_property
    def facts(self) -> str:
        """The layout as text."""
        slices = list(self.slices.values())
        formats = list(dict.fromkeys(part.format for part in slices))
        matrices = [[formats.index(s.format), len(s.rows), len(s.cols)] for s in slices]
        return json.dumps({"formats": [astuple(f) for f in formats], "matrices": matrices})

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Where the matrices lie, in the order of `slices`."""
        return read_places(self.facts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The matrices, in the order of `slices`."""
        return tuple(self.slices)

    @property
    def n_bytes(self) -> int:
        """Of all matrices, with what alignment adds."""
        ends = [v.start + v.n_bytes for place in self.places for v in place.views.values()]
        return _aligned(max(ends, default=0))

    def matrix(self, memory: Tensor, index: int) -> PackedMatrix:
        """One of the matrices; its tensors are views."""
        return self.places[index].matrix(memory)

    def load(self, memory: Tensor, index: int, name: str, tensor: Tensor) -> None:
        """Write this rank's part of a stored tensor.

        Args:
            memory: uint8 [n_bytes], on any device.
            index: of the matrix.
            name: one of `TENSORS`.
            tensor: of the whole matrix, as a file stores it.

        Raises:
            StoreError: the format has no such tensor, or one of another shape or dtype.
        """
        matrix = self.names[index]
        part = self.slices[matrix]
        expected = packed_shapes(part.stored, part.stored_rows, part.stored_cols)
        found = (tuple(tensor.shape), tensor.dtype)
        if expected.get(name) != found:
            raise StoreError(
                f"{matrix}.{name} is {_described(found)}, but {part.stored.name} "
                f"[{part.stored_rows}, {part.stored_cols}] has {_listed(expected)}; config.json "
                "and the files are of different checkpoints, or the checkpoint is not of this "
                "model: copy it again, or quantize again"
            )
        self.places[index].views[name].of(memory).copy_(part.cut(name, tensor))
        self.missing.discard((index, name))

    def check_complete(self, layer: str) -> None:
        """Raise if a tensor was not loaded.

        Raises:
            StoreError: naming the first ones.
        """
        if not self.missing:
            return
        lost = [f"{self.names[index]}.{name}" for index, name in sorted(self.missing)]
        raise StoreError(
            f"{layer}: {len(lost)} tensors of it are not in the checkpoint, e.g. "
            f"{', '.join(lost[:3])}; copy the checkpoint again, or quantize again"
        )


def _described(tensor: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = tensor
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _listed(expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {_described(tensor)}" for name, tensor in expected.items())
