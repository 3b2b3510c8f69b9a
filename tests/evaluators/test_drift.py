"""Drift of the routing by hand, against float64, and of the original from itself."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.evaluators.base import Evaluated, Subject
from alphaquant.evaluators.drift import RoutingDriftEvaluator, compare_routes
from alphaquant.evaluators.routes import (
    KeptRoutes,
    LayerRoutes,
    RoutedSite,
    find_routed,
    keep_routes,
    known_log_probs,
    pack,
    route_batches,
)
from alphaquant.runtime.checkpoint import load
from alphaquant.testing.models import ROUTED_EXPERTS, tiny_model, tiny_tokens
from alphaquant.testing.packed import save_packed

TOKENS = tiny_tokens(5, 9)
SITE = RoutedSite("experts", 3, None, nn.Identity(), None)  # type: ignore[arg-type]


def noisy(family: str, scale: float = 0.05) -> nn.Module:
    """The tiny model with noise on every weight."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def drift(original: nn.Module, model: nn.Module, batch_size: int = 2) -> Evaluated:
    kept = keep_routes(original, TOKENS, batch_size)
    return RoutingDriftEvaluator(TOKENS, kept).evaluate(Subject(model))


def kept_and_live(
    p: list[list[float]], p_ids: list[list[int]], q: list[list[float]], q_ids: list[list[int]]
) -> tuple[KeptRoutes, LayerRoutes]:
    """Routes of one window from probabilities [T, E] and ids [T, k]."""
    kept = KeptRoutes(torch.tensor([p_ids], dtype=torch.int16), pack(torch.tensor([p]).log()))
    ids = torch.tensor([q_ids])
    return kept, LayerRoutes(SITE, ids, torch.ones(ids.shape), torch.tensor([q]).log())


def test_the_example_of_the_file_head() -> None:
    pair = kept_and_live([[0.5, 0.25, 0.25]], [[0, 1]], [[0.25, 0.25, 0.5]], [[2, 0]])
    found = compare_routes(*pair)
    # Each ln is rounded by 2^-11 of itself: 1.39 * 2^-11 = 0.0007 at most.
    assert found.kl.tolist() == pytest.approx([math.log(2) / 4], abs=1e-3)
    assert found.overlap.tolist() == [0.5]


def test_tokens_of_a_window_are_averaged_and_the_order_of_experts_does_not_matter() -> None:
    row = [0.5, 0.25, 0.25]
    pair = kept_and_live([row] * 4, [[0, 1]] * 4, [row] * 4, [[1, 0], [0, 1], [2, 1], [0, 2]])
    found = compare_routes(*pair)
    assert found.kl.tolist() == [0.0]
    assert found.overlap.tolist() == [0.75]


def test_slots_without_an_expert_are_no_choice() -> None:
    row = [0.5, 0.25, 0.25]
    found = compare_routes(
        *kept_and_live([row] * 2, [[0, 3], [1, 2]], [row] * 2, [[0, 3], [3, 3]])
    )
    assert found.overlap.tolist() == [0.5]  # (1 of 1 + 0 of 2) / 2


@given(
    st.lists(st.floats(-1e5, 1e5, width=32), min_size=3, max_size=3),
    st.lists(st.floats(-1e5, 1e5, width=32), min_size=3, max_size=3),
)
def test_kl_is_finite_and_not_negative(p: list[float], q: list[float]) -> None:
    log_p, log_q = (torch.log_softmax(torch.tensor([[x]]), -1) for x in (p, q))
    ids = torch.zeros(1, 1, 1, dtype=torch.int16)
    live = LayerRoutes(SITE, ids.long(), torch.ones(1, 1, 1), log_q)
    kl = float(compare_routes(KeptRoutes(ids, pack(log_p)), live).kl)
    assert -1e-6 <= kl < math.inf  # float32


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
def test_the_original_has_no_drift_from_itself(family: str) -> None:
    found = drift(tiny_model(family), tiny_model(family))
    assert [score.value for score in found.scores] == [0.0, 1.0]
    assert [score.stderr for score in found.scores] == [0.0, 0.0]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "listed_moe"])
