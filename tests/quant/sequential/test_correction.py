"""Weights that go toward what the original model gives on its own inputs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.routing import tokens_by_expert
from alphaquant.models.sites import LinearSite, ModelMap
from alphaquant.models.walk import LayerCall, LayerStep, batches_of, observe_layer, walk
from alphaquant.quant.layerwise import quantize_layers, written
from alphaquant.quant.sequential.correction import CorrectedWeights
from alphaquant.quant.sequential.crosses import CrossSums, OriginalStates, observe_both
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(6, 24)
SETTINGS = QuantSettings(sequential=True, refine_sweeps=0, pooled_tokens=0)


def noisy_steps(model_map: ModelMap) -> Iterator[tuple[LayerStep, OriginalStates]]:
    """A walk whose hidden states differ from the original's, layer by layer."""
    generator = torch.Generator().manual_seed(1)
    original = OriginalStates()
    for step in walk(model_map, batches_of(TOKENS, 3)):
        original.calls(step)
        step.calls = [
            c.with_hidden(c.hidden + 0.3 * torch.randn(c.hidden.shape, generator=generator))
            for c in step.calls
        ]
        yield step, original


def corrected(sums: CrossSums, crosses: dict[str, Tensor], share: float, **args: Any) -> Any:
    return CorrectedWeights(
        args["model_map"],
        sums.batches(args["layer"]),
        crosses,
        replace(SETTINGS, correction=share, percdamp=1e-7),
    )


def test_all_the_way_is_the_least_squares_solution_of_a_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    model_map = map_model(tiny_model("llama"))
    site = model_map.layers[0].linears[0]
    n_cols = site.matrix.cols
    given = torch.randn(500, n_cols, generator=generator)
    mixed = given @ (torch.eye(n_cols) + 0.05 * torch.randn(n_cols, n_cols, generator=generator))
    inputs = mixed + 0.2 * torch.randn(given.shape, generator=generator)
    sums = CrossSums(given={site.matrix.name: given})
    sums.on_linear(LinearSite(site.matrix, site.module), inputs)
    crosses = {site.matrix.name: sums._cross[site.matrix.name]}
    layer = replace(model_map.layers[0], linears=(site,), experts=())
    weight = model_map.view(site.matrix.name).float()
    best = torch.linalg.lstsq(inputs, given @ weight.T).solution.T
    arguments = {"model_map": model_map, "layer": layer}
    found = {
        share: corrected(sums, crosses, share, **arguments).view(site.matrix.name)
        for share in (1.0, 0.5)
    }
    assert torch.allclose(found[1.0], best, rtol=0, atol=1e-4)
    assert torch.allclose(found[0.5], (weight + best) / 2, rtol=0, atol=1e-4)
    assert not torch.allclose(best, weight, rtol=0, atol=1e-2)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "listed_moe"])
def test_sums_of_experts_are_over_the_tokens_of_the_quantized_model(family: str) -> None:
    model_map = map_model(tiny_model(family))
    step, original = next(noisy_steps(model_map))
    site = step.layer.experts[0]
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class Seen:
        def on_linear(self, *_: Any) -> None: ...
        def on_experts(self, _: Any, inputs: Tensor, ids: Tensor, weights: Tensor) -> None:
            seen.append((inputs, ids, weights))

    with observe_layer(step.layer, Seen()):
        for own in [*original.calls(step), *step.calls]:
            own.run(step.layer)
    n_batches = len(step.calls)
    before_layer = list(original.hidden or [])
    _, pooled = observe_both(step, original, replace(SETTINGS, pooled_tokens=64))
    original.hidden = before_layer
    _, crosses = observe_both(step, original, SETTINGS)
    n_tokens = sum(ids.numel() for _, ids, _ in seen[n_batches:])
    gates = [site.inner(e)[0].name for e in range(site.n_experts)]
    beside = torch.stack([crosses[name] for name in gates]).sum(0) * 64 / n_tokens
    assert torch.allclose(pooled[gates[1]], crosses[gates[1]] + beside, rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled[site.down[1].name], crosses[site.down[1].name])
    matrices = [*site.inner(1), site.down[1]]
    expected = {m.name: torch.zeros(m.cols, m.cols) for m in matrices}
    for (given, _, _), (inputs, ids, weights) in zip(
        seen[:n_batches], seen[n_batches:], strict=True
    ):
        for tokens in tokens_by_expert(ids, weights, site.n_experts):
            if tokens.expert != 1:
                continue
            x, out = site.given(inputs, tokens)
            power = (out.float() ** 2).unsqueeze(-1)
            before = site.given(given, tokens)[0]
            pairs = [(before, x)] * (len(matrices) - 1)
            pairs.append(tuple(site.apply_gate(site.gate_up(1, y)) for y in (before, x)))
            for matrix, (a, b) in zip(matrices, pairs, strict=True):
                expected[matrix.name] += ((a - b) * power).T @ b
    for name, cross in expected.items():
        assert bool(cross.any())
        assert torch.allclose(crosses[name], cross, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_a_corrected_model_ends_nearer_to_the_original(family: str) -> None:
    model_map = map_model(tiny_model(family, num_hidden_layers=4))
    assignment = uniform_assignment(model_map.inventory, "int2-g32")
    tokens = tiny_tokens(24, 24)

    def hidden() -> Tensor:
        found: Tensor = model_map.model(tokens, output_hidden_states=True).hidden_states[-1]
        return found

    original, lost = hidden(), {}
    first: list[list[Tensor]] = []
    for share in (0.0, 0.25):
        layers = list(
            quantize_layers(
                model_map, assignment, replace(SETTINGS, correction=share), tokens, batch_size=8
            )
        )
        items = [item for layer in layers for item in layer.items]
        first.append([item.packed.dequantize() for item in layers[0].items])
        with written(model_map, {item.matrix.name: item.packed for item in items}):
            lost[share] = float((hidden() - original).square().mean())
    assert all(map(torch.equal, *first)), "the first layer is given what the original is"
    assert lost[0.25] < lost[0.0]


def test_what_is_not_quantized_keeps_its_weights() -> None:
    model_map = map_model(tiny_model("olmoe"))
    names = [m.name for m in model_map.inventory.matrices]
    kept = {name for name in names if name.startswith("model.layers.1") and "q_proj" in name}
    formats = {name: "bf16" if name in kept else "int3-g32" for name in names}
    layers = list(quantize_layers(model_map, Assignment(formats), SETTINGS, TOKENS))
    (item,) = [i for i in layers[1].items if i.matrix.name in kept]
    expected = model_map.view(item.matrix.name)
    assert torch.equal(item.packed.dequantize().to(expected), expected)


def test_layers_that_hand_on_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = next(walk(map_model(tiny_model("olmoe")), [TOKENS]))
    layer, refused = step.layer.module, pytest.raises(ModelError, match="use --correction 0")
    forward = layer.forward
    with monkeypatch.context() as patch, refused:
        patch.setattr(layer, "forward", lambda *a, **k: (forward(*a, **k), torch.zeros(1)))
        OriginalStates().run(step)
    OriginalStates().run(step)
    step.calls = [LayerCall(c.args, {**c.kwargs, "state": {}}) for c in step.calls]
    with pytest.raises(ModelError, match=r"layers.0 hands on more than hidden states"):
        OriginalStates().run(step)
