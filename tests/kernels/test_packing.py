"""Bit streams: the worked example of the header, odd sizes, every width."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.kernels.packing import (
    look_up,
    make_table,
    pack_codes,
    packed_row_bytes,
    pick_codes,
    unpack_codes,
)


def reference_bytes(codes: list[int], bits: int) -> bytes:
    """One integer holds the whole stream: code i starts at bit i * b."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")


def test_the_worked_example_gives_its_bytes() -> None:
    packed = pack_codes(torch.tensor([5, 2, 7], dtype=torch.uint8), 3)
    assert packed.tolist() == [0xD5, 0x01]
    assert unpack_codes(packed, 3, 3).tolist() == [5, 2, 7]


def test_nine_signs_give_the_bytes_of_the_header() -> None:
    signs = [1, 0, 1, 1, 0, 0, 0, 0, 1]
    packed = pack_codes(torch.tensor(signs, dtype=torch.uint8), 1)
    assert packed.tolist() == [0x0D, 0x01]
    assert unpack_codes(packed, 1, 9).tolist() == signs


def test_the_word_of_the_header_is_a_row_of_the_table() -> None:
    values = torch.arange(8.0)
    table = make_table(values, 3)
    assert table.shape == (4096, 4)
    assert table[0x1D5].tolist() == [5, 2, 7, 0]
    packed = torch.tensor([[0xD5, 0x01]], dtype=torch.uint8)
    assert look_up(packed, 3, 3, table).tolist() == [[5, 2, 7]]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**16))
def test_looked_up_values_are_those_of_the_codes(
    bits: int, rows: int, n_codes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, rows, packed_row_bytes(n_codes, bits))
    packed = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    values = torch.randn(2**bits, generator=generator)
    found = look_up(packed, bits, n_codes, make_table(values, bits))
    assert torch.equal(found, values[unpack_codes(packed, bits, n_codes).to(torch.int64)])
    assert found.is_contiguous()


@given(st.integers(1, 8), st.integers(1, 70), st.integers(0, 2**16))
def test_picked_codes_are_those_of_the_whole_stream(bits: int, n_codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_codes,), generator=generator, dtype=torch.uint8)
    places = torch.randint(0, n_codes, (2, 9), generator=generator)
    places[0, 0] = n_codes - 1  # which may end where the stream ends
    assert torch.equal(pick_codes(pack_codes(codes, bits), bits, places), codes[places])


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**16))
def test_codes_survive_packing_and_bytes_are_those_of_the_layout(
    bits: int, rows: int, n_codes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, n_codes), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, rows, packed_row_bytes(n_codes, bits))
    assert torch.equal(unpack_codes(packed, bits, n_codes), codes)
    assert bytes(packed[1, 0].tolist()) == reference_bytes(codes[1, 0].tolist(), bits)


@pytest.mark.parametrize(
    ("n_codes", "bits", "n_bytes"),
    [
        (8, 3, 3),  # a whole cell
        (9, 3, 4),  # one code more
        (1, 1, 1),  # a single bit takes a byte
        (7, 8, 7),  # bytes as they are
        (171, 5, 107),  # 855 bits
        (0, 4, 0),  # nothing
    ],
)
def test_rows_take_the_bytes_they_need(n_codes: int, bits: int, n_bytes: int) -> None:
    assert packed_row_bytes(n_codes, bits) == n_bytes


def test_unused_high_bits_of_a_row_are_zero() -> None:
    packed = pack_codes(torch.full((2, 3), 31, dtype=torch.uint8), 5)
    assert packed.tolist() == [[0xFF, 0x7F], [0xFF, 0x7F]]
