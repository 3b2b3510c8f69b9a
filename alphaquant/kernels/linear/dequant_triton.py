# mypy: ignore-errors
"""Tiles of weights in registers, from words in kernel order: the device functions of all kernels.

Two ways to unpack, equal number for number. On sm_90 and later the PTX bodies of
`alphaquant.kernels.bodies`, whose results come out in the layout in which wgmma takes its first
operand from registers. Elsewhere, and in Triton's interpreter, the same in Triton's own integer
operations, read from the same table of pieces. Unquantized tiles are only loaded.

The arguments `matrix` and `DECODING` are those of `alphaquant.kernels.matrix_triton`.

Letters: B rows of a tile, always 128 columns; P planes, R registers and Q sets per lane as in
`alphaquant.kernels.order`; C scales per row and step.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _n_registers(body):
    return len(body.pairs)


@triton.constexpr_function
def _n_pieces(body, r):
    return len(body.pairs[r])


@triton.constexpr_function
def _piece(body, r, j, part):
    """One number of piece j of pair r: its word, place, lowest bit or number of bits."""
    return body.pairs[r][j][part]


@triton.constexpr_function
def _n_table_words(body):
    return len(body.table)


@triton.constexpr_function
def _table_word(body, w):
    return body.table[w]


@triton.jit
def load_tile(matrix, tile, rows, DECODING: tl.constexpr):
    """Centred grid values of some rows [B] of a tile, times 2^-p if folded, [B, 128]."""
    BODY: tl.constexpr = DECODING.unpacking
    DTYPE: tl.constexpr = DECODING.dtype
    if _n_registers(BODY) == 0:
        return _load_bfloat16(matrix, tile, rows, DTYPE)
    else:
        words = _load_words(matrix, tile, rows, BODY)
        if BODY.text == "":
            return _decode(_arrange(_codes(words, BODY)), BODY, DTYPE)
        else:
            return _arrange(_run_body(words, BODY, DTYPE))


@triton.jit
def load_scales(matrix, tile, rows, DECODING: tl.constexpr, DTYPE: tl.constexpr):
    """Scales of some rows [B] of a tile in DTYPE, [B, C]."""
    KIND: tl.constexpr = DECODING.scale_kind
    POWER: tl.constexpr = KIND.power
    stored = tl.load(_group_pointers(matrix.scales, matrix, tile, rows, DECODING.n_scales))
    if KIND.stored == "f16":
        return stored.to(DTYPE) * (2.0**POWER)
    elif KIND.stored == "sub":
        step = tile // matrix.tiles_per_super
        first = (step * matrix.padded_rows + rows).to(tl.int64)  # [B]
        supers = tl.load(matrix.super_scales + first[:, None]).to(tl.float32)  # [B, 1]
        return (stored.to(tl.float32) * supers * (2.0**POWER)).to(DTYPE)
    elif KIND.stored == "e4m3":
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
def load_global(matrix, numbers, DECODING: tl.constexpr):
    """What multiplies products of whole matrices, by their numbers in the stack, float32."""
    POWER: tl.constexpr = DECODING.scale_kind.global_power
    return tl.load(matrix.global_scales + numbers) * (2.0**POWER)


@triton.jit
def load_zeros(matrix, tile, rows, DECODING: tl.constexpr):
    """Zero points of some rows [B] of a tile, less the unpacking's middle, int32 [B, C]."""
    stored = tl.load(_group_pointers(matrix.zeros, matrix, tile, rows, DECODING.n_scales))
    return stored.to(tl.int32) - DECODING.middle


