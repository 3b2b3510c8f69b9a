"""Number formats: how the numbers of one matrix are stored, and how many bits that takes.

This is the only place where bits are counted. It holds no tensors: the arithmetic is in
`alphaquant.kernels`, the choice of scales in `alphaquant.quant.codecs`.

Name grammar (`parse_format`)::

    int1[-g<N>|-row]                                 int1-g128   int1-row
    int<2|3|4|5|6|8>[-g<N>|-row][-asym]              int4-g128   int3-g64-asym   int8-row
    nl<2|3|4>[-g<N>|-row]                            nl4-g64     nl3-g32
    int<2|3|4>-g<16|32|64>-s256                      int3-g32-s256
    nl<2|3|4>-g<16|32|64>-s256                       nl3-g32-s256
    fp<4|6|8>[-<element>][-g<N>|-row]                fp8-e4m3-g128   fp6-e2m3-g64   fp4-g32
    mxfp<4|6|8>[-<element>]   nvfp4   bf16           mxfp4   mxfp6-e2m3
    a type of llama.cpp                              q4_k   iq3_s   q4_1   (see GGML_BLOCKS)

Absent parts: group 128 for int, nl and fp (32 for mxfp, 16 for nvfp4), symmetric, elements e2m1 /
e3m2 / e4m3. int1 is a sign: codes 0 and 1 stand for -scale and +scale, so it has no zero, no zero
point, and is for weights only.

nl is non-linear: codes stand for the numbers of a fixed table (`alphaquant.kernels.grids`), denser
near zero. `-s256` is a super-block: scales are 6-bit multiples, -32 to 31, of one float16 per 256
inputs of a row. Both are for weights only.

Stored layout of a matrix of R rows (outputs) and C columns (inputs), G = ceil(C / group) groups
per row, a short last group allowed::

    codes   R x ceil(C * bits / 8) bytes    little-endian bit stream per row, padded to a byte
    scales  R x G   float16 (int, nl, fp)  |  one byte E8M0 (mxfp)  |  one byte E4M3 (nvfp4)
            R x ceil(G * 6 / 8) bytes of multiples + 32, a stream per row      super-blocks only
    super_scales  R x ceil(C / 256) float16, a short last block allowed        super-blocks only
    zeros   ceil(R * G * bits / 8) bytes    asymmetric only, one stream for the matrix
    global  4 bytes float32                 nvfp4 only

and of a type of llama.cpp::

    codes   R x C / block * bytes of a block        its blocks, scales and all; block divides C

Worked example, R = 256, C = 128: `int3-g64-asym` has 256 * 48 bytes of codes, 256 * 2 * 2 bytes of
scales and 256 * 2 * 3 / 8 = 192 bytes of zeros, 13504 bytes = 108032 bits, 3.297 bits per weight
= 3 + (16 + 3) / 64. `int1-g64` has 256 * 16 bytes of codes and 256 * 2 * 2 of scales, 5120 bytes
= 40960 bits, 1.25 bits per weight = 1 + 16 / 64. `int3-g32-s256` has 256 * 48 bytes of codes,
256 * 3 of scales (4 of 6 bits) and 256 * 2 of super-scales, 13568 bytes, 3.3125 bits per weight;
from 256 inputs on 3.25 = 3 + 6 / 32 + 16 / 256. `q4_k` fits 256 inputs, not 128: 256 rows of them
are 256 * 144 bytes, 4.5 bits per weight = 8 * 144 / 256.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.1-5.4 (elements, E8M0); OCP 8-bit floating
point (OFP8) v1.0, table 1; ggml-common.h of llama.cpp b11549 (its blocks).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from math import ceil
from types import MappingProxyType

from alphaquant.errors import FormatError


@dataclass(frozen=True)
class Element:
    """A small floating-point number: one sign bit, exponent bits, mantissa bits.

    `max_value` is stated and not derived, because E4M3 gives its largest pattern to NaN and E5M2
    its largest exponent to infinity, while the 4- and 6-bit elements use every pattern.
    """

    exponent_bits: int
    mantissa_bits: int
    max_value: float

    @property
    def bits(self) -> int:
        """Bits of one code: sign, exponent, mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias: 2^(exponent_bits - 1) - 1."""
        return int(2 ** (self.exponent_bits - 1) - 1)

    @property
    def emax(self) -> int:
        """Exponent of the largest value (OCP MX 6.3): E2M1 2, E2M3 2, E3M2 4, E4M3 8, E5M2 15."""
        exponent = 0
        while 2.0 ** (exponent + 1) <= self.max_value:
            exponent += 1
        return exponent


ELEMENTS: dict[str, Element] = {
    "e2m1": Element(2, 1, 6.0),
    "e2m3": Element(2, 3, 7.5),
    "e3m2": Element(3, 2, 28.0),
    "e4m3": Element(4, 3, 448.0),
    "e5m2": Element(5, 2, 57344.0),
}

_DEFAULT_ELEMENT = {4: "e2m1", 6: "e3m2", 8: "e4m3"}
_INT_BITS = (1, 2, 3, 4, 5, 6, 8)
_FLOAT_BITS = (4, 6, 8)
_TABLE_BITS = (2, 3, 4)

SUPER_SIZE = 256
"""Inputs of a super-block: llama.cpp's, so that some formats are its types, number for number."""
SUB_BITS = 6
"""Bits of a scale inside a super-block: a multiple of its float16, plus 32."""
SUPER_GROUPS = (16, 32, 64)
"""Inputs per scale inside a super-block."""

