"""How kernels are launched on one kind of GPU: tables of measured configurations, candidates.

A table is a JSON file that `benchmarks/kernel_speed.py --tune` writes on the GPU it is for. It
says, per kind of matrix and block of tokens, how the packed kernel is launched, and from how many
rows of x on dequantizing the matrix is faster. Where a table has no entry, and without a table,
the defaults of `alphaquant.kernels.linear.product_triton` hold. A table changes speed, and the
order in which float32 numbers are added where columns are split otherwise; nothing else.

Sizes are classes: the power of two nearest to N and to K by ratio. Worked example: 1408 and 1792
are nearest to 1024 and 2048, because 1408 / 1024 = 1.375 < sqrt(2) = 1.414 < 1.75 = 1792 / 1024.

The file::

    {"version": 1, "device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.7.1", "commit": "...",
     "launches": [{"element": "int4", "scales": "f16", "scales_per_step": 1, "has_zeros": false,
                   "dtype": "bfloat16", "rows": 8192, "cols": 8192, "block_tokens": 16,
                   "block_rows": 128, "n_warps": 4, "n_stages": 3, "n_splits": 4}],
     "dense_rows": [{"element": "int4", "dtype": "bfloat16", "rows": 8192, "cols": 8192,
                     "n_tokens": 256}]}

It is looked for in `tuned/` beside this file, named after the device (`nvidia-h200.json`), unless
the environment variable ALPHAQUANT_KERNEL_TABLE names a file. This file needs no GPU.

Letters: N outputs, K inputs, C scales per row and step, T tiles of 128 columns, Z tokens of a
block.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from alphaquant.errors import StoreError
from alphaquant.kernels.order import KernelWeight

TABLE_VARIABLE = "ALPHAQUANT_KERNEL_TABLE"
VERSION = 1

_FOLDER = Path(__file__).parent / "tuned"
_SPLITS = (1, 2, 4, 8, 16)
_SCALES = {
    torch.float16: "f16",
    torch.uint8: "e8m0",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "sub",
}
_LIMITS: dict[str, tuple[int, ...]] = {
    "block_tokens": (16, 32, 64),
    "block_rows": (64, 128),
    "n_warps": (4, 8),
}
"""What the kernel can be launched with, where not every positive number works."""

T = TypeVar("T")


@dataclass(frozen=True)
class LinearConfig:
    """How the packed linear kernel is launched.

    Attributes:
        block_rows: outputs of a program, B: 64 or 128.
        n_warps: warps of a program.
        n_stages: loads in flight.
    """

    block_rows: int = 128
    n_warps: int = 4
    n_stages: int = 3


@dataclass(frozen=True)
class LaunchKey:
    """What a measured launch is for.

    Attributes:
        element: name in `alphaquant.kernels.order.LAYOUTS`.
        scales: f16, e8m0, e4m3 or sub.
        scales_per_step: C.
        has_zeros: whether there are zero points.
        dtype: of x, such as bfloat16.
        rows: class of N.
        cols: class of K.
        block_tokens: Z.
    """

    element: str
    scales: str
    scales_per_step: int
    has_zeros: bool
    dtype: str
    rows: int
    cols: int
    block_tokens: int


@dataclass(frozen=True)
class Launch:
    """A measured launch.

    Attributes:
        block_rows: as in `LinearConfig`, like the next two.
        n_warps: see there.
        n_stages: see there.
        n_splits: programs that share the columns of a block.
    """

    block_rows: int
    n_warps: int
    n_stages: int
    n_splits: int

    @property
    def config(self) -> LinearConfig:
        """All but the splits."""
        return LinearConfig(self.block_rows, self.n_warps, self.n_stages)


@dataclass(frozen=True)
class DenseKey:
    """What a measured crossover is for; attributes as in `LaunchKey`."""

    element: str
    dtype: str
    rows: int
    cols: int


@dataclass(frozen=True)
class KernelTable:
    """What was measured on one kind of GPU.

    Attributes:
        device: its name, as torch tells it.
        torch: version.
        triton: version.
        commit: of this repository, with `+` if the tree differed.
        launches: the fastest launch found.
        dense_rows: rows of x from which on dequantizing was faster.
    """

    device: str
    torch: str
    triton: str
    commit: str
    launches: Mapping[LaunchKey, Launch] = field(default_factory=dict)
    dense_rows: Mapping[DenseKey, int] = field(default_factory=dict)


def size_class(size: int) -> int:
    """The nearest power of two by ratio; see the example at the top.

    Args:
        size: at least 1.
    """
    below = 1 << (size.bit_length() - 1)
    return below if size * size < 2 * below * below else 2 * below


def launch_key(weight: KernelWeight, dtype: torch.dtype, block_tokens: int) -> LaunchKey:
    """What a launch with this weight is looked up by.

    Args:
        weight: the matrix [N, K].
        dtype: of x.
        block_tokens: Z.
    """
    has_zeros, n_scales = weight.zeros is not None, int(weight.scales.shape[2])
    sizes = (weight.rows, weight.cols)
    return _launch_key(
        weight.element, weight.scales.dtype, n_scales, has_zeros, dtype, sizes, block_tokens
    )


def dense_key(weight: KernelWeight, dtype: torch.dtype) -> DenseKey:
    """What the crossover of this weight is looked up by; arguments as in `launch_key`."""
    return _dense_key(weight.element, dtype, (weight.rows, weight.cols))


def launch_candidates(n_tiles: int) -> Iterator[Launch]:
    """What is worth timing for a matrix: 80 launches, fewer where it has less than 16 tiles.

    Args:
        n_tiles: T; no split is left without a tile.
    """
    splits = [n for n in _SPLITS if n <= n_tiles]
    for sizes in product((64, 128), (4, 8), (2, 3, 4, 5), splits):
        yield Launch(*sizes)


def crossover(n_tokens: Sequence[int], packed: Sequence[float], dense: Sequence[float]) -> int:
    """From how many rows of x on the matrix should be dequantized.

    Worked example: at 16, 64 and 256 rows packed takes 1, 2 and 5, dense 3, 3 and 4: from 256 on.
    Had dense taken 6 at 256, it would be 257: nothing is known beyond what was measured, and there
    dequantizing is the rule.

    Args:
        n_tokens: numbers of rows that were measured, ascending.
        packed: seconds of the packed kernel for each.
        dense: seconds with the matrix dequantized first.

    Returns:
        The least measured number from which on dense was never slower; else the number after the
        last one.
    """
    first = n_tokens[-1] + 1
    for n, packed_seconds, dense_seconds in reversed(
        list(zip(n_tokens, packed, dense, strict=True))
    ):
        if dense_seconds > packed_seconds:
            break
        first = n
    return first


def device_name(device: torch.device) -> str:
    """The name that tables go by; asked once per device."""
    return _name_of(device.type, device.index)


def table_for(name: str) -> KernelTable | None:
    """The table of a device, None if there is none; a file is read once.

    Args:
        name: of the device, from `device_name`.

    Raises:
        StoreError: the file cannot be read, or is no table of this version.
    """
    given = os.environ.get(TABLE_VARIABLE)
    return _read_given(given) if given else _read_shipped(name)


def table_file(name: str) -> str:
    """The file of a device in `tuned/`, such as nvidia-h200.json."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def read_table(path: Path) -> KernelTable:
    """Read a table.

    Raises:
        StoreError: the file cannot be read, or is no table of this version.
    """
    try:
        return _table_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"the kernel table {path} cannot be used: {error}; a table is a JSON file of version "
            f"{VERSION} that benchmarks/kernel_speed.py --tune wrote: make it again, or remove it "
            f"(or {TABLE_VARIABLE}) to launch with the defaults"
        ) from error


