"""Blocks of llama.cpp's types as weights, in torch on any device; bit for bit what gguf decodes.

A weight is factor * value - offset. Values are integers or numbers of a table; a factor and an
offset are shared by the 16 or 32 weights of a part, and are products of a float16 of the block and
a small integer of the part:

    q4_1 q5_1              d                      -m         values 0 .. 2^b - 1
    q2_k                   d * (s & 15)           dmin * (s >> 4)
    q4_k q5_k              d * s                  dmin * m   s and m of 6 bits
    q3_k q6_k              d * s                  none       values -4 .. 3 and -32 .. 31
    iq4_nl                 d                      none       a table of 16 values
    iq4_xs                 d * (s - 32)           none       the same table
    iq2_* iq3_*            d * (1/2 + s) / 4, ..  none       8 or 4 values from a table of a few
                                                             hundred vectors, and signs

Tables of vectors are those of the package gguf. Which bits are where is said at each reader, in
the order of the fields in ggml-common.h.

Letters: n blocks, P parts of a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from alphaquant.kernels.grids import TABLES
from alphaquant.spaces.formats import GGML_BLOCKS

NL_VALUES = TABLES["nl4"]
"""What the codes of iq4_nl and iq4_xs stand for (ggml-common.h, kvalues_iq4nl)."""


@dataclass(frozen=True)
class Levels:
    """Decoded blocks: a weight is d * scale * value - dmin * minimum.

    Attributes:
        values: float32 [n, weights of a block].
        d: float32 [n, 1], float16 numbers.
        scales: float32 [n, P], small integers, or what small integers stand for.
        dmin: float32 [n, 1], float16 numbers; None where there are no offsets.
        minima: float32 [n, P], likewise.
    """

    values: Tensor
    d: Tensor
    scales: Tensor
    dmin: Tensor | None = None
    minima: Tensor | None = None

    @property
    def factors(self) -> Tensor:
        """What values are multiplied with, float32 [n, P]."""
        return self.d * self.scales

    @property
    def offsets(self) -> Tensor | None:
        """What is taken away then, float32 [n, P]; None for nothing."""
        return None if self.dmin is None or self.minima is None else self.dmin * self.minima

    def weights(self) -> Tensor:
        """Weights, float32 [n, weights of a block]."""
        n_blocks, n_parts = self.scales.shape
        parts = self.values.view(n_blocks, n_parts, -1) * self.factors.unsqueeze(-1)
        if self.offsets is not None:
            parts = parts - self.offsets.unsqueeze(-1)
        return parts.view(n_blocks, -1)


def decode(kind: str, codes: Tensor) -> Tensor:
    """Weights of a matrix.

    Args:
        kind: key of `GGML_BLOCKS`.
        codes: uint8 [rows, bytes of a row].

    Returns:
        float32 [rows, cols].
    """
    return levels_of(kind, codes).weights().view(len(codes), -1)


def levels_of(kind: str, codes: Tensor) -> Levels:
    """The decoded blocks of a matrix, uint8 [rows, bytes of a row], one row after the other."""
    blocks = codes.reshape(-1, GGML_BLOCKS[kind][1])
    return _READERS[kind](blocks)


def _half(blocks: Tensor, start: int) -> Tensor:
    """A float16 of every block, float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(bytes_: Tensor, *shifts: int, mask: int) -> Tensor:
    """Bit fields of bytes [.., B]: for each shift all bytes, [.., shifts, B]."""
    at = torch.tensor(shifts, dtype=torch.uint8, device=bytes_.device).unsqueeze(-1)
    return bytes_.unsqueeze(-2) >> at & mask


def _words(blocks: Tensor, n_bytes: int) -> Tensor:
    """Little-endian words of 2 or 4 bytes, int64 [n, words]."""
    at = 8 * torch.arange(n_bytes, device=blocks.device)
    return (blocks.view(len(blocks), -1, n_bytes).long() << at).sum(-1)


def _q4_1(blocks: Tensor) -> Levels:
    """D 2, m 2, 16 bytes: weights j and j + 16."""
    values = _fields(blocks[:, 4:], 0, 4, mask=15).flatten(1)
    return _free_levels(values.float(), blocks)


def _free_levels(values: Tensor, blocks: Tensor) -> Levels:
    """Values of one part whose factor and offset are d and -m."""
    d, m = _half(blocks, 0), _half(blocks, 2)
    return Levels(values, d, torch.ones_like(d), m, -torch.ones_like(m))


def _q5_1(blocks: Tensor) -> Levels:
    """D 2, m 2, 4 bytes of fifth bits, 16 bytes as q4_1."""
    low = _fields(blocks[:, 8:], 0, 4, mask=15).flatten(1)
    high = _fields(blocks[:, 4:8], *range(8), mask=1).mT.flatten(1)
    return _free_levels((low | high << 4).float(), blocks)


