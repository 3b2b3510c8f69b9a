"""Tuning lowers the divergence on windows it has not seen, or changes nothing."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.layerwise import quantize_layers, written
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.tuning import learning as module
from alphaquant.quant.tuning.learning import Tuned, Tuning, tune
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.tuning import TuningSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS, HELDBACK = tiny_tokens(48, 16), tiny_tokens(32, 16, 7)


def quantized(model_map: ModelMap, assignment: Assignment) -> dict[str, PackedMatrix]:
    settings = QuantSettings(method="rtn")
    done = quantize_layers(model_map, assignment, settings, None)
    return {item.matrix.name: item.packed for layer in done for item in layer.items}


def divergence(model_map: ModelMap, packed: Mapping[str, PackedMatrix], tuned: Tuned) -> float:
    model: Any = model_map.model
    own = {name: model.get_parameter(name).clone() for name in tuned.kept}
    with torch.no_grad():
        original = torch.log_softmax(model(HELDBACK).logits, -1)
        with written(model_map, {**packed, **tuned.packed}):
            for name, value in tuned.kept.items():
                model.get_parameter(name).copy_(value)
            found = torch.log_softmax(model(HELDBACK).logits, -1)
        for name, value in own.items():
            model.get_parameter(name).copy_(value)
    return float((original.exp() * (original - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "include"), [("mixtral", ("head", "embeddings")), ("gpt_oss", ())]
)
def test_what_is_kept_is_what_was_measured_and_the_original_is_as_before(
    family: str, include: tuple[str, ...]
) -> None:
    model_map = map_model(tiny_model(family), include=include)
    before = {name: tensor.clone() for name, tensor in model_map.model.state_dict().items()}
    names = ("int2-g32-asym", "mxfp4", "int3-g32", "bf16")
    matrices = model_map.inventory.matrices
    packed = quantized(
        model_map, Assignment({m.name: names[i % 4] for i, m in enumerate(matrices)})
    )
    steps: list[tuple[int, int]] = []
    found = tune(
        model_map,
        packed,
        Tuning(TuningSettings(n_epochs=2, step_size=1e-2), TOKENS, HELDBACK),
        lambda done, total: steps.append((done, total)),
    )
    facts = found.facts
    assert facts["is_kept"] and facts["kl_after"] < facts["kl_before"]
    assert divergence(model_map, packed, Tuned({}, {}, {})) == pytest.approx(
        facts["kl_before"], rel=1e-4
    )
    assert divergence(model_map, packed, found) == pytest.approx(facts["kl_after"], rel=1e-4)
    after = model_map.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    formats = {packed[name].format.name for name in facts["fixed_matrices"]}
    assert formats == {"mxfp4", "bf16"}
    assert found.packed.keys() == packed.keys() - set(facts["fixed_matrices"])
    assert any("norm" in name for name in found.kept)
    assert any("router" in name or ".gate." in name for name in found.kept)
    assert steps[-1] == (24, 24)


def test_some_parts_move_alone() -> None:
    model_map = map_model(tiny_model("mixtral"))
    packed = quantized(model_map, uniform_assignment(model_map.inventory, "int3-g32"))
    settings = TuningSettings(("routers",), 1, 1e-2)
    found = tune(model_map, packed, Tuning(settings, TOKENS[:16], HELDBACK))
    assert not found.packed and set(found.facts["fixed_matrices"]) == packed.keys()
    assert all(".gate." in name for name in found.kept)


def test_what_does_not_help_changes_nothing() -> None:
    model_map = map_model(tiny_model("llama"))
    packed = quantized(model_map, uniform_assignment(model_map.inventory, "int8-g32"))
    settings = TuningSettings(n_epochs=1, step_size=0.5)  # steps that are far too large
    found = tune(model_map, packed, Tuning(settings, TOKENS[:8], HELDBACK))
    assert not found.facts["is_kept"] and not found.packed and not found.kept


def test_a_model_that_memory_does_not_hold_three_times_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1000)
    model_map = map_model(tiny_model("llama"))
    with pytest.raises(ModelError, match="0.0 GiB are free; leave --tune out"):
        tune(model_map, {}, Tuning(TuningSettings(), TOKENS, HELDBACK))
