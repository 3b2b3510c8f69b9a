"""How grouped kernels are launched: the worked example, and the bounds of every choice."""

import pytest
import torch

from alphaquant.errors import FormatError
from alphaquant.kernels.moe.config import (
    GroupedConfig,
    configs_of,
    default_block_slots,
    default_config,
    warps_of,
)
from alphaquant.kernels.moe.plan import ExpertStacks, order_by_format
from alphaquant.kernels.order import KernelWeight


def stacks_of(rows: int, cols: int, sizes: tuple[int, ...], scales: int = 1) -> ExpertStacks:
    """A product without numbers: int4, `sizes` experts per format."""
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    stacks = tuple(
        KernelWeight(
            *("int4", size * rows, cols, 128 // scales),
            torch.empty(1, cols // 128, size * rows, 64, dtype=torch.uint8, device="meta"),
            torch.empty(cols // 128, size * rows, scales, dtype=torch.float16, device="meta"),
        )
        for size in sizes
    )
    return ExpertStacks(stacks, order_by_format(numbers, torch.device("cpu")), rows)


@pytest.mark.parametrize(
    ("purpose", "sizes", "n_slots", "expected"),
    [
        ("the worked example", (64,), 8, (16, 64, 4, 1)),
        ("the worked example in four formats", (16,) * 4, 8, (16, 64, 4, 4)),
        ("one active expert, as many splits as have four tiles", (64,), 1, (16, 64, 4, 4)),
        ("enough experts for large programs", (64,), 64, (16, 128, 4, 1)),
        ("blocks of 32", (64,), 2048, (32, 128, 4, 1)),
        ("blocks of 64 need more warps", (64,), 8192, (64, 128, 8, 1)),
        ("more formats than slots", (1,) * 64, 2, (16, 64, 4, 4)),
    ],
)
def test_programs_fill_a_gpu(
    purpose: str, sizes: tuple[int, ...], n_slots: int, expected: tuple[int, ...]
) -> None:
    stacks = stacks_of(2048, 2048, sizes)
    for number in range(len(sizes)):
        found = default_config(stacks, number, n_slots)
        shape = (found.block_slots, found.block_rows, found.n_warps, found.n_splits)
        assert shape == expected, purpose


def test_few_tiles_are_not_split() -> None:
    assert default_config(stacks_of(2048, 896, (64,)), 0, 1).n_splits == 1
    assert default_config(stacks_of(2048, 1024, (64,)), 0, 1).n_splits == 2


def test_only_one_scale_per_step_takes_more_warps() -> None:
    assert [warps_of(1, z, 128) for z in (16, 32, 64)] == [4, 4, 8]
    assert (warps_of(1, 64, 64), warps_of(2, 64, 128)) == (4, 4)
    assert default_config(stacks_of(2048, 2048, (64,), scales=4), 0, 8192).n_warps == 4


def test_formats_of_a_product_have_one_size_of_blocks_and_splits_within_the_tiles() -> None:
    stacks = stacks_of(256, 384, (2, 3))
    given = GroupedConfig(32, 64, n_splits=9)
    assert configs_of(stacks, 5, given) == [GroupedConfig(32, 64, n_splits=3)] * 2
    assert configs_of(stacks, 5) == [default_config(stacks, number, 5) for number in range(2)]


@pytest.mark.parametrize(
    ("n_slots", "n_experts", "expected"),
    [(1, 64, 16), (1024, 64, 16), (1088, 64, 32), (4096, 64, 32), (4160, 64, 64), (9, 1, 16)],
)
def test_blocks_grow_with_the_slots_per_expert(
    n_slots: int, n_experts: int, expected: int
) -> None:
    assert default_block_slots(n_slots, n_experts) == expected


def test_programs_that_do_not_exist_are_refused() -> None:
    with pytest.raises(FormatError, match="block_slots=8; it is one of 16, 32, 64"):
        GroupedConfig(8)
    with pytest.raises(FormatError, match="block_rows=32; it is one of 64, 128"):
        GroupedConfig(16, 32)
    with pytest.raises(FormatError, match="n_warps=2; it is one of 4, 8"):
        GroupedConfig(16, n_warps=2)
    with pytest.raises(FormatError, match="n_splits=0.*at least 1"):
        GroupedConfig(16, n_splits=0)
