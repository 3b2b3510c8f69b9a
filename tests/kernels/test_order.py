"""Kernel order: the worked examples of the header, where every column lies, exact inverses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import FormatError
from alphaquant.kernels import order
from alphaquant.testing.kernels import CASES, FORMATS, Case, check_order

ELEMENTS = sorted(order.LAYOUTS)


def draw_codes(element: str, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    high = 2 ** order.LAYOUTS[element].bits
    return torch.randint(0, high, (rows, cols), generator=generator, dtype=torch.uint8)


def test_the_worked_example_gives_its_word() -> None:
    codes = (torch.arange(128) % 16).to(torch.uint8)[None]
    words = order.to_kernel_order(codes, "int4")
    assert words.shape == (1, 1, 128, 64)
    assert words[0, 0, 0, :4].tolist() == [0x80, 0x80, 0x91, 0x91]


def test_spans_of_groups_of_96_take_the_scales_of_the_header() -> None:
    scales = torch.arange(4, dtype=torch.float16)[None]
    ordered = order.groups_to_kernel_order(scales, 96, 384)
    assert ordered.shape == (3, 128, 4)
    assert ordered[:, 0].flatten().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(order.groups_from_kernel_order(ordered, 96, 1, 384), scales)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_column_lies_in_the_word_and_half_that_the_header_says(element: str) -> None:
    layout = order.LAYOUTS[element]
    n_registers, n_sets = layout.n_registers, layout.sets_per_lane
    one_per_row = torch.eye(128, dtype=torch.uint8) * (2**layout.bits - 1)
    halves = order.to_kernel_order(one_per_row, element).view(torch.int16)  # [P, 1, 128, 8 Q]
    for q in range(n_sets):
        for r in range(n_registers):
            for t in range(4):
                for b in range(2):
                    k = 8 * n_registers * q + 8 * r + 2 * t + b
                    filled = halves[:, 0, k].any(0).nonzero().flatten().tolist()
                    assert filled == [2 * (t * n_sets + q) + b], (element, k)


@pytest.mark.parametrize("element", ELEMENTS)
def test_words_have_no_unused_bit_and_none_used_twice(element: str) -> None:
    bits = order.LAYOUTS[element].bits
    full = torch.full((128, 256), 2**bits - 1, dtype=torch.uint8)
    words = order.to_kernel_order(full, element)
    assert bool((words == 255).all())
    assert 8 * words.numel() == 128 * 256 * bits


@given(st.sampled_from(ELEMENTS), st.integers(1, 140), st.integers(1, 300), st.integers(0, 2**16))
def test_codes_survive_kernel_order(element: str, rows: int, cols: int, seed: int) -> None:
    codes = draw_codes(element, rows, cols, seed)
    words = order.to_kernel_order(codes, element)
    layout = order.LAYOUTS[element]
    padded_rows, n_tiles = -(-rows // 128) * 128, -(-cols // 128)
    assert words.dtype == torch.uint8
    assert words.shape == (layout.n_planes, n_tiles, padded_rows, layout.row_bytes)
    assert torch.equal(order.from_kernel_order(words, element, rows, cols), codes)


@pytest.mark.parametrize("element", ELEMENTS)
def test_padding_is_zero(element: str) -> None:
    codes = torch.full((3, 130), 1, dtype=torch.uint8)
    words = order.to_kernel_order(codes, element)
    whole = order.from_kernel_order(words, element, 128, 256)
    assert bool((whole[:3, :130] == 1).all()) and int(whole.sum()) == 3 * 130


@given(st.integers(1, 140), st.integers(1, 300), st.integers(0, 2**16))
def test_unquantized_numbers_survive_kernel_order(rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (rows, cols), generator=generator).to(torch.int16)
    weight = order.order_bfloat16(bits.view(torch.bfloat16))
    n_tiles, padded_rows = -(-cols // 128), -(-rows // 128) * 128
    assert weight.words.dtype == torch.uint8
    assert weight.words.shape == (1, n_tiles, padded_rows, 256)
    assert weight.scales.shape == (1, padded_rows, 1)
    assert (weight.n_tiles, weight.tiles_per_step) == (n_tiles, n_tiles)
    assert torch.equal(order.restore_bfloat16(weight).view(torch.int16), bits)


def test_unquantized_columns_lie_beside_each_other_and_padding_is_zero() -> None:
    numbers = torch.arange(1, 131, dtype=torch.bfloat16).repeat(3, 1)  # exact up to 256
    tiles = order.order_bfloat16(numbers).words.view(torch.bfloat16)  # [1, 2, 128, 128]
    assert tiles[0, 0, 2].tolist() == list(range(1, 129))
    assert tiles[0, 1, 2, :3].tolist() == [129, 130, 0]
    assert int((tiles != 0).sum()) == 3 * 130


@given(
    st.sampled_from([8, 16, 24, 32, 64, 96, 128, 136, 200, 256, 384, 10**6]),
    st.integers(1, 140),
    st.integers(1, 1000),
    st.sampled_from([torch.float16, torch.uint8, torch.float8_e4m3fn]),
)
def test_scales_survive_kernel_order(
    group_size: int, rows: int, cols: int, dtype: torch.dtype
) -> None:
    n_groups = -(-cols // group_size)
    n_bytes = rows * n_groups * dtype.itemsize
    bits = torch.randint(0, 256, (n_bytes,), dtype=torch.uint8)
    scales = bits.view(dtype).reshape(rows, n_groups)
    ordered = order.groups_to_kernel_order(scales, group_size, cols)
    assert ordered.dtype == dtype and ordered.shape[1] == -(-rows // 128) * 128
    back = order.groups_from_kernel_order(ordered, group_size, rows, cols)
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize(
    ("group_size", "cols", "span", "step"),
    [
        (128, 512, 128, 128),  # one scale per tile
        (256, 512, 256, 256),  # two tiles share one
        (32, 512, 32, 128),  # four scales per tile
        (200, 512, 8, 128),  # groups cross tiles: cut into spans of gcd(200, 128)
        (171, 171, 256, 256),  # one scale per row, columns padded to whole tiles
        (64, 37, 128, 128),  # a row shorter than its group has one scale
    ],
)
def test_spans_and_steps_follow_from_the_group(
    group_size: int, cols: int, span: int, step: int
) -> None:
    assert order.span_of(group_size, cols) == span
    assert order.step_of(group_size, cols) == step


@pytest.mark.parametrize("group_size", [9, 12, 37, 100, 129])
def test_group_sizes_without_an_order_are_refused_with_what_is_possible(group_size: int) -> None:
    with pytest.raises(FormatError, match=rf"groups of {group_size}; .* multiples of 8"):
        order.span_of(group_size, 1000)


def test_an_unknown_element_is_refused_with_those_there_are() -> None:
    with pytest.raises(FormatError, match=r"'int7'; they have int1, .*e5m2"):
        order.to_kernel_order(torch.zeros(1, 1, dtype=torch.uint8), "int7")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.purpose)
def test_every_format_is_read_back_bit_for_bit(case: Case) -> None:
    for name in FORMATS:
        check_order(name, case)
