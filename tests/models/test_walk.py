"""The walk layer by layer: the model's own hidden states, calls counted, unreached modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.routing import tokens_by_expert
from alphaquant.models.sites import ExpertsSite, LinearSite, ModelMap
from alphaquant.models.walk import batches_of, check_walk, observe_layer, walk
from alphaquant.testing.models import FAMILIES, ROUTED_EXPERTS, tiny_model, tiny_tokens


class Recorder:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.linears: dict[str, list[Tensor]] = {}
        self.experts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        self.linears.setdefault(site.matrix.name, []).append(inputs)

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        self.experts.setdefault(site.name, []).append((inputs, expert_ids, weights))


def counted(model_map: ModelMap) -> list[int]:
    """How often each decoder layer is called; the list changes with every call."""
    calls = [0] * len(model_map.layers)

    def count(index: int) -> Any:
        def hook(_: nn.Module, args: object) -> None:
            calls[index] += 1

        return hook

    for layer in model_map.layers:
        layer.module.register_forward_pre_hook(count(layer.index))
    return calls


@pytest.mark.parametrize("n_windows", [1, 5], ids=["one window", "a short last batch"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_walking_gives_the_models_own_hidden_states(family: str, n_windows: int) -> None:
    model, tokens = tiny_model(family), tiny_tokens(n_windows, 13)
    model_map = map_model(model)
    results: list[Any] = []
    walked: list[list[Tensor]] = []
    for step in walk(model_map, batches_of(tokens, 2), results):
        assert [len(call.hidden) for call in step.calls] == ([1] if n_windows == 1 else [2, 2, 1])
        walked.append([call.hidden for call in step.calls])
    for b, batch in enumerate(batches_of(tokens, 2)):
        expected = model(batch, output_hidden_states=True)
        for index, of_layer in enumerate(walked):
            assert torch.equal(of_layer[b], expected.hidden_states[index])
        assert torch.equal(results[b].logits, expected.logits)


def test_a_walk_runs_each_layer_once_per_batch_and_nothing_behind_the_last() -> None:
    model_map = map_model(tiny_model("olmoe"))
    calls = counted(model_map)
    heads: list[object] = []
    model_map.model.lm_head.register_forward_hook(lambda *_: heads.append(1))  # type: ignore
    with torch.no_grad():
        for step in walk(model_map, batches_of(tiny_tokens(6, 9), 2)):
            with observe_layer(step.layer, Recorder()):
                step.run()
    # Hooks fire when the model arrives at a layer, and when the layer runs there.
    assert calls == [2 * 3, 2 * 3] and not heads


def test_the_model_is_as_before_after_a_walk_also_after_an_error_or_half_of_it() -> None:
    model_map = map_model(tiny_model("mixtral"))
    tokens = batches_of(tiny_tokens(2, 5), 2)
    expected = model_map.model(tokens[0]).logits
    list(walk(model_map, tokens))
    next(walk(model_map, tokens)).run()
    with pytest.raises(RuntimeError, match="stop"):
        for step in walk(model_map, tokens):
            with observe_layer(step.layer, Recorder()):
                step.run()
                raise RuntimeError("stop")
    assert torch.equal(model_map.model(tokens[0]).logits, expected)
    for module in model_map.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "forward" not in module.__dict__


def test_layers_that_remember_their_last_call_are_refused_by_name() -> None:
    model = tiny_model("llama")
    layer, seen = model.model.layers[1], []  # type: ignore[union-attr,index]

    def with_memory(_: nn.Module, args: object, output: Tensor) -> Tensor:
        seen.append(1)
        return output + len(seen)

    layer.mlp.register_forward_hook(with_memory)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"layer by layer: model\.layers\.1 run twice differs"):
        check_walk(map_model(model), [tiny_tokens(2, 9)])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_the_check_of_the_walk_passes_where_layers_only_compute(family: str) -> None:
    check_walk(map_model(tiny_model(family)), list(tiny_tokens(3, 9).split(2)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_module_is_observed_with_the_inputs_it_gets(family: str) -> None:
    model_map = map_model(tiny_model(family))
    for step in walk(model_map, [tiny_tokens(2, 9)]):
        layer, recorder = step.layer, Recorder()
        with observe_layer(layer, recorder):
            step.run()
        assert set(recorder.linears) == {s.matrix.name for s in layer.linears}
        assert set(recorder.experts) == {s.name for s in layer.experts}
        for site in layer.linears:
            assert recorder.linears[site.matrix.name][0].shape[-1] == site.matrix.cols


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
@torch.no_grad()
def test_observed_routing_reproduces_the_experts_output(family: str) -> None:
    """Indices and weights are those that the model itself used."""
    model_map = map_model(tiny_model(family))
    steps = walk(model_map, [tiny_tokens(3, 9)])
    next(steps)
    step, recorder = next(steps), Recorder()
    site = step.layer.experts[0]
    made: list[Tensor] = []
    site.hooked.register_forward_hook(
        lambda _, args, out: made.append(out[0] if isinstance(out, tuple) else out)
    )
    with observe_layer(step.layer, recorder):
        step.run()
    x, ids, weights = recorder.experts[site.name][0]
    output = torch.zeros_like(x)
    for tokens in tokens_by_expert(ids, weights, site.n_experts):
        given, factors = site.given(x, tokens)
        features = site.apply_gate(site.gate_up(tokens.expert, given))
        y = features @ site.views(tokens.expert).down.T
        bias = site.down_bias(site.module, tokens.expert)
        y = y if bias is None else y + bias
        output[tokens.rows] += factors.unsqueeze(-1) * y
    if site.hooked is site.block:  # which adds a shared expert
        output = (output + site.block.shared_expert(x)).view_as(made[0])  # type: ignore[operator]
    # Capability 23 asks for 1e-4; the same products in float32 give far less.
    assert float((output - made[0]).norm() / made[0].norm()) <= 1e-5
    if family in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert torch.allclose(weights.sum(-1), torch.ones(len(weights)))
    if family in ("olmoe", "qwen2_moe", "deepseek_v2", "deepseek", "listed_moe"):
        assert bool((weights.sum(-1) < 0.999).all())  # not renormalized


def test_a_layer_that_the_model_never_calls_is_an_error() -> None:
    model = tiny_model("llama")
    model_map = map_model(model)
    model.model.layers[1].forward = None  # must not be reached
    model.model.config.num_hidden_layers = 1
    with pytest.raises(ModelError, match=r"never called model\.layers\.1 "):
        list(walk(model_map, [tiny_tokens(1, 5)]))


def test_a_module_that_its_layer_does_not_call_on_this_text_is_an_error() -> None:
    model = tiny_model("llama")
    model_map = map_model(model)
    step = next(walk(model_map, [tiny_tokens(1, 5)]))
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    layer.mlp.forward = torch.zeros_like  # type: ignore[union-attr]
    with (
        pytest.raises(ModelError, match=r"3 modules of model\.layers\.0 .* .*mlp\.down_proj"),
        observe_layer(step.layer, Recorder()),
    ):
        step.run()


def test_tokens_come_by_expert_in_token_order_with_their_weights() -> None:
    ids = torch.tensor([[2, 0], [0, 3], [4, 2]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    found = [
        (t.expert, t.rows.tolist(), [round(w, 1) for w in t.weights.tolist()])
        for t in tokens_by_expert(ids, weights, 4)
    ]
    # Expert 1 is empty; expert 4 is padding beyond the four experts.
    assert found == [(0, [0, 1], [0.2, 0.3]), (2, [0, 2], [0.1, 0.6]), (3, [1], [0.4])]
