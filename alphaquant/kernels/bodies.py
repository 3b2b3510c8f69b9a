"""PTX that turns words in kernel order into pairs of 16-bit numbers: text, no execution.

A body reads the P words of a set and writes R registers, each with two weights in float16 or
bfloat16: exactly the values of the grid (`alphaquant.kernels.grids`), integers centred on zero.
The text is derived from `alphaquant.kernels.order.LAYOUTS`; no bit position is written twice.

Integers. The exponent pattern of 1024 (float16, 0x6400) or 128 (bfloat16, 0x4300) has 10 or 7
free bits below it. `lop3` puts a code's field there, (word & mask) | magic, which reads as
base + code * 2^p for a field at bit p of the free bits. One `fma` gives code - zero:

    int4 in float16, field at bit 4: 1024 + 16 c, times 1/16, minus 64 + 8  ->  c - 8

Fields that would reach above the free bits wait for a shift of the word, which as many following
fields as possible share. An 8-bit code does not fit bfloat16's 7 bits: its top bit makes a second
number, 256 or 128, that is subtracted: (128 + low 7 bits) - (256 - 128 top) = c - 128.

Floats. Sign to bit 15, exponent and mantissa to where the target has its own, with the source's
shorter exponent in the low end of the field. That reads as value * 2^(bias - target's bias), also
for subnormals; one multiplication by a power of two makes it the value.

    e2m1 in bfloat16, code 0 01 0 (1.0): 0x0080 = 2^-126, times 2^126  ->  1.0

Tables. Codes become nibbles of a selector, four of the first numbers of pairs in its low half and
those of the second numbers in its high half. `prmt` takes four bytes of eight by such nibbles:
that looks four codes up in eight numbers plus 128; of sixteen numbers both halves are looked up,
and a third `prmt` chooses by the codes' top bits. Bytes then become numbers as 8-bit codes do.

    nl4, codes 1 and 9 of the first two pairs: selector 0x..91, bytes 24 and 141, -104 and 13

Folding. Where weights are multiplied by scales anyway, a folded body leaves the power of two out,
value * 2^-p, and scale * 2^p makes up for it. The largest exponent of either target is p + bias,
with the element's bias, so scales of at most 2^bias can take it (`is_foldable`). E4M3 scales reach
1.75 * 2^8; they take 2^(p - 8 + bias), and their global factor the other 2^(8 - bias).

    e2m1 in bfloat16, p = 126, bias 1: 1.0 times scale 2 is 0x0080 times 0x7F00 = 2^127  ->  2.0

Folded values may be subnormal, and so may their products with E4M3 scales in float16, which are
multiples of 2^-17. PTX multiplies subnormals; tensor cores up to the A100's are known to take them
(Fasi et al. 2021).

All of it is exact. Ideas: Kim et al., "Who Says Elephants Can't Run" (2022), for the magic
exponent; FP6-LLM (2401.14112) for the placement of small floats. `add` and `mul` of bfloat16
pairs need sm_90.
"""

import struct
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from alphaquant.kernels.grids import TABLES, from_e8m0
from alphaquant.kernels.order import Layout, Piece, layout_of

Target = Literal["f16", "bf16"]

FLOATS: dict[str, tuple[int, int]] = {
    "e2m1": (2, 1),
    "e2m3": (2, 3),
    "e3m2": (3, 2),
    "e4m3": (4, 3),
    "e5m2": (5, 2),
}
"""Exponent and mantissa bits of the elements that are floats."""

_AND_OR = 0xEA  # lop3 table of (a & b) | c
_AND_XOR = 0x6A  # lop3 table of (a & b) ^ c


@dataclass(frozen=True)
class _TargetType:
    exponent_bits: int
    mantissa_bits: int
    magic: int  # bit pattern of 2^mantissa_bits


_TARGETS: dict[str, _TargetType] = {
    "f16": _TargetType(5, 10, 0x6400),
    "bf16": _TargetType(8, 7, 0x4300),
}


