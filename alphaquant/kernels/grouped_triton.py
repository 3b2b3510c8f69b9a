# mypy: ignore-errors
"""A layer of packed experts on its routed tokens, in Triton: any format per expert and matrix.

    y[t] = sum over j of weight[t, j] * down(silu(gate(x[t])) * up(x[t]))   of expert id[t, j]

Three steps on tables of blocks (`alphaquant.kernels.moe_slots`). Per format of gate and up one
launch writes the gated products of its experts' tokens, one row per sorted slot. Per format of
down one launch multiplies those rows and writes each one, weighted, to its slot. A last kernel
adds the slots of every token from first to last, so that results do not depend on timing.
Launches and grids depend on n, k and the formats only: programs beyond the number of blocks,
which only the device knows, return at once.

Where blocks are too few for a GPU, programs have 64 rows, and then columns are split: float32
parts are added in a fixed order, those of gate and up by a kernel that also gates, those of down
by the last one. Where an expert has many slots, its weights are dequantized once
(`alphaquant.kernels.moe_dense_triton`). `alphaquant.kernels.moe_config` decides.

Numbers are those of `alphaquant.kernels.linear_triton`: products and sums in float32, and gating
too; rows between the steps have the type of x, and parts are float32.

Limits: the gating function is silu(gate) * up, and experts have no biases. Nothing here was run
on a GPU: the tests run it in Triton's interpreter and compile it for sm_90.

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width, T tiles of 128
columns, L splits of them, B rows and Z slots of a block; P, N, Q, S, C as in
`alphaquant.kernels.order`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.dequant_triton import (
    load_global,
    load_scales,
    load_tile,
    load_zeros,
    spread,
)
from alphaquant.kernels.linear_triton import IS_INTERPRETED, can_use_asm, constants_of, pointers_of
from alphaquant.kernels.moe_config import DENSE_SLOTS, GroupedConfig, configs_of
from alphaquant.kernels.moe_dense_triton import can_multiply_dense, multiply_dense
from alphaquant.kernels.moe_plan import HALF_ROWS, ExpertStacks, GroupedExperts
from alphaquant.kernels.moe_rows_triton import add_slots, gate_parts, silu_times
from alphaquant.kernels.moe_slots import BlockTable, SortedSlots
from alphaquant.kernels.moe_slots_triton import SlotPlan, plan_slots
from alphaquant.kernels.order import TILE_COLS, KernelWeight

_HALF = tl.constexpr(HALF_ROWS)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _multiply(
    x_at,  # pointers [1, Z] to the first column of each row of activations
    is_slot,  # [Z]
    rows,  # [B], of the stack
    words_ptr,  # uint8 [P, T, stack's rows, 16 Q]
    scales_ptr,  # [S, stack's rows, C]
    zeros_ptr,  # uint8 [S, stack's rows, C], or anything if not HAS_ZEROS
    split,
    n_cols,
    stack_rows,
    n_tiles,
    tiles_per_split,
    tiles_per_step,
    plane_bytes,
    body: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """Rows of a matrix times a block of slots, without global scale, float32 [B, Z]."""
    columns = tl.arange(0, 128)
    # 64 bits: the planes of a stack together may have more than 2^31 bytes
    plane_bytes = plane_bytes.to(tl.int64)
    acc = tl.full((B, Z), 0.0, tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, n_tiles)):
        step = tile // tiles_per_step
        w = load_tile(words_ptr, tile, rows, stack_rows, plane_bytes, body, DTYPE)  # [B, 128]
        is_inside = is_slot[None, :]
        if not EVEN:
            is_inside = is_inside & (columns[:, None] < n_cols - tile * 128)
        x = tl.load(x_at + tile * 128 + columns[:, None], mask=is_inside, other=0.0)  # [128, Z]
        if HAS_ZEROS:
            zeros = load_zeros(zeros_ptr, step, rows, stack_rows, C, MIDDLE)
            w = w - spread(zeros.to(DTYPE), B, C)
        if C == 1:
            scales = load_scales(scales_ptr, step, rows, stack_rows, C, SCALE_KIND, tl.float32)
            acc += tl.dot(w, x, input_precision="ieee") * scales
        else:
            scales = load_scales(scales_ptr, step, rows, stack_rows, C, SCALE_KIND, DTYPE)
            acc = tl.dot(w * spread(scales, B, C), x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["number", "n_slots"])
def gate_up_kernel(
    x_ptr,  # [n, H], contiguous
    out_ptr,  # [n k, I], or float32 [L, n k, expert rows] if IS_SPLIT; rows in sorted order
    slots_ptr,  # int32 [n k]
    places_ptr,  # int32 [most blocks], as the next two
    firsts_ptr,
    ends_ptr,
    starts_ptr,  # int32 [F + 1]
    words_ptr,  # as in `_multiply`
    scales_ptr,
    zeros_ptr,
    global_ptr,  # float32 [2 per expert], gate and up, or anything if not HAS_GLOBAL
    number,  # of the format
    n_slots,  # n k
    n_choices,  # k
    n_cols,  # H
    width,  # I
    expert_rows,
    stack_rows,
    n_tiles,
    tiles_per_split,
    tiles_per_step,
    plane_bytes,
    body: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """silu(gate) * up for a block of slots and B / 2 of their I numbers, or parts of gate and up.

    Grid: (most blocks of the format, rows of an expert / B, L).
    """
    block = tl.load(starts_ptr + number) + tl.program_id(0)
    if block >= tl.load(starts_ptr + number + 1):
        return
    place = tl.load(places_ptr + block)
    positions = tl.load(firsts_ptr + block) + tl.arange(0, Z)  # [Z]
    is_slot = positions < tl.load(ends_ptr + block)
    slots = tl.load(slots_ptr + positions, mask=is_slot, other=0)
    tokens = (slots // n_choices).to(tl.int64)
    rows = tl.program_id(1) * B + tl.arange(0, B)
    split = tl.program_id(2)
    acc = _multiply(
        x_ptr + tokens[None, :] * n_cols,
        is_slot,
        place * expert_rows + rows,
        *(words_ptr, scales_ptr, zeros_ptr, split),
        *(n_cols, stack_rows, n_tiles, tiles_per_split, tiles_per_step, plane_bytes),
        *(body, SCALE_KIND, C, MIDDLE, HAS_ZEROS, EVEN, DTYPE, B, Z),
    )
    if HAS_GLOBAL:
        sides = rows // _HALF % 2  # 0 for gate, 1 for up
        acc *= load_global(global_ptr + 2 * place + sides, SCALE_KIND)[:, None]
    if IS_SPLIT:
        out_rows = split.to(tl.int64) * n_slots + positions  # [Z]
        at = out_rows[None, :] * expert_rows + rows[:, None]  # [B, Z]
        tl.store(out_ptr + at, acc, mask=is_slot[None, :])
    else:
        sides = acc.reshape(B // (2 * _HALF), 2, _HALF, Z).trans(0, 2, 3, 1)
        gate, up = tl.split(sides.reshape(B // 2, Z, 2))  # [B / 2, Z] each
        rows = tl.program_id(1) * (B // 2) + tl.arange(0, B // 2)
        at = positions[None, :].to(tl.int64) * width + rows[:, None]  # [B / 2, Z]
        is_inside = is_slot[None, :] & (rows[:, None] < width)
        gated = silu_times(gate, up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, gated, mask=is_inside)


@triton.jit(do_not_specialize=["number", "n_slots"])
def down_kernel(
    x_ptr,  # [n k, I], rows in sorted order
    out_ptr,  # [L, n k, H], rows in the order of slots
    weights_ptr,  # [n k], any float
    slots_ptr,  # int32 [n k]
    places_ptr,  # int32 [most blocks], as the next two
    firsts_ptr,
    ends_ptr,
    starts_ptr,  # int32 [F + 1]
    words_ptr,  # as in `_multiply`
    scales_ptr,
    zeros_ptr,
    global_ptr,  # float32 [1 per expert], or anything if not HAS_GLOBAL
    number,  # of the format
    n_slots,  # n k
    n_cols,  # I
    hidden,  # H
    expert_rows,
    stack_rows,
    n_tiles,
    tiles_per_split,
    tiles_per_step,
    plane_bytes,
    body: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_GLOBAL: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """Weighted outputs, or parts of them, for a block of slots and B of their H numbers.

    Grid: (most blocks of the format, rows of an expert / B, L).
    """
    block = tl.load(starts_ptr + number) + tl.program_id(0)
    if block >= tl.load(starts_ptr + number + 1):
        return
    place = tl.load(places_ptr + block)
    positions = tl.load(firsts_ptr + block) + tl.arange(0, Z)  # [Z]
    is_slot = positions < tl.load(ends_ptr + block)
    rows = tl.program_id(1) * B + tl.arange(0, B)
    split = tl.program_id(2)
    acc = _multiply(
        x_ptr + positions[None, :].to(tl.int64) * n_cols,
        is_slot,
        place * expert_rows + rows,
        *(words_ptr, scales_ptr, zeros_ptr, split),
        *(n_cols, stack_rows, n_tiles, tiles_per_split, tiles_per_step, plane_bytes),
        *(body, SCALE_KIND, C, MIDDLE, HAS_ZEROS, EVEN, DTYPE, B, Z),
    )
    slots = tl.load(slots_ptr + positions, mask=is_slot, other=0)
    factors = tl.load(weights_ptr + slots, mask=is_slot, other=0.0).to(tl.float32)
    if HAS_GLOBAL:
        factors *= load_global(global_ptr + place, SCALE_KIND)
    out_rows = split.to(tl.int64) * n_slots + slots  # [Z]
    at = out_rows[None, :] * hidden + rows[:, None]  # [B, Z]
    is_inside = is_slot[None, :] & (rows[:, None] < hidden)
    weighted = acc * factors[None, :]
    tl.store(out_ptr + at, weighted.to(out_ptr.dtype.element_ty), mask=is_inside)


def grouped_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: GroupedExperts,
    *,
    config: GroupedConfig | None = None,
    dense_slots: int = DENSE_SLOTS,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: [n, H], float16, bfloat16 or float32, on the experts' device.
        expert_ids: integers [n, k]; ids that are none of these experts add nothing.
        weights: [n, k] of any float dtype.
        experts: from `alphaquant.kernels.moe_plan.stack_experts`.
        config: how to launch both products in all formats; by default
            `alphaquant.kernels.moe_config.default_config` per format.
        dense_slots: from this average of slots per expert on, n k / E, torch multiplies weights
            dequantized one format at a time; in bfloat16 on sm_90 and sm_100, H and I multiples
            of 8, where it need not wait (`alphaquant.kernels.moe_dense_triton`).

    Returns:
        [n, H] in x's dtype; with expert parallelism this rank's part of the sum.

    Raises:
        FormatError: shapes or types that do not fit.
    """
    _check(x, expert_ids, weights, experts)
    if not expert_ids.numel():
        return torch.zeros_like(x)
    if IS_INTERPRETED and x.dtype == torch.bfloat16:
        # Triton's interpreter computes wrong numbers in bfloat16 without a word.
        options = {"config": config, "dense_slots": dense_slots}
        return grouped_moe(x.float(), expert_ids, weights, experts, **options).to(x.dtype)
    x, weights = x.contiguous(), weights.contiguous()
    given = (x, expert_ids, weights, experts)
    is_dense = expert_ids.numel() >= dense_slots * experts.n_experts
    is_dense = is_dense and can_multiply_dense(x, experts)
    parts = multiply_dense(*given) if is_dense else _multiply_packed(*given, config)
    return add_slots(parts, expert_ids.to(torch.int64).contiguous(), experts, x.dtype)


