"""How grouped kernels are launched: the one place that chooses, from sizes and formats.

Nothing here was timed. Warps follow from compiling (registers and spills), the rest from filling
a GPU with programs. A layer has one size of blocks and one number of splits per product, because
the formats of a product share tables and results; rows, warps and stages may differ by format.
Slots of other ranks count as this rank's own: only the device knows which they are.

Letters: n tokens, k experts per token, E experts, F formats of a product, Z slots of a block, B
rows of a program, T tiles of 128 columns, C scales per row and step.
"""

from dataclasses import dataclass, replace

from alphaquant.errors import FormatError
from alphaquant.kernels.moe.plan import ExpertStacks
from alphaquant.kernels.moe.slots import most_blocks
from alphaquant.kernels.order import BFLOAT16, TILE_ROWS

DENSE_SLOTS = 256
"""From this average of slots per expert on, weights are dequantized once and multiplied by torch.

A guess that no measurement supports: with blocks of 64 slots the packed kernels would dequantize
an expert four times.
"""

_PROGRAMS = 264
"""Programs that fill a GPU: two for each of the 132 multiprocessors of an H100 or H200."""

_TILES_PER_SPLIT = 4

_POSSIBLE = {
    "block_slots": (16, 32, 64),
    "block_rows": (64, 128),
    "n_warps": (4, 8),
}


@dataclass(frozen=True)
class GroupedConfig:
    """How one product of a layer is launched.

    Attributes:
        block_slots: Z, 16, 32 or 64.
        block_rows: B, 64 or 128 rows of an expert's matrix.
        n_warps: warps of a program, 4 or 8.
        n_stages: loads in flight.
        n_splits: programs that share the columns of a block; more than T count as T.
    """

    block_slots: int
    block_rows: int = 128
    n_warps: int = 4
    n_stages: int = 3
    n_splits: int = 1

    def __post_init__(self) -> None:
        for name, possible in _POSSIBLE.items():
            if getattr(self, name) not in possible:
                raise FormatError(
                    f"grouped kernels have no programs with {name}={getattr(self, name)}; it is "
                    f"one of {', '.join(map(str, possible))}: choose one of those"
                )
        if min(self.n_stages, self.n_splits) < 1:
            raise FormatError(
                f"n_stages={self.n_stages} and n_splits={self.n_splits} are asked for; both are "
                "at least 1: choose such numbers"
            )


def configs_of(
    stacks: ExpertStacks, n_slots: int, config: GroupedConfig | None = None
) -> list[GroupedConfig]:
    """How to launch each format of a product.

    Args:
        stacks: of the product.
        n_slots: n k.
        config: of all formats, if given; else the default of each.

    Returns:
        One per format, with equal block slots and equal splits, at most T.
    """
    found = [config or default_config(stacks, i, n_slots) for i in range(len(stacks.stacks))]
    assert len({(c.block_slots, c.n_splits) for c in found}) == 1, found
    n_splits = min(found[0].n_splits, stacks.stacks[0].n_tiles)
    return [replace(c, n_splits=n_splits) for c in found]


def default_config(stacks: ExpertStacks, number: int, n_slots: int) -> GroupedConfig:
    """How to launch the kernel of one format of a product.

    Worked example, one token of a layer with k = 8, E = 64, I = 1024, H = 2048 in one format:
    eight experts are active, and gate and up have 16 times 128 rows each, so that 128-row
    programs are 128 for 132 multiprocessors. 64-row programs are 256; columns are not split.
    In four formats a launch has two active experts, 64 programs, and columns are split by four.

    Args:
        stacks: of the product.
        number: of the format.
        n_slots: n k.

    Returns:
        The configuration; `block_slots` and `n_splits` do not depend on the format.
    """
    n_experts, n_formats = len(stacks.formats.order), len(stacks.stacks)
    block_slots = default_block_slots(n_slots, n_experts)
    n_blocks = max(1, most_blocks(n_slots, n_experts, block_slots) // n_formats)
    n_programs = n_blocks * stacks.expert_rows // TILE_ROWS
    block_rows = TILE_ROWS
    if n_programs < _PROGRAMS:
        block_rows, n_programs = TILE_ROWS // 2, 2 * n_programs
    most_splits = stacks.stacks[0].n_tiles // _TILES_PER_SPLIT
    stack = stacks.stacks[number]
    return GroupedConfig(
        block_slots,
        block_rows,
        warps_of(int(stack.scales.shape[2]), block_slots, block_rows),
        stages_of(stack.element),
        n_splits=max(1, min(_PROGRAMS // n_programs, most_splits)),
    )


def warps_of(scales_per_step: int, block_slots: int, block_rows: int) -> int:
    """Warps of a program: four, where its registers suffice.

    With one scale per step a lane holds the sums and, before they are scaled, the products of a
    tile. For 128 rows and 64 slots four warps then need all 255 registers, and some formats spill
    (`int4-g128` and `int6-g128`: 8 bytes). With more scales per step no format that was compiled
    needs more than 184.

    Args:
        scales_per_step: C of the format.
        block_slots: Z.
        block_rows: B.
    """
    return 8 if (scales_per_step, block_slots, block_rows) == (1, 64, 128) else 4


def stages_of(element: str) -> int:
    """Loads in flight: three, or two where weights are not packed.

    A tile of bfloat16 weights has 32 KB, and three of them with their activations (108 KB) exceed
    the shared memory of smaller GPUs, 99 KB.
    """
    return 2 if element == BFLOAT16 else 3


def default_block_slots(n_slots: int, n_experts: int) -> int:
    """Slots per block from the average slots per expert; a guess, not measured.

    16 is the least that tensor cores take here. Up to half of a block is padding on average, so
    larger ones wait until experts have several.
    """
    average = n_slots // n_experts
    return 16 if average <= 16 else 32 if average <= 64 else 64
