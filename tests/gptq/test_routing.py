"""What is recorded is what the model routed by, and no hook stays behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.gptq import GPTQMoE, MoEGPTQContext, get_layers_for_model
from alphaquant.models.architectures import ARCHITECTURES
from alphaquant.models.mapping import map_model
from alphaquant.models.routing import tokens_by_expert
from alphaquant.testing.models import ROUTED_EXPERTS, TOP_K, tiny_model, tiny_tokens

SPARSE_LAYER = 1
"""Sparse in every family; layer 0 is dense in the DeepSeeks and GLM-4."""


def hooks_of(module: nn.Module) -> list[tuple[Any, ...]]:
    """Every hook of every module."""
    names = (
        *("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"),
        *("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs"),
    )
    return [
        (path, name, dict(getattr(part, name)))
        for path, part in module.named_modules()
        for name in names
    ]


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
def test_the_block_can_be_computed_again_from_what_was_recorded(family: str) -> None:
    model = tiny_model(family)
    layer = map_model(model).layers[SPARSE_LAYER]
    (site,) = layer.experts
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = next(a for a in args if isinstance(a, Tensor) and a.is_floating_point())
        seen["in"] = hidden.reshape(-1, hidden.shape[-1]).clone()
        found = output[0] if isinstance(output, tuple) else output
        seen["out"] = found.reshape(seen["in"].shape).clone()

    handle = site.hooked.register_forward_hook(keep)
    context = MoEGPTQContext()
    context.register_routing_hooks(layer.module, SPARSE_LAYER)
    model(tiny_tokens(2, 9))
    info = context.get_routing_info()
    handle.remove()
    (scores,), (chosen,) = info["routing_scores"], info["selected_experts"]
    assert scores.shape == chosen.shape == (18, TOP_K[family])
    expected = torch.zeros_like(seen["in"])
    for tokens in tokens_by_expert(chosen, scores, site.n_experts):
        (x, factors), e = site.given(seen["in"], tokens), tokens.expert
        y = site.apply_gate(site.gate_up(e, x)) @ site.views(e).down.T
        bias = site.down_bias(site.module, e)
        y = y if bias is None else y + bias
        expected.index_add_(0, tokens.rows, y * factors.unsqueeze(-1))
    if site.hooked is site.block:  # which adds a shared expert
        expected += site.block.get_submodule("shared_expert")(seen["in"])
    error = (expected - seen["out"]).norm() / seen["out"].norm()
    assert error <= 1e-4


@pytest.mark.parametrize("family", ["olmoe", "listed_moe"])
def test_batches_of_different_lengths_are_kept_apart(family: str) -> None:
    model = tiny_model(family)
    layers = get_layers_for_model(model)
    context = MoEGPTQContext("generic_moe")
    for index, layer in enumerate(layers):
        context.register_routing_hooks(layer, index)
    shapes = ((2, 5), (1, 3), (4, 8))
    for shape in shapes:
        model(tiny_tokens(*shape))
    for index in range(2):
        info = context.get_routing_info(index)
        assert [len(s) for s in info["routing_scores"]] == [10, 3, 32]
        assert [len(s) for s in info["selected_experts"]] == [10, 3, 32]
    alone = MoEGPTQContext("generic_moe")
    alone.register_routing_hooks(layers[1], 1)
    model(tiny_tokens(1, 3))
    chosen = alone.get_routing_info()["selected_experts"][0]
    assert torch.equal(chosen, context.get_routing_info(1)["selected_experts"][1])


def test_the_steps_of_the_old_documents_work_on_a_real_expert() -> None:
    model = tiny_model("mixtral")
    transformer_layer = get_layers_for_model(model)[0]
    experts: Any = transformer_layer.mlp.experts
    seen: list[Tensor] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    before = experts.gate_up_proj.clone()

    gptq_moe = GPTQMoE(experts.gate_up_proj[0], expert_id=0)
    moe_ctx = MoEGPTQContext(model_type="mixtral")
    moe_ctx.register_routing_hooks(transformer_layer, layer_idx=0)
    model(tiny_tokens(3, 12))
    model(tiny_tokens(1, 7, seed=1))
    routing_info = moe_ctx.get_routing_info()
    gptq_moe.add_batch_with_routing(
        inp=seen,
        routing_scores=routing_info["routing_scores"],
        selected_experts=routing_info["selected_experts"],
        expert_num=0,
        num_experts=4,
    )
    made = gptq_moe.fasterquant(quantizer="int4-g8")
    moe_ctx.clear_hooks()
    handle.remove()

    chosen = torch.cat(routing_info["selected_experts"])
    assert gptq_moe.utilization_count == int((chosen == 0).sum()) > 0
    assert torch.equal(experts.gate_up_proj[0], made.packed.dequantize())
    assert torch.equal(experts.gate_up_proj[1:], before[1:])


@pytest.mark.parametrize("family", ["mixtral", "listed_moe", "llama"])
def test_hooks_are_those_that_were_there_before(family: str) -> None:
    model = tiny_model(family)
    tokens = tiny_tokens(1, 6)
    layers = get_layers_for_model(model)
    for module in layers[0].modules():
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_hook(lambda *_: None, with_kwargs=False)
    before, logits = hooks_of(model), model(tokens).logits
    context = MoEGPTQContext()
    for index, layer in enumerate(layers):
        context.register_routing_hooks(layer, index)
    assert (hooks_of(model) == before) == (family == "llama")
    assert torch.equal(model(tokens).logits, logits)
    context.clear_hooks()
    assert hooks_of(model) == before
    context.clear_hooks()
    model(tokens)
    assert len(context.get_routing_info(0)["routing_scores"]) == (family != "llama")
    context.register_routing_hooks(layers[0], 0)
    assert context.get_routing_info(0)["routing_scores"] == []


def test_dense_layers_have_no_routing() -> None:
    model = tiny_model("deepseek")
    context = MoEGPTQContext("deepseek")
    for index, layer in enumerate(get_layers_for_model(model)):
        context.register_routing_hooks(layer, index)
    model(tiny_tokens(1, 6))
    assert context.get_routing_info(0) == {"routing_scores": [], "selected_experts": []}
    assert len(context.get_routing_info(1)["routing_scores"]) == 1


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ModelError, match=", ".join(ARCHITECTURES)):
        MoEGPTQContext("mistral")
    layer = get_layers_for_model(tiny_model("mixtral"))[0]
    context = MoEGPTQContext()
    with pytest.raises(ModelError, match="recorded are none"):
        context.get_routing_info()
    context.register_routing_hooks(layer, 0)
    with pytest.raises(ModelError, match="layer 0 is recorded already; call clear_hooks"):
        context.register_routing_hooks(layer, 0)
    context.register_routing_hooks(layer, 3)
    with pytest.raises(ModelError, match="layer None asked; recorded are 0, 3"):
        context.get_routing_info()
    with pytest.raises(ModelError, match="layer 2 asked"):
        context.get_routing_info(2)
    with pytest.raises(ModelError, match="standard layers have none: use auto"):
        MoEGPTQContext("standard").register_routing_hooks(layer, 0)