def _q2_k(blocks: Tensor) -> Levels:
    """16 bytes of scale and minimum, 64 of codes (2 bits of 32 bytes are 32 weights), d, dmin."""
    scales = blocks[:, :16]
    codes = _fields(blocks[:, 16:80].reshape(len(blocks), 2, 32), 0, 2, 4, 6, mask=3)
    minima = (scales >> 4).float()
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    return Levels(codes.flatten(1).float(), d, (scales & 15).float(), dmin, minima)


def _q3_k(blocks: Tensor) -> Levels:
    """32 bytes of third bits, 64 of codes as q2_k, 12 of scales of 6 bits, d."""
    n_blocks = len(blocks)
    high = _fields(blocks[:, :32], *range(8), mask=1).flatten(1)
    low = _fields(blocks[:, 32:96].reshape(n_blocks, 2, 32), 0, 2, 4, 6, mask=3).flatten(1)
    values = low.float() - 4 * (1 - high.float())
    scales = _fields(blocks[:, 96:104], 0, 4, mask=15).flatten(1)
    tops = _fields(blocks[:, 104:108], 0, 2, 4, 6, mask=3).flatten(1)
    return Levels(values, _half(blocks, 108), (scales | tops << 4).float() - 32)


def _k_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits from 12 bytes, uint8 [n, 8] each.

    Bytes 0 .. 3 and 4 .. 7 hold the first four of each and two bits of the others, whose other
    four are halves of bytes 8 .. 11.
    """
    first, second, third = scales.view(len(scales), 3, 4).unbind(1)
    factors = torch.cat([first & 63, third & 15 | first >> 2 & 48], 1)
    return factors, torch.cat([second & 63, third >> 4 | second >> 2 & 48], 1)


def _q4_k(blocks: Tensor) -> Levels:
    """d, dmin, 12 bytes of scales and minima, 128 of codes (halves of 32 bytes are 32 weights)."""
    scales, minima = _k_scales(blocks[:, 4:16])
    codes = _fields(blocks[:, 16:].reshape(len(blocks), 4, 32), 0, 4, mask=15).flatten(1)
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    return Levels(codes.float(), d, scales.float(), dmin, minima.float())


def _q5_k(blocks: Tensor) -> Levels:
    """As q4_k, with 32 bytes of fifth bits before the codes."""
    scales, minima = _k_scales(blocks[:, 4:16])
    low = _fields(blocks[:, 48:].reshape(len(blocks), 4, 32), 0, 4, mask=15).flatten(1)
    high = _fields(blocks[:, 16:48], *range(8), mask=1).flatten(1)
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    return Levels((low | high << 4).float(), d, scales.float(), dmin, minima.float())


def _q6_k(blocks: Tensor) -> Levels:
    """128 bytes of low halves, 64 of upper bit pairs, 16 signed scales, d."""
    n_blocks = len(blocks)
    low = _fields(blocks[:, :128].reshape(n_blocks, 2, 64), 0, 4, mask=15).flatten(1)
    high = _fields(blocks[:, 128:192].reshape(n_blocks, 2, 32), 0, 2, 4, 6, mask=3).flatten(1)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Levels((low | high << 4).float() - 32, _half(blocks, 208), scales)


def _iq4_nl(blocks: Tensor) -> Levels:
    """d, 16 bytes of codes: weights j and j + 16."""
    codes = _fields(blocks[:, 2:], 0, 4, mask=15).flatten(1)
    d = _half(blocks, 0)
    return Levels(_nl(codes), d, torch.ones_like(d))


def _iq4_xs(blocks: Tensor) -> Levels:
    """d, 2 bytes of upper bit pairs of scales, 4 of lower halves, 128 of codes."""
    n_blocks = len(blocks)
    tops = _fields(blocks[:, 2:4], 0, 2, 4, 6, mask=3).mT.flatten(1)
    scales = _fields(blocks[:, 4:8], 0, 4, mask=15).mT.flatten(1)
    codes = _fields(blocks[:, 8:].reshape(n_blocks, 8, 16), 0, 4, mask=15).flatten(1)
    return Levels(_nl(codes), _half(blocks, 0), (scales | tops << 4).float() - 32)


def _nl(codes: Tensor) -> Tensor:
    table = torch.tensor(NL_VALUES, dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def _iq2_xxs(blocks: Tensor) -> Levels:
    """d, then for each 32 weights 4 bytes of vectors and a word: four 7-bit signs, a scale."""
    n_blocks = len(blocks)
    parts = blocks[:, 2:].reshape(n_blocks, 8, 8)
    words = _words(parts[..., 4:].reshape(n_blocks, -1), 4)  # [n, 8]
    values = _vectors("IQ2_XXS", parts[..., :4].reshape(n_blocks, -1).int())
    scales = (0.5 + (words >> 28).float()) * 0.25
    return _signed_levels(values, _seven_bits(words), _half(blocks, 0), scales)


def _iq2_xs(blocks: Tensor) -> Levels:
    """d, 32 words of 9 bits for a vector and 7 for signs, 8 bytes of two scales each."""
    words = _words(blocks[:, 2:66], 2)
    scales = _fields(blocks[:, 66:], 0, 4, mask=15).mT.flatten(1)
    values, signs = _vectors("IQ2_XS", (words & 511).int()), _full_signs(words >> 9)
    return _signed_levels(values, signs, _half(blocks, 0), (0.5 + scales.float()) * 0.25)


def _iq2_s(blocks: Tensor) -> Levels:
    """d, 32 bytes of vectors, 32 of signs, 8 of the vectors' upper bit pairs, 8 of scales."""
    tops = _fields(blocks[:, 66:74], 0, 2, 4, 6, mask=3).mT.flatten(1)
    scales = _fields(blocks[:, 74:], 0, 4, mask=15).mT.flatten(1)
    values = _vectors("IQ2_S", blocks[:, 2:34].int() | tops.int() << 8)
    scales = (0.5 + scales.float()) * 0.25
    return _signed_levels(values, blocks[:, 34:66], _half(blocks, 0), scales)


