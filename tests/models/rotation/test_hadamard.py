"""Matrices of Hadamard kind: which one a size gets, that it is orthogonal, and what it does."""

import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.models.rotation.hadamard import Rotation, base_matrix, shape_of

SIZES = {
    2: "Hadamard 2",
    40: "Hadamard 20 x 2",  # Paley's first kind, 19 is prime
    256: "Hadamard 256",
    576: "Hadamard 36 x 16",  # his second kind, 17 is prime
    896: "Hadamard 28 x 32",
    960: "Hadamard 60 x 16",
    2880: "Hadamard 180 x 16",
    184: "23 blocks of Hadamard 8",  # neither 183 and 91 nor 91 and 45 are prime
    6: "3 blocks of Hadamard 2",
}


def dense(size: int, seed: int = 0) -> torch.Tensor:
    return Rotation(size, seed).rotated(torch.eye(size))


@pytest.mark.parametrize("size", SIZES)
def test_a_size_gets_its_matrix_and_it_is_orthogonal(size: int) -> None:
    shape = shape_of(size)
    assert shape.text == SIZES[size]
    found = dense(size)
    assert torch.allclose(found @ found.T, torch.eye(size), atol=1e-5)
    # all entries of a block have one magnitude: no input is left with more than its share
    block = size // shape.n_blocks
    some = found[found.abs() > 1e-6].abs()
    assert len(some) == size * block
    assert torch.allclose(some, torch.tensor(block**-0.5), atol=1e-5)


def test_signs_stand_in_front() -> None:
    # Q = diag(s) H: every row is one of H or its negative, and the seed says which.
    plain, first, second = (dense(16, seed) for seed in (0, 0, 1))
    assert torch.equal(plain, first)
    assert not torch.equal(first, second)
    ratio = first / second
    assert torch.allclose(ratio.abs(), torch.ones(16, 16))
    assert torch.equal(ratio, ratio[:, :1].expand(16, 16))


def test_rows_and_columns_are_rotated_as_readers_and_writers() -> None:
    rotation, q = Rotation(40, 3), dense(40, 3)
    reader, writer = torch.randn(5, 40), torch.randn(40, 7)
    turned = [reader.clone(), writer.clone()]
    rotation.rotate_columns(turned[0])
    rotation.rotate_rows(turned[1])
    assert torch.allclose(turned[0], reader @ q, atol=1e-5)
    assert torch.allclose(turned[1], q.T @ writer, atol=1e-5)
    bias = torch.randn(40)
    rotation.rotate_columns(both := bias.clone())
    assert torch.allclose(both, bias @ q, atol=1e-5)


def test_rows_beyond_a_part_are_rotated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(9, 8)
    expected = Rotation(8, 0).rotated(rows)
    monkeypatch.setattr("alphaquant.models.rotation.hadamard._PART", 16)  # two rows
    Rotation(8, 0).rotate_columns(rows)
    assert torch.allclose(rows, expected)


def test_the_smallest_base_is_that_of_the_literature() -> None:
    # Paley's first kind with q = 3: characters of 0, 1, 2 are 0, 1, -1.
    wanted = [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    assert base_matrix(4).tolist() == wanted


def test_an_odd_size_is_refused() -> None:
    with pytest.raises(ModelError, match=r"odd hidden size 45.*leave --rotate out"):
        shape_of(45)
