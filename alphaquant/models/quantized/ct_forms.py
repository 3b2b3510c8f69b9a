"""compressed-tensors: integers in words, bytes, and fp4 in nibbles.

pack-quantized, b bits::

    weight_packed      int32 [N, ceil(K b / 32)]   codes offset by 2^(b - 1), as a bit stream
    weight_scale       float [N, G]
    weight_zero_point  int32 [ceil(N b / 32), G]   offset likewise, packed along outputs
    weight_g_idx       int32 [K]                   the group of every input, where it is ordered
    weight_shape       int64 [2]                   N and K

int-quantized, naive-quantized, float-quantized: `weight` int8 or float8_e4m3 [N, K],
`weight_scale` of the matrix [1], outputs [N, 1], groups [N, G] or blocks, `weight_zero_point` int8
of the same shape.

nvfp4-pack-quantized: `weight_packed` uint8 [N, K / 2] with the even input in the low nibble,
`weight_scale` float8_e4m3 [N, K / 16], `weight_global_scale` float32 [1], which divides.
mxfp4-pack-quantized: the same with `weight_scale` uint8 [N, K / 32], powers of two from 2^-127.

Words are dense from compressed-tensors 0.18 on. Releases up to 0.17 put whole codes into a word
and left its last bits unused: 128 codes of 3 bits are 12 words now, and were 13, ten codes in
each. Nothing else tells the two apart, so those are refused by the shape. Source:
compressed-tensors 0.20, `compressors/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.kernels.grids import from_e8m0
from alphaquant.models.quantized.byte_forms import block_shape, byte_codes, spread_scales
from alphaquant.models.quantized.compressed import (
    FLOATS,
    Form,
    GroupedCodes,
    Part,
    even_groups,
    group_text,
    n_even_groups,
)
from alphaquant.models.quantized.word_forms import WORD, unpack_words

_SPARSE_WORDS = (
    "these are words of compressed-tensors 0.17 and older, which leave their last bits unused; "
    "quantize it again with 0.18 or later"
)
_INT32, _INT8, _BYTE = frozenset(("I32",)), frozenset(("I8",)), frozenset(("U8",))


@dataclass(frozen=True)
class PackedIntForm(Form):
    """pack-quantized; see the file header.

    Attributes:
        bits: of one code.
        group_size: inputs per group, -1 for one.
        symmetric: whether there are no zero points.
        act_order: whether groups are of any inputs, so that `weight_g_idx` must be there.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False

    @property
    def name(self) -> str:
        """For people."""
        zeros = "" if self.symmetric else " asym"
        order = " act-order" if self.act_order else ""
        size = group_text(self.group_size)
        return f"compressed-tensors int{self.bits} {size}{zeros}{order}"

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.bits

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """Codes, scales, zero points, and what is beside them."""
        n_groups = n_even_groups(cols, self.group_size)
        words, sparse = -(-cols * self.bits // WORD), -(-cols // (WORD // self.bits))
        others: dict[tuple[int, ...], str] = {}
        if sparse != words:
            others[rows, sparse] = _SPARSE_WORDS
        found = {
            "weight_packed": Part(((rows, words),), _INT32, other_layouts=others),
            "weight_scale": Part(((rows, n_groups),), FLOATS),
            "weight_shape": Part(((2,),), frozenset(("I64", "I32")), is_required=False),
        }
        if not self.symmetric:
            shape = (-(-rows * self.bits // WORD), n_groups)
            found["weight_zero_point"] = Part((shape,), _INT32)
        if self.act_order:
            found["weight_g_idx"] = Part(((cols,),), frozenset(("I32", "I64")))
        return found

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Codes as stored; zero points count as codes do."""
        codes = unpack_words(tensors["weight_packed"], self.bits, cols)
        zeros = None
        if not self.symmetric:
            zeros = unpack_words(tensors["weight_zero_point"].t(), self.bits, rows).t()
            zeros = zeros.to(torch.float32).contiguous()  # [N, G]
        group_of = even_groups(cols, self.group_size, codes.device)
        if self.act_order:
            group_of = tensors["weight_g_idx"].to(torch.int64)
        scales = tensors["weight_scale"].to(torch.float32)
        return GroupedCodes("int", self.bits, codes, scales, zeros, group_of)


@dataclass(frozen=True)
class NaiveForm(Form):
    """A byte per weight; see the file header.

    Attributes:
        element: `int` or `e4m3`.
        group_size: inputs per group, -1 for one.
        symmetric: whether there are no zero points.
        block: outputs and inputs of a block, None for none.
        is_whole: whether the matrix has one scale.
    """

    element: str
    group_size: int = -1
    symmetric: bool = True
    block: tuple[int, int] | None = None
    is_whole: bool = False

    @property
    def name(self) -> str:
        """For people."""
        kind = "fp8" if self.element == "e4m3" else "int8"
        shared = "whole" if self.is_whole else group_text(self.group_size)
        if self.block is not None:
            shared = "x".join(map(str, self.block))
        return f"compressed-tensors {kind} {shared}{'' if self.symmetric else ' asym'}"

    def code_bits(self) -> int:
        """Bits of one code."""
        return 8

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """The weight, its scales and zero points."""
        shapes: tuple[tuple[int, ...], ...] = ((rows, n_even_groups(cols, self.group_size)),)
        if self.block is not None:
            shapes = (block_shape(self.block, rows, cols),)
        elif self.is_whole:
            shapes = ((), (1,), (1, 1))
        dtypes = frozenset(("F8_E4M3",)) if self.element == "e4m3" else _INT8
        found = {
            "weight": Part(((rows, cols),), dtypes),
            "weight_scale": Part(shapes, FLOATS),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Part(shapes, _INT8)
        return found

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Bytes with a scale of every output and group."""
        codes = byte_codes(tensors["weight"])
        scales, zeros = self._spread(tensors["weight_scale"], rows), None
        if not self.symmetric:
            zeros = self._spread(tensors["weight_zero_point"], rows) + 128.0
        width = self.group_size if self.block is None else self.block[1]
        group_of = even_groups(cols, width, codes.device)
        return GroupedCodes(self.element, 8, codes, scales, zeros, group_of)

    def _spread(self, tensor: Tensor, rows: int) -> Tensor:
        """Numbers of every output, float32 [N, G]."""
        numbers = tensor.to(torch.float32)
        if self.block is not None or self.is_whole:
            return spread_scales(numbers, rows, self.block)
        return numbers


@dataclass(frozen=True)
class Fp4Form(Form):
    """nvfp4 or mxfp4; see the file header.

    Attributes:
        is_mx: whether scales are powers of two.
    """

    is_mx: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"compressed-tensors {'mxfp4' if self.is_mx else 'nvfp4'}"

    @property
    def group_size(self) -> int:
        """Inputs per group."""
        return 32 if self.is_mx else 16

    def code_bits(self) -> int:
        """Bits of one code."""
        return 4

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """Codes and scales; of nvfp4 the factor of all scales."""
        shape = (rows, n_even_groups(cols, self.group_size))
        found = {"weight_packed": Part(((rows, cols // 2),), _BYTE)}
        if self.is_mx:
            return found | {"weight_scale": Part((shape,), _BYTE)}
        return found | {
            "weight_scale": Part((shape,), frozenset(("F8_E4M3",))),
            "weight_global_scale": Part(((1,), ()), frozenset(("F32",))),
        }

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Nibbles with their scales."""
        packed, shared = tensors["weight_packed"], None
        codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)  # [N, K]
        if self.is_mx:
            scales = from_e8m0(tensors["weight_scale"])
        else:
            divisor = tensors["weight_global_scale"].reshape(1)
            scales, shared = tensors["weight_scale"].to(torch.float32) / divisor, 1.0 / divisor
        group_of = even_groups(cols, self.group_size, codes.device)
        return GroupedCodes("e2m1", 4, codes, scales, None, group_of, shared)
