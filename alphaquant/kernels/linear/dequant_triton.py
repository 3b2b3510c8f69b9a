# mypy: ignore-errors
"""Tiles of weights in registers, from words in kernel order: the device functions of all kernels.

Two ways to unpack, equal number for number. On sm_90 and later the PTX bodies of
`alphaquant.kernels.bodies`, whose results come out in the layout in which wgmma takes its first
operand from registers. Elsewhere, and in Triton's interpreter, the same in Triton's own integer
operations, read from the same table of pieces. Unquantized tiles are only loaded.

Small floats may be folded (`alphaquant.kernels.bodies`): then a tile holds value * 2^-p, and the
scales, and for E4M3 the global factor, come multiplied by what makes up for it. `unpacking_of` and
`scale_kind_of` choose both sides together.

Letters: B rows of a tile, always 128 columns; P planes, R registers and Q sets per lane as in
`alphaquant.kernels.order`; C scales per row and step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from alphaquant.kernels.bodies import FLOATS, left_out_power, lent_power, make_body
from alphaquant.kernels.order import BFLOAT16, KernelWeight, layout_of

_STORED = {torch.float16: "f16", torch.uint8: "e8m0", torch.float8_e4m3fn: "e4m3"}
_TARGETS = {torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Unpacking:
    """How one element is unpacked; a compile-time argument, so all of it names the binary.

    Attributes:
        pairs: the pieces of each of the R pairs, each (word, at, bit, number of bits); none for
            bfloat16, which is not packed.
        n_planes: P.
        is_float: whether codes are small floats.
        exponent_bits: of such a float, else 0.
        mantissa_bits: of such a float, else the bits of the integer.
        is_folded: whether such a float keeps the factor 2^-p.
        text: PTX of the body, empty to unpack without it.
        constraints: of the PTX.
    """

    pairs: tuple[tuple[tuple[int, int, int, int], ...], ...]
    n_planes: int
    is_float: bool
    exponent_bits: int
    mantissa_bits: int
    is_folded: bool = False
    text: str = ""
    constraints: str = ""


@dataclass(frozen=True)
class ScaleKind:
    """How scales are stored, and what they make up for; a compile-time argument.

    Attributes:
        stored: `f16`, `e8m0` or `e4m3`.
        power: scales come multiplied by 2^power.
        global_power: the global factor comes multiplied by 2^global_power.
    """

    stored: str
    power: int = 0
    global_power: int = 0


def unpacking_of(weight: KernelWeight, dtype: torch.dtype, *, use_asm: bool) -> Unpacking:
    """How the tiles of a matrix are unpacked.

    Args:
        weight: the matrix.
        dtype: what the kernel computes in.
        use_asm: whether to unpack with PTX; there is none for float32 and bfloat16 matrices.
    """
    element = weight.element
    if element == BFLOAT16:
        return Unpacking((), 1, True, 8, 7)
    layout, is_folded = layout_of(element), _folded_power(weight, dtype) > 0
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
        *(is_folded, text, constraints),
    )


def scale_kind_of(weight: KernelWeight, dtype: torch.dtype) -> ScaleKind:
    """How the scales of a matrix are loaded, for tiles from `unpacking_of` of the same dtype."""
    stored, power = _STORED[weight.scales.dtype], _folded_power(weight, dtype)
    if not power or weight.global_scale is None:
        return ScaleKind(stored, power)
    lent = lent_power(weight.element)
    return ScaleKind(stored, power - lent, lent)


def _folded_power(weight: KernelWeight, dtype: torch.dtype) -> int:
    """The p that scales make up for, or 0: tiles hold values as they are."""
    if not weight.is_foldable:
        return 0
    # float32 has the exponents of bfloat16.
    return left_out_power(weight.element, _TARGETS.get(dtype, "bf16"))


@triton.constexpr_function
def _n_registers(body):
    return len(body.pairs)


@triton.constexpr_function
def _field_of(body, name):
    return getattr(body, name)


@triton.constexpr_function
def _n_pieces(body, r):
    return len(body.pairs[r])


@triton.constexpr_function
def _piece(body, r, j, part):
    """One number of piece j of pair r: its word, place, lowest bit or number of bits."""
    return body.pairs[r][j][part]


@triton.jit
def load_tile(
    words_ptr,  # uint8 [P, T, N padded, 16 Q]
    tile,
    rows,  # [B]
    padded_rows,
    plane_bytes,
    body: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Centred grid values of one tile, times 2^-p if folded, [B, 128] in DTYPE.

    `body` is an `Unpacking`.
    """
    if _n_registers(body) == 0:
        return _load_bfloat16(words_ptr, tile, rows, padded_rows, DTYPE)
    else:
        words = _load_words(words_ptr, tile, rows, padded_rows, plane_bytes, body)
        if _field_of(body, "text") == "":
            return _decode(_arrange(_codes(words, body)), body, DTYPE)
        else:
            return _arrange(_run_body(words, body, DTYPE))


