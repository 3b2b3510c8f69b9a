"""Experts whose inputs are weighted: which rows are whose tokens, and what their Hessians are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.layouts.input_weighted import InputWeightedExperts
from alphaquant.models.mapping import map_model
from alphaquant.quant.hessian import LayerHessians
from alphaquant.testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("probed_each_time")

N_TOKENS, N_EXPERTS, TOP_K, HIDDEN = 9, 6, 2, 40


@pytest.fixture
def site() -> InputWeightedExperts:
    found = map_model(tiny_model("llama4_text")).layers[1].experts[0]
    assert isinstance(found, InputWeightedExperts)
    return found


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, N_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def scores_of(site: InputWeightedExperts, x: Tensor) -> Tensor:
    scores: Tensor = site.block.get_submodule("router")(x[0])[0]
    return scores


def test_only_chosen_experts_have_tokens(site: InputWeightedExperts, x: Tensor) -> None:
    inputs, ids, weights = site.route((x,), {})
    scores = scores_of(site, x)
    assert torch.equal(inputs, x[0]) and ids.shape == weights.shape == (N_TOKENS, TOP_K)
    assert torch.equal(scores.gather(-1, ids), weights)
    assert int((scores > 0).sum()) == N_TOKENS * TOP_K  # of N_TOKENS * N_EXPERTS rows


def test_a_score_of_zero_belongs_to_no_expert(site: InputWeightedExperts, x: Tensor) -> None:
    router: Any = site.block.get_submodule("router")
    router.weight.zero_()
    router.weight[:5, 0] = -1e4 * x[0, :, 0].abs().max()  # sigmoid is 0 where x_0 > 0
    ids, weights = site.route((x.abs(),), {})[1:]
    assert ids.tolist() == [[5]] * N_TOKENS and weights.tolist() == [[0.5]] * N_TOKENS


def test_packed_experts_run_on_rows_that_are_not_zero(
    site: InputWeightedExperts, x: Tensor
) -> None:
    scores = scores_of(site, x)
    repeated = x[0].repeat(N_EXPERTS, 1) * scores.T.reshape(-1, 1)  # as the block calls them
    rows, ids, weights = site.route_packed((repeated,), {})
    assert rows is repeated and bool((weights == 1).all())
    expected = torch.arange(N_EXPERTS).masked_fill(scores == 0, N_EXPERTS)  # [n, E]
    assert torch.equal(ids.view(N_EXPERTS, N_TOKENS).T, expected)


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_hessians_are_those_of_the_weighted_inputs(
    exponent: int, site: InputWeightedExperts, x: Tensor
) -> None:
    scores = scores_of(site, x)
    observer = LayerHessians(exponent, pooled_tokens=0)
    observer.on_experts(site, *site.route((x,), {}))
    w13, w2 = (
        batch
        for batch in observer.batches(map_model(tiny_model("llama4_text")).layers[1])
        if batch.stacks[0][0].expert is not None
    )
    assert sum(w13.n_tokens) == sum(w2.n_tokens) == N_TOKENS * TOP_K
    for e in range(N_EXPERTS):
        given = x[0] * scores[:, e : e + 1]  # rows of zeros add nothing
        features = site.apply_gate(site.gate_up(e, given))
        assert torch.allclose(w13.hessian[e], given.T @ given, rtol=1e-4, atol=1e-5)
        assert torch.allclose(w2.hessian[e], features.T @ features, rtol=1e-4, atol=1e-5)


def test_the_models_own_experts_agree(site: InputWeightedExperts, x: Tensor) -> None:
    repeated = x[0].repeat(N_EXPERTS, 1)
    made = site.module(repeated).view(N_EXPERTS, N_TOKENS, HIDDEN)
    for e in range(N_EXPERTS):
        ours = site.apply_gate(site.gate_up(e, x[0])) @ site.views(e).down.T
        assert torch.allclose(ours, made[e], rtol=1e-4, atol=1e-5)


def test_a_block_without_router_is_refused_by_name(site: InputWeightedExperts) -> None:
    with pytest.raises(ModelError, match=r"\(Llama4TextExperts\) .* block Module has no"):
        InputWeightedExperts.make(0, "m.experts", site.module, nn.Module())
