"""Our packed matrices as blocks of llama.cpp's types, number for number.

    ours                            llama.cpp  block
    int1-g128                       Q1_0       d, 128 bits: 0 is -d, 1 is d
    int2-g64                        Q2_0       d, 64 codes of 2 bits for (code - 1) d
    int4-g32                        Q4_0       d, 32 nibbles for (code - 8) d: j with j + 16
    int5-g32                        Q5_0       d, 32 fifth bits, nibbles as Q4_0, for (code - 16) d
    int8-g32                        Q8_0       d, 32 signed bytes
    nl4-g32                         IQ4_NL     d, 32 nibbles for numbers of the table
    int3-g16-s256                   Q3_K       256 third bits, 256 pairs, 16 multiples + 32, d
    nl4-g32-s256                    IQ4_XS     d, 8 multiples + 32, 256 nibbles of the table
    mxfp4                           MXFP4      2^e, 32 elements, j and j + 16 share a byte
    bf16                            BF16
    q2_k, iq3_s, q4_1, ...          the same   as they are

d is a float16, our scale or super-scale. Larger groups of the same numbers, and whole rows, are
written with their scale repeated in every block of theirs: exact, and larger than our own file.
Super-blocks of theirs are whole, 256 inputs each; the multiples' 6 bits lie in two places. Q2_0
counts from -1 and our codes from -2: d is the negative of our scale, and the code 3 less ours.

Worked example: int4-g32 codes 1, 2, .., 15, 0, 1, .., 0 with scale 0.5 are d = 00 38, then bytes
11, 22, 33, ..: code 0 of the row in the low half of the first byte, code 16 in the high one.

The package gguf (0.19) does not know Q2_0; its number is in ggml.h.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.formats import GGML_BLOCKS, PER_ROW, SUB_BITS, SUPER_SIZE, Format


@dataclass(frozen=True)
class Twin:
    """A type of llama.cpp.

    Attributes:
        name: as llama.cpp calls it: `Q4_0`.
        block: weights of a block.
        n_bytes: bytes of a block.
    """

    name: str
    block: int
    n_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row."""
        return cols // self.block * self.n_bytes


_PLAIN = MappingProxyType(
    {"F32": Twin("F32", 1, 4), "F16": Twin("F16", 1, 2), "BF16": Twin("BF16", 1, 2)}
)
_INTEGERS: Mapping[int, Twin] = MappingProxyType(
    {
        1: Twin("Q1_0", 128, 18),
        2: Twin("Q2_0", 64, 18),
        4: Twin("Q4_0", 32, 18),
        5: Twin("Q5_0", 32, 22),
        8: Twin("Q8_0", 32, 34),
    }
)
"""By bits of symmetric integers."""
_MXFP4 = Twin("MXFP4", 32, 17)
_IQ4_NL = Twin("IQ4_NL", 32, 18)
_SUPERS: Mapping[str, Twin] = MappingProxyType(
    {
        "int3-g16-s256": Twin("Q3_K", SUPER_SIZE, 110),
        "nl4-g32-s256": Twin("IQ4_XS", SUPER_SIZE, 136),
    }
)

WRITTEN = (
    "bf16, mxfp4, int1-g128, int2-g64, int4-g32, int5-g32, int8-g32, nl4-g32 (or the same in "
    f"larger groups), {', '.join(_SUPERS)}, {', '.join(GGML_BLOCKS)}"
)
"""What is exact, for messages."""


def twin_of(fmt: Format, cols: int) -> Twin | None:
    """The type that holds the same numbers, None where there is none.

    Args:
        fmt: the format.
        cols: inputs of the matrix.
    """
    if not fmt.is_quantized:
        return _PLAIN["BF16"]
    if fmt.is_ggml:
        block, n_bytes = GGML_BLOCKS[fmt.kind]
        return Twin(fmt.kind.upper(), block, n_bytes) if fmt.fits(cols) else None
    twin = _MXFP4 if fmt.name == "mxfp4" else None
    if fmt.super_size:
        twin = _SUPERS.get(fmt.name)
        return twin if twin is not None and cols % twin.block == 0 else None
    if fmt.family == "int" and fmt.symmetric:
        twin = _INTEGERS.get(fmt.bits)
    if fmt.kind == "nl4":
        twin = _IQ4_NL
    if twin is None or cols % twin.block:
        return None
    is_even = fmt.group_size == PER_ROW or fmt.group_size % twin.block == 0
    return twin if is_even else None


