"""Routes against the routers themselves, on plain and packed models; hooks and refusals."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4Router

from alphaquant.errors import ModelError
from alphaquant.evaluators.base import Subject
from alphaquant.evaluators.routes import (
    LayerRoutes,
    find_routed,
    keep_routes,
    known_log_probs,
    pack,
    route_batches,
    unpack,
)
from alphaquant.evaluators.utilization import UtilizationEvaluator
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import load
from alphaquant.testing.models import ROUTED_EXPERTS, TOP_K, tiny_model, tiny_tokens
from alphaquant.testing.packed import quantize_mixed, save_packed
from alphaquant.texts.windows import token_digest

TOKENS = tiny_tokens(5, 9)

# A fused layout, one transposed and interleaved with biases, sigmoid scores, a ModuleList, and
# weighted inputs.
LAYOUTS = ("olmoe", "gpt_oss", "deepseek_v3", "listed_moe", "llama4_text")


def routes_of(model: nn.Module, tokens: Tensor = TOKENS, batch_size: int = 8) -> list[LayerRoutes]:
    """Routes of each layer, of a single batch."""
    (batch,) = route_batches(model, tokens, batch_size)
    return list(batch)


def hooks(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


def logits_by_hook(model: nn.Module, router_name: str) -> list[Tensor]:
    """Logits that the modules of a name return, float [n, E] of each; from the whole model."""
    found: list[Tensor] = []

    def keep(router: nn.Module, _: Any, output: Any) -> None:
        # Llama 4's gives scores first.
        place = int(isinstance(router, Llama4Router))
        found.append(output[place] if isinstance(output, tuple) else output)

    routers = [m for n, m in model.named_modules() if n.endswith(f".{router_name}")]
    handles = [router.register_forward_hook(keep) for router in routers]
    model(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
def test_the_routes_of_every_family_are_those_of_its_routers(family: str) -> None:
    model = tiny_model(family)
    name = "router" if family in ("gpt_oss", "llama4_text") else "gate"
    expected = [logits for logits in logits_by_hook(model, name) if logits.shape[-1] > 1]
    found = routes_of(model)
    assert len(found) == len(expected) > 0
    for routes, logits in zip(found, expected, strict=True):
        n_experts, k = ROUTED_EXPERTS[family], TOP_K[family]
        assert routes.expert_ids.shape == routes.weights.shape == (5, 9, k)
        assert routes.expert_ids.dtype == torch.int64 and routes.weights.dtype == torch.float32
        assert routes.site.n_experts == n_experts > routes.expert_ids.max()
        assert (routes.expert_ids.sort(-1).values.diff(dim=-1) > 0).all()  # no expert twice
        log_probs = known_log_probs(routes)
        reference = torch.log_softmax(logits.float(), -1).reshape(5, 9, n_experts)
        # The same products in batches of another shape, float32.
        assert torch.allclose(log_probs, reference, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "listed_moe"])
def test_a_softmax_router_chooses_its_most_likely_and_weights_by_probability(family: str) -> None:
    for routes in routes_of(tiny_model(family)):
        top = known_log_probs(routes).exp().topk(TOP_K[family], -1)
        order = routes.weights.argsort(-1, descending=True)
        assert torch.equal(routes.expert_ids.gather(-1, order), top.indices)
        # A measured weight (listed) is a difference of numbers of size 1024 * weight.
        assert torch.allclose(routes.weights.gather(-1, order), top.values, atol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_packed_model_routes_like_the_plain_one_with_its_weights(
    family: str, tmp_path: Path
) -> None:
    packed = load(save_packed(tiny_model(family), tmp_path / "packed"))
    plain = tiny_model(family)
    model_map = map_model(plain)
    for items in quantize_mixed(model_map).values():
        for item in items:
            model_map.view(item.matrix.name).copy_(item.packed.dequantize())
    pairs = zip(routes_of(packed), routes_of(plain), strict=True)
    for found, expected in pairs:
        assert found.site.name == expected.site.name
        assert found.site.n_experts == expected.site.n_experts
        assert torch.equal(found.expert_ids.sort(-1).values, expected.expert_ids.sort(-1).values)
        # The same sums in another order, float32.
        assert torch.allclose(known_log_probs(found), known_log_probs(expected), atol=1e-4)


def test_layers_without_routed_experts_are_left_out() -> None:
    assert [site.name for site in find_routed(tiny_model("deepseek_v2"))] == [
        "model.layers.1.mlp.experts"
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_cut_the_windows_and_change_nothing(batch_size: int) -> None:
    model = tiny_model("olmoe")
    parts = list(route_batches(model, TOKENS, batch_size))
    assert [len(part[0].expert_ids) for part in parts][:-1] == [batch_size] * (len(parts) - 1)
    for layer, whole in enumerate(routes_of(model)):
        found = torch.cat([known_log_probs(part[layer]) for part in parts])
        assert torch.allclose(found, known_log_probs(whole), atol=1e-5)  # float32
        ids = torch.cat([part[layer].expert_ids for part in parts])
        assert torch.equal(ids, whole.expert_ids)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4)])
def test_single_windows_and_tokens_are_routed(shape: tuple[int, int]) -> None:
    for family in ("mixtral", "listed_moe"):
        assert routes_of(tiny_model(family), TOKENS[: shape[0], : shape[1]])[0].weights.shape == (
            *shape,
            TOP_K[family],
        )


def test_no_hook_and_no_gradient_is_left() -> None:
    model = tiny_model("listed_moe").requires_grad_(True)
    batches: Iterator[Any] = route_batches(model, TOKENS, 2)
    first = next(batches)
    assert hooks(model) == []  # also while the caller has not asked for the next batch
    assert not any(known_log_probs(r).requires_grad or r.weights.requires_grad for r in first)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["mixtral", "listed_moe"])
def test_no_hook_is_left_when_the_model_fails(family: str) -> None:
    model = tiny_model(family)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    last = map_model(model).layers[1].linears[-1].module
    last.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        keep_routes(model, TOKENS)
    assert hooks(model) == [fail]


def test_a_model_without_routed_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM routes no tokens.*leave out"):
        keep_routes(tiny_model("llama"), TOKENS)


def test_experts_that_are_never_called_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.1.mlp")
    monkeypatch.setattr(block, "forward", lambda hidden: hidden)
    with pytest.raises(ModelError, match=r"never called the experts of model\.layers\.1\.mlp"):
        routes_of(model)
    assert hooks(model) == []


def test_a_router_that_is_never_called_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.0.mlp")

    def without_router(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        chosen = torch.zeros(len(flat), 1, dtype=torch.int64)
        output: Tensor = block.experts(flat, chosen, torch.ones(len(flat), 1))  # type: ignore[operator]
        return output.view_as(hidden)

    monkeypatch.setattr(block, "forward", without_router)
    with pytest.raises(ModelError, match=r"never called the router of model\.layers\.0\.mlp"):
        routes_of(model)


def test_experts_that_see_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.0.mlp")
    whole = block.forward

    def first_window(hidden: Tensor) -> Tensor:
        return torch.cat([whole(hidden[:1]), hidden[1:]])

    monkeypatch.setattr(block, "forward", first_window)
    with pytest.raises(ModelError, match="routed 9 tokens in a pass over 45"):
        routes_of(model)


def test_where_two_modules_could_be_the_router_only_the_chosen_are_known() -> None:
    model = tiny_model("mixtral")
    block = model.get_submodule("model.layers.1.mlp")
    block.add_module("twin", nn.Linear(40, 4))
    first, second = routes_of(model)
    assert first.log_probs is not None and second.log_probs is None
    assert second.expert_ids.shape == (5, 9, 2)
    with pytest.raises(ModelError, match=r"router of model\.layers\.1.*a weight of 4 rows"):
        keep_routes(model, TOKENS)
    loads = UtilizationEvaluator(TOKENS).evaluate(Subject(model)).details["layers"]
    assert sum(loads[1]["hard_load"]) == pytest.approx(1.0)


def test_a_linear_deeper_in_the_block_is_not_taken_for_the_router() -> None:
    model = tiny_model("qwen2_moe", shared_expert_intermediate_size=6)  # gate and up have 6 rows
    for site in find_routed(model):
        assert site.router is not None
        assert type(site.router).__name__ == "Qwen2MoeTopKRouter"


def test_kept_routes_are_compact_and_say_what_they_are_of() -> None:
    model = tiny_model("olmoe")
    kept = keep_routes(model, TOKENS, 2)
    assert [len(batch[0].expert_ids) for batch in kept.batches] == [2, 2, 1]
    assert kept.n_experts == {f"model.layers.{i}.mlp.experts": 8 for i in range(2)}
    assert kept.n_bytes == 2 * 45 * 2 * (8 + 3)  # layers, tokens, bytes, E + k
    assert (kept.batch_size, kept.data_digest) == (2, token_digest(TOKENS))
    whole = routes_of(model)
    for layer, routes in enumerate(whole):
        ids = torch.cat([batch[layer].expert_ids for batch in kept.batches])
        assert ids.dtype == torch.int16
        assert torch.equal(ids.to(torch.int64), routes.expert_ids)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9))
def test_unpacked_log_probabilities_are_normalized_and_near(logits: list[float]) -> None:
    log_probs = torch.log_softmax(torch.tensor(logits), -1)
    found = unpack(pack(log_probs), torch.device("cpu"))
    assert torch.isfinite(found).all()
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    # float16 has 11 bits: each is off by a share of 2^-11 at most, the sum by that of the largest
    # part, sum p |ln p| <= ln 9, and values below 2^-14 by 2^-25.
    bound = 2**-11 * (log_probs.abs() + 2.2) + 1e-5
    likely = log_probs > -60000
    assert ((found - log_probs).abs() <= bound)[likely].all()
