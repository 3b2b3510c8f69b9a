# mypy: ignore-errors
"""A layer of packed experts on its routed tokens, in Triton: any format per expert and matrix.

    y[t] = sum over j of weight[t, j] * down(silu(gate(x[t])) * up(x[t]))   of expert id[t, j]

Three steps on the tables of `alphaquant.kernels.moe_plan`. Per format of gate and up one launch
multiplies the tokens of its experts with both and writes the gated products, one row per sorted
slot. Per format of down one launch multiplies those rows and writes each one, weighted, to its
slot. A last kernel adds the slots of every token from first to last, so that results do not
depend on timing. Launches and grids depend on n, k and the formats only: programs beyond the
number of blocks, which only the device knows, return at once.

Numbers are those of `alphaquant.kernels.linear_triton`: products and sums in float32, and gating
too; rows between the steps have the type of x.

Limits: the gating function is silu(gate) * up, and experts have no biases; every matrix has a
kernel order, so none is bfloat16; columns are not split over programs. Nothing here was run on a
GPU: the tests run it in Triton's interpreter and compile it for sm_90.

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width, T tiles of 128
columns, Z slots of a block; P, N, Q, S, C as in `alphaquant.kernels.order`.
"""

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
from alphaquant.kernels.linear_triton import (
    IS_INTERPRETED,
    can_use_asm,
    constants_of,
    pointers_of,
)
from alphaquant.kernels.moe_plan import (
    BlockTable,
    ExpertStacks,
    GroupedExperts,
    SortedSlots,
    cut_blocks,
    default_block_slots,
    sort_slots,
)
from alphaquant.kernels.order import TILE_COLS, TILE_ROWS, KernelWeight

_N_WARPS, _N_STAGES = 4, 3
_SUM_BLOCK = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _multiply(
    x_at,  # pointers [1, Z] to the first column of each row of activations
    is_slot,  # [Z]
    rows,  # [128], of the stack
    words_ptr,  # uint8 [P, T, stack's rows, 16 Q]
    scales_ptr,  # [S, stack's rows, C]
    zeros_ptr,  # uint8 [S, stack's rows, C], or anything if not HAS_ZEROS
    n_cols,
    stack_rows,
    n_tiles,
    tiles_per_step,
    plane_bytes,
    body: tl.constexpr,
    SCALE_KIND: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    Z: tl.constexpr,
):
    """Rows of a matrix times a block of slots, without global scale, float32 [128, Z]."""
    columns = tl.arange(0, 128)
    # 64 bits: the planes of a stack together may have more than 2^31 bytes
    plane_bytes = plane_bytes.to(tl.int64)
    acc = tl.full((128, Z), 0.0, tl.float32)
    for tile in range(n_tiles):
        step = tile // tiles_per_step
        w = load_tile(words_ptr, tile, rows, stack_rows, plane_bytes, body, DTYPE)  # [128, 128]
        is_inside = is_slot[None, :]
        if not EVEN:
            is_inside = is_inside & (columns[:, None] < n_cols - tile * 128)
        x = tl.load(x_at + tile * 128 + columns[:, None], mask=is_inside, other=0.0)  # [128, Z]
        if HAS_ZEROS:
            zeros = load_zeros(zeros_ptr, step, rows, stack_rows, C, MIDDLE)
            w = w - spread(zeros.to(DTYPE), 128, C)
        if C == 1:
            scales = load_scales(scales_ptr, step, rows, stack_rows, C, SCALE_KIND, tl.float32)
            acc += tl.dot(w, x, input_precision="ieee") * scales
        else:
            scales = load_scales(scales_ptr, step, rows, stack_rows, C, SCALE_KIND, DTYPE)
            acc = tl.dot(w * spread(scales, 128, C), x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["number"])
