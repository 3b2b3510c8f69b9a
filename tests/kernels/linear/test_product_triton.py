"""The packed linear kernel against the reference: every format, odd sizes, all three dtypes.

Without a GPU it runs in Triton's interpreter, where it unpacks without PTX; with one, the same
tests run on it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alphaquant.kernels import reference
from alphaquant.kernels.order import KernelWeight
from alphaquant.kernels.tuning import (
    TABLE_VARIABLE,
    KernelTable,
    Launch,
    dense_key,
    dump_table,
    launch_key,
)
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.kernels import (
    CASES,
    FORMATS,
    Case,
    Linear,
    check_columns,
    check_product,
    check_refusals,
    check_zeros,
    pack_drawn,
)
from tests.interpreted import DEVICE, import_kernels

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ONE_OF_EACH = (  # every element, and every kind of scale and zero point
    *("int1-g64", "int2-g128", "int2-g32-asym", "int3-row", "int3-g64", "int4-g128-asym"),
    *("int5-g128-asym", "int6-g64", "int8-g256-asym", "fp4-e2m1-g128", "fp6-e2m3-g32"),
    *("fp8-e5m2-row", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "bf16"),
    *("nl2-row", "nl4-g64", "int3-g16-s256", "nl3-g32-s256"),
)


HARD = ("int4-g8", "int3-g96-asym", "fp8-e4m3-g200", "int2-g384")  # groups that cross tiles


def rows_of_formats() -> list[Any]:
    """Numbers of all formats; slow are those of an element, scale and zero that others have."""
    fast = {*ONE_OF_EACH, *HARD}
    return [
        pytest.param(i, id=name, marks=[] if name in fast else [pytest.mark.slow])
        for i, name in enumerate(FORMATS)
    ]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_kernels("linear.product_triton")


def drawn(name: str, rows: int, cols: int) -> KernelWeight:
    return order_matrix(pack_drawn(name, rows, cols)).to(DEVICE)


def draw_x(n_tokens: int, cols: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, cols, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("index", rows_of_formats())
def test_products_are_those_of_the_reference(kernels: ModuleType, index: int) -> None:
    # Cases and dtypes take turns, so that each meets every family of formats.
    case, dtype = CASES[index % len(CASES)], DTYPES[index % len(DTYPES)]
    # The interpreter runs one program after the other: below, a few times are enough for it.
    repeat = DEVICE == "cuda"
    check_product(kernels.packed_linear, FORMATS[index], case, dtype, DEVICE, repeat=repeat)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.purpose)
@pytest.mark.parametrize("name", ["int3-g64-asym", "nvfp4"])
def test_every_size_works_in_float16(kernels: ModuleType, name: str, case: Case) -> None:
    check_product(kernels.packed_linear, name, case, torch.float16, DEVICE)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_column_is_where_it_belongs(kernels: ModuleType, name: str) -> None:
    check_columns(kernels.packed_linear, name, 171, torch.float16, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_zeros_and_no_tokens(kernels: ModuleType, dtype: torch.dtype) -> None:
    check_zeros(kernels.packed_linear, "int4-g64-asym", dtype, DEVICE)


def test_activations_that_do_not_fit_are_refused(kernels: ModuleType) -> None:
    check_refusals(kernels.packed_linear, DEVICE)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_weights_are_the_reference_rounded_once(
    kernels: ModuleType, name: str, dtype: torch.dtype
) -> None:
    weight = drawn(name, 130, 171)
    found = kernels.dequantize_packed(weight, dtype)
    assert torch.equal(found, reference.dequantize(weight).to(dtype))


@pytest.mark.parametrize("n_splits", [2, 3, 9, 40])  # 9 tiles: two splits are of unequal length
def test_splits_add_up_to_the_whole(kernels: ModuleType, n_splits: int) -> None:
    weight, x = drawn("int4-g128", 130, 1153), draw_x(3, 1153, torch.float32)
    found = kernels.packed_linear(x, weight, n_splits=n_splits)
    whole = kernels.packed_linear(x, weight, n_splits=1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.packed_linear(x, weight, n_splits=n_splits), found)


def test_splits_fill_the_gpu_but_keep_four_tiles_each(kernels: ModuleType) -> None:
    weight = drawn("int4-g128", 130, 1153)  # two blocks of 128 rows, ten tiles
    assert weight.n_tiles == 10
    assert kernels.default_splits(weight, 128, 1) == 2
    assert kernels.default_splits(weight, 128, 132) == 1
    assert kernels.default_splits(weight, 128, 300) == 1


def table_with(
    weight: KernelWeight, dtype: torch.dtype, launches: dict[int, Launch], dense_rows: int | None
) -> KernelTable:
    """A table with launches by block of tokens, for matrices such as this one."""
    keys = {launch_key(weight, dtype, z): launch for z, launch in launches.items()}
    dense = {} if dense_rows is None else {dense_key(weight, dtype): dense_rows}
    return KernelTable("test", "0", "0", "0", keys, dense)


@pytest.fixture
def use_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[KernelTable], None]:
    def use(table: KernelTable) -> None:
        path = tmp_path / "table.json"
        path.write_text(dump_table(table))
        monkeypatch.setenv(TABLE_VARIABLE, str(path))

    return use


def test_a_table_says_how_the_kernel_is_launched(
    kernels: ModuleType, use_table: Callable[[KernelTable], None]
) -> None:
    weight = drawn("int4-g128", 130, 1153)
    default = kernels.choose_launch(weight, torch.float16, 3)
    assert default == Launch(128, 4, 3, 2)
    tuned = {16: Launch(64, 8, 5, 9), 64: Launch(64, 4, 2, 8)}
    use_table(table_with(weight, torch.float16, tuned, None))
    assert kernels.choose_launch(weight, torch.float16, 3) == tuned[16]
    # No entry: another dtype, another block of tokens, another kind of matrix.
    assert kernels.choose_launch(weight, torch.float32, 3) == default
    assert kernels.choose_launch(weight, torch.float16, 20) == default
    other = drawn("int4-g128-asym", 130, 1153)
    assert kernels.choose_launch(other, torch.float16, 3) == default
    # Three blocks of tokens fill the GPU with fewer splits, and no split is without a tile.
    assert kernels.choose_launch(weight, torch.float16, 64) == tuned[64]
    assert kernels.choose_launch(weight, torch.float16, 130) == Launch(64, 4, 2, 2)
    short = drawn("int4-g128", 130, 1000)  # eight tiles, the same class
    assert kernels.choose_launch(short, torch.float16, 3) == Launch(64, 8, 5, 8)


def test_what_the_caller_gives_comes_before_the_table(
    kernels: ModuleType, use_table: Callable[[KernelTable], None]
) -> None:
    weight = drawn("int4-g128", 130, 1153)
    use_table(table_with(weight, torch.float16, {16: Launch(64, 8, 5, 9)}, None))
    config = kernels.LinearConfig(128, 8, 4)
    assert kernels.choose_launch(weight, torch.float16, 3, config) == Launch(128, 8, 4, 2)
    assert kernels.choose_launch(weight, torch.float16, 3, None, 5) == Launch(64, 8, 5, 5)
    assert kernels.choose_launch(weight, torch.float16, 3, config, 5) == Launch(128, 8, 4, 5)


def test_the_kernel_is_launched_as_the_table_says(
    kernels: ModuleType, use_table: Callable[[KernelTable], None]
) -> None:
    weight, x = drawn("int4-g128", 130, 1153), draw_x(3, 1153, torch.float16)
    chosen = kernels.packed_linear(
        x, weight, config=kernels.LinearConfig(64, 8, 5), n_splits=9, dense_rows=4
    )
    use_table(table_with(weight, torch.float16, {16: Launch(64, 8, 5, 9)}, None))
    with mock.patch.object(kernels, "_add_splits", wraps=kernels._add_splits) as add:
        assert torch.equal(kernels.packed_linear(x, weight), chosen)
    (parts, _), _ = add.call_args
    assert len(parts) == 9


def test_a_table_says_from_where_on_weights_are_dequantized(
    kernels: ModuleType, use_table: Callable[[KernelTable], None]
) -> None:
    weight, x = drawn("int4-g64", 5, 171), draw_x(4, 171, torch.float32)
    dense = x @ reference.dequantize(weight).T
    assert kernels.default_dense_rows(weight, torch.float32) == kernels.DENSE_ROWS
    assert not torch.equal(kernels.packed_linear(x, weight), dense)
    use_table(table_with(weight, torch.float32, {}, 4))
    assert kernels.default_dense_rows(weight, torch.float32) == 4
    assert kernels.default_dense_rows(weight, torch.float16) == kernels.DENSE_ROWS
    assert torch.equal(kernels.packed_linear(x, weight), dense)
    assert not torch.equal(kernels.packed_linear(x, weight, dense_rows=5), dense)


def test_many_rows_are_multiplied_with_dequantized_weights(kernels: ModuleType) -> None:
    weight, x = drawn("int4-g64", 5, 171), draw_x(4, 171, torch.float32)
    dense = x @ reference.dequantize(weight).T
    assert torch.equal(kernels.packed_linear(x, weight, dense_rows=4), dense)
    packed = kernels.packed_linear(x, weight, dense_rows=5)
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-5)
    with mock.patch.object(kernels, "dequantize_packed", side_effect=AssertionError):
        assert torch.equal(kernels.packed_linear(x, weight, dense_rows=5), packed)


def test_the_example_of_the_page_runs(kernels: ModuleType) -> None:
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    with torch.device(DEVICE):
        exec(blocks[0], names)
    expected = names["linear"](names["x"], names["weight"])
    torch.testing.assert_close(names["y"], expected, rtol=1e-4, atol=1e-4)


def test_the_page_counts_the_bytes_of_its_example() -> None:
    page = (Path(__file__).parents[3] / "docs" / "kernels.md").read_text(encoding="utf-8")
    weight = order_matrix(pack_drawn("int3-g64-asym", 1408, 2048))
    assert weight.zeros is not None
    tensors = (weight.words, weight.scales, weight.zeros)
    words, scales, zeros = (t.numel() * t.element_size() for t in tensors)
    assert f"{words} bytes of words,\n{scales} of scales and {zeros} of zero points" in page
    assert f"{words + scales + zeros} in all" in page
    assert f"take {parse_format('int3-g64-asym').zero_bytes(1408, 2048)} bytes" in page


@pytest.mark.parametrize("block_rows", [64, 128])
def test_blocks_of_other_sizes_give_the_same(kernels: ModuleType, block_rows: int) -> None:
    weight, x = drawn("int6-g128-asym", 130, 300), draw_x(33, 300, torch.float16)
    config = kernels.LinearConfig(block_rows=block_rows, n_warps=8, n_stages=2)
    found = kernels.packed_linear(x, weight, config=config)
    assert torch.equal(found, kernels.packed_linear(x, weight))


def test_scales_at_the_ends_of_their_range(kernels: ModuleType) -> None:
    """E8M0 0, which is 2^-127, and negative and subnormal float16."""
    tiny = drawn("mxfp4", 2, 64)
    tiny.scales[:] = torch.tensor([0, 1, 254, 127], dtype=torch.uint8)[: tiny.scales.shape[2]]
    found = kernels.dequantize_packed(tiny, torch.float32)
    assert torch.equal(found, reference.dequantize(tiny)) and bool((found != 0).any())
    negative = drawn("int4-row", 2, 64)
    negative.scales[:] = torch.tensor([-(2.0**-24)], dtype=torch.float16)
    found = kernels.dequantize_packed(negative, torch.float32)
    assert torch.equal(found, reference.dequantize(negative)) and bool((found != 0).any())


def test_the_formats_here_have_every_element_scale_and_zero_point() -> None:
    formats = [parse_format(name) for name in ONE_OF_EACH]
    every = [parse_format(name) for name in FORMATS]
    assert {f.element or f.kind for f in formats} == {f.element or f.kind for f in every}
    assert {f.family for f in formats} == {f.family for f in every}
    assert {f.symmetric for f in formats} == {True, False}


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, w: reference.linear(x.roll(1, 1), w).to(x.dtype),  # columns moved by one
        lambda x, w: 1.01 * reference.linear(x, w).to(x.dtype),  # a scale off by one percent
        lambda x, w: reference.linear(x, w),  # another dtype
        lambda x, w: reference.linear(x, w).to(x.dtype) + torch.rand(()).to(x),  # never the same
    ],
)
def test_the_suite_sees_a_broken_implementation(broken: Linear) -> None:
    case = CASES[1]
    check_product(lambda x, w: reference.linear(x, w).to(x.dtype), "int4-g64", case, torch.float16)
    with pytest.raises(AssertionError):
        check_product(broken, "int4-g64", case, torch.float16)