@triton.jit
def spread(values):
    """What spans share, once per column: [B, C] -> [B, 128].

    Also for C = 1: if [B, 1] were left to broadcast by itself, Triton 3.9 would move all weights
    through shared memory (129 stores in the loop of int4-g128-asym instead of 2).
    """
    B: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    wide = tl.broadcast_to(values[:, :, None], (B, C, 128 // C))
    return wide.reshape(B, 128)


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
def _group_pointers(ptr, matrix, tile, rows, C: tl.constexpr):
    """Where the numbers of groups are, [S, N padded, C] -> [B, C]."""
    step = tile // matrix.tiles_per_step
    first = (step * matrix.padded_rows + rows).to(tl.int64) * C  # [B]
    return ptr + first[:, None] + tl.arange(0, C)[None, :]  # [B, C]


@triton.jit
def _load_words(matrix, tile, rows, BODY: tl.constexpr):
    """The P planes of a tile, a tuple of uint8 [B, 16 Q]."""
    R: tl.constexpr = _n_registers(BODY)
    ROW_BYTES: tl.constexpr = 256 // R
    columns = tl.arange(0, ROW_BYTES)
    # 64 bits: a plane, and all planes together, may have more than 2^31 bytes
    first = (tile * matrix.padded_rows + rows).to(tl.int64) * ROW_BYTES  # [B]
    at = matrix.words + first[:, None] + columns[None, :]  # [B, 16 Q]
    words = (tl.load(at, eviction_policy="evict_first"),)
    N_PLANES: tl.constexpr = BODY.n_planes
    for _ in tl.static_range(1, N_PLANES):
        at += matrix.plane_bytes.to(tl.int64)
        words = words + (tl.load(at, eviction_policy="evict_first"),)
    return words


@triton.jit
def _load_bfloat16(matrix, tile, rows, DTYPE: tl.constexpr):
    """An unquantized tile as it is, [B, 128] in DTYPE."""
    columns = tl.arange(0, 128)
    first = (tile * matrix.padded_rows + rows).to(tl.int64) * 128  # [B]
    at = first[:, None] + columns[None, :]  # [B, 128]
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        numbers_ptr = matrix.words.to(tl.pointer_type(tl.bfloat16), bitcast=True)
        return tl.load(numbers_ptr + at, eviction_policy="evict_first")
    else:
        # The upper half of a float32; Triton's interpreter cannot convert bfloat16.
        bits_ptr = matrix.words.to(tl.pointer_type(tl.int16), bitcast=True)
        bits = tl.load(bits_ptr + at, eviction_policy="evict_first").to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def _codes(words, BODY: tl.constexpr):
    """Codes of R / 2 pairs of registers, each int32 [B, 16 Q] as a body would give them."""
    B: tl.constexpr = words[0].shape[0]
    N_WORDS: tl.constexpr = words[0].shape[1] // 4
    halves = ()  # P of int32 [B, 4 Q, half]
    for p in tl.static_range(len(words)):
        low, high = tl.split(words[p].reshape(B, N_WORDS, 2, 2))
        halves = halves + (low.to(tl.int32) | (high.to(tl.int32) << 8),)
    parts = ()
    for i in tl.static_range(_n_registers(BODY) // 2):
        even = _gather_pieces(halves, BODY, 2 * i)
        odd = _gather_pieces(halves, BODY, 2 * i + 1)
        both = tl.join(even, odd).trans(0, 1, 3, 2)  # [B, 4 Q, register, half]
        parts = parts + (both.reshape(B, 4 * N_WORDS),)
    return parts


@triton.jit
def _gather_pieces(halves, BODY: tl.constexpr, r: tl.constexpr):
    """The codes of pair r, int32 [B, 4 Q, half]."""
    code = halves[0] & 0
    for j in tl.static_range(_n_pieces(BODY, r)):
        part = halves[_piece(BODY, r, j, 0)] >> _piece(BODY, r, j, 1)
        part &= (1 << _piece(BODY, r, j, 3)) - 1
        code |= part << _piece(BODY, r, j, 2)
    return code


@triton.jit
def _decode(codes, BODY: tl.constexpr, DTYPE: tl.constexpr):
    """Grid values of codes in DTYPE, integers centred."""
    BITS: tl.constexpr = BODY.mantissa_bits
    if _n_table_words(BODY) > 0:
        return _look_up(codes, BODY, DTYPE)
    elif BODY.is_folded:
        return _folded_float(codes, BODY.exponent_bits, BITS, DTYPE)
    elif BODY.is_float:
        return _small_float(codes, BODY.exponent_bits, BITS).to(DTYPE)
    elif BITS == 1:
        return (2 * codes - 1).to(DTYPE)
    else:
        return (codes - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def _look_up(codes, BODY: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a table times 2^-p: a word of four is chosen, then one of its bytes."""
    word = tl.full(codes.shape, _table_word(BODY, 0), tl.int32)
    for w in tl.static_range(1, _n_table_words(BODY)):
        word = tl.where(codes >= 4 * w, _table_word(BODY, w), word)
    number = ((word >> (8 * (codes & 3))) & 255) - 128
    POWER: tl.constexpr = BODY.table_power
    return (number.to(tl.float32) * (2.0**-POWER)).to(DTYPE)


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
