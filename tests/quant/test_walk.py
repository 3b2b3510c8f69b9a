"""The walk layer by layer: the model's own hidden states, calls counted, unreached modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.quant.models import map_model
from alphaquant.quant.routing import tokens_by_expert
from alphaquant.quant.sites import ExpertsSite, LinearSite, ModelMap
from alphaquant.quant.walk import batches_of, capture_inputs, observe_layer, run_layer
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
    inputs = capture_inputs(model_map, batches_of(tokens, 2))
    hidden = inputs.hidden
    assert [len(h) for h in hidden] == ([1] if n_windows == 1 else [2, 2, 1])
    outputs: list[Tensor] = []
    model_map.layers[-1].module.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    for start in range(0, n_windows, 2):
        expected = model(tokens[start : start + 2], output_hidden_states=True).hidden_states
        walked = [hidden[start // 2]]
        for layer in model_map.layers:
            walked.append(run_layer(layer, walked[-1], inputs.arguments[layer.index]))
        assert torch.equal(walked[0], expected[0]) and torch.equal(walked[1], expected[1])
        # transformers' last hidden state has the final norm; the layer's own output is compared.
        assert torch.equal(walked[2], outputs[-2])


def test_capturing_runs_one_window_through_the_model_and_walking_each_layer_once_per_batch() -> (
    None
):
    model_map = map_model(tiny_model("olmoe"))
    calls = counted(model_map)
    inputs = capture_inputs(model_map, batches_of(tiny_tokens(6, 9), 2))
    # One window for the arguments of all layers; of the batches, only the first layer is reached.
    assert calls == [1 + 3, 1]
    calls[:] = [0, 0]
    for layer in model_map.layers:
        with torch.no_grad(), observe_layer(layer, Recorder()):
            for h in inputs.hidden:
                run_layer(layer, h, inputs.arguments[layer.index])
    assert calls == [3, 3]  # one forward per batch and layer, whatever the number of experts


def test_hooks_are_gone_after_the_walk_also_after_an_error() -> None:
    model_map = map_model(tiny_model("mixtral"))
    inputs = capture_inputs(model_map, batches_of(tiny_tokens(2, 5), 2))
    layer = model_map.layers[0]
    with observe_layer(layer, Recorder()):
        run_layer(layer, inputs.hidden[0], inputs.arguments[0])
    with pytest.raises(RuntimeError, match="stop"), observe_layer(layer, Recorder()):
        raise RuntimeError("stop")
    for module in model_map.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_module_is_observed_with_the_inputs_it_gets(family: str) -> None:
    model_map = map_model(tiny_model(family))
    inputs = capture_inputs(model_map, batches_of(tiny_tokens(2, 9), 2))
    hidden = inputs.hidden[0]
    for layer in model_map.layers:
        recorder = Recorder()
        with observe_layer(layer, recorder):
            hidden = run_layer(layer, hidden, inputs.arguments[layer.index])
        assert set(recorder.linears) == {s.matrix.name for s in layer.linears}
        assert set(recorder.experts) == {s.name for s in layer.experts}
        for site in layer.linears:
            assert recorder.linears[site.matrix.name][0].shape[-1] == site.matrix.cols


@pytest.mark.parametrize("family", ROUTED_EXPERTS)
@torch.no_grad()
def test_observed_routing_reproduces_the_experts_output(family: str) -> None:
    """Indices and weights are those that the model itself used."""
    model_map = map_model(tiny_model(family))
    inputs = capture_inputs(model_map, batches_of(tiny_tokens(3, 9), 3))
    hidden = run_layer(model_map.layers[0], inputs.hidden[0], inputs.arguments[0])
    layer, recorder = model_map.layers[1], Recorder()
    site = layer.experts[0]
    made: list[Tensor] = []
    site.hooked.register_forward_hook(
        lambda _, args, out: made.append(out[0] if isinstance(out, tuple) else out)
    )
    with observe_layer(layer, recorder):
        run_layer(layer, hidden, inputs.arguments[1])
    x, ids, weights = recorder.experts[site.name][0]
    output = torch.zeros_like(x)
    for tokens in tokens_by_expert(ids, weights, site.n_experts):
        features = site.apply_gate(site.gate_up(tokens.expert, x[tokens.rows]))
        y = features @ site.views(tokens.expert).down.T
        bias = site.down_bias(site.module, tokens.expert)
        y = y if bias is None else y + bias
        output[tokens.rows] += tokens.weights.unsqueeze(-1) * y
    if family == "listed_moe":  # its block adds a shared expert
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
    with pytest.raises(ModelError, match=r"never called model\.layers\.1;"):
        capture_inputs(model_map, [tiny_tokens(1, 5)])


def test_a_module_that_its_layer_never_calls_is_an_error() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.unused = nn.Linear(4, 4)
    model_map = map_model(model)
    inputs = capture_inputs(model_map, [tiny_tokens(1, 5)])
    layer = model_map.layers[0]
    with (
        pytest.raises(ModelError, match=r"1 modules of model\.layers\.0 .* e\.g\. .*mlp\.unused"),
        observe_layer(layer, Recorder()),
    ):
        run_layer(layer, inputs.hidden[0], inputs.arguments[0])


def test_tokens_come_by_expert_in_token_order_with_their_weights() -> None:
    ids = torch.tensor([[2, 0], [0, 3], [4, 2]])
    weights = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    found = [
        (t.expert, t.rows.tolist(), [round(w, 1) for w in t.weights.tolist()])
        for t in tokens_by_expert(ids, weights, 4)
    ]
    # Expert 1 is empty; expert 4 is padding beyond the four experts.
    assert found == [(0, [0, 1], [0.2, 0.3]), (2, [0, 2], [0.1, 0.6]), (3, [1], [0.4])]