GGML_BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "iq2_xxs": (256, 66),
        "iq2_xs": (256, 74),
        "iq2_s": (256, 82),
        "q2_k": (256, 84),
        "iq3_xxs": (256, 98),
        "iq3_s": (256, 110),
        "q3_k": (256, 110),
        "iq4_xs": (256, 136),
        "q4_k": (256, 144),
        "iq4_nl": (32, 18),
        "q4_1": (32, 20),
        "q5_k": (256, 176),
        "q5_1": (32, 24),
        "q6_k": (256, 210),
    }
)
"""Types of llama.cpp that are none of ours: weights and bytes of a block."""

GGML_TWINS: Mapping[str, str] = MappingProxyType(
    {
        "q1_0": "int1-g128",
        "q2_0": "int2-g64",
        "q4_0": "int4-g32",
        "q5_0": "int5-g32",
        "q8_0": "int8-g32",
    }
)
"""Types of llama.cpp that are ours, number for number: they go by our names."""

FORMAT_KINDS: tuple[str, ...] = (
    *(f"int{b}" for b in _INT_BITS),
    *(f"nl{b}" for b in _TABLE_BITS),
    *(f"fp{b}" for b in _FLOAT_BITS),
    *(f"mxfp{b}" for b in _FLOAT_BITS),
    "nvfp4",
    *GGML_BLOCKS,
    "bf16",
)
"""Every name that a configuration's `wq` may hold."""

SUPER_KINDS: tuple[str, ...] = tuple(f"{f}{b}" for f in ("int", "nl") for b in _TABLE_BITS)
"""Kinds that can have super-blocks."""

ACTIVATION_KINDS: tuple[str, ...] = tuple(
    kind
    for kind in FORMAT_KINDS
    if kind != "int1" and not kind.startswith("nl") and kind not in GGML_BLOCKS
)
"""Every name that `aq` may hold: signs alone cannot store the zeros and sizes of a token; tables,
whose scales are searched, and llama.cpp's types are for weights."""

ASYMMETRIC_KINDS: tuple[str, ...] = tuple(f"int{b}" for b in _INT_BITS if b > 1)
"""Kinds that can have a zero point. One bit cannot: its two levels would be zero and one sign.

Of the squares of normal weights those keep at most max phi(t)^2 / (1 - Phi(t)) = 41 %, -scale and
+scale 2 / pi = 64 %.
"""

