"""What a GGUF file holds, from its header alone; no tensor is read.

Version 3 of the layout, little endian (version 2 has the same bytes)::

    "GGUF"  version u32  n_tensors u64  n_keys u64
    n_keys times     key string, type u32, value; a string is a length u64 and UTF-8, an array its
                     element type u32, a count u64 and the elements
    n_tensors times  name string, n_dims u32, dims u64 each (fastest first), type u32, offset u64
    zeros to the next multiple of general.alignment (32), then the data; offsets count from here

Worked example: a Q8_0 block is 32 weights in 34 bytes, so a tensor with dims 64, 3 has shape
[3, 64], 6 blocks and 204 bytes.

Source: the GGUF specification in github.com/ggml-org/ggml.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import MappingProxyType

from alphaquant.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FLOATS = ("F32", "F16", "BF16", "F64")
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
"""Numbers of value types and how `struct` calls them."""

NEWER_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType({42: ("Q2_0", 64, 18)})
"""Types of ggml.h that gguf 0.19 does not know: number -> name, weights and bytes of a block."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies and how it is stored.

    Attributes:
        name: as llama.cpp calls it: `blk.0.attn_q.weight`.
        shape: rows first, as torch counts.
        type: `Q4_K`, `F32`, ...
        start: of its first byte in the file.
        n_bytes: that it takes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A file without its data.

    Attributes:
        path: the file.
        metadata: keys that are no arrays.
        tensors: in the order of the file.
    """

    path: Path
    metadata: Mapping[str, str | int | float]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it: `llama`, `qwen3moe`."""
        return str(self.metadata["general.architecture"])

    @property
    def quantized_shares(self) -> dict[str, float]:
        """Types that are no plain floats -> share of all weights, the largest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += prod(tensor.shape)
        n_all = counts.total()
        return {name: n / n_all for name, n in counts.most_common() if name not in _FLOATS}

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all tensors in bits, over their weights."""
        n_weights = sum(prod(tensor.shape) for tensor in self.tensors)
        return 8 * sum(tensor.n_bytes for tensor in self.tensors) / n_weights


def check_package() -> None:
    """Refuse to go on without the package that knows llama.cpp's types and names.

    Raises:
        ModelError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise ModelError(
            "a GGUF file is read with the package gguf, which is not installed; "
            "pip install 'aq-search[gguf]', or give the original checkpoint"
        )


def read_header(path: Path) -> GgufHeader:
    """Read what a file says about itself.

    Raises:
        ModelError: it is no GGUF file, is damaged or incomplete, one part of several, or has
            types that gguf does not know; or gguf is not installed.
    """
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise ModelError(
                f"{path} is no GGUF file: it starts with {start!r} instead of {MAGIC!r}; give a "
                "GGUF file, or a directory with config.json and safetensors"
            )
        check_package()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).header()
            except (struct.error, UnicodeDecodeError, KeyError) as error:
                raise _damaged(path, f"its header cannot be read: {error}") from error


class _Reader:
    """Walks through a header from its first byte on."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(MAGIC)

    def header(self) -> GgufHeader:
        """Everything.

        Raises:
            ModelError: see `read_header`.
            struct.error: the file ends within.
            KeyError: a value type that does not exist.
        """
        (version,) = self._take("I")
        if version not in _VERSIONS:
            raise ModelError(
                f"{self._path} is a GGUF file of version {version}; versions 2 and 3, little "
                "endian, are read: convert it with a current llama.cpp"
            )
        n_tensors, n_keys = self._take("QQ")
        found = {}
        for _ in range(n_keys):
            key = self._string()
            found[key] = self._value(*self._take("I"))
        metadata = {key: value for key, value in found.items() if value is not None}
        self._check(metadata)
        entries = [self._entry() for _ in range(n_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        first = -(-self._at // max(alignment, 1)) * alignment
        tensors = tuple(self._tensor(*entry, first) for entry in entries)
        return GgufHeader(self._path, metadata, tensors)

    def _check(self, metadata: Mapping[str, str | int | float]) -> None:
        if "general.architecture" not in metadata:
            raise _damaged(self._path, "general.architecture is not in its metadata")
        n_parts = int(metadata.get("split.count", 1))
        if n_parts > 1:
            raise ModelError(
                f"{self._path} is one of {n_parts} parts of a model; a single file is read: join "
                "them with llama-gguf-split --merge and give the result"
            )

    def _take(self, layout: str) -> tuple[int, ...]:
        """The next numbers."""
        size = struct.calcsize(f"<{layout}")
        found = struct.unpack_from(f"<{layout}", self._data, self._at)
        self._at += size
        return found

    def _skip(self, n_bytes: int) -> None:
        if self._at + n_bytes > len(self._data):
            raise struct.error(f"{n_bytes} bytes from {self._at} on, of {len(self._data)}")
        self._at += n_bytes

    def _string(self) -> str:
        (length,) = self._take("Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> str | int | float | None:
        """A value; None for arrays, which are passed over."""
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])[0]
        (element,) = self._take("I")
        (count,) = self._take("Q")
        if element in (_STRING, _ARRAY):
            for _ in range(count):
                if element == _STRING:
                    self._skip(*self._take("Q"))
                else:
                    self._value(_ARRAY)
        else:
            self._skip(count * struct.calcsize(f"<{_SCALARS[element]}"))
        return None

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type and offset of a tensor."""
        name = self._string()
        (n_dims,) = self._take("I")
        dims = self._take(f"{n_dims}Q")
        (kind,) = self._take("I")
        (offset,) = self._take("Q")
        return name, dims[::-1], kind, offset

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, first: int
    ) -> GgufTensor:
        type_name, n_block, block_bytes = self._sizes(name, kind)
        if not shape or shape[-1] % n_block:
            raise _damaged(
                self._path, f"tensor {name} has shape {list(shape)}, in blocks of {n_block}"
            )
        n_bytes = prod(shape) // n_block * block_bytes
        end = first + offset + n_bytes
        if end > len(self._data):
            raise _damaged(
                self._path, f"tensor {name} ends at byte {end}, the file at {len(self._data)}"
            )
        return GgufTensor(name, shape, type_name, first + offset, n_bytes)

    def _sizes(self, name: str, kind: int) -> tuple[str, int, int]:
        """Name of a type, weights and bytes of its blocks."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind in NEWER_TYPES:
            return NEWER_TYPES[kind]
        try:
            named = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelError(
                f"{self._path}: tensor {name} is of ggml type {kind}, which the installed gguf "
                "does not know; install a newer one, or give another file"
            ) from error
        return named.name, *GGML_QUANT_SIZES[named]


def _damaged(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path} is damaged or incomplete: {reason}; fetch or copy it again")