@dataclass(frozen=True)
class Body:
    """The PTX of one word set.

    Attributes:
        text: statements in braces; `$0` .. are the outputs, then the inputs.
        n_inputs: P.
        n_outputs: R.
        constraints: early-clobbered outputs and inputs, 32-bit registers.
    """

    text: str
    n_inputs: int
    n_outputs: int

    @property
    def constraints(self) -> str:
        """The constraint string of the inline assembly."""
        return ",".join(["=&r"] * self.n_outputs + ["r"] * self.n_inputs)


def left_out_power(element: str, target: Target) -> int:
    """The p of value * 2^-p, which a folded body gives; 0 where nothing is left out."""
    if element in TABLES:
        # Numbers of a table are up to 127, so their scales are small, and float16 is short of
        # small numbers.
        return 7 if target == "f16" else 0
    if element not in FLOATS:
        return 0
    return _bias(_TARGETS[target].exponent_bits) - _bias(FLOATS[element][0])


def lent_power(element: str) -> int:
    """The exponent of what a global factor takes over where E4M3 scales are folded."""
    return max(0, _bias(FLOATS["e4m3"][0]) + 1 - _bias(FLOATS[element][0]))


def is_foldable(element: str, scales: Tensor, global_scale: Tensor | None = None) -> bool:
    """Whether scales can take over the power of two that a folded body leaves out.

    Looks at the largest scale, so it waits for the device where there is something to fold.

    Args:
        element: name in `alphaquant.kernels.order.LAYOUTS`, or any other.
        scales: [S, N padded, C] float16, uint8 (E8M0) or float8_e4m3fn.
        global_scale: float32 [1] or None.

    Returns:
        False also where nothing is to be gained: for integers, and where a tile has one scale.
    """
    if element not in FLOATS or scales.shape[-1] == 1:
        return False
    wide = from_e8m0(scales) if scales.dtype == torch.uint8 else scales.to(torch.float32)
    if global_scale is not None:
        wide = wide * global_scale
    return bool(wide.abs().max() <= 2.0 ** _bias(FLOATS[element][0]))


def make_body(element: str, target: Target, *, is_folded: bool = False) -> Body:
    """The body of an element for one type of numbers.

    Args:
        element: name in `alphaquant.kernels.order.LAYOUTS`.
        target: what the outputs are, `f16` or `bf16`.
        is_folded: whether small floats and tables keep the factor 2^-p of `left_out_power`.

    Raises:
        FormatError: unknown element.
    """
    layout = layout_of(element)
    writer = _Writer(target, layout, looks_up=element in TABLES)
    if element in TABLES:
        power = left_out_power(element, target) if is_folded else 0
        _write_table(writer, TABLES[element], power)
        return Body(writer.text(), layout.n_planes, layout.n_registers)
    for r, pieces in enumerate(layout.pairs):
        if element in FLOATS:
            _write_float(writer, r, pieces, FLOATS[element])
            power = 0 if is_folded else left_out_power(element, target)
            if power:
                writer.arithmetic(f"${r}", 2.0**power, 0.0)
        elif layout.bits > _TARGETS[target].mantissa_bits:
            _write_wide(writer, r, pieces[0])
        else:
            _write_integer(writer, r, pieces)
    return Body(writer.text(), layout.n_planes, layout.n_registers)