DEFAULT_GROUP_SIZE = 128
PER_ROW = -1
MIN_GROUP_SIZE = 8
MAX_GROUP_SIZE = 2**24
"""Sixteen million inputs, far more than any matrix has: a larger number is a mistake."""
GROUP_SIZES = f"-1 (one scale per row) or {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}"
"""Group sizes that are possible, for messages."""


@dataclass(frozen=True)
class Family:
    """What all formats of a family share.

    Attributes:
        scale: how a scale is stored: `float16`, `e8m0` (a power of two), `e4m3`; empty for none.
        scale_bits: bits of one scale.
        block: inputs per scale where that is part of the format, 0 where each format of the family
            has its own; None where it is chosen.
        global_bits: bits of a factor for the whole matrix.
    """

    scale: str
    scale_bits: int
    block: int | None = None
    global_bits: int = 0


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "int": Family("float16", 16),
        "nl": Family("float16", 16),
        "fp": Family("float16", 16),
        "mxfp": Family("e8m0", 8, block=32),
        "nvfp": Family("e4m3", 8, block=16, global_bits=32),
        "ggml": Family("", 0, block=0),
        "bf16": Family("", 0),
    }
)
"""The one table of what families are; a new kind of scale begins with a row here."""


@dataclass(frozen=True)
class Format:
    """How the numbers of one matrix are stored.

    Attributes:
        family: `int`, `nl`, `fp`, `mxfp`, `nvfp`, `ggml` or `bf16`.
        bits: bits of one code (16 for bf16), rounded down for llama.cpp's types.
        group_size: consecutive inputs that share one scale; `PER_ROW` for one scale per row; of
            llama.cpp's types a block.
        symmetric: whether integers have no zero point; always true outside `int`.
        element: name in `ELEMENTS` for floating-point codes, in `GGML_BLOCKS` for a type of
            llama.cpp, empty otherwise.
        super_size: inputs of a super-block, `SUPER_SIZE`; 0 where scales are numbers of their own.
    """

    family: str
    bits: int
    group_size: int = PER_ROW
    symmetric: bool = True
    element: str = ""
    super_size: int = 0

    @property
    def kind(self) -> str:
        """The name without group, symmetry and element, as `wq` holds it: `int4`, `mxfp6`."""
        if self.family in ("bf16", "ggml"):
            return self.element or self.family
        return f"{self.family}{self.bits}"

    @property
    def name(self) -> str:
        """The canonical name; `parse_format(name)` gives this format back."""
        parts = [self.kind]
        if self.family in ("fp", "mxfp") and (
            self.family == "fp" or self.element != _DEFAULT_ELEMENT[self.bits]
        ):
            parts.append(self.element)
        if self.has_groups:
            parts.append("row" if self.group_size == PER_ROW else f"g{self.group_size}")
        if self.super_size:
            parts.append(f"s{self.super_size}")
        if not self.symmetric:
            parts.append("asym")
        return "-".join(parts)

    @property
    def is_quantized(self) -> bool:
        """False for bf16 only."""
        return self.family != "bf16"

    @property
    def is_ggml(self) -> bool:
        """Whether it is a type of llama.cpp, whose blocks are stored as they are."""
        return self.family == "ggml"

    @property
    def shared(self) -> Family:
        """What it shares with its family: the kind of its scales and more."""
        return FAMILIES[self.family]

    @property
    def is_table(self) -> bool:
        """Whether codes stand for the numbers of a table."""
        return self.family == "nl"

    @property
    def scale_type(self) -> str:
        """How a scale is stored: `float16`, `e8m0`, `e4m3`, or `sub` inside super-blocks."""
        return "sub" if self.super_size else self.shared.scale

    @property
    def has_groups(self) -> bool:
        """Whether its group size is chosen, and not a part of the format."""
        return self.is_quantized and self.shared.block is None

    @property
    def code(self) -> str:
        """What one code is: `e2m1`, `int4`, ..."""
        return self.element or self.kind

    def columns_per_scale(self, cols: int) -> int:
        """Inputs that share a scale, of `cols`: all of them where there is one group."""
        return cols if self.n_groups(cols) == 1 else self.group_size

    def n_groups(self, cols: int) -> int:
        """Scales per row of `cols` inputs; the last group may be short."""
        if not self.is_quantized:
            return 0
        return 1 if self.group_size == PER_ROW else ceil(cols / self.group_size)

    def n_supers(self, cols: int) -> int:
        """Super-blocks per row of `cols` inputs; the last may be short. 0 without them."""
        return ceil(cols / self.super_size) if self.super_size else 0

    def fits(self, cols: int) -> bool:
        """Whether `cols` inputs can be stored: llama.cpp's types have whole blocks only."""
        return not self.is_ggml or cols % self.group_size == 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of the codes of one row of `cols` inputs."""
        if self.is_ggml:
            return ceil(cols / self.group_size) * GGML_BLOCKS[self.element][1]
        return ceil(cols * self.bits / 8)

    def zero_bytes(self, rows: int, cols: int) -> int:
        """Bytes of the zero points of the whole matrix; 0 when symmetric."""
        return 0 if self.symmetric else ceil(rows * self.n_groups(cols) * self.bits / 8)

    def sub_bytes(self, cols: int) -> int:
        """Bytes of the scales of one row inside super-blocks."""
        return ceil(self.n_groups(cols) * SUB_BITS / 8)

    def storage_bits(self, rows: int, cols: int) -> int:
        """Bits of a [rows, cols] matrix on disk: packed codes, scales, zeros, padding, global."""
        scale_bits = rows * self.n_groups(cols) * self.shared.scale_bits
        if self.super_size:
            of_row = 8 * self.sub_bytes(cols) + self.n_supers(cols) * self.shared.scale_bits
            scale_bits = rows * of_row
        return (
            8 * rows * self.row_bytes(cols)
            + scale_bits
            + 8 * self.zero_bytes(rows, cols)
            + self.shared.global_bits
        )

    @property
    def nominal_bits(self) -> float:
        """Bits per weight where the group divides the width; per-row, per-matrix parts are 0."""
        if self.group_size == PER_ROW:
            return float(self.bits)
        if self.is_ggml:
            return 8 * GGML_BLOCKS[self.element][1] / self.group_size
        if self.super_size:
            shared = self.shared.scale_bits / self.super_size
            return self.bits + SUB_BITS / self.group_size + shared
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + (self.shared.scale_bits + zero_bits) / self.group_size


BF16 = Format("bf16", 16)

_NAME = re.compile(
    r"(?P<kind>[a-z]+[0-9]+)(?:-(?P<element>e[0-9]m[0-9]))?"
    r"(?:-(?:g(?P<group>[0-9]+)|(?P<row>row)))?(?:-s(?P<super>[0-9]+))?(?P<asym>-asym)?"
)


@lru_cache(maxsize=1024)
def parse_format(name: str) -> Format:
    """Read a format name such as `int3-g64-asym`; see the grammar in the file header.

    Args:
        name: the name, lower case.

    Returns:
        The format.

    Raises:
        FormatError: the name does not follow the grammar.
    """
    if name in GGML_BLOCKS:
        return make_format(name)
    if name in GGML_TWINS:
        raise FormatError(
            f"{name!r} is {GGML_TWINS[name]} here, number for number; known kinds are "
            f"{', '.join(FORMAT_KINDS)}: use {GGML_TWINS[name]}"
        )
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] not in FORMAT_KINDS:
        kind, *rest = name.split("-")
        near = get_close_matches(kind, FORMAT_KINDS, n=1, cutoff=0.75)
        meant = f"; did you mean {'-'.join([*near, *rest])}?" if near not in ([], [kind]) else ""
        raise FormatError(
            f"unknown format {name!r}; known kinds are {', '.join(FORMAT_KINDS)}, written like "
            f"int4-g128, int3-g64-asym, nl3-g32-s256, fp8-e4m3-g128, mxfp4, nvfp4, bf16{meant}"
        )
    group_size = PER_ROW if match["row"] else int(match["group"]) if match["group"] else None
    if group_size is not None and match["kind"].startswith(("mx", "nv", "bf")):
        raise FormatError(
            f"{name!r}: {match['kind']} has a fixed block size; drop the group from the name"
        )
    return make_format(
        match["kind"],
        group_size,
        symmetric=not match["asym"],
        element=match["element"],
        super_size=int(match["super"]) if match["super"] else 0,
    )


def make_format(
    kind: str,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    element: str | None = None,
    super_size: int = 0,
) -> Format:
    """Build a format from the fields that a configuration names.

    Args:
        kind: one of `FORMAT_KINDS`.
        group_size: inputs per scale, `PER_ROW` (-1) for one scale per row, None for the default;
            ignored for mxfp, nvfp4 and bf16, whose blocks are fixed (32, 16, none).
        symmetric: False adds a zero point per group; integers of 2 bits and more only.
        element: e2m1, e2m3, e3m2, e4m3 or e5m2; only for fp and mxfp of matching width.
        super_size: inputs of a super-block, `SUPER_SIZE`, or 0 for none; of `SUPER_KINDS` with
            one of `SUPER_GROUPS`.

    Raises:
        FormatError: unknown kind, a group size that cannot be, or an element, zero point or
            super-block that the kind cannot have.
    """
    _refuse_parts(kind, symmetric, element)
    if super_size:
        _refuse_super(kind, group_size, super_size, symmetric=symmetric)
    if kind in GGML_BLOCKS:
        block, n_bytes = GGML_BLOCKS[kind]
        return Format("ggml", 8 * n_bytes // block, block, True, kind)
    family = kind.rstrip("0123456789")
    bits = int(kind.removeprefix(family))
    if family == "bf":
        return BF16
    fixed = FAMILIES[family].block
    n_shared = _group_size(kind, group_size) if fixed is None else fixed
    if family in ("int", "nl"):
        return Format(family, bits, n_shared, symmetric, super_size=super_size)
    return Format(family, bits, n_shared, True, element or _DEFAULT_ELEMENT[bits])


def _refuse_parts(kind: str, symmetric: bool, element: str | None) -> None:
    """Refuse a zero point or an element that a kind cannot have."""
    possible = elements_of(kind)
    if not symmetric and kind not in ASYMMETRIC_KINDS:
        raise FormatError(
            f"{kind} has no zero point; only int formats of 2 bits and more can be asymmetric: "
            f"drop the asymmetry, or use {', '.join(ASYMMETRIC_KINDS)}"
        )
    if element is not None and element not in possible:
        change = f"use {' or '.join(possible)}" if possible else "drop the element"
        raise FormatError(f"{kind} cannot store {element} elements; {change}")


def _refuse_super(kind: str, group_size: int | None, super_size: int, *, symmetric: bool) -> None:
    """Refuse a super-block that a format cannot have."""
    if super_size != SUPER_SIZE or not can_be_super(kind, group_size, symmetric=symmetric):
        group = "no group" if group_size is None else f"group size {group_size}"
        raise FormatError(
            f"{kind} with {group}{'' if symmetric else ', asymmetric'} has no super-blocks of "
            f"{super_size}; they have {SUPER_SIZE} inputs, group sizes "
            f"{', '.join(map(str, SUPER_GROUPS))}, and kinds {', '.join(SUPER_KINDS)} without "
            f"zero points: use such a format, e.g. int3-g32-s{SUPER_SIZE}"
        )


def can_be_super(kind: str, group_size: int | None, *, symmetric: bool) -> bool:
    """Whether a format can have super-blocks."""
    return kind in SUPER_KINDS and group_size in SUPER_GROUPS and symmetric


def is_group_size(value: int) -> bool:
    """Whether so many inputs can share a scale; see `GROUP_SIZES`."""
    return value == PER_ROW or MIN_GROUP_SIZE <= value <= MAX_GROUP_SIZE


def elements_of(kind: str) -> tuple[str, ...]:
    """Names of the elements that a kind can store, the default first; none for int, nl and bf16.

    Raises:
        FormatError: unknown kind.
    """
    if kind not in FORMAT_KINDS:
        raise FormatError(f"unknown format {kind!r}; known are {', '.join(FORMAT_KINDS)}")
    if kind.startswith(("int", "nl", "bf")) or kind in GGML_BLOCKS:
        return ()
    bits = int(kind[-1])
    default = _DEFAULT_ELEMENT[bits]
    return (default, *(n for n, e in ELEMENTS.items() if e.bits == bits and n != default))


def _group_size(kind: str, group_size: int | None) -> int:
    if group_size is None:
        return DEFAULT_GROUP_SIZE
    if not is_group_size(group_size):
        raise FormatError(
            f"{kind}: group size {group_size} is not possible; use {GROUP_SIZES}, e.g. 32, 64, 128"
        )
    return group_size


_INT_MENU: tuple[str, ...] = (
    *("int1-g256", "int1-g64"),
    *("int2-g256-asym", "int2-g128", "int2-g128-asym"),
    *("int3-g256-asym", "int3-g128", "int3-g64"),
    *("int4-g128", "int4-g128-asym", "int4-g64"),
    *("int5-g128-asym", "int5-g64-asym", "int6-g128-asym", "int8-g128"),
)

DEFAULT_MENU: tuple[str, ...] = (
    *("int1-g256", "int1-g64"),
    *("nl2-g128", "nl2-g32-s256", "nl2-g16-s256"),
    *("nl3-g128", "nl3-g64-s256", "nl3-g32-s256", "nl3-g16-s256"),
    *("nl4-g32-s256", "int4-g64", "mxfp4", "nl4-g16-s256"),
    *("int5-g64-asym", "int6-g128-asym", "int8-g128"),
)
"""Formats that a search considers unless told otherwise.

