# mypy: ignore-errors
"""y = x W^T on weights in kernel order: one Triton kernel for few rows, dequantization for many.

The operands are swapped: the kernel computes W x^T, so that the weights are the tensor core's
first operand, which may stay in registers, and the tokens lie on its side of granularity 8. The
columns can be split over programs; their float32 parts are added in a fixed order by a second
kernel, so that results do not depend on timing.

Numbers. Products and sums are float32. Where a tile of 128 columns has one scale, that scale
multiplies float32 sums of exact codes. Where it has several, weights are multiplied by their
scales in the type of x before the product, as `dequantize().to(x.dtype)` would, except that a
float16 scale is itself rounded when x is bfloat16. nvfp4's block scales are exact either way, and
its global scale multiplies the result. There scales may also carry a power of two that weights
lack (`alphaquant.kernels.bodies`), which rounds nothing.

Nothing here was run on a GPU: the tests run it in Triton's interpreter and compile it for sm_90.
The configurations follow from registers and spills and were not timed; a table of measured ones
(`alphaquant.kernels.tuning`) comes before them.

Letters: M rows of x, N outputs, K inputs, T tiles of 128 columns, B rows and Z columns of an
output block.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.linear.dequant_triton import (
    load_global,
    load_scales,
    load_tile,
    load_zeros,
    spread,
)
from alphaquant.kernels.matrix_triton import COMPUTE_TYPES, decoding_of, matrix_of
from alphaquant.kernels.order import LAYOUTS, TILE_COLS, KernelWeight
from alphaquant.kernels.tile_triton import multiply_tiles
from alphaquant.kernels.tuning import (
    KernelTable,
    Launch,
    LinearConfig,
    dense_key,
    device_name,
    launch_key,
    table_for,
)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which is decided when this file is imported."""

DENSE_ROWS = 256
"""From this many rows on weights are dequantized once, unless a table says otherwise; a guess."""

_PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100 or H200."""

CONFIGS: dict[tuple[str, int], LinearConfig] = {
    # With four warps the 128 x 64 sums and the weights of a tile need more than 255 registers.
    (element, 64): LinearConfig(n_warps=8)
    for element in LAYOUTS
    if element not in ("int1", "int2", "int3")
}
"""By element and Z, where they differ from the default; chosen by compiling, not by timing."""


@triton.jit(do_not_specialize=["n_x_rows", "tiles_per_split"])
def packed_linear_kernel(
    x_ptr,  # [M, K], contiguous
    out_ptr,  # [number of splits, M, N]
    matrix,  # [N, K]
    n_x_rows,
    n_rows,
    tiles_per_split,
    DECODING: tl.constexpr,
    EVEN: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """Grid: (N padded / B, ceil(M / Z), splits)."""
    rows = tl.program_id(0) * B + tl.arange(0, B)  # [B]
    x_rows = tl.program_id(1) * Z + tl.arange(0, Z)  # [Z]
    split = tl.program_id(2)
    x_at = x_ptr + x_rows.to(tl.int64) * matrix.n_cols  # [Z]
    is_row = x_rows < n_x_rows
    acc = multiply_tiles(x_at, is_row, matrix, rows, tiles_per_split, DECODING, EVEN)
    if matrix.global_scales is not None:
        acc *= load_global(matrix, 0, DECODING)
    out_rows = (split * n_x_rows + x_rows).to(tl.int64)
    out_at = out_rows[None, :] * n_rows + rows[:, None]  # [B, Z]
    is_inside = is_row[None, :] & (rows[:, None] < n_rows)
    tl.store(out_ptr + out_at, acc.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["n_splits"])
def add_splits_kernel(
    parts_ptr,  # float32 [number of splits, M N]
    out_ptr,  # [M N]
    n_splits,
    n_numbers,
    BLOCK: tl.constexpr,
):
    """Sum of the parts from first to last. Grid: (ceil(M N / BLOCK),)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    is_inside = at < n_numbers
    total = tl.full((BLOCK,), 0.0, tl.float32)
    part_at = at
    for _ in range(n_splits):
        total += tl.load(parts_ptr + part_at, mask=is_inside, other=0.0)
        part_at += n_numbers
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def dequantize_kernel(
    out_ptr,  # [N, K]
    matrix,  # [N, K]
    n_rows,
    DECODING: tl.constexpr,
    B: tl.constexpr,
):
    """Weights, rounded once. Grid: (N padded / B, T)."""
    rows = tl.program_id(0) * B + tl.arange(0, B)  # [B]
    tile = tl.program_id(1)
    columns = tile * 128 + tl.arange(0, 128)
    w = load_tile(matrix, tile, rows, DECODING).to(tl.float32)  # [B, 128]
    scales = load_scales(matrix, tile, rows, DECODING, tl.float32)
    if matrix.zeros is not None:
        w = w - spread(load_zeros(matrix, tile, rows, DECODING).to(tl.float32))
    if matrix.global_scales is not None:
        scales *= load_global(matrix, 0, DECODING)
    w *= spread(scales)
    at = out_ptr + rows[:, None].to(tl.int64) * matrix.n_cols + columns[None, :]  # [B, 128]
    is_inside = (rows[:, None] < n_rows) & (columns[None, :] < matrix.n_cols)
    tl.store(at, w.to(out_ptr.dtype.element_ty), mask=is_inside)


