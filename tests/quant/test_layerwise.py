"""Layer by layer: whose outputs the next layer sees."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.pages.opening import open_weights
from alphaquant.models.sites import LinearSite, ModelMap
from alphaquant.models.walk import check_walk
from alphaquant.progress import no_progress
from alphaquant.quant.hessian import LayerHessians
from alphaquant.quant.layerwise import quantize_layers, written
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(4, 16)
FAMILIES = ("olmoe", "gpt_oss", "listed_moe")


def results(
    model_map: ModelMap, *, sequential: bool, correction: float = 0.0
) -> Iterator[list[Tensor]]:
    """Dequantized weights of each layer."""
    settings = QuantSettings(sequential=sequential, correction=correction, refine_sweeps=0)
    assignment = uniform_assignment(model_map.inventory, "int3-g32")
    for done in quantize_layers(model_map, assignment, settings, TOKENS, batch_size=2):
        yield [item.packed.dequantize() for item in done.items]


@pytest.mark.parametrize("family", FAMILIES)
def test_sequential_mode_uses_the_inputs_of_the_quantized_model(family: str) -> None:
    """The second layer comes out as if the first had been quantized in the model beforehand."""
    model_map = map_model(tiny_model(family))
    settings = QuantSettings(sequential=True, correction=0.0, refine_sweeps=0)
    assignment = uniform_assignment(model_map.inventory, "int3-g32")
    layers = list(quantize_layers(model_map, assignment, settings, TOKENS, batch_size=2))
    for item in layers[0].items:
        model_map.view(item.matrix.name).copy_(item.packed.dequantize())
    second = list(results(model_map, sequential=False))[1]
    expected = [item.packed.dequantize() for item in layers[1].items]
    assert all(torch.equal(a, b) for a, b in zip(second, expected, strict=True))


def test_cached_inputs_are_those_that_the_final_model_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Capability 12: inputs that Hessians were made from, against a hook on the final model."""
    model_map = map_model(tiny_model("qwen2_moe"))
    site = model_map.layers[1].linears[0]
    seen: list[Tensor] = []
    plain = LayerHessians.on_linear

    def spy(self: LayerHessians, linear: LinearSite, inputs: Tensor) -> None:
        if linear.matrix.name == site.matrix.name:
            seen.append(inputs.clone())
        plain(self, linear, inputs)

    monkeypatch.setattr(LayerHessians, "on_linear", spy)
    settings = QuantSettings(sequential=True)
    assignment = uniform_assignment(model_map.inventory, "int2-g32")
    items = [
        item
        for done in quantize_layers(model_map, assignment, settings, TOKENS, batch_size=4)
        for item in done.items
    ]
    final: list[Tensor] = []
    site.module.register_forward_pre_hook(lambda _, args: final.append(args[0]))
    with written(model_map, {i.matrix.name: i.packed for i in items}):
        model_map.model(TOKENS)
    assert len(seen) == len(final) == 1
    assert torch.allclose(seen[0], final[0], rtol=0, atol=1e-5)
    original = final.pop()
    model_map.model(TOKENS)
    assert not torch.allclose(original, final[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize("sequential", [False, True])
def test_the_model_has_its_own_weights_afterwards(sequential: bool) -> None:
    model_map = map_model(tiny_model("olmoe"))
    before = {k: v.clone() for k, v in model_map.model.state_dict().items()}
    list(results(model_map, sequential=sequential))
    after = model_map.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_weights_come_back_after_an_error() -> None:
    model_map = map_model(tiny_model("olmoe"))
    settings = QuantSettings(method="rtn")
    assignment = uniform_assignment(model_map.inventory, "int2-g32")
    first = next(iter(quantize_layers(model_map, assignment, settings, None)))
    name = first.items[0].matrix.name
    before = model_map.view(name).clone()
    with (
        pytest.raises(ZeroDivisionError),
        written(model_map, {i.matrix.name: i.packed for i in first.items}),
    ):
        assert not torch.equal(model_map.view(name), before)
        raise ZeroDivisionError
    assert torch.equal(model_map.view(name), before)


@pytest.mark.parametrize(
    ("sequential", "correction", "n_runs"), [(False, 0.0, 1), (True, 0.0, 2), (True, 0.25, 3)]
)
@pytest.mark.parametrize("family", ["olmoe", "listed_moe"])
def test_a_layer_runs_at_most_twice_per_batch(
    family: str, sequential: bool, correction: float, n_runs: int
) -> None:
    """Capability 13: passes do not grow with the number of experts; once more if corrected."""
    model_map = map_model(tiny_model(family))
    calls = []

    def count(_: nn.Module, args: object) -> None:
        calls.append(1)

    for layer in model_map.layers:
        layer.module.register_forward_pre_hook(count)
    check_walk(model_map, [TOKENS[:2], TOKENS[2:]])
    n_check = len(calls)
    list(results(model_map, sequential=sequential, correction=correction))
    n_batches, n_layers = 2, 2
    # Hooks fire when the model arrives at a layer, and when the layer runs there.
    assert len(calls) - 2 * n_check == n_batches * n_layers * (1 + n_runs)


def test_gptq_without_text_is_refused() -> None:
    model_map = map_model(tiny_model("llama"))
    assignment = uniform_assignment(model_map.inventory, "int4-g32")
    with pytest.raises(ModelError, match="GPTQ needs calibration text"):
        next(quantize_layers(model_map, assignment, QuantSettings(), None))


def test_inputs_that_are_no_numbers_are_an_error() -> None:
    """They would look like an expert without tokens."""
    model_map = map_model(tiny_model("llama"))
    model_map.model.model.embed_tokens.weight[int(TOKENS[0, 3]), 0] = float("nan")
    assignment = uniform_assignment(model_map.inventory, "int4-g32")
    with pytest.raises(ModelError, match=r"inputs of model\.layers\.0\.\S+ hold NaN"):
        list(quantize_layers(model_map, assignment, QuantSettings(), TOKENS))


@torch.no_grad()
def test_of_weights_in_files_nothing_stays_in_memory(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path / "source")
    opened = open_weights(tmp_path / "source", "auto", tmp_path / "cache", no_progress)
    model_map = map_model(opened.model, pages=opened.pages)
    before = {name: view.clone() for name, view in model_map.views.items()}
    settings = QuantSettings(method="rtn")
    assignment = uniform_assignment(model_map.inventory, "int2-g32")
    for done in list(quantize_layers(model_map, assignment, settings, None)):
        with written(model_map, {item.matrix.name: item.packed for item in done.items}):
            assert done.layer.pages is not None
            assert done.layer.pages.changed_bytes() > 0
        assert done.layer.pages.changed_bytes() == 0
    assert all(torch.equal(model_map.view(name), view) for name, view in before.items())
    # What somebody else wrote is not in the file.
    name = done.items[0].matrix.name
    model_map.view(name).zero_()
    with written(model_map, {name: done.items[0].packed}):
        assert bool(model_map.view(name).any())
    assert not bool(model_map.view(name).any())