Chosen by measurement: benchmarks/allocation.md. int4-g64 and mxfp4 are uniform formats of exactly
4.25 bits, which people use: as part of the menu they are trials, so a search at that budget cannot
end above them.
"""

GGML_REPLACED: Mapping[str, str] = MappingProxyType(
    {"q3_k": "int3-g16-s256", "iq4_xs": "nl4-g32-s256", "iq4_nl": "nl4-g32"}
)
"""Types of llama.cpp that hold the very numbers of formats of ours, which we round better:
docs/llama-cpp.md."""

GGUF_MENU: tuple[str, ...] = (
    *(kind for kind in GGML_BLOCKS if kind not in GGML_REPLACED),
    *GGML_REPLACED.values(),
    *GGML_TWINS.values(),
    *("mxfp4", "bf16"),
)
"""Types of llama.cpp, each once: its own and those that are ours. IQ1, TQ and NVFP4 are not."""

MENUS: dict[str, tuple[str, ...]] = {
    "default": DEFAULT_MENU,
    "int": _INT_MENU,
    "gguf": GGUF_MENU,
    "mx": ("mxfp4", "mxfp6", "mxfp8"),
    "fp": ("fp4-e2m1-g128", "fp6-e3m2-g128", "fp8-e4m3-g128"),
    "all": (
        *dict.fromkeys((*DEFAULT_MENU, *_INT_MENU)),
        "mxfp6",
        "mxfp8",
        "nvfp4",
        "fp4-e2m1-g128",
        "fp6-e3m2-g128",
        "fp8-e4m3-g128",
        "bf16",
    ),
}


def parse_menu(text: str) -> tuple[str, ...]:
    """Read `--formats`: menu names and format names, separated by commas.

    Returns:
        Canonical names without duplicates, sorted by nominal bits.

    Raises:
        FormatError: an unknown name, or nothing given.
    """
    names: set[str] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        names |= {parse_format(n).name for n in MENUS.get(part, (part,))}
    if not names:
        raise FormatError(
            f"no formats in {text!r}; give names such as int4-g128,mxfp4 or a menu: "
            f"{', '.join(MENUS)}"
        )
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))
