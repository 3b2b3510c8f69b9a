"""Sums over tokens against numbers that can be computed by hand, and against each other."""

import pytest
import torch
from torch import Tensor

from alphaquant.costs import matrix_costs
from alphaquant.costs.matrix_costs import (
    MatrixTrace,
    TokenSums,
    sampled_squares,
    sums_by_sequence,
    sums_by_token,
    token_sums,
)
from alphaquant.spaces.units import Matrix


def trace(inputs: Tensor, gradients: Tensor, sequence: list[int]) -> MatrixTrace:
    rows, cols = gradients.shape[-1], inputs.shape[-1]
    return MatrixTrace(
        matrix=Matrix("m", rows, cols, "dense", 0),
        weight=torch.zeros(rows, cols),
        inputs=inputs,
        gradients=gradients,
        sequence=torch.tensor(sequence, dtype=torch.int64),
        routing_weight=1.0,
        active_share=1.0,
        output_error=lambda errors: torch.zeros(len(errors)),
    )


def drawn_trace(n_tokens: int, n_sequences: int) -> MatrixTrace:
    """Normal numbers; the first tokens have a sequence each, the last one takes the rest."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(s, generator=generator) for s in ((n_tokens, 6), (2, n_tokens, 4)))
    return trace(x, g, [min(t, n_sequences - 1) for t in range(n_tokens)])


def drawn_errors(n_formats: int) -> Tensor:
    return torch.randn(n_formats, 4, 6, generator=torch.Generator().manual_seed(2))


def test_the_documented_example() -> None:
    seen = trace(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[[1.0], [-1.0]]]), [0, 0])
    errors = torch.tensor([[[2.0, 0.0]]])
    for sums in (token_sums(errors, seen, 1, 0), sums_by_token(errors, seen, 1)):
        assert sums.products.tolist() == [[[-4.0]]]
        assert sums.squares.tolist() == [[40.0]]
    assert sums_by_sequence(errors, seen, 1).tolist() == [[[-4.0]]]
    assert sampled_squares(errors, seen, 0).tolist() == [[40.0]]


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 4, 2**24], ids=["one token", "four", "all"])
def test_chunks_do_not_change_the_sums(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_costs, "_CHUNK_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randint(-3, 4, s, generator=generator) for s in ((7, 5), (2, 7, 3)))
    errors = torch.randint(-3, 4, (2, 3, 5), generator=generator).float()
    sequence = [0, 0, 2, 2, 2, 3, 3]  # the second of four sequences has no token here
    seen = trace(x.float(), g.float(), sequence)
    sums = sums_by_token(errors, seen, 4)
    products, squares = torch.zeros(2, 2, 4), torch.zeros(2, 2)
    for f in range(2):
        for d in range(2):
            for t, s in enumerate(sequence):
                p = g[d, t].float() @ errors[f] @ x[t].float()
                products[f, d, s] += p
                squares[f, d] += p**2
    assert torch.equal(sums.products.float(), products)  # small integers are exact
    assert torch.equal(sums.squares.float(), squares)
    assert torch.equal(sums_by_sequence(errors, seen, 4).float(), products)
    assert torch.equal(sampled_squares(errors, seen, 0).float(), squares)


@pytest.mark.parametrize(
    ("n_tokens", "n_sequences", "by_token"),
    [
        pytest.param(9, 9, True, id="a token per sequence"),
        pytest.param(0, 3, True, id="no token"),
        pytest.param(40, 4, False, id="many tokens per sequence"),
        pytest.param(40, 1, False, id="one sequence"),
    ],
)
def test_the_cheaper_way_is_taken_and_both_are_equal(
    n_tokens: int, n_sequences: int, by_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, errors, ways = drawn_trace(n_tokens, n_sequences), drawn_errors(3), []

    def recorded(errors: Tensor, trace: MatrixTrace, n_sequences: int) -> TokenSums:
        ways.append("token")
        return sums_by_token(errors, trace, n_sequences)

    monkeypatch.setattr(matrix_costs, "sums_by_token", recorded)
    sums = token_sums(errors, seen, n_sequences, 0)
    assert ways == ["token"] * by_token
    expected = sums_by_token(errors, seen, n_sequences)
    # float32 sums of 24 products of normal numbers.
    assert torch.allclose(sums.products, expected.products, rtol=1e-5, atol=1e-4)
    found = sums_by_sequence(errors, seen, n_sequences)
    assert torch.allclose(found, expected.products, rtol=1e-5, atol=1e-4)
    assert torch.allclose(sums.squares, expected.squares, rtol=1e-5)


def test_sampled_squares_are_right_in_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, errors = drawn_trace(500, 5), drawn_errors(2)
    monkeypatch.setattr(matrix_costs, "_SQUARED_TOKENS", 16)
    expected = sums_by_token(errors, seen, 5).squares
    found = torch.stack([sampled_squares(errors, seen, seed) for seed in range(200)])
    assert len({float(x) for x in found[:, 0, 0]}) > 100  # each seed draws its own
    # Means of 200, with their own standard errors: four of them.
    error = found.std(0) / 200**0.5
    assert bool(((found.mean(0) - expected).abs() < 4 * error).all())
    assert bool((found.std(0) < 0.6 * expected).all())  # 16 squares of normal numbers: 0.35


def test_sampled_squares_depend_on_seed_and_matrix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_costs, "_SQUARED_TOKENS", 16)
    seen, errors = drawn_trace(100, 5), drawn_errors(2)
    assert torch.equal(sampled_squares(errors, seen, 3), sampled_squares(errors, seen, 3))
    assert not torch.equal(sampled_squares(errors, seen, 3), sampled_squares(errors, seen, 4))
