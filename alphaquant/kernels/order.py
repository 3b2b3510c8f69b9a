"""Kernel order: codes, scales and zero points arranged for the GPU kernels, and back.

On disk a row is one bit stream (`alphaquant.kernels.packing`). A kernel wants other bytes beside
each other: the weights that one lane of a warp feeds to the tensor core (`wgmma`, operand A from
registers) should come out of the words that this lane loads, so that no weight moves between
lanes. This file only moves bits: every function has its exact inverse, and nothing is rounded.

Letters: N rows (outputs), K columns (inputs), T tiles of 128 columns, P planes, R registers.

Word sets. The smallest piece of work of a lane is a set of P 32-bit words that unpacks into R
registers of two 16-bit numbers, 2R weights. Word p of every set lies in plane p. The low 16 bits
of the words hold the first weights of the R pairs, the high 16 bits the second ones, at the same
places; `Layout.pairs` says where each code's bits are:

    bits    P  R   weights of a set   places in each half word
    1       1  16  32                 pair r at bit r
    2       1   8  16                 pair r at bit 2r
    3       3  16  32                 pairs 0-14: five per word at 3j; pair 15: bit 15 of the three
    4       1   4   8                 pair r at bit 4r (e2m1 is spread otherwise, see the table)
    5       5  16  32                 pairs 0-14: three per word at 5j; pair 15: bit 15 of the five
    6       3   8  16                 pairs 0-5: two per word; pairs 6 and 7 from what is left over
    8       1   2   4                 pair r at bit 8r

Columns. A tile has 128 columns and Q = 128 / 8R word sets for each of the four lanes t = 0 .. 3
that share a row. Set (t, q) holds in pair r, half b the column

    k = 8R q + 8r + 2t + b            and is word t Q + q of the row's part of the tile.

Worked example, int4 (R = 4, Q = 4), code of column k is k mod 16: word 0 (t = 0, q = 0) holds the
columns 0 8 16 24 in its low half and 1 9 17 25 in its high half, nibbles 0 8 0 8 and 1 9 1 9, so
it is 0x91918080, bytes 80 80 91 91.

Tensors of a matrix (`KernelWeight`); rows are padded to 128, columns to whole tiles, with zeros::

    words   uint8 [P, T, N padded, 16 Q]
    scales  [S, N padded, C]      S steps along the columns with C scales each
    zeros   uint8, as the scales  one byte each, asymmetric only

Groups of a multiple of 128 columns have one scale per step of that many columns (C = 1). Shorter
and odd ones are cut into spans of gcd(group, 128) columns, which never cross a tile; a step is a
tile, with C = 128 / span scales, repeated where a group has several spans. Worked example: groups
of 96 have spans of 32; in three tiles the spans 0 .. 11 take the scales 0 0 0 1 1 1 2 2 2 3 3 3.

Scales inside super-blocks are int8 multiples, -32 to 31, in the order of scales. Super-scales are
float16 [S, N padded, 1], a step being a super-block: a multiple of 128 columns, or the row.

Unquantized matrices are bfloat16 (`BFLOAT16`). Their words are the numbers themselves, uint8
[1, T, N padded, 256]: column 130 is the third number, bytes 4 and 5, of its row in tile 1. Their
scales are ones, one per row.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from alphaquant.errors import FormatError

TILE_COLS = 128
TILE_ROWS = 128
MIN_SPAN = 8


@dataclass(frozen=True)
class Piece:
    """Consecutive bits of a code and their place.

    Attributes:
        word: index of the word in its set.
        at: lowest bit within the half word.
        bit: lowest bit within the code.
        n_bits: how many.
    """

    word: int
    at: int
    bit: int
    n_bits: int


@dataclass(frozen=True)
class Layout:
    """Where the bits of a set's codes are.

    Attributes:
        bits: bits per code.
        n_planes: P, words per set.
        pairs: the pieces of each of the R pairs, which are the same in both half words.
    """

    bits: int
    n_planes: int
    pairs: tuple[tuple[Piece, ...], ...]

    @property
    def n_registers(self) -> int:
        """R, pairs of weights per set."""
        return len(self.pairs)

    @property
    def sets_per_lane(self) -> int:
        """Q, word sets that one lane has per row and tile."""
        return TILE_COLS // (8 * self.n_registers)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a tile in one plane, 16 Q."""
        return 16 * self.sets_per_lane