def _multiply_packed(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: GroupedExperts,
    config: GroupedConfig | None,
) -> Tensor:
    """Weighted outputs of every slot, [L, n k, H], rows in the order of slots."""
    products = (experts.gate_up, experts.down)
    configs = [configs_of(stacks, expert_ids.numel(), config) for stacks in products]
    plan = plan_slots(
        *(expert_ids, experts.first_expert, experts.n_experts),
        [stacks.formats for stacks in products],
        [own[0].block_slots for own in configs],
    )
    gated = _gate_up(x, plan, expert_ids.shape[1], experts, configs[0])
    return _down(gated, weights, plan, experts, configs[1])


def _gate_up(
    x: Tensor,
    plan: SlotPlan,
    n_choices: int,
    experts: GroupedExperts,
    configs: Sequence[GroupedConfig],
) -> Tensor:
    """silu(gate) * up of every slot, [n k, I], rows in sorted order."""
    stacks, n_slots, blocks = experts.gate_up, len(plan.order.slots), plan.blocks[0]
    gated = x.new_empty(n_slots, experts.width)
    n_splits, out = configs[0].n_splits, gated
    if n_splits > 1:
        out = x.new_empty(n_splits, n_slots, stacks.expert_rows, dtype=torch.float32)
    for number, stack in enumerate(stacks.stacks):
        gate_up_kernel[_grid(stacks, blocks, number, configs[number])](
            *(x, out, *_tensors(plan.order, blocks, stack)),
            *(number, n_slots, n_choices, experts.hidden, experts.width),
            *_strides(stacks, stack, n_splits),
            **_constants(stack, x, configs[number]),
            IS_SPLIT=n_splits > 1,
        )
    if n_splits > 1:
        gate_parts(out, gated, plan.order)
    return gated


