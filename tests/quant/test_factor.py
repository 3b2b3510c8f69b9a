"""Factors of damped Hessians: what they multiply to, damping, retries, errors."""

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant.factor import dampen, factorize
from alphaquant.testing.formats import draw_weights


def hessian_of(n_cols: int, n_tokens: int) -> Tensor:
    inputs = draw_weights(n_tokens, n_cols, seed=5)
    return inputs.T @ inputs


@pytest.mark.parametrize(
    "n_cols",
    [
        pytest.param(37, id="one call of LAPACK"),
        pytest.param(600, id="by blocks, the last one short"),
    ],
)
def test_the_factor_times_itself_is_the_damped_hessian(n_cols: int) -> None:
    hessian = hessian_of(n_cols, 2 * n_cols)
    damped = factorize(hessian, 0.01, (False, True))
    assert torch.equal(damped.matrix, dampen(hessian, 0.01)) and damped.damp == 0.01
    for factor in damped.factors:
        V = factor.upper.double()
        assert torch.equal(V, V.triu())
        order = torch.arange(n_cols) if factor.order is None else factor.order
        expected = damped.matrix[order][:, order].double()
        # K float32 roundings of sums of squares
        assert float((V @ V.T - expected).norm()) <= 1e-5 * float(expected.norm())
    ordered = damped.factors[1].order
    assert ordered is not None
    assert bool((hessian.diagonal()[ordered].diff() <= 0).all())


def test_diagonal_inverses_are_those_of_the_diagonal_blocks() -> None:
    factor = factorize(hessian_of(90, 200), 0.01, (False,)).factors[0]
    blocks = ((0, 32), (32, 64), (64, 90))
    for (start, stop), inverse in zip(blocks, factor.diagonal_inverses(blocks), strict=True):
        product = inverse @ factor.upper[start:stop, start:stop]
        assert torch.allclose(product, torch.eye(stop - start), atol=1e-4)


def test_damping_grows_until_the_factor_exists_and_ends_with_the_name() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    damped = factorize(hessian, 0.01, (False,))
    assert damped.damp == pytest.approx(0.1)
    for n_cols in (3, 600):
        with pytest.raises(ModelError, match=rf"Hessian of q_proj \({n_cols} inputs\) is not pos"):
            factorize(torch.full((n_cols, n_cols), torch.nan), 0.01, (False,), "q_proj")
