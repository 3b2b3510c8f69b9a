# mypy: ignore-errors
"""The inner step of every product in Triton: one tile of 128 columns, weights times activations.

Where a tile has one scale per row, it multiplies float32 sums; where it has several, weights are
made whole before the product. Zero points are subtracted from the weights either way. Taking
zero * sum(x) off the sums instead, with sum(x) as a product with ones, makes `int4-g128-asym` 4.15
instructions per weight instead of 3.38 (sm_90, bfloat16, 16 columns): the ones need registers too.

Letters: B rows of weights, Z columns of activations, C scales per row and tile.
"""

import triton
import triton.language as tl

from alphaquant.kernels.linear.dequant_triton import load_scales, load_tile, load_zeros, spread


@triton.jit
def add_tile(
    acc,  # float32 [B, Z]
    x,  # [128, Z]
    words_ptr,  # uint8 [P, T, N padded, 16 Q]
    scales_ptr,  # [S, N padded, C]
    zeros_ptr,  # uint8 [S, N padded, C], or anything if not HAS_ZEROS
    tile,
    step,
    rows,  # [B]
    padded_rows,
    plane_bytes,
    body: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
    B: tl.constexpr,
):
    """The sums and what a tile adds to them, float32 [B, Z], without global scale."""
    w = load_tile(words_ptr, tile, rows, padded_rows, plane_bytes, body, DTYPE)  # [B, 128]
    if HAS_ZEROS:
        zeros = load_zeros(zeros_ptr, step, rows, padded_rows, C, MIDDLE)
        w = w - spread(zeros.to(DTYPE), B, C)
    if C == 1:
        scales = load_scales(scales_ptr, step, rows, padded_rows, C, SCALE_KIND, tl.float32)
        return acc + tl.dot(w, x, input_precision="ieee") * scales
    else:
        scales = load_scales(scales_ptr, step, rows, padded_rows, C, SCALE_KIND, DTYPE)
        return tl.dot(w * spread(scales, B, C), x, acc, input_precision="ieee")
