# mypy: ignore-errors
"""The dense path of a MoE layer, for many slots per expert: dequantize once, multiply with torch.

Per format the stack is dequantized to the type of x, the rows of its experts are gathered beside
each other, and `torch.nn.functional.grouped_mm` multiplies them all. At most one format's
dequantized stack exists at a time. Rows of gate and up alternate in the result as in the stack,
and the gating kernel reads them so; where they have stacks of their own, torch gates. Nothing
waits for the device.

Numbers: weights are rounded once to the type of x, products have float32 sums, and what torch
returns is rounded to that type before gating and weighting, which are float32.

Letters: n tokens, k experts per token, E experts, F formats, K columns, H hidden size, I width.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from alphaquant.kernels.linear.product_triton import dequantize_packed
from alphaquant.kernels.moe.plan import HALF_ROWS, ExpertStacks, GroupedExperts
from alphaquant.kernels.moe.rows_triton import gate_rows, gather_rows, weigh_rows
from alphaquant.kernels.moe.slots import SortedSlots, order_rows, sort_slots

_ALIGNMENT = 16


def can_multiply_dense(x: Tensor, experts: GroupedExperts) -> bool:
    """Whether torch's grouped product serves a layer without waiting for the device.

    On CUDA that is bfloat16 on compute capability 9 or 10: for other types and devices torch 2.13
    copies the sizes of the groups to the host. On the CPU, which tests use, float32. Rows must be
    multiples of 16 bytes: H and I multiples of 8 in bfloat16.
    """
    sizes = (experts.hidden, experts.width)
    if any(size * x.element_size() % _ALIGNMENT for size in sizes):
        return False
    if not x.is_cuda:
        return x.device.type == "cpu" and x.dtype == torch.float32
    is_served = torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    return is_served and x.dtype == torch.bfloat16


def multiply_dense(
    x: Tensor, expert_ids: Tensor, weights: Tensor, experts: GroupedExperts
) -> Tensor:
    """Weighted outputs of every slot.

    Args:
        x: [n, H], contiguous, such that `can_multiply_dense`.
        expert_ids: integers [n, k].
        weights: [n, k], contiguous.
        experts: the layer.

    Returns:
        [1, n k, H], rows in the order of slots; those of skipped slots hold anything.
    """
    order = sort_slots(expert_ids, experts.n_experts, experts.first_expert)
    gated = _gate_up(x, order, expert_ids.shape[1], experts)
    return _down(gated, weights, order, experts)[None]


def _gate_up(x: Tensor, order: SortedSlots, n_choices: int, experts: GroupedExperts) -> Tensor:
    """silu(gate) * up of every slot, [n k, I], rows in sorted order."""
    if len(experts.gate_up) > 1:
        gate, up = (
            _side(x, order, n_choices, stacks, experts.width).to(torch.float32)
            for stacks in experts.gate_up
        )
        return (silu(gate) * up).to(x.dtype)
    (stacks,) = experts.gate_up
    table = order_rows(order, stacks.formats)
    tokens = order.slots[table.positions] // n_choices  # [n k]
    gated = x.new_empty(len(tokens), experts.width)
    for number in range(len(stacks.stacks)):
        rows = gather_rows(x, tokens, table, number)
        both = _multiply(rows, stacks, number, table.ends[number])
        gate_rows(both[None], gated, table, number)
    return gated


def _side(
    x: Tensor, order: SortedSlots, n_choices: int, stacks: ExpertStacks, width: int
) -> Tensor:
    """Gate or up of every slot, [n k, I], rows in sorted order."""
    table = order_rows(order, stacks.formats)
    tokens = order.slots[table.positions] // n_choices  # [n k]
    outputs, ones = x.new_empty(len(tokens), width), x.new_ones(len(tokens))
    for number in range(len(stacks.stacks)):
        rows = gather_rows(x, tokens, table, number)
        products = _multiply(rows, stacks, number, table.ends[number])
        weigh_rows(products, outputs, ones, table.positions, table, number)
    return outputs


def _down(gated: Tensor, weights: Tensor, order: SortedSlots, experts: GroupedExperts) -> Tensor:
    """Weighted outputs of every slot, [n k, H], rows in the order of slots."""
    table = order_rows(order, experts.down.formats)
    slots = order.slots[table.positions]  # [n k]
    outputs = gated.new_empty(len(slots), experts.hidden)
    for number in range(len(experts.down.stacks)):
        rows = gather_rows(gated, table.positions, table, number)
        products = _multiply(rows, experts.down, number, table.ends[number])
        weigh_rows(products, outputs, weights, slots, table, number)
    return outputs


def _multiply(rows: Tensor, stacks: ExpertStacks, number: int, ends: Tensor) -> Tensor:
    """Rows [n k, K] of one format's experts times their matrices: [n k, rows of an expert].

    Rows from the last of `ends`, int32 [experts of the format], on give anything.
    """
    dense = _dequantize(stacks, number, rows.dtype)
    return grouped_mm(rows, dense.transpose(1, 2), offs=ends)


def _dequantize(stacks: ExpertStacks, number: int, dtype: torch.dtype) -> Tensor:
    """The matrices of one format's experts, padding included, [experts, rows, K].

    The dequantizing kernel takes one global scale, and a stack has one per matrix. Without it a
    weight of nvfp4 is exact in 16 bits, so that multiplying afterwards rounds once as well.
    """
    stack, size = stacks.stacks[number], stacks.formats.sizes[number]
    shared = stack.global_scale
    if shared is None:
        return dequantize_packed(stack, dtype).view(size, stacks.expert_rows, stack.cols)
    # folding needs the global scale
    dense = dequantize_packed(replace(stack, global_scale=None, is_foldable=False), dtype)
    # gate and up have two per expert, in turns
    halves = dense.view(size, -1, len(shared) // size, HALF_ROWS, stack.cols)
    halves *= shared.view(size, 1, -1, 1, 1)
    return dense.view(size, stacks.expert_rows, stack.cols)
