# mypy: ignore-errors
"""The inner loop of every product in Triton: tiles of 128 columns, weights times activations.

Where a tile has one scale per row, it multiplies float32 sums; where it has several, weights are
made whole before the product. Zero points are subtracted from the weights either way. Taking
zero * sum(x) off the sums instead, with sum(x) as a product with ones, makes `int4-g128-asym` 4.15
instructions per weight instead of 3.38 (sm_90, bfloat16, 16 columns, steps of a number of tiles
that the compiler does not know): the ones need registers too.

Letters: K columns of the matrix, B rows of it in a program, Z rows of activations.
"""

import triton
import triton.language as tl

from alphaquant.kernels.linear.dequant_triton import load_scales, load_tile, load_zeros, spread


@triton.jit
def multiply_tiles(
    x_at,  # pointers [Z] to the first of K activations
    is_row,  # [Z], whether there are any
    matrix,
    rows,  # [B] of the matrix
    tiles_per_split,
    DECODING: tl.constexpr,
    EVEN: tl.constexpr,  # whether K is a multiple of 128
):
    """Rows of a matrix times rows of activations, float32 [B, Z], without global scale.

    `matrix` and `DECODING` are those of `alphaquant.kernels.matrix_triton`. The columns are shared
    by the programs of the third axis of the grid.
    """
    columns = tl.arange(0, 128)
    n_tiles = (matrix.n_cols + 127) // 128
    acc = tl.full((rows.shape[0], is_row.shape[0]), 0.0, tl.float32)
    first = tl.program_id(2) * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        is_inside = is_row[None, :]
        if not EVEN:
            is_inside = is_inside & (columns[:, None] < matrix.n_cols - tile * 128)
        at = x_at[None, :] + tile * 128 + columns[:, None]  # [128, Z]
        acc = _add_tile(acc, tl.load(at, mask=is_inside, other=0.0), matrix, tile, rows, DECODING)
    return acc


@triton.jit
def _add_tile(
    acc,  # float32 [B, Z]
    x,  # [128, Z]
    matrix,
    tile,
    rows,  # [B]
    DECODING: tl.constexpr,
):
    """The sums and what a tile adds to them, float32 [B, Z]."""
    w = load_tile(matrix, tile, rows, DECODING)  # [B, 128]
    if matrix.zeros is not None:
        w = w - spread(load_zeros(matrix, tile, rows, DECODING).to(DECODING.dtype))
    if DECODING.n_scales == 1:
        scales = load_scales(matrix, tile, rows, DECODING, tl.float32)
        return acc + tl.dot(w, x, input_precision="ieee") * scales
    else:
        scales = load_scales(matrix, tile, rows, DECODING, DECODING.dtype)
        return tl.dot(w * spread(scales), x, acc, input_precision="ieee")