@triton.jit
def load_scales(
    scales_ptr,  # [S, N padded, C]
    step,
    rows,  # [B]
    padded_rows,
    C: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Scales of one step in DTYPE, [B, C]; KIND is a `ScaleKind`."""
    POWER: tl.constexpr = _field_of(KIND, "power")
    stored = tl.load(_group_pointers(scales_ptr, step, rows, padded_rows, C))
    if _field_of(KIND, "stored") == "f16":
        return stored.to(DTYPE) * (2.0**POWER)
    elif _field_of(KIND, "stored") == "e4m3":
        exact = stored.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return exact.to(DTYPE) * (2.0**POWER)
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        # 2^-127 is a subnormal: the highest bit of the mantissa
        bits = tl.maximum((stored.to(tl.int32) + POWER) << 7, 1 << 6).to(tl.int16)
        return bits.to(DTYPE, bitcast=True)
    else:
        bits = tl.maximum((stored.to(tl.int32) + POWER) << 23, 1 << 22)
        return bits.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def load_global(global_ptr, KIND: tl.constexpr):
    """What multiplies the products of a whole matrix, float32; KIND is that of its scales."""
    return tl.load(global_ptr) * (2.0 ** _field_of(KIND, "global_power"))


@triton.jit
def load_zeros(
    zeros_ptr,  # uint8 [S, N padded, C]
    step,
    rows,  # [B]
    padded_rows,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
):
    """Zero points minus the code that unpacking centred on, int32 [B, C]."""
    return tl.load(_group_pointers(zeros_ptr, step, rows, padded_rows, C)).to(tl.int32) - MIDDLE


@triton.jit
def spread(values, ROWS: tl.constexpr, C: tl.constexpr):
    """What spans share, once per column: [B, C] -> [B, 128].

    Also for C = 1: if [B, 1] were left to broadcast by itself, Triton 3.9 would move all weights
    through shared memory (129 stores in the loop of int4-g128-asym instead of 2).
    """
    wide = tl.broadcast_to(values[:, :, None], (ROWS, C, 128 // C))
    return wide.reshape(ROWS, 128)


@tl.core.builtin
def _run_body(words, body, dtype, _semantic=None):
    """The results of a body, a tuple of R / 2 tensors [B, 16 Q].

    A function of the compiler itself, because kernels cannot build a tuple of as many types.
    """
    text, constraints = body.value.text, body.value.constraints
    types = (dtype.value,) * (len(body.value.pairs) // 2)
    return tl.tuple(
        tl.inline_asm_elementwise(
            text, constraints, list(words), types, is_pure=True, pack=4, _semantic=_semantic
        )
    )


@triton.jit
def _group_pointers(ptr, step, rows, padded_rows, C: tl.constexpr):
    first = (step * padded_rows + rows).to(tl.int64) * C  # [B]
    return ptr + first[:, None] + tl.arange(0, C)[None, :]  # [B, C]


@triton.jit
def _load_words(words_ptr, tile, rows, padded_rows, plane_bytes, body: tl.constexpr):
    """The P planes of a tile, a tuple of uint8 [B, 16 Q]."""
    R: tl.constexpr = _n_registers(body)
    ROW_BYTES: tl.constexpr = 256 // R
    columns = tl.arange(0, ROW_BYTES)
    # 64 bits: a plane may have more than 2^31 bytes
    first = (tile * padded_rows + rows).to(tl.int64) * ROW_BYTES  # [B]
    at = words_ptr + first[:, None] + columns[None, :]  # [B, 16 Q]
    words = (tl.load(at, eviction_policy="evict_first"),)
    for _ in tl.static_range(1, _field_of(body, "n_planes")):
        at += plane_bytes
        words = words + (tl.load(at, eviction_policy="evict_first"),)
    return words


@triton.jit
def _load_bfloat16(words_ptr, tile, rows, padded_rows, DTYPE: tl.constexpr):
    """An unquantized tile as it is, [B, 128] in DTYPE."""
    columns = tl.arange(0, 128)
    first = (tile * padded_rows + rows).to(tl.int64) * 128  # [B]
    at = first[:, None] + columns[None, :]  # [B, 128]
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        numbers_ptr = words_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        return tl.load(numbers_ptr + at, eviction_policy="evict_first")
    else:
        # The upper half of a float32; Triton's interpreter cannot convert bfloat16.
        bits_ptr = words_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        bits = tl.load(bits_ptr + at, eviction_policy="evict_first").to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _codes(words, body: tl.constexpr):
    """Codes of R / 2 pairs of registers, each int32 [B, 16 Q] as a body would give them."""
    B: tl.constexpr = words[0].shape[0]
    N_WORDS: tl.constexpr = words[0].shape[1] // 4
    halves = ()  # P of int32 [B, 4 Q, half]
    for p in tl.static_range(len(words)):
        low, high = tl.split(words[p].reshape(B, N_WORDS, 2, 2))
        halves = halves + (low.to(tl.int32) | (high.to(tl.int32) << 8),)
    parts = ()
    for i in tl.static_range(_n_registers(body) // 2):
        even = _gather_pieces(halves, body, 2 * i)
        odd = _gather_pieces(halves, body, 2 * i + 1)
        both = tl.join(even, odd).trans(0, 1, 3, 2)  # [B, 4 Q, register, half]
        parts = parts + (both.reshape(B, 4 * N_WORDS),)
    return parts


@triton.jit
def _gather_pieces(halves, body: tl.constexpr, r: tl.constexpr):
    """The codes of pair r, int32 [B, 4 Q, half]."""
    code = halves[0] & 0
    for j in tl.static_range(_n_pieces(body, r)):
        part = halves[_piece(body, r, j, 0)] >> _piece(body, r, j, 1)
        part &= (1 << _piece(body, r, j, 3)) - 1
        code |= part << _piece(body, r, j, 2)
    return code


@triton.jit
def _decode(codes, body: tl.constexpr, DTYPE: tl.constexpr):
    """Grid values of codes in DTYPE, integers centred."""
    BITS: tl.constexpr = _field_of(body, "mantissa_bits")
    if _field_of(body, "is_folded"):
        return _folded_float(codes, _field_of(body, "exponent_bits"), BITS, DTYPE)
    elif _field_of(body, "is_float"):
        return _small_float(codes, _field_of(body, "exponent_bits"), BITS).to(DTYPE)
    elif BITS == 1:
        return (2 * codes - 1).to(DTYPE)
    else:
        return (codes - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def _small_float(codes, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """Values of small floats, float32."""
    FIELD: tl.constexpr = (1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1
    LEAST: tl.constexpr = 2 - (1 << (EXPONENT_BITS - 1))  # exponent of subnormals
    field = codes & FIELD
    mantissa = field & ((1 << MANTISSA_BITS) - 1)
    subnormal = mantissa.to(tl.float32) * (2.0 ** (LEAST - MANTISSA_BITS))
    rebiased = (field << (23 - MANTISSA_BITS)) + ((126 + LEAST) << 23)
    is_normal = field >= (1 << MANTISSA_BITS)
    magnitude = tl.where(is_normal, rebiased.to(tl.float32, bitcast=True), subnormal)
    return tl.where(codes > FIELD, -magnitude, magnitude)


@triton.jit
def _folded_float(
    codes, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Values of small floats times 2^-p: their fields in the low ends of those of DTYPE."""
    SIGN: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS
    field, sign = codes & ((1 << SIGN) - 1), codes >> SIGN
    if DTYPE == tl.float16:  # noqa: SIM300
        bits = (sign << 15) | (field << (10 - MANTISSA_BITS))
        return bits.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        bits = (sign << 31) | (field << (23 - MANTISSA_BITS))
        return bits.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _arrange(parts):
    """Columns in order, [B, 128], from R / 2 tensors [B, 16 Q] of registers 2i and 2i + 1.

    A part's columns are (t, q, register, half); the order wanted is (q, i, register, t, half).
    """
    B: tl.constexpr = parts[0].shape[0]
    Q: tl.constexpr = parts[0].shape[1] // 16
    if len(parts) == 1:
        ordered = parts[0].reshape(B, 4, Q, 2, 2).trans(0, 2, 3, 1, 4)
    elif len(parts) == 2:
        joined = tl.join(parts[0], parts[1])
        ordered = joined.reshape(B, 4, Q, 2, 2, 2).trans(0, 2, 5, 3, 1, 4)
    elif len(parts) == 4:
        joined = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        ordered = joined.reshape(B, 4, Q, 2, 2, 2, 2).trans(0, 2, 6, 5, 3, 1, 4)
    else:
        low = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        high = tl.join(tl.join(parts[4], parts[5]), tl.join(parts[6], parts[7]))
        joined = tl.join(low, high)
        ordered = joined.reshape(B, 4, Q, 2, 2, 2, 2, 2).trans(0, 2, 7, 6, 5, 3, 1, 4)
    return ordered.reshape(B, 128)
