# mypy: ignore-errors
"""A stored matrix as kernels take it: one tuple of what varies, one constant of how it is decoded.

Every kernel that reads packed numbers has an argument `matrix`, a `StoredMatrix`, and one
`DECODING`, a `Decoding`. Triton takes named tuples apart before a launch: each number and pointer
is specialized as if it were an argument of its own, and None, as 1, is a constant. So a matrix
without zero points has another binary than one with them, and kernels ask `matrix.zeros is None`.
`do_not_specialize` does not reach into tuples (Triton 3.7.1): numbers that change from call to
call stay arguments of their own, or every one of them would be compiled anew.

Small floats may be folded (`alphaquant.kernels.bodies`): then a tile holds value * 2^-p, and the
scales, and for E4M3 the global factor, come multiplied by what makes up for it. `decoding_of`
chooses both sides together.

Letters: P planes, Q sets per lane, T tiles of 128 columns, S steps, N and K as in
`alphaquant.kernels.order`; C scales per row and step.
"""

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from alphaquant.kernels.bodies import FLOATS, left_out_power, lent_power, make_body
from alphaquant.kernels.grids import TABLES
from alphaquant.kernels.order import BFLOAT16, KernelWeight, layout_of

COMPUTE_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
"""What kernels compute in."""

_STORED = {
    torch.float16: "f16",
    torch.uint8: "e8m0",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "sub",
}
_TARGETS = {torch.float16: "f16", torch.bfloat16: "bf16"}


class StoredMatrix(NamedTuple):
    """A matrix, or a stack of them, in kernel order.

    Attributes:
        words: uint8 [P, T, N padded, 16 Q].
        scales: [S, N padded, C], small floats as bytes.
        zeros: uint8 [S, N padded, C], None when symmetric.
        global_scales: float32, one per matrix, or None.
        padded_rows: N padded.
        n_cols: K.
        tiles_per_step: tiles that share one step of scales.
        plane_bytes: from one plane to the next.
        super_scales: float16 [S, N padded, 1], or None.
        tiles_per_super: tiles that share one of them.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scales: Tensor | None
    padded_rows: int
    n_cols: int
    tiles_per_step: int
    plane_bytes: int
    super_scales: Tensor | None
    tiles_per_super: int


@dataclass(frozen=True)
class Unpacking:
    """How one element is unpacked.

    Attributes:
        pairs: the pieces of each of the R pairs, each (word, at, bit, number of bits); none for
            bfloat16, which is not packed.
        n_planes: P.
        is_float: whether codes are small floats.
        exponent_bits: of such a float, else 0.
        mantissa_bits: of such a float, else the bits of the integer.
        is_folded: whether such a float keeps the factor 2^-p.
        table: of a table, four numbers plus 128 to a word, the first in the low byte; else empty.
        table_power: p of numbers of a table times 2^-p; scales make up for it.
        text: PTX of the body, empty to unpack without it.
        constraints: of the PTX.
    """

    pairs: tuple[tuple[tuple[int, int, int, int], ...], ...]
    n_planes: int
    is_float: bool
    exponent_bits: int
    mantissa_bits: int
    is_folded: bool = False
    table: tuple[int, ...] = ()
    table_power: int = 0
    text: str = ""
    constraints: str = ""


@dataclass(frozen=True)
class ScaleKind:
    """How scales are stored, and what they make up for.

    Attributes:
        stored: `f16`, `e8m0`, `e4m3`, or `sub` for multiples of super-scales.
        power: scales come multiplied by 2^power.
        global_power: the global factor comes multiplied by 2^global_power.
    """

    stored: str
    power: int = 0
    global_power: int = 0


@dataclass(frozen=True)
class Decoding:
    """How a stored matrix is decoded; a compile-time argument, so all of it names the binary.

    Attributes:
        unpacking: of its words.
        scale_kind: of its scales.
        n_scales: C.
        middle: the code that unpacking centres on, which zero points are counted from.
        dtype: what the kernel computes in.
    """

    unpacking: Unpacking
    scale_kind: ScaleKind
    n_scales: int
    middle: int
    dtype: tl.dtype


class _Kind(NamedTuple):
    """What matrices have in common that are decoded the same way."""

    element: str
    scales: torch.dtype
    n_scales: int
    has_zeros: bool
    has_global: bool
    is_foldable: bool


def matrix_of(weight: KernelWeight) -> StoredMatrix:
    """The first of the two arguments."""
    words, scales = weight.words, weight.scales
    if scales.dtype == torch.float8_e4m3fn:
        scales = scales.view(torch.uint8)
    return StoredMatrix(
        *(words, scales, weight.zeros, weight.global_scale),
        *(words.shape[2], weight.cols, weight.tiles_per_step, words[0].numel()),
        *(weight.super_scales, weight.tiles_per_super),
    )


def decoding_of(weight: KernelWeight, dtype: torch.dtype, *, use_asm: bool) -> Decoding:
    """The second of the two arguments.

    Args:
        weight: the matrix.
        dtype: what the kernel computes in.
        use_asm: whether to unpack with PTX; there is none for float32 and bfloat16 matrices.
    """
    kind = _Kind(
        *(weight.element, weight.scales.dtype, weight.scales.shape[2]),
        *(weight.zeros is not None, weight.global_scale is not None, weight.is_foldable),
    )
    return _decoding(kind, dtype, use_asm)


# Cached, because every launch asks for one.
@lru_cache(maxsize=4096)
def _decoding(kind: _Kind, dtype: torch.dtype, use_asm: bool) -> Decoding:
    # float32 has the exponents of bfloat16
    left_out = left_out_power(kind.element, _TARGETS.get(dtype, "bf16"))
    power = left_out if kind.is_foldable or kind.element in TABLES else 0
    lent = lent_power(kind.element) if power and kind.has_global else 0
    return Decoding(
        _unpacking(kind.element, dtype, power, use_asm=use_asm),
        ScaleKind(_STORED[kind.scales], power - lent, lent),
        n_scales=kind.n_scales,
        middle=(1 << layout_of(kind.element).bits) // 2 if kind.has_zeros else 0,
        dtype=COMPUTE_TYPES[dtype],
    )


def _unpacking(element: str, dtype: torch.dtype, power: int, *, use_asm: bool) -> Unpacking:
    if element == BFLOAT16:
        return Unpacking((), 1, True, 8, 7)
    layout = layout_of(element)
    table = _words_of(TABLES[element]) if element in TABLES else ()
    is_folded = power > 0
    exponent_bits, mantissa_bits = FLOATS.get(element, (0, layout.bits))
    text, constraints = "", ""
    if use_asm and dtype in _TARGETS:
        body = make_body(element, _TARGETS[dtype], is_folded=is_folded)
        text, constraints = body.text, body.constraints
    pairs = tuple(
        tuple((p.word, p.at, p.bit, p.n_bits) for p in pieces) for pieces in layout.pairs
    )
    return Unpacking(
        *(pairs, layout.n_planes, element in FLOATS, exponent_bits, mantissa_bits),
        *(is_folded and element in FLOATS, table, power if table else 0, text, constraints),
    )


def _words_of(table: tuple[int, ...]) -> tuple[int, ...]:
    """Four numbers of a table plus 128 to a word, as signed 32-bit integers."""
    raw = bytes(number + 128 for number in table)
    return struct.unpack(f"<{len(raw) // 4}i", raw)
