"""GPTQ and AWQ: codes in int32 words.

GPTQ, K inputs, N outputs, b bits, groups of g (one group where g is -1)::

    qweight  int32 [K b / 32, N]   the codes of a column, one after the other from the lowest bit
    qzeros   int32 [G, N b / 32]   zero points, likewise along outputs
    scales   float [G, N]
    g_idx    int32 [K]             the group of every input; files may leave it out

A word is 32 bits of a little-endian stream, so with b = 3 codes 10 and 21 of every 32 lie across
two words. Files of version 1 (`checkpoint_format: gptq`, or nothing) hold zero points less one,
those of version 2 (`gptq_v2`) hold them as they are. A zero point of 0 is stored as 2^b - 1 in
version 1. GPTQModel subtracts one from all zero points of a word at once, as one integer, so there
the borrow of a zero changes its neighbour; it is undone in the same way (b = 2, 4, 8; with 3 bits
it goes code by code). Worked example, b = 4: zero points 0 and 5 are the byte 0x50; less 0x11 that
is 0x3F, which read code by code would be 0 and 4.

AWQ (`version: gemm`)::

    qweight  int32 [K, N / 8]   bits 4 i .. 4 i + 3 of a word are output ORDER[i] of its eight
    qzeros   int32 [G, N / 8]   likewise, as they are
    scales   float [G, N]

Sources: AutoGPTQ and GPTQModel (qlinear modules, convert_gptq_v2_to_v1_format), AutoAWQ
(`WQLinear_GEMM`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.kernels.packing import unpack_codes
from alphaquant.models.quantized.compressed import (
    FLOATS,
    Form,
    GroupedCodes,
    Part,
    even_groups,
    group_text,
    n_even_groups,
)

WORD = 32
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight outputs each nibble of a word of AWQ holds, from the lowest."""

_INT32 = frozenset(("I32",))


@dataclass(frozen=True)
class GptqForm(Form):
    """A matrix of GPTQ; see the file header.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs per group, -1 for one.
        is_v1: whether stored zero points are less one.
        borrows: whether one was subtracted from whole words.
        act_order: whether groups are of any inputs, so that `g_idx` must be there.
    """

    bits: int
    group_size: int
    is_v1: bool
    borrows: bool = False
    act_order: bool = False

    @property
    def name(self) -> str:
        """For people."""
        order = " act-order" if self.act_order else ""
        version = "v1" if self.is_v1 else "v2"
        return f"gptq {version} {self.bits} bits {group_text(self.group_size)}{order}"

    def code_bits(self) -> int:
        """Bits of one code."""
        return self.bits

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """Codes, zero points, scales, and the groups of inputs."""
        n_groups = n_even_groups(cols, self.group_size)
        n_zero_words = -(-rows * self.bits // WORD)
        return {
            "qweight": Part(((-(-cols * self.bits // WORD), rows),), _INT32),
            "qzeros": Part(((n_groups, n_zero_words),), _INT32),
            "scales": Part(((n_groups, rows),), FLOATS),
            "g_idx": Part(((cols,),), frozenset(("I32", "I64")), self.act_order),
        }

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Codes along outputs' rows, zero points as they were before they were stored."""
        codes = unpack_words(tensors["qweight"].t(), self.bits, cols)
        zeros = self._zeros(tensors["qzeros"], rows)
        group_of = even_groups(cols, self.group_size, codes.device)
        if "g_idx" in tensors:
            group_of = tensors["g_idx"].to(torch.int64)
        scales = tensors["scales"].to(torch.float32).t().contiguous()  # [N, G]
        return GroupedCodes("int", self.bits, codes, scales, zeros.t().contiguous(), group_of)

    def _zeros(self, words: Tensor, rows: int) -> Tensor:
        """Zero points, float32 [G, N]."""
        if self.is_v1 and self.borrows and WORD % self.bits == 0:
            ones = sum(1 << shift for shift in range(0, WORD, self.bits))
            total = (words.to(torch.int64) + ones) & (2**WORD - 1)
            words = torch.where(total >= 2 ** (WORD - 1), total - 2**WORD, total).to(torch.int32)
            return unpack_words(words, self.bits, rows).to(torch.float32)
        stored = unpack_words(words, self.bits, rows).to(torch.float32)
        return (stored + 1) % 2**self.bits if self.is_v1 else stored


@dataclass(frozen=True)
class AwqForm(Form):
    """A matrix of AWQ with four bits; see the file header.

    Attributes:
        group_size: inputs per group, -1 for one.
    """

    group_size: int

    @property
    def name(self) -> str:
        """For people."""
        return f"awq 4 bits {group_text(self.group_size)}"

    def code_bits(self) -> int:
        """Bits of one code."""
        return 4

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """Codes, zero points, scales."""
        n_groups = n_even_groups(cols, self.group_size)
        return {
            "qweight": Part(((cols, rows // 8),), _INT32),
            "qzeros": Part(((n_groups, rows // 8),), _INT32),
            "scales": Part(((n_groups, rows),), FLOATS),
        }

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Codes along outputs' rows, in the order of outputs."""
        codes = _in_order(tensors["qweight"]).t().contiguous()  # [N, K]
        zeros = _in_order(tensors["qzeros"]).t().to(torch.float32).contiguous()  # [N, G]
        scales = tensors["scales"].to(torch.float32).t().contiguous()
        group_of = even_groups(cols, self.group_size, codes.device)
        return GroupedCodes("int", 4, codes, scales, zeros, group_of)


def unpack_words(words: Tensor, bits: int, n_codes: int) -> Tensor:
    """Codes of rows of little-endian words.

    Args:
        words: int32 [R, W].
        bits: bits per code, 1 to 8.
        n_codes: codes per row.

    Returns:
        uint8 [R, n_codes].
    """
    stream = words.contiguous().view(torch.uint8)  # [R, 4 W]: torch runs on little-endian only
    used = -(-n_codes * bits // 8)
    return unpack_codes(stream[:, :used].contiguous(), bits, n_codes)


def _in_order(words: Tensor) -> Tensor:
    """The nibbles of words of AWQ in the order of outputs, uint8 [R, 8 W]."""
    nibbles = unpack_words(words, 4, 8 * words.shape[1])
    held = nibbles.reshape(len(words), -1, 8)  # [R, W, nibble]
    place = sorted(range(8), key=ORDER.__getitem__)  # the nibble that holds output c
    return held[:, :, place].flatten(1)
