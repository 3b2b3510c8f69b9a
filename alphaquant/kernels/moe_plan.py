"""Work of a grouped MoE layer: experts stacked by format, and routed slots cut into blocks.

Slot t k + j is the j-th choice of token t. Slots are sorted by expert, and the slots of each
expert are cut into blocks; a block times 128 rows of the expert's matrix is what one program of
`alphaquant.kernels.grouped_triton` computes. The first and the second matrix of an expert may
have different formats, so each of the two products has its own stacks and its own table of blocks.

Nothing here looks at a value on the host: shapes depend on the shapes of the arguments only, so
that routing, too, can be captured in a CUDA graph. Tables have as many entries as the worst case
needs, and `BlockTable.starts` says on the device how many there are.

Worked example. Experts 0 and 2 are int4, expert 1 is int8; k = 2, blocks of 2 slots, three tokens
choose experts (0, 1), (2, 0), (0, 9), and 9 is padding::

    sorted slots    0 3 4 | 1 | 2 | 5      experts 0, 1, 2, none; starts 0 3 4 5
    order           0 2 | 1                experts of int4, then those of int8; places 0 1 | 0
    blocks          int4: place 0, positions 0-1; place 0, position 2; place 1, position 4
                    int8: place 0, position 3
    starts          0 3 4                  of the blocks of int4, of int8, end
    most blocks     4 in all; 4 of int4, 3 of int8

Letters: n tokens, k experts per token, E experts of this rank, F formats, H hidden size, I expert
width; P, T, N, Q, S, C as in `alphaquant.kernels.order`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.order import KernelWeight

HALF_ROWS = 64
"""Rows of gate, then rows of up, that alternate in a stack; together the 128 of a program."""


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one expert in kernel order.

    Attributes:
        gate: [I, H].
        up: [I, H], of gate's format.
        down: [H, I].
    """

    gate: KernelWeight
    up: KernelWeight
    down: KernelWeight


@dataclass(frozen=True)
class FormatOrder:
    """Experts in the order of their formats.

    Attributes:
        order: int64 [E], the experts of format 0, then those of format 1, and so on.
        places: int32 [E], which one of its format each expert of `order` is.
        last: int64 [F], index in `order` of the last expert of each format.
        sizes: experts of each format.
    """

    order: Tensor
    places: Tensor
    last: Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ExpertStacks:
    """One matrix of every expert, those of equal format below each other.

    Attributes:
        stacks: per format a weight with the padded rows of all its experts; its global scale, if
            any, has one number per matrix.
        formats: which expert is where.
        expert_rows: rows of one expert in a stack, a multiple of 128.
    """

    stacks: tuple[KernelWeight, ...]
    formats: FormatOrder
    expert_rows: int


@dataclass(frozen=True)
class GroupedExperts:
    """The experts of a layer, or of one rank of it, as grouped kernels take them.

    Attributes:
        gate_up: rows of gate and up alternate, `HALF_ROWS` of each.
        down: as they are.
        hidden: H.
        width: I.
        first_expert: number of the first one; the others follow it.
        n_experts: E.
    """

    gate_up: ExpertStacks
    down: ExpertStacks
    hidden: int
    width: int
    first_expert: int
    n_experts: int


@dataclass(frozen=True)
class SortedSlots:
    """Slots in the order of their experts.

    Attributes:
        slots: int32 [n k], slots of expert 0, of expert 1, and so on; those to skip are before
            and after them.
        starts: int64 [E + 1], position of each expert's first slot, and the end of the last one's.
    """

    slots: Tensor
    starts: Tensor


@dataclass(frozen=True)
class BlockTable:
    """Blocks of slots in the order of the formats.

    Attributes:
        places: int32 [most blocks], which one of its format the block's expert is.
        firsts: int32 [most blocks], position of the block's first slot.
        ends: int32 [most blocks], position after its last one.
        starts: int32 [F + 1], the first block of each format; entries of the others from the last
            start on mean nothing.
        most: per format the most blocks that there can be.
    """

    places: Tensor
    firsts: Tensor
    ends: Tensor
    starts: Tensor
    most: tuple[int, ...]


