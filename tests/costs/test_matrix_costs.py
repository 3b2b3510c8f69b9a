"""Sums over tokens against numbers that can be computed by hand."""

import pytest
import torch
from torch import Tensor

from alphaquant.costs import matrix_costs
from alphaquant.costs.matrix_costs import MatrixTrace, token_sums
from alphaquant.spaces.units import Matrix


def trace(inputs: Tensor, gradients: Tensor, sequence: list[int]) -> MatrixTrace:
    rows, cols = gradients.shape[-1], inputs.shape[-1]
    return MatrixTrace(
        matrix=Matrix("m", rows, cols, "dense", 0),
        weight=torch.zeros(rows, cols),
        inputs=inputs,
        gradients=gradients,
        sequence=torch.tensor(sequence),
        routing_weight=1.0,
        active_share=1.0,
        output_error=lambda errors: torch.zeros(2, len(errors)),
    )


def test_the_documented_example() -> None:
    seen = trace(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[[1.0], [-1.0]]]), [0, 0])
    sums = token_sums(torch.tensor([[[2.0, 0.0]]]), seen, 1)
    assert sums.products.tolist() == [[[-4.0]]]
    assert sums.squares.tolist() == [[40.0]]


@pytest.mark.parametrize("numbers", [1, 2 * 3 * 4, 2**24], ids=["one token", "four", "all"])
def test_chunks_do_not_change_the_sums(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_costs, "_CHUNK_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randint(-3, 4, s, generator=generator) for s in ((7, 5), (2, 7, 3)))
    errors = torch.randint(-3, 4, (2, 3, 5), generator=generator).float()
    sequence = [0, 0, 2, 2, 2, 3, 3]  # the second of four sequences has no token here
    sums = token_sums(errors, trace(x.float(), g.float(), sequence), 4)
    products, squares = torch.zeros(2, 2, 4), torch.zeros(2, 2)
    for f in range(2):
        for d in range(2):
            for t, s in enumerate(sequence):
                p = g[d, t].float() @ errors[f] @ x[t].float()
                products[f, d, s] += p
                squares[f, d] += p**2
    assert torch.equal(sums.products.float(), products)  # small integers are exact
    assert torch.equal(sums.squares.float(), squares)