def plain_twin(tensor: Tensor) -> Twin:
    """The type of a tensor that is not quantized: that of its dtype."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return _PLAIN[names[tensor.dtype]]


def blocks_of(packed: PackedMatrix) -> Tensor:
    """The bytes of a matrix in its twin, uint8 [rows, bytes of a row]; see `twin_of`."""
    fmt, rows, cols = packed.format, packed.rows, packed.cols
    if not fmt.is_quantized:
        return packed.tensors["weight"].contiguous().view(torch.uint8)
    if fmt.is_ggml:
        return packed.tensors["codes"]
    twin = twin_of(fmt, cols)
    assert twin is not None, "checked before"
    codes = unpack_codes(packed.tensors["codes"], fmt.bits, cols).view(rows, -1, twin.block)
    if fmt.super_size:
        multiples = unpack_codes(packed.tensors["scales"], SUB_BITS, fmt.n_groups(cols))
        supers = packed.tensors["super_scales"].contiguous().view(torch.uint8)
        parts = multiples.view(rows, codes.shape[1], -1), supers.view(rows, -1, 2)
        return torch.cat(_SUPER_BODIES[twin.name](codes, *parts), -1).view(rows, -1)
    repeats = fmt.columns_per_scale(cols) // twin.block
    scales = packed.tensors["scales"].repeat_interleave(repeats, 1)[:, : cols // twin.block]
    if twin is _MXFP4:
        head = scales.unsqueeze(-1)  # [rows, blocks, 1]
    else:
        signed = -scales if fmt.bits == 2 else scales
        head = signed.contiguous().view(torch.uint8).view(rows, -1, 2)
    return torch.cat([head, _BODIES[twin.name](codes)], -1).view(rows, -1)


def _bits(codes: Tensor) -> Tensor:
    """Bit j of a block in bit j % 8 of byte j // 8."""
    return _joined(codes.view(*codes.shape[:-1], -1, 8), 1)


def _pairs(codes: Tensor) -> Tensor:
    """Four codes of two bits to a byte, the first in the low bits."""
    return _joined((3 - codes).view(*codes.shape[:-1], -1, 4), 2)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes j and j + 16 in the halves of byte j."""
    low, high = (codes & 15).chunk(2, -1)
    return low | high << 4


def _fives(codes: Tensor) -> Tensor:
    """Fifth bits, four bytes, then nibbles."""
    return torch.cat([_bits(codes >> 4), _nibbles(codes)], -1)


def _signed(codes: Tensor) -> Tensor:
    """Offset binary as two's complement."""
    return codes ^ 128


def _q3_k(codes: Tensor, multiples: Tensor, d: Tensor) -> list[Tensor]:
    """Bit i of byte j and pair i of half h: weights 32 i + j and 128 h + 32 i + j."""
    by_bit = codes.view(*codes.shape[:2], 8, 32).mT  # [rows, blocks, j, i]
    pairs = (codes & 3).view(*codes.shape[:2], 2, 4, 32).mT  # [rows, blocks, h, j, i]
    low = _joined((multiples & 15).view(*multiples.shape[:2], 2, 8).mT, 4)
    tops = _joined((multiples >> 4).view(*multiples.shape[:2], 4, 4).mT, 2)
    return [_joined(by_bit >> 2, 1), _joined(pairs, 2).flatten(-2), low, tops, d]


def _iq4_xs(codes: Tensor, multiples: Tensor, d: Tensor) -> list[Tensor]:
    """Upper pairs of the multiples, then their lower halves, neighbours in a byte."""
    tops = _joined((multiples >> 4).view(*multiples.shape[:2], 2, 4), 2)
    low = _joined((multiples & 15).view(*multiples.shape[:2], 4, 2), 4)
    nibbles = _nibbles(codes.view(*codes.shape[:2], 8, 32)).flatten(-2)
    return [d, tops, low, nibbles]


def _joined(codes: Tensor, bits: int) -> Tensor:
    """The last dimension as one byte, its first code in the low bits."""
    shifts = torch.arange(codes.shape[-1], device=codes.device) * bits
    return (codes.to(torch.int32) << shifts).sum(-1).to(torch.uint8)


_BODIES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "Q1_0": _bits,
        "Q2_0": _pairs,
        "Q4_0": _nibbles,
        "Q5_0": _fives,
        "Q8_0": _signed,
        "MXFP4": _nibbles,
        "IQ4_NL": _nibbles,
    }
)
_SUPER_BODIES: Mapping[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = MappingProxyType(
    {"Q3_K": _q3_k, "IQ4_XS": _iq4_xs}
)