@dataclass
class _Writer:
    """Collects the statements of one body."""

    target: str
    layout: Layout
    lines: list[str] = field(default_factory=list)
    constants: dict[int, str] = field(default_factory=dict)
    held: tuple[int, int] | None = None  # word and shift that register y holds
    looks_up: bool = False

    def text(self) -> str:
        """All of it, constants first."""
        head = [".reg .b32 y, z, t, u, v, lo, hi;" if self.looks_up else ".reg .b32 y, z;"]
        for bits, name in self.constants.items():
            head.append(f".reg .b32 {name}; mov.u32 {name}, 0x{bits:08X};")
        return "\n".join(["{", *head, *self.lines, "}"])

    def shifted(self, word: int, shift: int) -> str:
        """A register with a word shifted right (left if negative)."""
        source = f"${self.layout.n_registers + word}"
        if shift == 0:
            return source
        if self.held != (word, shift):
            name = "shr.u32" if shift > 0 else "shl.b32"
            self.lines.append(f"{name} y, {source}, {abs(shift)};")
            self.held = (word, shift)
        return "y"

    def shift_of(self, word: int) -> int:
        """By how much a word is shifted right already, at no cost."""
        return self.held[1] if self.held is not None and self.held[0] == word else 0

    def combine(self, out: str, source: str, mask: int, other: str, table: int = _AND_OR) -> None:
        """(source & mask) | other in both halves, or another function of the three."""
        self.lines.append(f"lop3.b32 {out}, {source}, {_both(mask)}, {other}, {table};")

    def constant(self, value: float) -> str:
        """A register with a number in both halves."""
        bits = _bits_of(value, self.target)
        return self.constants.setdefault(bits << 16 | bits, f"c{len(self.constants)}")

    def bits(self, word: int) -> str:
        """A register with 32 bits."""
        return self.constants.setdefault(word, f"c{len(self.constants)}")

    def permute(self, out: str, low: str, high: str, selector: str) -> None:
        """Four bytes of eight, chosen by the nibbles of the selector's low half."""
        self.lines.append(f"prmt.b32 {out}, {low}, {high}, {selector};")

    def arithmetic(self, out: str, factor: float, addend: float) -> None:
        """Out * factor + addend."""
        kind = f"rn.{self.target}x2"
        if factor == 1.0:
            self.lines.append(f"add.{kind} {out}, {out}, {self.constant(addend)};")
        elif addend == 0.0:
            self.lines.append(f"mul.{kind} {out}, {out}, {self.constant(factor)};")
        else:
            operands = f"{self.constant(factor)}, {self.constant(addend)}"
            self.lines.append(f"fma.{kind} {out}, {out}, {operands};")


def _write_integer(writer: _Writer, r: int, pieces: tuple[Piece, ...]) -> None:
    """One pair of codes of at most as many bits as the target's mantissa has."""
    bits, target = writer.layout.bits, _TARGETS[writer.target]
    # Signs are 2c - 1. At bit 0 that would need 2 * base + 1, which has a bit too many.
    step, zero, least = (2.0, 1.0, 1) if bits == 1 else (1.0, float(1 << (bits - 1)), 0)
    other, place = _both(target.magic), 0
    for piece in pieces:
        if len(pieces) == 1:
            shift = writer.shift_of(piece.word)
            if not least <= piece.at - shift <= target.mantissa_bits - bits:
                shift = piece.at - least
            place = piece.at - shift
        else:
            shift = piece.at - piece.bit
        mask = ((1 << piece.n_bits) - 1) << (piece.bit + place)
        writer.combine(f"${r}", writer.shifted(piece.word, shift), mask, other)
        other = f"${r}"
    base = float(1 << target.mantissa_bits)
    factor = step / (1 << place)
    writer.arithmetic(f"${r}", factor, -(base * factor + zero))


def _write_wide(writer: _Writer, r: int, piece: Piece) -> None:
    """One pair of 8-bit codes in bfloat16."""
    _write_top_bit(writer, f"${r}", writer.shifted(piece.word, piece.at))


def _write_top_bit(writer: _Writer, out: str, source: str) -> None:
    """The low bytes of both halves of a register, less 128, where they are a bit too wide."""
    target = _TARGETS[writer.target]
    top = 1 << target.mantissa_bits
    writer.combine("z", source, top, _both(target.magic | top), _AND_XOR)
    writer.combine(out, source, top - 1, _both(target.magic))
    writer.lines.append(f"sub.rn.{writer.target}x2 {out}, {out}, z;")


_QUADS = {
    2: ((0, 2, 4, 6), (1, 3, 5, 7)),
    3: ((0, 1, 2, 3), (5, 6, 7, 8), (10, 11, 12, 13), (4, 9, 14, 15)),
    4: ((0, 1, 2, 3),),
}
"""Pairs that are looked up together, by bits: so that few shifts make a selector."""