def dump_table(table: KernelTable) -> str:
    """The text of a table's file; `read_table` gives the same table back."""
    launches = [asdict(key) | asdict(launch) for key, launch in table.launches.items()]
    dense = [asdict(key) | {"n_tokens": n} for key, n in table.dense_rows.items()]
    facts = {name: getattr(table, name) for name in ("device", "torch", "triton", "commit")}
    content = {"version": VERSION, **facts, "launches": launches, "dense_rows": dense}
    return json.dumps(content, indent=1) + "\n"


# Keys are cached, because every call of a linear layer asks for two.
@lru_cache(maxsize=4096)
def _launch_key(
    element: str,
    scales: torch.dtype,
    scales_per_step: int,
    has_zeros: bool,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    block_tokens: int,
) -> LaunchKey:
    return LaunchKey(
        element=element,
        scales=_SCALES[scales],
        scales_per_step=scales_per_step,
        has_zeros=has_zeros,
        dtype=str(dtype).removeprefix("torch."),
        rows=size_class(sizes[0]),
        cols=size_class(sizes[1]),
        block_tokens=block_tokens,
    )


@lru_cache(maxsize=4096)
def _dense_key(element: str, dtype: torch.dtype, sizes: tuple[int, int]) -> DenseKey:
    name = str(dtype).removeprefix("torch.")
    return DenseKey(element, name, size_class(sizes[0]), size_class(sizes[1]))


