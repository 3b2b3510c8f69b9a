"""Types of llama.cpp whose values are a ladder: integers or a table, free for every weight.

Those can be rounded by anybody: a part's scale and minimum, the float16 of a block and every value
are chosen, and `packed` writes them as blocks. What iq2_* and iq3_* choose are vectors of a table,
which is left to llama.cpp's code.

Letters: n blocks, P parts of a block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from alphaquant.quant.ggml.decoding import NL_VALUES, Levels


@dataclass(frozen=True)
class Ladder:
    """What a type can hold.

    Attributes:
        part: weights that share a scale.
        low: smallest value.
        high: largest value.
        scales: smallest and largest scale; equal where only the block's float16 is free.
        minima: smallest and largest minimum; None where there are none.
        values: all values, ascending, where they are not all integers from `low` to `high`.
    """

    part: int
    low: int
    high: int
    scales: tuple[int, int]
    minima: tuple[int, int] | None = None
    values: tuple[int, ...] = ()

    def snap(self, scaled: Tensor) -> Tensor:
        """Nearest values, saturating, float32."""
        if not self.values:
            return scaled.round().clamp_(self.low, self.high)
        table = torch.tensor(self.values, dtype=torch.float32, device=scaled.device)
        middles = (table[1:] + table[:-1]) / 2
        return table[torch.bucketize(scaled, middles)]


LADDERS: Mapping[str, Ladder] = MappingProxyType(
    {
        "q4_1": Ladder(32, 0, 15, (1, 1), (-1, -1)),
        "q5_1": Ladder(32, 0, 31, (1, 1), (-1, -1)),
        "q2_k": Ladder(16, 0, 3, (0, 15), (0, 15)),
        "q3_k": Ladder(16, -4, 3, (-32, 31)),
        "q4_k": Ladder(32, 0, 15, (0, 63), (0, 63)),
        "q5_k": Ladder(32, 0, 31, (0, 63), (0, 63)),
        "q6_k": Ladder(16, -32, 31, (-128, 127)),
        "iq4_nl": Ladder(32, -127, 113, (1, 1), values=NL_VALUES),
        "iq4_xs": Ladder(32, -127, 113, (-32, 31), values=NL_VALUES),
    }
)


def packed(kind: str, levels: Levels) -> Tensor:
    """Blocks of a ladder, uint8 [n, bytes of a block]; the reverse of `levels_of`."""
    codes = (levels.values - LADDERS[kind].low).to(torch.uint8)
    if LADDERS[kind].values:
        table = torch.tensor(LADDERS[kind].values, dtype=torch.float32, device=codes.device)
        codes = torch.bucketize(levels.values, table).to(torch.uint8)
    return torch.cat(_PACKERS[kind](codes, levels), 1)


Parts = list[Tensor]


def _half(numbers: Tensor | None) -> Tensor:
    """float32 [n, 1] as the bytes of float16."""
    assert numbers is not None, "a type with minima"
    return numbers.to(torch.float16).contiguous().view(torch.uint8)


def _joined(fields: Tensor, bits: int) -> Tensor:
    """Fields [.., F, B] of each byte as bytes [.., B], the first in the low bits."""
    found = torch.zeros_like(fields[..., 0, :])
    for i in range(fields.shape[-2]):
        found = found | fields[..., i, :] << bits * i
    return found


def _neighbours(fields: Tensor, n_fields: int, bits: int) -> Tensor:
    """Fields [n, F * B] of which F neighbours share a byte, [n, B]."""
    return _joined(fields.view(len(fields), -1, n_fields).mT, bits)


def _runs(codes: Tensor, run: int, n_fields: int, bits: int) -> Tensor:
    """Codes [n, K] in runs of neighbouring bytes: F runs share their bytes, [n, K / F]."""
    return _joined(codes.view(len(codes), -1, n_fields, run), bits).flatten(1)


def _q4_1(codes: Tensor, levels: Levels) -> Parts:
    return [_half(levels.d), _half(levels.dmin), _runs(codes, 16, 2, 4)]


def _q5_1(codes: Tensor, levels: Levels) -> Parts:
    high = _neighbours(codes >> 4, 8, 1)
    return [_half(levels.d), _half(levels.dmin), high, _runs(codes & 15, 16, 2, 4)]


def _q2_k(codes: Tensor, levels: Levels) -> Parts:
    assert levels.minima is not None
    scales = levels.scales.to(torch.uint8) | levels.minima.to(torch.uint8) << 4
    return [scales, _runs(codes, 32, 4, 2), _half(levels.d), _half(levels.dmin)]


def _q3_k(codes: Tensor, levels: Levels) -> Parts:
    scales = (levels.scales + 32).to(torch.uint8)
    low = _joined((scales & 15).view(-1, 2, 8), 4)
    tops = _joined((scales >> 4).view(-1, 4, 4), 2)
    high = _joined((codes >> 2).view(-1, 8, 32), 1)
    return [high, _runs(codes & 3, 32, 4, 2), low, tops, _half(levels.d)]


def _k_scales(levels: Levels) -> Parts:
    """See `decoding._k_scales`."""
    assert levels.minima is not None
    scales, minima = levels.scales.to(torch.uint8), levels.minima.to(torch.uint8)
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | minima[:, 4:] << 4
    return [_half(levels.d), _half(levels.dmin), first, second, third]


def _q4_k(codes: Tensor, levels: Levels) -> Parts:
    return [*_k_scales(levels), _runs(codes, 32, 2, 4)]


def _q5_k(codes: Tensor, levels: Levels) -> Parts:
    high = _joined((codes >> 4).view(-1, 8, 32), 1)
    return [*_k_scales(levels), high, _runs(codes & 15, 32, 2, 4)]


def _q6_k(codes: Tensor, levels: Levels) -> Parts:
    scales = levels.scales.to(torch.int8).view(torch.uint8)
    low, high = _runs(codes & 15, 64, 2, 4), _runs(codes >> 4, 32, 4, 2)
    return [low, high, scales, _half(levels.d)]


def _iq4_nl(codes: Tensor, levels: Levels) -> Parts:
    return [_half(levels.d), _runs(codes, 16, 2, 4)]


def _iq4_xs(codes: Tensor, levels: Levels) -> Parts:
    scales = (levels.scales + 32).to(torch.uint8)
    tops, low = _neighbours(scales >> 4, 4, 2), _neighbours(scales & 15, 2, 4)
    return [_half(levels.d), tops, low, _runs(codes, 16, 2, 4)]


_PACKERS: Mapping[str, Callable[[Tensor, Levels], Parts]] = MappingProxyType(
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
    }
)
