"""Routed slots of a grouped MoE layer: sorted by expert, and cut into blocks or rows by format.

Slot t k + j is the j-th choice of token t. Slots are sorted by expert, and the slots of each
expert are cut into blocks; a block times 64 or 128 rows of the expert's matrix is what one program
of `alphaquant.kernels.moe.launch_triton` computes. Formats of the two products of an expert may
differ (`alphaquant.kernels.moe.plan`), so each has its own table.

Nothing here looks at a value on the host: shapes depend on the shapes of the arguments only, so
that routing, too, can be captured in a CUDA graph. Tables have as many entries as the worst case
needs, and their `starts` say on the device how many there are.

Worked example. Experts 0 and 2 are int4, expert 1 is int8; k = 2, blocks of 2 slots, three tokens
choose experts (0, 1), (2, 0), (0, 9), and 9 is padding::

    sorted slots    0 3 4 | 1 | 2 | 5      experts 0, 1, 2, none; starts 0 3 4 5
    order           0 2 | 1                experts of int4, then those of int8; places 0 1 | 0
    blocks          int4: place 0, positions 0-1; place 0, position 2; place 1, position 4
                    int8: place 0, position 3
    starts          0 3 4                  of the blocks of int4, of int8, end
    most blocks     4 in all; 4 of int4, 3 of int8
    rows            positions 0 1 2 4 | 3 ..; starts 0 4 5; ends 3 4 | 1

Letters: n tokens, k experts per token, E experts of this rank, F formats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.kernels.moe.plan import FormatOrder


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


@dataclass(frozen=True)
class RowTable:
    """Single slots in the order of the formats, for products of whole formats.

    Attributes:
        positions: int32 [n k], positions in `SortedSlots.slots`; from the last of `starts` on
            they are positions of any slots.
        starts: int32 [F + 1], the first entry of each format.
        ends: per format int32 [experts of the format], the end of each expert's slots, counted
            from the format's first.
    """

    positions: Tensor
    starts: Tensor
    ends: tuple[Tensor, ...]


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


def order_rows(sorted_slots: SortedSlots, formats: FormatOrder) -> RowTable:
    """Order each expert's slots by format.

    Args:
        sorted_slots: of all tokens, at least one.
        formats: of the matrix that the rows are multiplied with.
    """
    table = cut_blocks(sorted_slots, formats, 1)
    counts = sorted_slots.starts.diff()[formats.order]  # [E]
    ends = [part.cumsum(0).to(torch.int32) for part in torch.split(counts, list(formats.sizes))]
    positions = table.firsts.clamp(max=len(sorted_slots.slots) - 1)
    return RowTable(positions, table.starts, tuple(ends))


def most_blocks(n_slots: int, n_experts: int, block_slots: int) -> int:
    """The most blocks that any routing of slots to experts can need.

    An active expert has one block and one more for each further `block_slots` slots. The sum is
    largest with as many active experts as possible: A + (n_slots - A) // block_slots.
    """
    n_active = min(n_slots, n_experts)
    return n_active + (n_slots - n_active) // block_slots