@lru_cache
def _name_of(kind: str, index: int | None) -> str:
    return torch.cuda.get_device_name(index) if kind == "cuda" else kind


@lru_cache
def _read_given(path: str) -> KernelTable:
    return read_table(Path(path))


@lru_cache
def _read_shipped(name: str) -> KernelTable | None:
    path = _FOLDER / table_file(name)
    return read_table(path) if path.is_file() else None


def _table_of(content: Any) -> KernelTable:
    """A table from what its file holds; ValueError says what is wrong."""
    head = ("version", "device", "torch", "triton", "commit")
    found = _checked("table", content, (*head, "launches", "dense_rows"))
    if found["version"] != VERSION:
        raise ValueError(f"version {found['version']!r}")
    facts = {name: _typed(name, found[name], str) for name in head[1:]}
    launches = {}
    for number, entry in enumerate(_typed("launches", found["launches"], list)):
        where = f"launches[{number}]"
        _checked(where, entry, (*_names(LaunchKey), *_names(Launch)))
        launches[_part(where, entry, LaunchKey)] = _part(where, entry, Launch)
    dense = {}
    for number, entry in enumerate(_typed("dense_rows", found["dense_rows"], list)):
        where = f"dense_rows[{number}]"
        _checked(where, entry, (*_names(DenseKey), "n_tokens"))
        n_tokens = _number(f"{where}.n_tokens", entry["n_tokens"], "n_tokens")
        dense[_part(where, entry, DenseKey)] = n_tokens
    return KernelTable(**facts, launches=launches, dense_rows=dense)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))


def _checked(where: str, content: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The content, if it is an object with exactly these names."""
    known: dict[str, Any] = _typed(where, content, dict)
    if set(known) != set(names):
        wrong = sorted(set(known) ^ set(names))
        raise ValueError(f"{where}: missing or unknown: {', '.join(wrong)}")
    return known


def _part(where: str, entry: dict[str, Any], kind: type[T]) -> T:
    """A dataclass of the fields of an entry, types and numbers checked."""
    values: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        name = f"{where}.{one.name}"
        if one.type is int:
            values[one.name] = _number(name, entry[one.name], one.name)
        else:
            values[one.name] = _typed(name, entry[one.name], one.type)
    return kind(**values)


def _number(where: str, value: Any, name: str) -> int:
    number: int = _typed(where, value, int)
    if number < 1 or number not in _LIMITS.get(name, (number,)):
        possible = _LIMITS.get(name, "1 or more")
        raise ValueError(f"{where} is {number}, possible is {possible}")
    return number


def _typed(where: str, value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where} is {type(value).__name__}, not {kind.__name__}")
    return value
