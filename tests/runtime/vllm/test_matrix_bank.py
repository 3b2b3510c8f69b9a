"""Matrices of different formats in one tensor of bytes."""

import pytest
import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.runtime.vllm.matrix_bank import MatrixBank, place, read_places
from alphaquant.runtime.vllm.slices import Slice
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.packed import draw_packed

NAMES = ("int4-g32", "int3-g64-asym", "nvfp4", "mxfp6", "bf16", "int1-row")
ROWS, COLS = 4, 64


def bank_of(rows: range = range(ROWS)) -> MatrixBank:
    return MatrixBank(
        {f"layer.{n}": Slice(parse_format(n), ROWS, COLS, rows, range(COLS)) for n in NAMES}
    )


def fill(bank: MatrixBank, memory: Tensor) -> None:
    for index, name in enumerate(NAMES):
        for part, tensor in draw_packed(name, ROWS, COLS).tensors.items():
            bank.load(memory, index, part, tensor)


def test_worked_example_of_the_header_is_right() -> None:
    (four, plain) = place([(parse_format("int4-g32"), 2, 64), (parse_format("bf16"), 1, 8)])
    assert [four.views["codes"].start, four.views["codes"].n_bytes] == [0, 64]
    assert [four.views["scales"].start, four.views["scales"].n_bytes] == [64, 8]
    assert [plain.views["weight"].start, plain.views["weight"].n_bytes] == [80, 16]


@pytest.mark.parametrize("rows", [range(ROWS), range(2, 4)])
def test_what_is_loaded_comes_out_again(rows: range) -> None:
    bank = bank_of(rows)
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    fill(bank, memory)
    bank.check_complete("layer")
    for index, name in enumerate(NAMES):
        expected = draw_packed(name, ROWS, COLS).dequantize()[rows.start : rows.stop]
        assert torch.equal(bank.matrix(memory, index).dequantize(), expected)


def test_bytes_are_those_of_the_formats_and_their_alignment() -> None:
    stored = sum(parse_format(name).storage_bits(ROWS, COLS) // 8 for name in NAMES)
    n_tensors = len(bank_of().missing)
    assert stored <= bank_of().n_bytes < stored + 16 * n_tensors


def test_facts_are_the_layout() -> None:
    bank = bank_of(range(1, 3))
    assert read_places(bank.facts) == bank.places
    assert [place.format.name for place in bank.places] == list(NAMES)
    assert {(place.rows, place.cols) for place in bank.places} == {(2, COLS)}


def test_a_bank_without_matrices_has_no_bytes() -> None:
    assert MatrixBank({}).n_bytes == 0


def test_missing_tensors_are_named() -> None:
    bank = bank_of()
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    bank.load(memory, 0, "codes", draw_packed(NAMES[0], ROWS, COLS).tensors["codes"])
    with pytest.raises(StoreError, match=r"layer\.int4-g32\.scales.*copy the checkpoint again"):
        bank.check_complete("the layer")


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("codes", torch.zeros(ROWS, COLS // 2 + 1, dtype=torch.uint8)),  # another shape
        ("scales", torch.zeros(ROWS, 2, dtype=torch.float32)),  # another dtype
        ("zeros", torch.zeros(4, dtype=torch.uint8)),  # a symmetric format has none
    ],
)
def test_a_tensor_of_another_layout_is_refused(part: str, tensor: Tensor) -> None:
    bank = bank_of()
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    with pytest.raises(StoreError, match=rf"layer\.int4-g32\.{part} is .*int4-g32 \[4, 64\] has"):
        bank.load(memory, 0, part, tensor)
    assert not memory.any()
