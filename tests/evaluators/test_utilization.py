"""Loads of experts by hand, by property, and of a router that is made to starve experts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.evaluators.base import Subject
from alphaquant.evaluators.routes import LayerRoutes, RoutedSite, find_routed, route_batches
from alphaquant.evaluators.utilization import ExpertLoads, UtilizationEvaluator, add_loads
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(5, 9)


def loads(*counts: int) -> ExpertLoads:
    return ExpertLoads(torch.tensor(counts), torch.tensor(counts, dtype=torch.float64))


@pytest.fixture(scope="module")
def site() -> RoutedSite:
    """Of four experts."""
    return find_routed(tiny_model("mixtral"))[0]


def test_the_example_of_the_file_head() -> None:
    found = loads(6, 2, 0, 0)
    assert found.imbalance == pytest.approx(math.sqrt(6 / 4), abs=1e-12)
    entropy = (3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)) / math.log(4)
    assert found.entropy == pytest.approx(entropy, abs=1e-12) == pytest.approx(0.4056, abs=1e-4)
    assert found.starved == 0.5
    assert found.facts("layer") == {
        "experts": "layer",
        "hard_load": [0.75, 0.25, 0.0, 0.0],
        "soft_load": [0.75, 0.25, 0.0, 0.0],
        "load_imbalance": found.imbalance,
        "load_entropy": found.entropy,
        "starved": [2, 3],
    }


@pytest.mark.parametrize(
    ("counts", "imbalance", "entropy", "starved"),
    [
        pytest.param((5, 5, 5), 0.0, 1.0, 0.0, id="balanced"),
        pytest.param((0, 7, 0, 0, 0), 2.0, 0.0, 0.8, id="one for all"),
        pytest.param((9,), 0.0, 1.0, 0.0, id="a single expert"),
        pytest.param((1, 7), 0.75, None, 0.0, id="a quarter exactly is not starved"),
    ],
)
def test_loads_by_hand(
    counts: tuple[int, ...], imbalance: float, entropy: float | None, starved: float
) -> None:
    found = loads(*counts)
    assert found.imbalance == pytest.approx(imbalance, abs=1e-12)
    assert entropy is None or found.entropy == pytest.approx(entropy, abs=1e-12)
    assert found.starved == starved


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=40).filter(any))
def test_the_numbers_keep_their_ranges(counts: list[int]) -> None:
    found = loads(*counts)
    assert -1e-9 <= found.imbalance <= math.sqrt(len(counts) - 1) + 1e-9
    assert -1e-9 <= found.entropy <= 1 + 1e-9
    assert found.starved == sum(4 * len(counts) * n < sum(counts) for n in counts) / len(counts)
    doubled = loads(*(2 * n for n in counts))
    assert (doubled.imbalance, doubled.entropy) == (found.imbalance, found.entropy)


def test_slots_and_weights_add_up_over_batches_and_empty_slots_count_nothing(
    site: RoutedSite,
) -> None:
    ids = torch.tensor([[[0, 1], [0, 4]], [[3, 0], [1, 4]]])  # 4: no expert
    weights = torch.tensor([[[0.5, 0.25], [1.0, 0.0]], [[0.75, 0.25], [0.25, 0.0]]])
    total: ExpertLoads | None = None
    for part in (slice(0, 1), slice(1, 2)):
        total = add_loads(total, LayerRoutes(site, ids[part], weights[part], None))
    assert total is not None
    assert total.counts.tolist() == [3, 2, 0, 1]
    assert total.weights.tolist() == [1.75, 0.5, 0.0, 0.75]
    assert total.hard.fraction == (3 / 6, 2 / 6, 0.0, 1 / 6)
    assert total.soft == [1.75 / 3, 0.5 / 3, 0.0, 0.25]


def only_experts_0_and_1() -> nn.Module:
    """The bias of every router decides: expert 0, then 1, for all tokens."""
    model = tiny_model("gpt_oss")
    for site in find_routed(model):
        assert site.router is not None
        bias = torch.tensor([2000.0, 1000.0, 0.0, 0.0])
        site.router.get_parameter("bias").data.copy_(bias)
    return model


def test_a_router_that_always_chooses_the_same_two_of_four() -> None:
    found = UtilizationEvaluator(TOKENS, 2).evaluate(Subject(only_experts_0_and_1()))
    assert [score.metric for score in found.scores] == [
        "load_imbalance",
        "load_entropy",
        "starved_experts",
    ]
    # E f = 2, 2, 0, 0
    assert [score.value for score in found.scores] == pytest.approx([1.0, 0.5, 0.5])
    assert {(s.stderr, s.n_samples, s.n_tokens) for s in found.scores} == {(None, 5, 45)}
    first = found.details["layers"][0]
    assert first["experts"] == "model.layers.0.mlp.experts"
    assert first["hard_load"] == [0.5, 0.5, 0.0, 0.0]
    assert first["soft_load"] == pytest.approx([1.0, 0.0, 0.0, 0.0])  # softmax of 1000 and 0
    assert first["starved"] == [2, 3]


@pytest.mark.parametrize("family", ["qwen3_moe", "listed_moe"])
def test_scores_are_means_over_layers_of_what_the_routes_say(family: str) -> None:
    model = tiny_model(family)
    (batch,) = route_batches(model, TOKENS)
    found = UtilizationEvaluator(TOKENS, 2).evaluate(Subject(model))
    imbalances = []
    for routes, row in zip(batch, found.details["layers"], strict=True):
        n_experts = routes.site.n_experts
        chosen = nn.functional.one_hot(routes.expert_ids, n_experts)  # [B, T, k, E]
        counts = chosen.sum((0, 1, 2)).double()
        soft = (chosen * routes.weights.unsqueeze(-1)).sum((0, 1, 2)).double()
        assert row["hard_load"] == pytest.approx((counts / counts.sum()).tolist())
        # float32 weights of two batchings
        assert row["soft_load"] == pytest.approx((soft / soft.sum()).tolist(), abs=1e-5)
        imbalances.append(float(counts.std(unbiased=False) / counts.mean()))
    assert len(imbalances) == 2 and imbalances[0] != imbalances[1]
    assert found.scores[0].value == pytest.approx(sum(imbalances) / 2)


def test_a_dense_model_has_no_utilization() -> None:
    with pytest.raises(ModelError, match="routes no tokens"):
        UtilizationEvaluator(TOKENS).evaluate(Subject(tiny_model("llama")))
