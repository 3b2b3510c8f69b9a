"""Weights as blocks of llama.cpp's types, by llama.cpp's own code: byte for byte what it makes.

It weighs squared errors by one importance per input. Two traps, neither of which it tells of: an
importance of zero in all columns makes several types write zeros (a deleted expert), and some
cannot do without. So no importance means ones, and a column's is never zero.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from alphaquant.quant.ggml.library import open_library
from alphaquant.spaces.formats import GGML_BLOCKS

_LEAST = 1e-6
"""Of an importance, relative to the largest."""


def encode(kind: str, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Quantize a matrix.

    Args:
        kind: key of `GGML_BLOCKS`, or any other type of llama.cpp in lower case.
        weight: float32 [rows, cols], on any device; a block divides cols.
        importance: float32 [cols], weight of each column's squared error; None for equal weights.

    Returns:
        uint8 [rows, bytes of a row] on the CPU.

    Raises:
        ModelError: the library is not installed.
    """
    block, n_bytes = GGML_BLOCKS[kind] if kind in GGML_BLOCKS else _sizes(kind)
    weight = weight.to("cpu", torch.float32).contiguous()
    rows, cols = weight.shape
    assert cols % block == 0, "menus hold what fits"
    row = torch.ones(cols) if importance is None else importance.to("cpu", torch.float32)
    largest = float(row.max())
    if not largest > 0:
        row, largest = torch.ones(cols), 1.0
    row = (row / largest).clamp(min=_LEAST).contiguous()
    found = torch.zeros(rows, cols // block * n_bytes, dtype=torch.uint8)
    number = _number(kind)
    library = _prepared(number)
    n_written = library.ggml_quantize_chunk(
        number, weight.data_ptr(), found.data_ptr(), 0, rows, cols, row.data_ptr()
    )
    assert n_written == found.numel(), "blocks have other sizes in this release"
    return found


@cache
def _prepared(number: int) -> ctypes.CDLL:
    """The library with the tables of a type."""
    library = open_library()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_init(number)
    return library


def _number(kind: str) -> int:
    """The number of a type in ggml.h."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType[kind.upper()])


def _sizes(kind: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return block, n_bytes