def packed_linear(
    x: Tensor,
    weight: KernelWeight,
    *,
    config: LinearConfig | None = None,
    n_splits: int | None = None,
    dense_rows: int | None = None,
) -> Tensor:
    """Activations times the transposed matrix.

    Args:
        x: [M, K], float16, bfloat16 or float32, on the weight's device.
        weight: the matrix [N, K].
        config: how to launch the kernel; by default from the device's table, else `CONFIGS`.
        n_splits: programs that share the columns of a block; by default from the device's table
            unless `config` is given, else as many as fill a GPU.
        dense_rows: from this many rows on the matrix is dequantized and multiplied by torch; by
            default from the device's table, else `DENSE_ROWS`.

    Returns:
        [M, N] in x's dtype.

    Raises:
        FormatError: x has another width or type than the kernel takes.
        StoreError: the table of `alphaquant.kernels.tuning` cannot be read.
    """
    _check(x, weight)
    if not len(x):
        return x.new_empty(0, weight.rows)
    if IS_INTERPRETED and x.dtype == torch.bfloat16:
        # Triton's interpreter computes wrong numbers in bfloat16 without a word.
        wide = packed_linear(
            x.float(), weight, config=config, n_splits=n_splits, dense_rows=dense_rows
        )
        return wide.to(x.dtype)
    if len(x) >= (default_dense_rows(weight, x.dtype) if dense_rows is None else dense_rows):
        return x @ dequantize_packed(weight, x.dtype).T
    return _launch(x.contiguous(), weight, config, n_splits)


