"""Products in bfloat16 where calibration text runs, and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from alphaquant.evaluators.predictions import predict_walked
from alphaquant.models.dtypes import rough_products
from alphaquant.models.mapping import map_model
from alphaquant.models.walk import walk
from alphaquant.provenance import multiplies_bfloat16
from alphaquant.spaces.units import Matrix
from alphaquant.testing.models import tiny_model, tiny_tokens


def of(cols: int) -> Matrix:
    return Matrix("m", rows=8, cols=cols, kind="attention", layer=0)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="a processor without AMX")
def test_products_are_rounded_inside_and_exact_again_outside() -> None:
    a, b = torch.randn(2, 600, 600, generator=torch.Generator().manual_seed(0))
    exact = a @ b
    with rough_products([of(600)]):
        rough = a @ b
    error = (rough - exact).norm() / exact.norm()
    assert 5e-4 < float(error) < 4e-3  # two roundings to 8 bits, evenly spread: 2^-9 * 0.82
    assert torch.equal(a @ b, exact)
    with pytest.raises(ValueError, match="inside"), rough_products([of(600)]):
        raise ValueError("inside")
    assert torch.equal(a @ b, exact)


@pytest.mark.skipif(not multiplies_bfloat16(), reason="a processor without AMX")
def test_sums_of_products_of_bfloat16_are_as_exact_as_in_float32() -> None:
    x = torch.randn(2048, 576, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    true = x.double().T @ x.double()
    with rough_products([of(576)]):
        found = x.T @ x
    assert float((found - true).norm() / true.norm()) < 1e-6


def test_small_matrices_are_multiplied_as_ever() -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = a @ b
    with rough_products([of(64)]):
        assert torch.equal(a @ b, exact)


def test_calibration_is_rough_and_what_is_compared_with_the_original_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[int] = []

    @contextmanager
    def rough(matrices: Any) -> Iterator[None]:
        entered.append(len(list(matrices)))
        yield

    monkeypatch.setattr("alphaquant.models.walk.rough_products", rough)
    model_map, batches = map_model(tiny_model("olmoe")), [tiny_tokens(2, 9)]
    for pieces in predict_walked(model_map, batches):
        list(pieces)
    assert not entered
    for step in walk(model_map, batches, is_rough=True):
        step.run()
    assert entered == [len(list(layer.matrices())) for layer in model_map.layers]
