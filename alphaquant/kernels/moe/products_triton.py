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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alphaquant.kernels.linear.dequant_triton import load_global
from alphaquant.kernels.linear.product_triton import can_use_asm
from alphaquant.kernels.matrix_triton import decoding_of, matrix_of
from alphaquant.kernels.moe.config import GroupedConfig, configs_of
from alphaquant.kernels.moe.plan import HALF_ROWS, ExpertStacks, GroupedExperts
from alphaquant.kernels.moe.rows_triton import gate_parts, silu_times
from alphaquant.kernels.moe.slots import BlockTable, SortedSlots
from alphaquant.kernels.moe.slots_triton import SlotPlan, plan_slots
from alphaquant.kernels.order import TILE_COLS, KernelWeight
from alphaquant.kernels.tile_triton import multiply_tiles

_HALF = tl.constexpr(HALF_ROWS)


class RoutedBlocks(NamedTuple):
    """The blocks of a product as kernels take them: the tensors of `SortedSlots` and `BlockTable`.

    Attributes:
        slots: int32 [n k], in sorted order.
        places: int32 [most blocks].
        firsts: int32 [most blocks].
        ends: int32 [most blocks].
        starts: int32 [F + 1].
    """

    slots: Tensor
    places: Tensor
    firsts: Tensor
    ends: Tensor
    starts: Tensor


@triton.jit
def _load_block(blocks, block, Z: tl.constexpr):
    """A block's expert in the stack, positions [Z] in sorted order, and which of them it has."""
    positions = tl.load(blocks.firsts + block) + tl.arange(0, Z)
    is_slot = positions < tl.load(blocks.ends + block)
    return tl.load(blocks.places + block), positions, is_slot


