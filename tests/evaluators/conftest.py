"""A model that is a table of logits, for numbers that can be computed by hand."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


class TableModel(nn.Module):
    """Logits of the next token are a row of a table [V, V], chosen by the last token alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.n_calls = 0

    def forward(self, batch: Tensor, *, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.n_calls += 1
        return SimpleNamespace(logits=self.get_buffer("table")[batch])


@pytest.fixture
def table_model() -> Callable[..., TableModel]:
    """Makes a model from rows of probabilities, or from a seed and a vocabulary."""

    def make(
        probabilities: list[list[float]] | None = None, *, seed: int = 0, n: int = 7
    ) -> nn.Module:
        if probabilities is not None:
            return TableModel(torch.tensor(probabilities).log() + 3.0)  # logits are up to a shift
        generator = torch.Generator().manual_seed(seed)
        return TableModel(2.0 * torch.randn(n, n, generator=generator))

    return make