def test_drift_equals_torch_on_the_routes_in_float64(family: str) -> None:
    original, model = tiny_model(family), noisy(family)
    found = drift(original, model)
    kls, shares = [], []
    (before,), (after,) = (route_batches(m, TOKENS) for m in (original, model))
    for a, b in zip(before, after, strict=True):
        p, q = (known_log_probs(routes).double() for routes in (a, b))
        kl = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        kls.append(kl.mean(-1))  # [N]
        shares.append(_overlap(a.expert_ids, b.expert_ids, a.site.n_experts))
    kl, share = torch.stack(kls), torch.stack(shares)
    assert float(kl.mean()) > 0.01 and 0.3 < float(share.mean()) < 0.99  # something to compare
    names = [(s.metric, s.unit, s.direction, s.n_samples, s.n_tokens) for s in found.scores]
    assert names == [
        ("router_kl", "nats/token", "minimize", 5, 45),
        ("expert_overlap", "share of chosen experts", "maximize", 5, 45),
    ]
    # float16 log-probabilities of size ln E: 2^-11 of each, against differences of size sqrt(KL).
    assert found.scores[0].value == pytest.approx(float(kl.mean()), abs=5e-4)
    assert found.scores[1].value == pytest.approx(float(share.mean()), abs=1e-12)
    expected = [float(x.mean(0).std()) / math.sqrt(5) for x in (kl, share)]
    assert [s.stderr for s in found.scores] == pytest.approx(expected, abs=5e-4)
    for row, a, one_kl, one_share in zip(found.details["layers"], before, kl, share, strict=True):
        assert row["experts"] == a.site.name
        assert row["router_kl"] == pytest.approx(float(one_kl.mean()), abs=5e-4)
        assert row["expert_overlap"] == pytest.approx(float(one_share.mean()), abs=1e-12)


def _overlap(a: Tensor, b: Tensor, n_experts: int) -> Tensor:
    """Share of the experts of a that b has too, by window, from sets; float64 [N]."""
    both = [
        len(set(x) & set(y)) / len(x)
        for x, y in zip(a.flatten(0, 1).tolist(), b.flatten(0, 1).tolist(), strict=True)
    ]
    return torch.tensor(both, dtype=torch.float64).reshape(a.shape[:2]).mean(-1)


def test_more_noise_drifts_more() -> None:
    original = tiny_model("mixtral")
    found = [drift(original, noisy("mixtral", scale)) for scale in (0.001, 0.01, 0.1)]
    kl = [f.scores[0].value for f in found]
    overlap = [f.scores[1].value for f in found]
    assert kl == sorted(kl) and overlap == sorted(overlap, reverse=True)
    assert 0 < kl[0] < 0.1 * kl[2]


@pytest.mark.parametrize("family", ["mixtral", "listed_moe"])
def test_a_packed_model_is_compared_with_the_plain_original(family: str, tmp_path: Path) -> None:
    original = tiny_model(family)
    found = drift(original, load(save_packed(original, tmp_path / "packed")))
    kl, overlap = (score.value for score in found.scores)
    assert 0.0 < kl < 1.0 and 0.5 < overlap < 1.0
    assert len(found.details["layers"]) == 2


def test_routes_of_other_windows_are_refused() -> None:
    kept = keep_routes(tiny_model("mixtral"), TOKENS)
    with pytest.raises(StoreError, match="asked on 4 windows of 9 tokens, which are not those"):
        RoutingDriftEvaluator(TOKENS[:4], kept)


def test_a_model_with_other_experts_is_refused() -> None:
    evaluator = RoutingDriftEvaluator(TOKENS, keep_routes(tiny_model("mixtral"), TOKENS))
    other = tiny_model("mixtral", num_local_experts=5)
    with pytest.raises(ModelError, match=r"in 2 modules to \[5\] experts, the original in 2"):
        evaluator.evaluate(Subject(other))


def test_a_model_whose_router_is_not_found_is_refused() -> None:
    model = tiny_model("mixtral")
    evaluator = RoutingDriftEvaluator(TOKENS, keep_routes(model, TOKENS))
    model.get_submodule("model.layers.0.mlp").add_module("twin", nn.Linear(40, 4))
    assert find_routed(model)[0].router is None
    with pytest.raises(ModelError, match="router of model.layers.0.mlp.experts was not found"):
        evaluator.evaluate(Subject(model))