def dequantize_packed(weight: KernelWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in float16, bfloat16 or float32, rounded once from float32."""
    wide = torch.float32 if IS_INTERPRETED and dtype == torch.bfloat16 else dtype
    out = torch.empty(weight.rows, weight.cols, dtype=wide, device=weight.words.device)
    block_rows = 64
    grid = (weight.words.shape[2] // block_rows, weight.n_tiles)
    dequantize_kernel[grid](
        *(out, matrix_of(weight), weight.rows),
        DECODING=decoding_of(weight, wide, use_asm=can_use_asm(out)),
        B=block_rows,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out.to(dtype)


def default_splits(weight: KernelWeight, block_rows: int, n_column_blocks: int) -> int:
    """Programs per block that fill a GPU, each with at least four tiles."""
    n_blocks = weight.words.shape[2] // block_rows * n_column_blocks
    return max(1, min(_PROGRAMS // n_blocks, weight.n_tiles // 4))


def default_dense_rows(weight: KernelWeight, dtype: torch.dtype) -> int:
    """From how many rows of x in a dtype `packed_linear` dequantizes if it is not told."""
    table = _table_of(weight)
    return table.dense_rows.get(dense_key(weight, dtype), DENSE_ROWS) if table else DENSE_ROWS


def choose_launch(
    weight: KernelWeight,
    dtype: torch.dtype,
    n_x_rows: int,
    config: LinearConfig | None = None,
    n_splits: int | None = None,
) -> Launch:
    """How the packed kernel is launched, by what is given, the device's table, or the defaults.

    Args:
        weight: the matrix.
        dtype: of x.
        n_x_rows: M.
        config: as in `packed_linear`, like the next one.
        n_splits: see there.
    """
    block_cols = _block_cols(n_x_rows)
    n_column_blocks = triton.cdiv(n_x_rows, block_cols)
    table = None if config else _table_of(weight)
    tuned = table.launches.get(launch_key(weight, dtype, block_cols)) if table else None
    if tuned is not None:
        # Splits were measured with one block of columns; several fill the GPU with fewer.
        config, splits = tuned.config, max(1, tuned.n_splits // n_column_blocks)
    else:
        config = config or CONFIGS.get((weight.element, block_cols), LinearConfig())
        splits = default_splits(weight, config.block_rows, n_column_blocks)
    splits = min(n_splits or splits, weight.n_tiles)
    return Launch(config.block_rows, config.n_warps, config.n_stages, splits)


def _block_cols(n_x_rows: int) -> int:
    """Z: the least that holds all rows of x, at most 64."""
    return next((z for z in (16, 32) if n_x_rows <= z), 64)


def _table_of(weight: KernelWeight) -> KernelTable | None:
    return table_for(device_name(weight.words.device))


def _launch(
    x: Tensor, weight: KernelWeight, config: LinearConfig | None, n_splits: int | None
) -> Tensor:
    n_x_rows = len(x)
    block_cols = _block_cols(n_x_rows)
    launch = choose_launch(weight, x.dtype, n_x_rows, config, n_splits)
    splits = launch.n_splits
    out_dtype = x.dtype if splits == 1 else torch.float32
    parts = torch.empty(splits, n_x_rows, weight.rows, dtype=out_dtype, device=x.device)
    n_row_blocks = weight.words.shape[2] // launch.block_rows
    grid = (n_row_blocks, triton.cdiv(n_x_rows, block_cols), splits)
    packed_linear_kernel[grid](
        *(x, parts, matrix_of(weight), n_x_rows, weight.rows),
        triton.cdiv(weight.n_tiles, splits),
        DECODING=decoding_of(weight, x.dtype, use_asm=can_use_asm(x)),
        EVEN=weight.cols % TILE_COLS == 0,
        B=launch.block_rows,
        Z=block_cols,
        num_warps=launch.n_warps,
        num_stages=launch.n_stages,
        enable_fp_fusion=True,
    )
    return parts[0] if splits == 1 else _add_splits(parts, x.dtype)


def _add_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    grid = (triton.cdiv(out.numel(), 1024),)
    add_splits_kernel[grid](parts, out, len(parts), out.numel(), BLOCK=1024, enable_fp_fusion=True)
    return out


def can_use_asm(x: Tensor) -> bool:
    """Whether this device has the bodies' instructions."""
    return x.is_cuda and not IS_INTERPRETED and torch.cuda.get_device_capability(x.device)[0] >= 9


def _check(x: Tensor, weight: KernelWeight) -> None:
    if x.dim() != 2 or x.shape[1] != weight.cols or x.dtype not in COMPUTE_TYPES:
        raise FormatError(
            f"x is {x.dtype} {list(x.shape)}; this matrix takes [rows, {weight.cols}] in float16, "
            "bfloat16 or float32: reshape or convert x"
        )