def _write_table(writer: _Writer, table: tuple[int, ...], power: int) -> None:
    """All pairs of a set, looked up four by four, times 2^-power."""
    words = struct.unpack(f"<{len(table) // 4}I", bytes(number + 128 for number in table))
    names = [writer.bits(word) for word in words]
    for quad in _QUADS[writer.layout.bits]:
        _write_selector(writer, quad)
        for out, shift in (("lo", 0), ("hi", 16)):
            if shift:
                writer.lines.append(f"shr.u32 t, t, {shift};")
            _write_look_up(writer, out, names)
        for first, selector in ((0, 0x5140), (2, 0x7362)):
            writer.permute("u", "lo", "hi", f"0x{selector:04X}")
            for pair, place in ((first, 0x4140), (first + 1, 0x4342)):
                _write_byte(writer, f"${quad[pair]}", f"0x{place:04X}", power)
        writer.held = None


def _write_selector(writer: _Writer, quad: tuple[int, ...]) -> None:
    """The codes of four pairs as nibbles of both halves of t."""
    masks: dict[tuple[int, int], int] = {}
    for k, r in enumerate(quad):
        for piece in writer.layout.pairs[r]:
            place = 4 * k + piece.bit
            key = (piece.word, piece.at - place)
            masks[key] = masks.get(key, 0) | ((1 << piece.n_bits) - 1) << place
    for i, ((word, shift), mask) in enumerate(masks.items()):
        source = writer.shifted(word, shift)
        if i == 0:
            writer.lines.append(f"and.b32 t, {source}, {_both(mask)};")
        else:
            writer.combine("t", source, mask, "t")


def _write_look_up(writer: _Writer, out: str, words: list[str]) -> None:
    """Four numbers plus 128, by the low half of t; of sixteen numbers y, z, u, v are lost."""
    if len(words) < 4:
        writer.permute(out, words[0], words[-1], "t")
        return
    writer.lines.append(f"and.b32 y, t, {_both(0x7777)};")
    writer.permute("u", words[0], words[1], "y")
    writer.permute("v", words[2], words[3], "y")
    writer.lines.append("shr.u32 z, t, 1;")
    writer.combine("z", "z", 0x4444, _both(0x3210))
    writer.permute(out, "u", "v", "z")


def _write_byte(writer: _Writer, out: str, place: str, power: int) -> None:
    """Two bytes of u, numbers plus 128, as a pair of the target's."""
    target = _TARGETS[writer.target]
    if target.mantissa_bits >= 8:
        writer.permute(out, "u", writer.bits(_repeated(target.magic >> 8)), place)
        factor = 2.0**-power
        writer.arithmetic(out, factor, -((1 << target.mantissa_bits) + 128) * factor)
        return
    writer.permute(out, "u", writer.bits(0), place)
    _write_top_bit(writer, out, out)
    if power:
        writer.arithmetic(out, 2.0**-power, 0.0)


def _repeated(byte: int) -> int:
    """A byte in all four places of a word."""
    return byte * 0x01010101


def _write_float(
    writer: _Writer, r: int, pieces: tuple[Piece, ...], element: tuple[int, int]
) -> None:
    """One pair of small floats, times 2^-p."""
    target = _TARGETS[writer.target]
    exponent_bits, mantissa_bits = element
    sign = exponent_bits + mantissa_bits
    masks: dict[tuple[int, int], int] = {}
    for piece in pieces:
        for bit in range(piece.bit, piece.bit + piece.n_bits):
            place = 15 if bit == sign else target.mantissa_bits - mantissa_bits + bit
            key = (piece.word, piece.at + bit - piece.bit - place)
            masks[key] = masks.get(key, 0) | 1 << place
    for i, ((word, shift), mask) in enumerate(masks.items()):
        source = writer.shifted(word, shift)
        if i == 0:
            writer.lines.append(f"and.b32 ${r}, {source}, {_both(mask)};")
        else:
            writer.combine(f"${r}", source, mask, f"${r}")


def _bias(exponent_bits: int) -> int:
    """What is added to the exponent of a float with so many bits for it."""
    return (1 << (exponent_bits - 1)) - 1


def _both(half: int) -> str:
    """A 16-bit pattern in both halves of a word."""
    return f"0x{half << 16 | half:08X}"


def _bits_of(value: float, target: str) -> int:
    """The 16 bits of a number that the target represents exactly."""
    dtype = torch.float16 if target == "f16" else torch.bfloat16
    return int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