@triton.jit(do_not_specialize=["number", "n_slots", "tiles_per_split"])
def gate_up_kernel(
    x_ptr,  # [n, H], contiguous
    out_ptr,  # [n k, I], or float32 [L, n k, 2 I padded] of parts; rows in sorted order
    blocks,  # `RoutedBlocks`
    stack,  # `StoredMatrix`; global scales are gate's and up's of each expert
    number,  # of the format
    n_slots,  # n k
    n_choices,  # k
    out_cols,  # I, or 2 I padded of parts
    tiles_per_split,
    DECODING: tl.constexpr,
    EVEN: tl.constexpr,
    WRITES: tl.constexpr,  # "gated", or parts: of "both", of "gate" alone or of "up" alone
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """silu(gate) * up for a block of slots and B / 2 of their I numbers, or parts of gate and up.

    Parts have gate and up in turns, whichever of them this launch computes.

    Grid: (most blocks of the format, rows of an expert / B, L).
    """
    block = tl.load(blocks.starts + number) + tl.program_id(0)
    if block >= tl.load(blocks.starts + number + 1):
        return
    place, positions, is_slot = _load_block(blocks, block, Z)
    slots = tl.load(blocks.slots + positions, mask=is_slot, other=0)
    x_at = x_ptr + (slots // n_choices).to(tl.int64) * stack.n_cols  # [Z]
    rows = tl.program_id(1) * B + tl.arange(0, B)
    stack_rows = place * (tl.num_programs(1) * B) + rows  # the grid has the rows of an expert
    acc = multiply_tiles(x_at, is_slot, stack, stack_rows, tiles_per_split, DECODING, EVEN)
    if stack.global_scales is not None:
        if WRITES == "gated" or WRITES == "both":
            sides = rows // _HALF % 2  # 0 for gate, 1 for up
            acc *= load_global(stack, 2 * place + sides, DECODING)[:, None]
        else:
            acc *= load_global(stack, place, DECODING)
    if WRITES != "gated":
        out_rows = tl.program_id(2).to(tl.int64) * n_slots + positions  # [Z]
        if WRITES != "both":
            rows = rows // _HALF * (2 * _HALF) + rows % _HALF
        if WRITES == "up":
            rows += _HALF
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
    blocks,  # `RoutedBlocks`
    stack,  # `StoredMatrix`; one global scale per expert
    number,  # of the format
    n_slots,  # n k
    hidden,  # H
    tiles_per_split,
    DECODING: tl.constexpr,
    EVEN: tl.constexpr,
    B: tl.constexpr,
    Z: tl.constexpr,
):
    """Weighted outputs, or parts of them, for a block of slots and B of their H numbers.

    Grid: (most blocks of the format, rows of an expert / B, L).
    """
    block = tl.load(blocks.starts + number) + tl.program_id(0)
    if block >= tl.load(blocks.starts + number + 1):
        return
    place, positions, is_slot = _load_block(blocks, block, Z)
    x_at = x_ptr + positions.to(tl.int64) * stack.n_cols  # [Z]
    rows = tl.program_id(1) * B + tl.arange(0, B)
    stack_rows = place * (tl.num_programs(1) * B) + rows  # the grid has the rows of an expert
    acc = multiply_tiles(x_at, is_slot, stack, stack_rows, tiles_per_split, DECODING, EVEN)
    slots = tl.load(blocks.slots + positions, mask=is_slot, other=0)
    factors = tl.load(weights_ptr + slots, mask=is_slot, other=0.0).to(tl.float32)
    if stack.global_scales is not None:
        factors *= load_global(stack, place, DECODING)
    out_rows = tl.program_id(2).to(tl.int64) * n_slots + slots  # [Z]
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
    order, is_apart = plan.order, len(experts.gate_up) > 1
    # The parts of gate and of up are as many, though their formats may differ in number.
    n_splits = min(own[0].n_splits for own in configs)
    out = gated = x.new_empty(len(order.slots), experts.width)
    written = ("gate", "up") if is_apart else ("both" if n_splits > 1 else "gated",)
    if written != ("gated",):
        n_cols = sum(stacks.expert_rows for stacks in experts.gate_up)
        out = x.new_empty(n_splits, len(order.slots), n_cols, dtype=torch.float32)
    for side, (stacks, own) in enumerate(zip(experts.gate_up, configs, strict=True)):
        for number, stack in enumerate(stacks.stacks):
            launch = replace(own[number], n_splits=n_splits)
            gate_up_kernel[_grid(stacks, plan.blocks[side], number, launch)](
                *(x, out, _blocks_of(order, plan.blocks[side]), matrix_of(stack), number),
                *(len(order.slots), n_choices, out.shape[-1]),
                triton.cdiv(stack.n_tiles, n_splits),
                **_constants(stack, x, launch),
                WRITES=written[side],
            )
    if out is not gated:
        gate_parts(out, gated, order)
    return gated


def _down(
    gated: Tensor,
    weights: Tensor,
    plan: SlotPlan,
    experts: GroupedExperts,
    configs: Sequence[GroupedConfig],
) -> Tensor:
    """Weighted outputs of every slot, [L, n k, H], rows in the order of slots."""
    stacks, table, n_splits = experts.down, plan.blocks[-1], configs[0].n_splits
    dtype = gated.dtype if n_splits == 1 else torch.float32
    parts = gated.new_empty(n_splits, weights.numel(), experts.hidden, dtype=dtype)
    for number, stack in enumerate(stacks.stacks):
        down_kernel[_grid(stacks, table, number, configs[number])](
            *(gated, parts, weights, _blocks_of(plan.order, table), matrix_of(stack), number),
            *(weights.numel(), experts.hidden),
            triton.cdiv(stack.n_tiles, n_splits),
            **_constants(stack, gated, configs[number]),
        )
    return parts


def _grid(
    stacks: ExpertStacks, table: BlockTable, number: int, config: GroupedConfig
) -> tuple[int, int, int]:
    return (table.most[number], stacks.expert_rows // config.block_rows, config.n_splits)


def _blocks_of(order: SortedSlots, table: BlockTable) -> RoutedBlocks:
    return RoutedBlocks(order.slots, table.places, table.firsts, table.ends, table.starts)


def _constants(stack: KernelWeight, x: Tensor, config: GroupedConfig) -> dict[str, object]:
    """Compile-time arguments, and how both kernels are launched."""
    return {
        "DECODING": decoding_of(stack, x.dtype, use_asm=can_use_asm(x)),
        "EVEN": stack.cols % TILE_COLS == 0,
        "B": config.block_rows,
        "Z": config.block_slots,
        "num_warps": config.n_warps,
        "num_stages": config.n_stages,
    }