def stack_experts(experts: Sequence[ExpertWeights], first_expert: int = 0) -> GroupedExperts:
    """Copy experts into the layout of the grouped kernels.

    Args:
        experts: E of them, at least one, on one device.
        first_expert: number of the first one in the whole layer.

    Raises:
        FormatError: no expert, different sizes, or gate and up of different formats.
    """
    if not experts:
        raise FormatError("no experts to stack; a rank without experts has nothing to compute")
    width, hidden = experts[0].gate.rows, experts[0].gate.cols
    for number, expert in enumerate(experts, first_expert):
        _check_expert(number, expert, width, hidden)
    return GroupedExperts(
        gate_up=_stack([_alternate(expert.gate, expert.up) for expert in experts]),
        down=_stack([expert.down for expert in experts]),
        hidden=hidden,
        width=width,
        first_expert=first_expert,
        n_experts=len(experts),
    )


def order_by_format(formats: Sequence[int], device: torch.device) -> FormatOrder:
    """Put experts of equal format beside each other.

    Args:
        formats: number of each expert's format, each of 0 .. F - 1 at least once.
        device: of the tensors.
    """
    order = sorted(range(len(formats)), key=lambda expert: formats[expert])
    sizes = tuple(formats.count(number) for number in range(max(formats) + 1))
    places = [place for size in sizes for place in range(size)]
    last = torch.tensor(sizes).cumsum(0) - 1
    return FormatOrder(
        torch.tensor(order, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
        last.to(device),
        sizes,
    )


def sort_slots(expert_ids: Tensor, n_experts: int, first_expert: int = 0) -> SortedSlots:
    """Sort slots by expert, those of one expert in token order.

    Args:
        expert_ids: integers [n, k]. Ids outside of this rank's experts, be they of other ranks
            or padding, are skipped.
        n_experts: E.
        first_expert: number of this rank's first expert.
    """
    ids = expert_ids.reshape(-1).to(torch.int64) - first_expert
    by_expert = torch.sort(ids, stable=True)
    numbers = torch.arange(n_experts + 1, device=ids.device)
    # bincount would wait for the device to learn the largest id
    starts = torch.searchsorted(by_expert.values, numbers)
    return SortedSlots(by_expert.indices.to(torch.int32), starts)


def cut_blocks(sorted_slots: SortedSlots, formats: FormatOrder, block_slots: int) -> BlockTable:
    """Cut each expert's slots into blocks; an expert without slots gets none.

    Args:
        sorted_slots: of all tokens.
        formats: of the matrix that the blocks are multiplied with.
        block_slots: slots per block; the last one of an expert may have fewer.
    """
    n_slots, n_experts = len(sorted_slots.slots), len(formats.order)
    starts = sorted_slots.starts
    n_blocks = ((starts.diff() + block_slots - 1) // block_slots)[formats.order]  # [E]
    block_ends = n_blocks.cumsum(0)
    blocks = torch.arange(most_blocks(n_slots, n_experts, block_slots), device=starts.device)
    index = torch.searchsorted(block_ends, blocks, right=True).clamp(max=n_experts - 1)
    expert = formats.order[index]
    firsts = starts[expert] + block_slots * (blocks - (block_ends - n_blocks)[index])
    ends = torch.minimum(firsts + block_slots, starts[expert + 1])
    format_starts = torch.nn.functional.pad(block_ends[formats.last], (1, 0))
    return BlockTable(
        formats.places[index],
        firsts.to(torch.int32),
        ends.to(torch.int32),
        format_starts.to(torch.int32),
        tuple(most_blocks(n_slots, size, block_slots) for size in formats.sizes),
    )


def most_blocks(n_slots: int, n_experts: int, block_slots: int) -> int:
    """The most blocks that any routing of slots to experts can need.

    An active expert has one block and one more for each further `block_slots` slots. The sum is
    largest with as many active experts as possible: A + (n_slots - A) // block_slots.
    """
    n_active = min(n_slots, n_experts)
    return n_active + (n_slots - n_active) // block_slots


def default_block_slots(n_slots: int, n_experts: int) -> int:
    """Slots per block from the average slots per expert; a guess, not measured.

    16 is the least that tensor cores take here. Up to half of a block is padding on average, so
    larger ones wait until experts have several.
    """
    average = n_slots // n_experts
    return 16 if average <= 16 else 32 if average <= 64 else 64


def _check_expert(number: int, expert: ExpertWeights, width: int, hidden: int) -> None:
    shapes = [(m.rows, m.cols) for m in (expert.gate, expert.up, expert.down)]
    wanted = [(width, hidden), (width, hidden), (hidden, width)]
    if shapes != wanted:
        raise FormatError(
            f"gate, up and down of expert {number} are {shapes}; the first expert needs {wanted}: "
            "stack experts of equal sizes"
        )
    gate, up = _format_key(expert.gate), _format_key(expert.up)
    if gate != up:
        raise FormatError(
            f"gate and up of expert {number} have formats {gate} and {up}; one program computes "
            "both: give them one format, or compute this layer with torch"
        )


def _format_key(weight: KernelWeight) -> tuple[object, ...]:
    """What matrices have in common that one launch serves."""
    return (
        weight.element,
        min(weight.group_size, weight.cols),
        weight.scales.dtype,
        "symmetric" if weight.zeros is None else "asymmetric",
        "own scales" if weight.global_scale is None else "global scale",
    )


def _stack(weights: Sequence[KernelWeight]) -> ExpertStacks:
    """One stack per format, in the order in which formats first appear."""
    keys = [_format_key(weight) for weight in weights]
    distinct = list(dict.fromkeys(keys))
    formats = order_by_format([distinct.index(key) for key in keys], weights[0].words.device)
    members = [[w for w, own in zip(weights, keys, strict=True) if own == key] for key in distinct]
    stacks = tuple(_below_each_other(group) for group in members)
    return ExpertStacks(stacks, formats, int(weights[0].words.shape[2]))


def _below_each_other(weights: Sequence[KernelWeight]) -> KernelWeight:
    first = weights[0]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    shared = [weight.global_scale for weight in weights if weight.global_scale is not None]
    scales = torch.cat([_as_bytes(weight.scales) for weight in weights], -2)
    return replace(
        first,
        rows=len(weights) * int(first.words.shape[2]),
        words=torch.cat([weight.words for weight in weights], -2),
        scales=scales.view(first.scales.dtype),
        zeros=torch.cat(zeros, -2) if zeros else None,
        global_scale=torch.cat(shared) if shared else None,
    )


def _alternate(gate: KernelWeight, up: KernelWeight) -> KernelWeight:
    """Rows of both: 64 of gate, 64 of up, the next 64 of gate, and so on."""

    def mix(one: Tensor, other: Tensor) -> Tensor:
        """[.., N, C] twice -> [.., 2 N, C], any dtype."""
        shape = (*one.shape[:-2], one.shape[-2] // HALF_ROWS, HALF_ROWS, -1)
        halves = [_as_bytes(part).reshape(shape) for part in (one, other)]
        return torch.stack(halves, -3).flatten(-4, -2).view(one.dtype)

    zeros = None if gate.zeros is None or up.zeros is None else mix(gate.zeros, up.zeros)
    shared = [m.global_scale for m in (gate, up) if m.global_scale is not None]
    return replace(
        gate,
        rows=2 * gate.rows,
        words=mix(gate.words, up.words),
        scales=mix(gate.scales, up.scales),
        zeros=zeros,
        global_scale=torch.cat(shared) if shared else None,
    )


def _as_bytes(values: Tensor) -> Tensor:
    """The same memory as bytes: torch does not join tensors of every small float."""
    return values.contiguous().view(torch.uint8)