def _iq3_xxs(blocks: Tensor) -> Levels:
    """d, 64 bytes of vectors, 8 words: four 7-bit signs, a scale."""
    words = _words(blocks[:, 66:], 4)
    values = _vectors("IQ3_XXS", blocks[:, 2:66].int())
    scales = (0.5 + (words >> 28).float()) * 0.5
    return _signed_levels(values, _seven_bits(words), _half(blocks, 0), scales)


def _iq3_s(blocks: Tensor) -> Levels:
    """d, 64 bytes of vectors, 8 of their ninth bits, 32 of signs, 4 of two scales each."""
    tops = _fields(blocks[:, 66:74], *range(8), mask=1).mT.flatten(1)
    scales = _fields(blocks[:, 106:], 0, 4, mask=15).mT.flatten(1)
    values = _vectors("IQ3_S", blocks[:, 2:66].int() | tops.int() << 8)
    scales = 1 + 2 * scales.float()
    return _signed_levels(values, blocks[:, 74:106], _half(blocks, 0), scales)


def _seven_bits(words: Tensor) -> Tensor:
    """The four sign patterns in the low 28 bits of words [n, 8], uint8 [n, 32]."""
    at = torch.tensor([0, 7, 14, 21], device=words.device)
    return _full_signs((words.unsqueeze(-1) >> at & 127).flatten(1))


def _full_signs(patterns: Tensor) -> Tensor:
    """Seven stored signs with the eighth, which makes their number even; uint8."""
    bits = patterns.unsqueeze(-1) >> torch.arange(7, device=patterns.device) & 1
    return (patterns | bits.sum(-1) % 2 << 7).to(torch.uint8)


def _signed_levels(values: Tensor, signs: Tensor, d: Tensor, scales: Tensor) -> Levels:
    """Values [n, 256] with the signs of bytes [n, 32], a set bit being negative."""
    bits = _fields(signs, *range(8), mask=1).mT.flatten(1)
    return Levels(values * (1 - 2 * bits.float()), d, scales)


def _vectors(name: str, numbers: Tensor) -> Tensor:
    """Rows of a table by number [n, V], one after the other, float32."""
    return _table(name, numbers.device)[numbers].flatten(1)


@lru_cache(maxsize=32)
def _table(name: str, device: torch.device) -> Tensor:
    """A table of vectors of the package gguf, float32 [V, 4 or 8]."""
    from gguf import quants

    own: Any = getattr(quants, name)
    own.init_grid()
    return torch.from_numpy(own.grid[0, 0].copy()).to(device, torch.float32)


_READERS: Mapping[str, Callable[[Tensor], Levels]] = MappingProxyType(
    {
        "q4_1": _q4_1,
        "q5_1": _q5_1,
        "q2_k": _q2_k,
        "q3_k": _q3_k,
        "q4_k": _q4_k,
        "q5_k": _q5_k,
        "q6_k": _q6_k,
        "iq4_nl": _iq4_nl,
        "iq4_xs": _iq4_xs,
        "iq2_xxs": _iq2_xxs,
        "iq2_xs": _iq2_xs,
        "iq2_s": _iq2_s,
        "iq3_xxs": _iq3_xxs,
        "iq3_s": _iq3_s,
    }
)