def _down(
    gated: Tensor,
    weights: Tensor,
    plan: SlotPlan,
    experts: GroupedExperts,
    configs: Sequence[GroupedConfig],
) -> Tensor:
    """Weighted outputs of every slot, [L, n k, H], rows in the order of slots."""
    stacks, n_slots, blocks = experts.down, len(plan.order.slots), plan.blocks[1]
    n_splits = configs[0].n_splits
    dtype = gated.dtype if n_splits == 1 else torch.float32
    parts = gated.new_empty(n_splits, n_slots, experts.hidden, dtype=dtype)
    for number, stack in enumerate(stacks.stacks):
        down_kernel[_grid(stacks, blocks, number, configs[number])](
            *(gated, parts, weights, *_tensors(plan.order, blocks, stack)),
            *(number, n_slots, experts.width, experts.hidden),
            *_strides(stacks, stack, n_splits),
            **_constants(stack, gated, configs[number]),
        )
    return parts


def _grid(
    stacks: ExpertStacks, blocks: BlockTable, number: int, config: GroupedConfig
) -> tuple[int, int, int]:
    return (blocks.most[number], stacks.expert_rows // config.block_rows, config.n_splits)


def _tensors(order: SortedSlots, blocks: BlockTable, stack: KernelWeight) -> tuple[Tensor, ...]:
    tables = (blocks.places, blocks.firsts, blocks.ends, blocks.starts)
    return order.slots, *tables, *pointers_of(stack)


def _strides(stacks: ExpertStacks, stack: KernelWeight, n_splits: int) -> tuple[int, ...]:
    """Rows of an expert and of the stack, tiles, per split and per step, bytes of a plane."""
    n_tiles = stack.n_tiles
    return (
        *(stacks.expert_rows, stack.words.shape[2], n_tiles, triton.cdiv(n_tiles, n_splits)),
        *(stack.tiles_per_step, stack.words[0].numel()),
    )


def _constants(stack: KernelWeight, x: Tensor, config: GroupedConfig) -> dict[str, object]:
    """Compile-time arguments, and how both kernels are launched."""
    return constants_of(stack, x.dtype, use_asm=can_use_asm(x)) | {
        "EVEN": stack.cols % TILE_COLS == 0,
        "B": config.block_rows,
        "Z": config.block_slots,
        "num_warps": config.n_warps,
        "num_stages": config.n_stages,
    }


def _check(x: Tensor, expert_ids: Tensor, weights: Tensor, experts: GroupedExperts) -> None:
    if x.dim() != 2 or x.shape[1] != experts.hidden or x.dtype not in _DTYPES:
        raise FormatError(
            f"x is {x.dtype} {list(x.shape)}; these experts take [tokens, {experts.hidden}] in "
            "float16, bfloat16 or float32: reshape or convert x"
        )
    if expert_ids.dim() != 2 or len(expert_ids) != len(x) or weights.shape != expert_ids.shape:
        raise FormatError(
            f"expert ids are {list(expert_ids.shape)} and weights {list(weights.shape)} for "
            f"{len(x)} tokens; both are [tokens, choices]: reshape them"
        )