def _fields(bits: int, n_planes: int = 1) -> tuple[tuple[Piece, ...], ...]:
    """As many whole codes as fit into each word, from bit 0 up."""
    per_word = 16 // bits
    return tuple(
        (Piece(r // per_word, bits * (r % per_word), 0, bits),) for r in range(per_word * n_planes)
    )


def _with_top_bits(bits: int) -> tuple[tuple[Piece, ...], ...]:
    """`bits` words full of codes; their spare bits 15 are one code more."""
    return (*_fields(bits, bits), tuple(Piece(i, 15, i, 1) for i in range(bits)))


_SIX = Layout(
    6,
    3,
    (
        *(((Piece(r // 2, 6 * (r % 2), 0, 6),)) for r in range(6)),
        (Piece(0, 12, 0, 4), Piece(1, 12, 4, 2)),
        (Piece(2, 12, 0, 4), Piece(1, 14, 4, 2)),
    ),
)
# Small floats lie as high in the half word as they can, so that signs are near bit 15.
_SIX_FLOAT = Layout(
    6,
    3,
    (
        *(((Piece(r // 2, 10 - 6 * (r % 2), 0, 6),)) for r in range(6)),
        (Piece(0, 0, 2, 4), Piece(1, 0, 0, 2)),
        (Piece(2, 0, 2, 4), Piece(1, 2, 0, 2)),
    ),
)
# One mask (sign at bit 15, the rest at 8-6) cuts the first three out of shifted words in bfloat16.
_FOUR_FLOAT = Layout(
    4,
    1,
    (
        *(((Piece(0, 15 - 3 * r, 3, 1), Piece(0, 6 - 3 * r, 0, 3))) for r in range(3)),
        (Piece(0, 14, 3, 1), Piece(0, 10, 1, 2), Piece(0, 13, 0, 1)),
    ),
)
_EIGHT = Layout(8, 1, _fields(8))

LAYOUTS: dict[str, Layout] = {
    "int1": Layout(1, 1, _fields(1)),
    "int2": Layout(2, 1, _fields(2)),
    "int3": Layout(3, 3, _with_top_bits(3)),
    "int4": Layout(4, 1, _fields(4)),
    "int5": Layout(5, 5, _with_top_bits(5)),
    "int6": _SIX,
    "int8": _EIGHT,
    "nl2": Layout(2, 1, _fields(2)),
    "nl3": Layout(3, 3, _with_top_bits(3)),
    "nl4": Layout(4, 1, _fields(4)),
    "e2m1": _FOUR_FLOAT,
    "e3m2": _SIX_FLOAT,
    "e2m3": _SIX_FLOAT,
    "e4m3": _EIGHT,
    "e5m2": _EIGHT,
}
"""The layout of every quantized element that kernels serve; nothing else knows where bits are."""

BFLOAT16 = "bf16"
"""The element of unquantized matrices, which has no layout."""


@dataclass(frozen=True)
class KernelWeight:
    """One matrix in kernel order.

    A weight is (value - zero) * scale, times the global scale or super-scale where there is one;
    see `alphaquant.kernels.reference`.

    Attributes:
        element: name in `LAYOUTS`, or `BFLOAT16`.
        rows: N, without padding.
        cols: K, without padding.
        group_size: columns per scale; at least K for one scale per row.
        words: uint8 [P, T, N padded, 16 Q], or [1, T, N padded, 256] of bfloat16.
        scales: [S, N padded, C] float16, uint8 (E8M0), float8_e4m3fn, or int8 multiples.
        zeros: uint8 [S, N padded, C], None when symmetric.
        global_scale: float32 [1], only beside E4M3 scales, or None.
        is_foldable: what `alphaquant.kernels.bodies.is_foldable` says of these scales. False is
            always right; several matrices as one are foldable if each of them is.
        super_scales: float16 [S, N padded, 1], only beside int8 multiples, or None.
        super_size: columns per super-scale, 0 without them.
    """

    element: str
    rows: int
    cols: int
    group_size: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None
    is_foldable: bool = False
    super_scales: Tensor | None = None
    super_size: int = 0

    @property
    def n_tiles(self) -> int:
        """T, tiles along the columns."""
        return int(self.words.shape[1])

    @property
    def tiles_per_step(self) -> int:
        """Tiles that share one step of scales."""
        return step_of(self.group_size, self.cols) // TILE_COLS

    @property
    def tiles_per_super(self) -> int:
        """Tiles that share one super-scale, at least one."""
        return step_of(self.super_size, self.cols) // TILE_COLS if self.super_size else 1

    def to(self, device: torch.device | str) -> "KernelWeight":
        """The same matrix on a device."""
        return replace(
            self,
            words=self.words.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            global_scale=None if self.global_scale is None else self.global_scale.to(device),
            super_scales=None if self.super_scales is None else self.super_scales.to(device),
        )


def padded(n: int, multiple: int) -> int:
    """The smallest multiple that is not below n."""
    return -(-n // multiple) * multiple


def to_kernel_order(codes: Tensor, element: str) -> Tensor:
    """Arrange codes for the kernels.

    Args:
        codes: uint8 [N, K], each below 2^bits.
        element: name in `LAYOUTS`.

    Returns:
        uint8 [P, T, N padded, 16 Q].

    Raises:
        FormatError: unknown element.
    """
    layout = layout_of(element)
    n_rows, n_cols = codes.shape
    whole = torch.nn.functional.pad(codes, _padding(n_rows, n_cols))
    shape = (whole.shape[0], -1, layout.sets_per_lane, layout.n_registers, 4, 2)
    sets = whole.reshape(shape)  # [N, T, Q, R, t, b]
    words = sets.new_zeros((layout.n_planes, *sets.shape[:3], 4), dtype=torch.int64)
    for r, pieces in enumerate(layout.pairs):
        for half in range(2):
            code = sets[..., r, :, half].to(torch.int64)  # [N, T, Q, t]
            for piece in pieces:
                part = (code >> piece.bit) & ((1 << piece.n_bits) - 1)
                words[piece.word] |= part << (piece.at + 16 * half)
    lanes = words.permute(0, 2, 1, 4, 3)  # [P, T, N, t, Q]
    low_first = lanes.to(torch.int32).flatten().view(torch.uint8)
    return low_first.reshape(*lanes.shape[:3], layout.row_bytes)


def from_kernel_order(words: Tensor, element: str, rows: int, cols: int) -> Tensor:
    """Undo `to_kernel_order`.

    Args:
        words: uint8 [P, T, N padded, 16 Q].
        element: name in `LAYOUTS`.
        rows: N.
        cols: K.

    Returns:
        uint8 [N, K].

    Raises:
        FormatError: unknown element.
    """
    layout = layout_of(element)
    lanes = words.contiguous().view(torch.int32)  # [P, T, N, t Q]
    shape = (*lanes.shape[:3], 4, layout.sets_per_lane)
    sets = lanes.reshape(shape).permute(0, 2, 1, 4, 3)  # [P, N, T, Q, t]
    pairs = []
    for pieces in layout.pairs:
        halves = []
        for half in range(2):
            code = torch.zeros_like(sets[0])
            for piece in pieces:
                part = sets[piece.word] >> (piece.at + 16 * half)
                code |= (part & ((1 << piece.n_bits) - 1)) << piece.bit
            halves.append(code)
        pairs.append(torch.stack(halves, -1))
    codes = torch.stack(pairs, -3).to(torch.uint8)  # [N, T, Q, R, t, b]
    return codes.reshape(sets.shape[1], -1)[:rows, :cols].contiguous()


def order_bfloat16(weight: Tensor) -> KernelWeight:
    """An unquantized matrix as the kernels take it.

    Args:
        weight: bfloat16 [N, K].
    """
    n_rows, n_cols = weight.shape
    whole = torch.nn.functional.pad(weight, _padding(n_rows, n_cols))
    tiles = whole.reshape(len(whole), -1, TILE_COLS).transpose(0, 1)  # [T, N, 128]
    words = tiles.contiguous().view(torch.uint8)[None]
    ones = torch.ones(n_rows, 1, dtype=torch.float16, device=weight.device)
    scales = groups_to_kernel_order(ones, n_cols, n_cols)
    return KernelWeight(BFLOAT16, n_rows, n_cols, n_cols, words, scales)


def restore_bfloat16(weight: KernelWeight) -> Tensor:
    """Undo `order_bfloat16`: bfloat16 [N, K]."""
    tiles = weight.words[0].contiguous().view(torch.bfloat16)  # [T, N, 128]
    rows = tiles.transpose(0, 1).flatten(1)
    return rows[: weight.rows, : weight.cols].contiguous()


def span_of(group_size: int, cols: int) -> int:
    """Columns that a stored scale serves: a multiple of 128, or a divisor of 128.

    Raises:
        FormatError: the group size has no divisor of 8 or more in common with 128.
    """
    if group_size >= cols:
        return padded(cols, TILE_COLS)
    span = group_size if group_size % TILE_COLS == 0 else gcd(group_size, TILE_COLS)
    if span < MIN_SPAN:
        raise FormatError(
            f"kernels have no order for groups of {group_size}; they take one scale per row and "
            f"multiples of {MIN_SPAN}: choose such a group size, or compute with torch"
        )
    return span


def check_super(super_size: int, cols: int) -> None:
    """Refuse super-blocks that are not whole tiles.

    Raises:
        FormatError: naming what kernels take.
    """
    if super_size < cols and super_size % TILE_COLS:
        raise FormatError(
            f"kernels have no order for super-blocks of {super_size}; they take multiples of "
            f"{TILE_COLS} columns, and whole rows: divide the matrix elsewhere, or compute with "
            "torch"
        )


def step_of(group_size: int, cols: int) -> int:
    """Columns that one step of scales serves: the span, at least a tile."""
    return max(span_of(group_size, cols), TILE_COLS)


def groups_to_kernel_order(values: Tensor, group_size: int, cols: int) -> Tensor:
    """Arrange what groups share: scales or zero points.

    Args:
        values: [N, G] of any one- or two-byte dtype, G = ceil(K / group size).
        group_size: columns per group; at least K for one group per row.
        cols: K.

    Returns:
        [S, N padded, C] of the same dtype, zeros in the padding.

    Raises:
        FormatError: a group size that kernels have no order for.
    """
    span, step = span_of(group_size, cols), step_of(group_size, cols)
    n_steps, n_rows = padded(cols, step) // step, values.shape[0]
    starts = torch.arange(0, n_steps * step, span, device=values.device)
    groups = (starts // group_size).clamp(max=values.shape[1] - 1)
    spread = _as_integers(values)[:, groups]  # [N, S C]
    steps = spread.reshape(n_rows, n_steps, step // span).permute(1, 0, 2)  # [S, N, C]
    pad = (0, 0, 0, padded(n_rows, TILE_ROWS) - n_rows)
    return torch.nn.functional.pad(steps, pad).contiguous().view(values.dtype)


def groups_from_kernel_order(ordered: Tensor, group_size: int, rows: int, cols: int) -> Tensor:
    """Undo `groups_to_kernel_order`.

    Args:
        ordered: [S, N padded, C].
        group_size: columns per group.
        rows: N.
        cols: K.

    Returns:
        [N, G] of the same dtype.
    """
    span = span_of(group_size, cols)
    flat = _as_integers(ordered)[:, :rows].permute(1, 0, 2).reshape(rows, -1)  # [N, S C]
    first = torch.arange(0, cols, min(group_size, cols), device=ordered.device) // span
    return flat[:, first].contiguous().view(ordered.dtype)


def layout_of(element: str) -> Layout:
    """The layout of an element.

    Raises:
        FormatError: kernels do not serve it.
    """
    if element not in LAYOUTS:
        raise FormatError(
            f"kernels have no layout for {element!r}; they have {', '.join(LAYOUTS)}: choose one "
            "of those, or compute with torch"
        )
    return LAYOUTS[element]


def _padding(n_rows: int, n_cols: int) -> tuple[int, int, int, int]:
    """What whole tiles lack, as `torch.nn.functional.pad` takes it."""
    return (0, padded(n_cols, TILE_COLS) - n_cols, 0, padded(n_rows, TILE_ROWS) - n_rows)


def _as_integers(values: Tensor) -> Tensor:
    """The same bits as integers: torch does not index or pad every small float."""
    return values.view({1: torch.uint8, 2: torch.int16}[values.element_size()])