def gate_up_kernel(
    x_ptr,  # [n, H], contiguous
    out_ptr,  # [n k, I], rows in sorted order
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
    n_choices,  # k
    n_cols,  # H
    width,  # I
    expert_rows,
    stack_rows,
    n_tiles,
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
    Z: tl.constexpr,
):
    """silu(gate) * up for a block of slots and 64 of their I numbers.

    Grid: (most blocks of the format, rows of an expert / 128).
    """
    block = tl.load(starts_ptr + number) + tl.program_id(0)
    if block >= tl.load(starts_ptr + number + 1):
        return
    place = tl.load(places_ptr + block)
    positions = tl.load(firsts_ptr + block) + tl.arange(0, Z)  # [Z]
    is_slot = positions < tl.load(ends_ptr + block)
    slots = tl.load(slots_ptr + positions, mask=is_slot, other=0)
    tokens = (slots // n_choices).to(tl.int64)
    acc = _multiply(
        x_ptr + tokens[None, :] * n_cols,
        is_slot,
        place * expert_rows + tl.program_id(1) * 128 + tl.arange(0, 128),
        *(words_ptr, scales_ptr, zeros_ptr),
        *(n_cols, stack_rows, n_tiles, tiles_per_step, plane_bytes),
        *(body, SCALE_KIND, C, MIDDLE, HAS_ZEROS, EVEN, DTYPE, Z),
    )
    gate, up = tl.split(acc.reshape(2, 64, Z).trans(1, 2, 0))  # [64, Z] each
    if HAS_GLOBAL:
        gate *= load_global(global_ptr + 2 * place, SCALE_KIND)
        up *= load_global(global_ptr + 2 * place + 1, SCALE_KIND)
    rows = tl.program_id(1) * 64 + tl.arange(0, 64)
    at = positions[None, :].to(tl.int64) * width + rows[:, None]  # [64, Z]
    is_inside = is_slot[None, :] & (rows[:, None] < width)
    # e^80 is finite, and what it divides is zero in any type of x
    gated = gate / (1.0 + tl.exp(tl.minimum(-gate, 80.0))) * up
    tl.store(out_ptr + at, gated.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["number"])
def down_kernel(
    x_ptr,  # [n k, I], rows in sorted order
    out_ptr,  # [n k, H], rows in the order of slots
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
    n_cols,  # I
    hidden,  # H
    expert_rows,
    stack_rows,
    n_tiles,
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
    Z: tl.constexpr,
):
    """Weighted outputs for a block of slots and 128 of their H numbers.

    Grid: (most blocks of the format, rows of an expert / 128).
    """
    block = tl.load(starts_ptr + number) + tl.program_id(0)
    if block >= tl.load(starts_ptr + number + 1):
        return
    place = tl.load(places_ptr + block)
    positions = tl.load(firsts_ptr + block) + tl.arange(0, Z)  # [Z]
    is_slot = positions < tl.load(ends_ptr + block)
    rows = tl.program_id(1) * 128 + tl.arange(0, 128)
    acc = _multiply(
        x_ptr + positions[None, :].to(tl.int64) * n_cols,
        is_slot,
        place * expert_rows + rows,
        *(words_ptr, scales_ptr, zeros_ptr),
        *(n_cols, stack_rows, n_tiles, tiles_per_step, plane_bytes),
        *(body, SCALE_KIND, C, MIDDLE, HAS_ZEROS, EVEN, DTYPE, Z),
    )
    slots = tl.load(slots_ptr + positions, mask=is_slot, other=0)
    factors = tl.load(weights_ptr + slots, mask=is_slot, other=0.0).to(tl.float32)
    if HAS_GLOBAL:
        factors *= load_global(global_ptr + place, SCALE_KIND)
    at = slots[None, :].to(tl.int64) * hidden + rows[:, None]  # [128, Z]
    is_inside = is_slot[None, :] & (rows[:, None] < hidden)
    weighted = acc * factors[None, :]
    tl.store(out_ptr + at, weighted.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def add_slots_kernel(
    slots_ptr,  # [n k, H]; rows of skipped slots hold anything
    ids_ptr,  # int64 [n, k], 0 .. E - 1 where they are to be added
    out_ptr,  # [n, H]
    first_expert,
    n_experts,  # E
    n_choices,  # k
    hidden,  # H
    BLOCK: tl.constexpr,
):
    """Sum of each token's slots from first to last. Grid: (n, ceil(H / BLOCK))."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for j in range(n_choices):
        slot = token * n_choices + j
        expert = tl.load(ids_ptr + slot) - first_expert
        if (expert >= 0) & (expert < n_experts):
            at = slots_ptr + slot * hidden + columns
            total += tl.load(at, mask=columns < hidden, other=0.0)
    out_at = out_ptr + token * hidden + columns
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=columns < hidden)


def grouped_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: GroupedExperts,
    *,
    block_slots: int | None = None,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: [n, H], float16, bfloat16 or float32, on the experts' device.
        expert_ids: integers [n, k]; ids that are none of these experts add nothing.
        weights: [n, k] of any float dtype.
        experts: from `alphaquant.kernels.moe_plan.stack_experts`.
        block_slots: Z, 16, 32 or 64; by default from n, k and the number of experts.

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
        wide = grouped_moe(x.float(), expert_ids, weights, experts, block_slots=block_slots)
        return wide.to(x.dtype)
    n_slots = expert_ids.numel()
    n_block_slots = block_slots or default_block_slots(n_slots, experts.n_experts)
    order = sort_slots(expert_ids, experts.n_experts, experts.first_expert)
    gated = x.new_empty(n_slots, experts.width)
    _launch_gate_up(x.contiguous(), gated, order, expert_ids.shape[1], experts, n_block_slots)
    outputs = x.new_empty(n_slots, experts.hidden)
    _launch_down(gated, outputs, weights.contiguous(), order, experts, n_block_slots)
    return _add_slots(outputs, expert_ids.to(torch.int64).contiguous(), experts)


def _launch_gate_up(
    x: Tensor,
    out: Tensor,
    order: SortedSlots,
    n_choices: int,
    experts: GroupedExperts,
    block_slots: int,
) -> None:
    blocks = cut_blocks(order, experts.gate_up.formats, block_slots)
    for number, stack in enumerate(experts.gate_up.stacks):
        gate_up_kernel[_grid(experts.gate_up, blocks, number)](
            *(x, out, *_tables(order, blocks), *pointers_of(stack)),
            *(number, n_choices, experts.hidden, experts.width),
            *_strides(experts.gate_up, stack),
            **_constants(stack, x, block_slots),
        )


def _launch_down(
    x: Tensor,
    out: Tensor,
    weights: Tensor,
    order: SortedSlots,
    experts: GroupedExperts,
    block_slots: int,
) -> None:
    blocks = cut_blocks(order, experts.down.formats, block_slots)
    for number, stack in enumerate(experts.down.stacks):
        down_kernel[_grid(experts.down, blocks, number)](
            *(x, out, weights, *_tables(order, blocks), *pointers_of(stack)),
            *(number, experts.width, experts.hidden),
            *_strides(experts.down, stack),
            **_constants(stack, x, block_slots),
        )


def _add_slots(slots: Tensor, expert_ids: Tensor, experts: GroupedExperts) -> Tensor:
    n_tokens, n_choices = expert_ids.shape
    out = slots.new_empty(n_tokens, experts.hidden)
    add_slots_kernel[(n_tokens, triton.cdiv(experts.hidden, _SUM_BLOCK))](
        *(slots, expert_ids, out, experts.first_expert, experts.n_experts),
        *(n_choices, experts.hidden),
        BLOCK=_SUM_BLOCK,
    )
    return out


def _grid(stacks: ExpertStacks, blocks: BlockTable, number: int) -> tuple[int, int]:
    return (blocks.most[number], stacks.expert_rows // TILE_ROWS)


def _tables(order: SortedSlots, blocks: BlockTable) -> tuple[Tensor, ...]:
    return order.slots, blocks.places, blocks.firsts, blocks.ends, blocks.starts


def _strides(stacks: ExpertStacks, stack: KernelWeight) -> tuple[int, ...]:
    """Rows of an expert and of the stack, tiles, tiles per step, bytes of a plane."""
    return (
        *(stacks.expert_rows, stack.words.shape[2], stack.n_tiles),
        *(stack.tiles_per_step, stack.words[0].numel()),
    )


def _constants(stack: KernelWeight, x: Tensor, block_slots: int) -> dict[str, object]:
    """Compile-time arguments, and how both kernels are launched."""
    return constants_of(stack, x.dtype, use_asm=can_use_asm(x)) | {
        "EVEN": stack.cols % TILE_COLS == 0,
        "Z": block_slots,
        "num_warps": _N_WARPS,
        "num_stages": _N_STAGES,
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
