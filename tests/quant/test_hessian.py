"""Hessians: against direct sums over tokens, routing weights, pooling, and what shares one."""

import pytest
import torch
from torch import Tensor, nn

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ExpertsSite, LayerSite, ModelMap
from alphaquant.models.walk import observe_layer, walk
from alphaquant.quant import engine
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import HessianBatch, LayerHessians, accumulate, observer_of
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.quant.shrinkage import Shrinkage
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import ROUTED_EXPERTS, TOP_K, tiny_model, tiny_tokens


def close(found: Tensor, expected: Tensor) -> bool:
    """Relative error of at most 1e-5, the limit of capability 18."""
    return float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def experts_site(model_map: ModelMap) -> tuple[LayerSite, ExpertsSite]:
    layer = model_map.layers[-1]
    return layer, layer.experts[0]


def draw_routing(n: int, k: int, n_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct experts per token and weights that sum to one; int64 and float32 [n, k]."""
    generator = torch.Generator().manual_seed(seed)
    scores, ids = torch.rand(n, n_experts, generator=generator).topk(k, -1)
    return ids, scores / scores.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def olmoe() -> ModelMap:
    return map_model(tiny_model("olmoe"))


@pytest.fixture(scope="module")
def routed(olmoe: ModelMap) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n, H] and routing [n, k] of an experts module; expert 5 gets nothing."""
    inputs = torch.randn(61, 40, generator=torch.Generator().manual_seed(1))
    ids, weights = draw_routing(61, 3, 5)
    return inputs, torch.where(ids == 4, 7, ids), weights


def sums(
    site: ExpertsSite, routed: tuple[Tensor, Tensor, Tensor], exponent: int, pooled: int = 0
) -> tuple[HessianBatch, HessianBatch]:
    """Hessians of gate+up and of down, both of all experts."""
    observer = LayerHessians(exponent, pooled)
    observer.on_experts(site, *routed)
    layer = LayerSite(0, "layer", site.module, (), (site,))
    w13, w2 = observer.batches(layer)
    return w13, w2


def direct_sum(inputs: Tensor, weights: Tensor) -> Tensor:
    """sum_j w_j x_j x_j', token by token."""
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for x, w in zip(inputs.double(), weights.double(), strict=True):
        total += w * torch.outer(x, x)
    return total.float()


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_expert_hessians_equal_the_direct_sum(
    exponent: int, olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    inputs, ids, weights = routed
    w13, w2 = sums(site, routed, exponent)
    for e in range(site.n_experts):
        token, slot = torch.where(ids == e)
        power = weights[token, slot] ** exponent
        gate, up = site.gate_up(e, inputs[token]).chunk(2, -1)
        features = torch.nn.functional.silu(gate) * up
        assert close(w13.hessian[e], direct_sum(inputs[token], power)), e
        assert close(w2.hessian[e], direct_sum(features, power)), e
        assert w13.n_tokens[e] == w2.n_tokens[e] == len(token)
    assert w13.stacks[2] == (site.gate[2], site.up[2]) and w2.stacks[2] == (site.down[2],)
    expected = "routing_weighted" if exponent else "plain"
    assert set(w13.source) == set(w2.source) == {expected}


@pytest.mark.parametrize("width", [1024, 1100])
@pytest.mark.parametrize("n_tokens", [512, 700])
def test_half_of_a_wide_sum_is_the_mirror_of_the_other(width: int, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(n_tokens, width, generator=generator)
    weights = torch.rand(n_tokens, generator=generator)
    total, direct = torch.zeros(width, width), torch.zeros(width, width, dtype=torch.float64)
    for factor in (1, 2):  # the second is added to the first
        accumulate(total, inputs * factor, weights)
        exact = (inputs * factor).double()
        direct += (exact * weights.double().unsqueeze(-1)).T @ exact
    assert torch.equal(total[:256, 256:], total[256:, :256].T)
    assert close(total, direct.float())


def test_exponent_zero_and_weights_of_one_equal_the_plain_hessian(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    inputs, ids, weights = routed
    plain = sums(site, routed, 0)[0].hessian
    for exponent in (1, 2):
        ones = sums(site, (inputs, ids, torch.ones_like(weights)), exponent)[0].hessian
        assert torch.equal(ones, plain)
    for e in range(site.n_experts):
        token, _ = torch.where(ids == e)
        assert close(plain[e], inputs[token].T @ inputs[token])


def test_weighting_equals_scaling_the_inputs_by_the_root(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    inputs, ids, weights = routed
    found = sums(site, routed, 1)[0].hessian
    for e in (0, 7):
        token, slot = torch.where(ids == e)
        scaled = inputs[token] * weights[token, slot].sqrt().unsqueeze(-1)
        assert close(found[e], scaled.T @ scaled)


def test_tokens_of_weight_zero_have_no_effect(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    inputs, ids, weights = routed
    muted = torch.where(torch.arange(61)[:, None] < 30, torch.zeros_like(weights), weights)
    found = sums(site, (inputs, ids, muted), 2)
    without = sums(site, (inputs[30:], ids[30:], weights[30:]), 2)
    for f, w in zip(found, without, strict=True):
        # The same sums with zeros among the terms: only the order of additions differs.
        assert torch.allclose(f.hessian, w.hessian, rtol=1e-5, atol=1e-5)


def test_weights_stay_with_their_token_in_any_slot_order(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Each token's slots in another order: the same pairs of token and weight."""
    _, site = experts_site(olmoe)
    inputs, ids, weights = routed
    order = torch.rand(61, 3, generator=torch.Generator().manual_seed(4)).argsort(-1)
    mixed = (inputs, ids.gather(-1, order), weights.gather(-1, order))
    for found, expected in zip(sums(site, mixed, 2), sums(site, routed, 2), strict=True):
        assert torch.equal(found.hessian, expected.hessian)


@pytest.mark.parametrize("n_batches", [4, 16])
def test_expert_hessians_do_not_depend_on_batches(
    n_batches: int, olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    layer, site = experts_site(olmoe)
    observer = LayerHessians(2, 0)
    for part in zip(*(t.chunk(n_batches) for t in routed), strict=True):
        observer.on_experts(site, *part)
    found = observer.batches(LayerSite(0, "layer", site.module, (), (site,)))
    for f, e in zip(found, sums(site, routed, 2), strict=True):
        assert close(f.hessian, e.hessian) and f.n_tokens == e.n_tokens


def test_pooling_adds_the_layers_mean_for_gate_and_up_and_its_diagonal_for_down(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    n_slots = routed[1].numel()
    w13, w2 = sums(site, routed, 2)
    pooled13, pooled2 = sums(site, routed, 2, pooled=512)
    mean = w13.hessian.sum(0) / n_slots  # of one routed token
    assert close(pooled13.hessian, w13.hessian + 512 * mean)
    diagonal = w2.hessian.diagonal(dim1=-2, dim2=-1).sum() / (24 * n_slots)
    assert close(pooled2.hessian, w2.hessian + 512 * diagonal * torch.eye(24))
    assert pooled13.source[5] == "pooled" and pooled13.n_tokens[5] == 0
    assert pooled13.source[0] == "routing_weighted+pooled"


def quantize_experts(
    model_map: ModelMap, routed: tuple[Tensor, Tensor, Tensor], pooled: int
) -> dict[str, QuantizedMatrix]:
    layer, site = experts_site(model_map)
    observer = LayerHessians(2, pooled)
    observer.on_experts(site, *routed)
    alone = LayerSite(layer.index, layer.name, layer.module, (), layer.experts)
    settings = QuantSettings(pooled_tokens=pooled, refine_sweeps=0)
    items = quantize_layer(model_map, alone, observer.batches(alone), ["int4-g32"], settings)
    return {item.matrix.name: item for item in items}


def test_a_never_routed_expert_uses_the_pooled_hessian(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    items = quantize_experts(olmoe, routed, 512)
    for matrix in (site.gate[5], site.up[5], site.down[5]):
        record = items[matrix.name].record
        assert (record.method, record.hessian, record.fallback) == ("gptq", "pooled", None)
        assert record.n_tokens == 0
    assert items[site.gate[0].name].record.hessian == "routing_weighted+pooled"


def test_without_pooling_a_never_routed_expert_is_rounded_and_says_so(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, site = experts_site(olmoe)
    items = quantize_experts(olmoe, routed, 0)
    for matrix in (site.gate[5], site.up[5], site.down[5]):
        item = items[matrix.name]
        assert (item.record.method, item.record.fallback) == ("rtn", "no_tokens")
        assert item.record.hessian is None and item.record.output_error is None
        weight = olmoe.view(matrix.name)[None]
        expected = quantize_rtn(weight, parse_format("int4-g32"), "mse").weights()[0]
        assert torch.equal(item.packed.dequantize(), expected)
    routed_record = items[site.gate[0].name].record
    assert (routed_record.method, routed_record.hessian) == ("gptq", "routing_weighted")
    assert routed_record.fallback is None and routed_record.damp == 0.01


@pytest.mark.parametrize("name", ["one token", "same experts"])
def test_degenerate_routing_gives_finite_weights(name: str, olmoe: ModelMap) -> None:
    n = 1 if name == "one token" else 40
    inputs = torch.randn(n, 40, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[6, 0, 3]]).expand(n, 3).contiguous()
    weights = torch.tensor([[0.5, 0.3, 0.2]]).expand(n, 3).contiguous()
    for pooled in (0, 512):
        for item in quantize_experts(olmoe, (inputs, ids, weights), pooled).values():
            assert bool(torch.isfinite(item.packed.dequantize()).all())
            has_data = pooled > 0 or item.matrix.expert in (6, 0, 3)
            assert (item.record.fallback is None) == has_data


def observe(
    model_map: ModelMap, exponent: int = 2, layer_index: int = -1
) -> tuple[LayerSite, LayerHessians]:
    """Hessians of one layer over two batches."""
    layer = model_map.layers[layer_index]
    observer = LayerHessians(exponent, 0)
    with torch.no_grad():
        for step in walk(model_map, list(tiny_tokens(4, 11).split(2))):
            if step.layer is layer:
                with observe_layer(layer, observer):
                    step.run()
    return layer, observer


def keep_inputs(layer: LayerSite, path: str) -> list[Tensor]:
    """A list that fills with the inputs of a module of the layer, [n, K] each."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]))

    layer.module.get_submodule(path).register_forward_pre_hook(hook)
    return found


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
def test_utilization_sums_to_tokens_times_top_k(family: str) -> None:
    layer, observer = observe(map_model(tiny_model(family)))
    counts = observer.utilization()
    assert list(counts) == [site.name for site in layer.experts]
    assert len(counts[layer.experts[0].name]) == ROUTED_EXPERTS[family]
    assert sum(counts[layer.experts[0].name]) == 4 * 11 * TOP_K[family]


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj")]),
        ("deepseek_v2", [("q_proj", "kv_a_proj_with_mqa"), ("kv_b_proj",), ("o_proj",)]),
    ],
)
def test_linears_of_one_input_share_a_hessian(
    family: str, projections: list[tuple[str, ...]]
) -> None:
    model_map = map_model(tiny_model(family))
    seen = keep_inputs(model_map.layers[0], "self_attn.q_proj")
    layer, observer = observe(model_map, layer_index=0)
    batches = observer.batches(layer)
    found = [tuple(m.projection for m in batch.stacks[0]) for batch in batches]
    assert found[: len(projections)] == projections
    assert all(batch.n_tokens == (4 * 11,) for batch in batches)
    assert all(batch.source == ("plain",) for batch in batches)
    x = torch.cat(seen[-2:])  # the two batches; before them one window for the arguments
    assert close(batches[0].hessian[0], x.T @ x)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_a_shared_expert_is_weighted_by_its_gate_if_it_has_one(family: str, exponent: int) -> None:
    model_map = map_model(tiny_model(family))
    name = "mlp.shared_expert" if family == "qwen2_moe" else "mlp.shared_experts"
    seen = keep_inputs(model_map.layers[-1], name)
    layer, observer = observe(model_map, exponent)
    batches = {
        tuple(m.projection for m in b.stacks[0]): b
        for b in observer.batches(layer)
        if b.stacks[0][0].kind == "shared"
    }
    x, shared = torch.cat(seen[-2:]), layer.module.get_submodule(name)
    weights, source = torch.ones(len(x)), "plain"
    if family == "qwen2_moe" and exponent:
        gate = layer.module.get_submodule("mlp.shared_expert_gate")
        weights, source = torch.sigmoid(gate(x)).flatten() ** exponent, "routing_weighted"
    features = torch.nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x)
    assert close(batches[("gate_proj", "up_proj")].hessian[0], direct_sum(x, weights))
    assert close(batches[("down_proj",)].hessian[0], direct_sum(features, weights))
    assert all(b.source == (source,) for b in batches.values())
    assert all(b.n_tokens == (4 * 11,) for b in batches.values())


def test_nothing_is_held_back_where_nobody_asks(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor]
) -> None:
    layer, site = experts_site(olmoe)
    for settings, n_held in (
        (QuantSettings(), 4),
        (QuantSettings(shrinkage=False), 0),
        (QuantSettings(method="rtn"), 0),
    ):
        observer = observer_of(settings)
        observer.on_experts(site, *routed)
        found = observer.batches(LayerSite(0, "layer", site.module, (), (site,)))
        for batch in found:
            assert len(batch.held) >= n_held if n_held else not batch.held


def test_an_expert_that_nothing_reached_has_a_finite_error_under_any_shrinkage(
    olmoe: ModelMap, routed: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tokens of its own its down projection is shrunk all the way, s = 1."""
    monkeypatch.setattr(engine, "choose_shrinkage", lambda *args: Shrinkage(2.0, 0.9))
    _, site = experts_site(olmoe)
    record = quantize_experts(olmoe, routed, 512)[site.down[5].name].record
    assert record.shrinkage == 1.0 and record.heldout_gain == 0.9
    assert record.output_error is not None and 0 < record.output_error < 1
