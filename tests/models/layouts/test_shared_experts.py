"""Shared experts in 3-D parameters, as Inkling has them."""

import pytest
import torch

from alphaquant.evaluators.routes import find_routed
from alphaquant.models.layouts.shared_experts import SharedExperts
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ExpertsSite, ModelMap
from alphaquant.models.walk import observe_layer, walk
from alphaquant.quant.hessian import LayerHessians
from alphaquant.testing.any_model import tiny_model_of

pytestmark = pytest.mark.usefixtures("probed_each_time")

N_SHARED, HIDDEN, WIDTH = 2, 64, 48


@pytest.fixture(scope="module")
def inkling() -> ModelMap:
    extra = {"n_shared_experts": N_SHARED}
    return map_model(tiny_model_of("inkling_text", extra).requires_grad_(False))


def sites_of(model_map: ModelMap) -> dict[str, ExpertsSite]:
    layer = next(layer for layer in model_map.layers if layer.experts)
    return {site.name.rpartition(".")[2]: site for site in layer.experts}


def test_they_are_shared_matrices_and_not_routed(inkling: ModelMap) -> None:
    site = sites_of(inkling)["shared_experts"]
    matrix = site.down[1]
    assert (matrix.kind, matrix.expert) == ("shared", None)
    assert (matrix.rows, matrix.cols) == (HIDDEN, WIDTH)
    assert matrix.name == f"{site.name}.1.down_proj"
    assert all(routed.name.endswith(".mlp.experts") for routed in find_routed(inkling.model))


def test_every_token_goes_to_each_of_them_with_its_own_weight(inkling: ModelMap) -> None:
    site = sites_of(inkling)["shared_experts"]
    assert isinstance(site, SharedExperts)
    hidden, gammas = torch.ones(2, 3, HIDDEN), torch.arange(12.0).reshape(6, N_SHARED)
    tokens = site.route((hidden,), {"gammas": gammas})
    assert tokens.inputs.shape == (6, HIDDEN)
    assert tokens.expert_ids.tolist() == [[0, 1]] * 6
    assert torch.equal(tokens.weights, gammas)


def test_their_hessians_see_every_token_and_utilization_leaves_them_out(
    inkling: ModelMap,
) -> None:
    tokens = torch.randint(3, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    hessians = LayerHessians(pooled_tokens=0)
    for step in walk(inkling, [tokens]):
        if step.layer.experts:
            with observe_layer(step.layer, hessians):
                step.run()
            break
    sites = sites_of(inkling)
    assert list(hessians.utilization()) == [sites["experts"].name]
    counts = {
        matrices[0].name: n
        for batch in hessians.batches(step.layer)
        for matrices, n in zip(batch.stacks, batch.n_tokens, strict=True)
    }
    assert [counts[m.name] for m in sites["shared_experts"].down] == [24, 24]
