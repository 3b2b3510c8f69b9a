# mypy: ignore-errors
"""The products of a MoE layer in Triton: rows of slots times packed matrices of experts.

Per format one launch multiplies the slots of all experts that have it, block by block
(`alphaquant.kernels.moe.slots`). The product of gate and up also gates, unless columns are split
or gate and up of an expert have formats of their own: then parts in float32 are written, and
`alphaquant.kernels.moe.rows_triton` adds and gates them. The product of down weights its rows.

Letters: as in `alphaquant.kernels.moe.launch_triton`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.kernels.linear.dequant_triton import load_global
from alphaquant.kernels.linear.product_triton import can_use_asm, constants_of, pointers_of
from alphaquant.kernels.moe.config import GroupedConfig, configs_of
from alphaquant.kernels.moe.plan import HALF_ROWS, ExpertStacks, GroupedExperts
from alphaquant.kernels.moe.rows_triton import gate_parts, silu_times
from alphaquant.kernels.moe.slots import BlockTable, SortedSlots
from alphaquant.kernels.moe.slots_triton import SlotPlan, plan_slots
from alphaquant.kernels.order import TILE_COLS, KernelWeight
from alphaquant.kernels.tile_triton import add_tile

_HALF = tl.constexpr(HALF_ROWS)


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
        is_inside = is_slot[None, :]
        if not EVEN:
            is_inside = is_inside & (columns[:, None] < n_cols - tile * 128)
        x = tl.load(x_at + tile * 128 + columns[:, None], mask=is_inside, other=0.0)  # [128, Z]
        acc = add_tile(
            *(acc, x, words_ptr, scales_ptr, zeros_ptr, tile, step, rows),
            *(stack_rows, plane_bytes, body, SCALE_KIND, C, MIDDLE, HAS_ZEROS, DTYPE, B),
        )
    return acc


@triton.jit(do_not_specialize=["number", "n_slots", "tiles_per_split"])
def gate_up_kernel(
    x_ptr,  # [n, H], contiguous
    out_ptr,  # [n k, I], or float32 [L, n k, 2 I padded] if IS_SPLIT; rows in sorted order
    slots_ptr,  # int32 [n k]
    places_ptr,  # int32 [most blocks], as the next two
    firsts_ptr,
    ends_ptr,
    starts_ptr,  # int32 [F + 1]
    words_ptr,  # as in `_multiply`
    scales_ptr,
    zeros_ptr,
    global_ptr,  # float32, gate's and up's of each expert, or anything if not HAS_GLOBAL
    number,  # of the format
    n_slots,  # n k
    n_choices,  # k
    n_cols,  # H
    out_cols,  # I, or 2 I padded if IS_SPLIT
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
    SIDE: tl.constexpr,  # 0 for gate alone, 1 for up alone, -1 for both in turns
    DTYPE: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """silu(gate) * up for a block of slots and B / 2 of their I numbers, or parts of gate and up.

    Parts have gate and up in turns, whichever of them this launch computes.

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
    if HAS_GLOBAL and SIDE >= 0:
        acc *= load_global(global_ptr + place, SCALE_KIND)
    elif HAS_GLOBAL:
        sides = rows // _HALF % 2  # 0 for gate, 1 for up
        acc *= load_global(global_ptr + 2 * place + sides, SCALE_KIND)[:, None]
    if IS_SPLIT:
        out_rows = split.to(tl.int64) * n_slots + positions  # [Z]
        if SIDE >= 0:
            rows = rows // _HALF * (2 * _HALF) + SIDE * _HALF + rows % _HALF
        at = out_rows[None, :] * out_cols + rows[:, None]  # [B, Z]
        tl.store(out_ptr + at, acc, mask=is_slot[None, :])
    else:
        sides = acc.reshape(B // (2 * _HALF), 2, _HALF, Z).trans(0, 2, 3, 1)
        gate, up = tl.split(sides.reshape(B // 2, Z, 2))  # [B / 2, Z] each
        rows = tl.program_id(1) * (B // 2) + tl.arange(0, B // 2)
        at = positions[None, :].to(tl.int64) * out_cols + rows[:, None]  # [B / 2, Z]
        is_inside = is_slot[None, :] & (rows[:, None] < out_cols)
        gated = silu_times(gate, up).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, gated, mask=is_inside)


@triton.jit(do_not_specialize=["number", "n_slots", "tiles_per_split"])
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


def multiply_packed(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: GroupedExperts,
    config: GroupedConfig | None,
) -> Tensor:
    """Weighted outputs of every slot.

    Args:
        x: [n, H], contiguous.
        expert_ids: integers [n, k], at least one.
        weights: [n, k], contiguous.
        experts: the layer.
        config: of all products and formats; None for the default of each.

    Returns:
        [L, n k, H], rows in the order of slots; those of skipped slots hold anything.
    """
    products = (*experts.gate_up, experts.down)
    configs = [configs_of(stacks, expert_ids.numel(), config) for stacks in products]
    plan = plan_slots(
        *(expert_ids, experts.first_expert, experts.n_experts),
        [stacks.formats for stacks in products],
        [own[0].block_slots for own in configs],
    )
    gated = _gate_up(x, plan, expert_ids.shape[1], experts, configs[:-1])
    return _down(gated, weights, plan, experts, configs[-1])


def _gate_up(
    x: Tensor,
    plan: SlotPlan,
    n_choices: int,
    experts: GroupedExperts,
    configs: Sequence[Sequence[GroupedConfig]],
) -> Tensor:
    """silu(gate) * up of every slot, [n k, I], rows in sorted order."""
    n_slots, is_apart = len(plan.order.slots), len(experts.gate_up) > 1
    # The parts of gate and of up are as many, though their formats may differ in number.
    n_splits = min(own[0].n_splits for own in configs)
    out = gated = x.new_empty(n_slots, experts.width)
    if is_apart or n_splits > 1:
        n_cols = sum(stacks.expert_rows for stacks in experts.gate_up)
        out = x.new_empty(n_splits, n_slots, n_cols, dtype=torch.float32)
    for side, (stacks, own) in enumerate(zip(experts.gate_up, configs, strict=True)):
        for number, stack in enumerate(stacks.stacks):
            launch = replace(own[number], n_splits=n_splits)
            gate_up_kernel[_grid(stacks, plan.blocks[side], number, launch)](
                *(x, out, *_tensors(plan.order, plan.blocks[side], stack)),
                *(number, n_slots, n_choices, experts.hidden, out.shape[-1]),
                *_strides(stacks, stack, n_splits),
                **_constants(stack, x, launch),
                IS_SPLIT=out is not gated,
                SIDE=side if is_apart else -1,
            )
    if out is not gated:
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
    stacks, n_slots, blocks = experts.down, len(plan.order.slots), plan.blocks[-1]
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
