"""Cutting packed matrices for ranks gives exactly that part of the dequantized matrix."""

from math import gcd

import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.quant.matrix import PackedMatrix, check_packed
from alphaquant.runtime.vllm.engine_names import check_formats
from alphaquant.runtime.vllm.slices import Slice, part_of
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import QUANTIZED
from alphaquant.testing.packed import draw_packed

ROWS, COLS = 12, 96

FORMATS = (
    *QUANTIZED,
    "int3-g64-asym",  # groups longer than a rank's 48 columns, and a short last one
    "int5-g40",  # a group that the boundary cuts
    "int8-g128",  # one group
    "int3-row-asym",
    "bf16",
)


def cut(matrix: PackedMatrix, part: Slice) -> PackedMatrix:
    tensors = {name: part.cut(name, tensor) for name, tensor in matrix.tensors.items()}
    made = PackedMatrix(part.format, len(part.rows), len(part.cols), tensors)
    check_packed(made, "m", "here")
    return made


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_rows_and_columns_of_ranks_dequantize_to_the_parts(n_ranks: int) -> None:
    for name in FORMATS:
        matrix = draw_packed(name, ROWS, COLS)
        whole = matrix.dequantize()
        for rank in range(n_ranks):
            rows, cols = part_of(ROWS, rank, n_ranks), part_of(COLS, rank, n_ranks)
            by_rows = cut(matrix, Slice(matrix.format, ROWS, COLS, rows, range(COLS)))
            assert torch.equal(by_rows.dequantize(), whole[rows.start : rows.stop]), name
            by_cols = cut(matrix, Slice(matrix.format, ROWS, COLS, range(ROWS), cols))
            assert torch.equal(by_cols.dequantize(), whole[:, cols.start : cols.stop]), name


def test_a_part_without_whole_bytes_is_repacked() -> None:
    matrix = draw_packed("int3-g32-asym", ROWS, COLS)
    part = Slice(matrix.format, ROWS, COLS, range(2, 5), range(33, 66))
    assert part.format.group_size == 1  # gcd(32, 33, 33)
    assert torch.equal(cut(matrix, part).dequantize(), matrix.dequantize()[2:5, 33:66])


@pytest.mark.parametrize(
    ("name", "cols", "n_ranks", "group_size"),
    [
        ("int4-g64", 704, 2, 32),  # the example of the file's header
        ("int8-g128", 128, 2, 128),  # one group, which each rank keeps
        ("int4-g32", 256, 2, 32),
        ("int4-g64", 704, 1, 64),
        ("mxfp4", 96, 2, 16),
    ],
)
def test_groups_of_a_rank_are_as_long_as_they_can_be(
    name: str, cols: int, n_ranks: int, group_size: int
) -> None:
    fmt = parse_format(name)
    part = Slice(fmt, 4, cols, range(4), part_of(cols, n_ranks - 1, n_ranks))
    assert part.format.group_size == group_size
    assert group_size in (fmt.group_size, gcd(fmt.group_size, cols // n_ranks))


def test_super_blocks_of_a_rank_are_as_long_as_they_can_be() -> None:
    fmt = parse_format("int3-g32-s256")
    halves = [Slice(fmt, 4, 704, range(4), part_of(704, rank, 2)) for rank in range(2)]
    assert {(half.format.group_size, half.format.super_size) for half in halves} == {(32, 32)}
    whole = Slice(fmt, 4, 1024, range(4), part_of(1024, 1, 2))
    assert whole.format == fmt  # they lie whole on a rank
    matrix = draw_packed(fmt.name, 4, 704)
    found = torch.cat([cut(matrix, half).dequantize() for half in halves], 1)
    assert torch.equal(found, matrix.dequantize())


def test_parts_of_ranks_follow_one_another() -> None:
    assert [part_of(12, rank, 3) for rank in range(3)] == [range(4), range(4, 8), range(8, 12)]


def test_what_the_plug_in_does_not_serve_is_named() -> None:
    int4, q4_k, int8 = (parse_format(name) for name in ("int4-g32", "q4_k", "int8-row"))
    check_formats(PackedFormats({"a": int4}))
    with pytest.raises(ModelError, match="1 matrices are in types of llama.cpp, e.g. b in q4_k"):
        check_formats(PackedFormats({"a": int4, "b": q4_k}))
    with pytest.raises(
        ModelError, match="inputs of 1 matrices are rounded, e.g. of a to int8-row"
    ):
        check_formats(PackedFormats({"a": int4}, {"a": int8}))
