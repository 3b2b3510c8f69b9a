"""The first run of a checkpoint: what fails is told with its place."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.runtime import first_run as module
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.first_run import relative_error
from alphaquant.runtime.modules import PackedLinear
from alphaquant.runtime.pipeline import PackingJob, PipelineResult, quantize_to_checkpoint
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import FAMILIES, tiny_model


def run(folder: Path, model: Any, **changes: Any) -> PipelineResult:
    model_map = map_model(model)
    assignment = uniform_assignment(model_map.inventory, "int3-g32")
    settings = QuantSettings(method="rtn")
    job = PackingJob(model_map, assignment, settings, **changes)
    return quantize_to_checkpoint(job, folder, facts={})


def first_run_of(result: PipelineResult) -> dict[str, Any]:
    report = json.loads((result.path / "quantize_report.json").read_text())
    found: dict[str, Any] = report["first_run"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_agrees_in_float32_and_the_model_is_unchanged(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = first_run_of(run(tmp_path / "packed", model))
    assert found["max_relative_error"] < 1e-5 and found["text"] == "random"
    assert found["n_tokens"] == 64 and found["device"] == "cpu" and found["seconds"] > 0
    assert found["tolerance"] == pytest.approx(1e-4, rel=0.05)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_it_agrees_in_bfloat16_and_with_rounded_inputs(tmp_path: Path) -> None:
    model = tiny_model("olmoe").to(torch.bfloat16)
    names = [m.name for m in map_model(model).inventory.matrices]
    activations = dict.fromkeys(names, parse_format("int8-row"))
    found = first_run_of(run(tmp_path / "packed", model, activations=activations))
    assert 0 <= found["max_relative_error"] < 0.05 and found["tolerance"] > 0.1


def damaged_load(where: str, scale: float) -> Any:
    """`load` of a checkpoint with one matrix scaled."""

    def loading(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        matrix = model.get_submodule(where)
        assert isinstance(matrix, PackedLinear)
        matrix.scales.mul_(scale)
        return model

    return loading


@pytest.mark.parametrize("scale", [1.1, math.nan])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_differs_is_named_and_the_checkpoint_kept(
    layer: int, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"model.layers.{layer}.self_attn.o_proj"
    monkeypatch.setattr(module, "load", damaged_load(where, scale))
    message = rf"the output of model\.layers\.{layer} differs .* kept in .*packed\.part/checkpoint"
    with pytest.raises(ModelError, match=message):
        run(tmp_path / "packed", tiny_model("olmoe"))
    assert [p.name for p in tmp_path.iterdir()] == ["packed.part"]
    assert load(tmp_path / "packed.part" / "checkpoint")


def test_a_model_that_cannot_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore")

    monkeypatch.setattr(PackedLinear, "forward", crash)
    with pytest.raises(
        ModelError, match="it cannot be run .mat1 and mat2 .* multiplied"
    ) as caught:
        run(tmp_path / "packed", tiny_model("olmoe"))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_broken_itself_is_told_apart(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    model.model.embed_tokens.weight.data.fill_(math.inf)
    with pytest.raises(ModelError, match=r"come out of model\.layers\.0, in the original"):
        run(tmp_path / "packed", model)


def test_one_token_of_twenty_may_go_to_another_expert() -> None:
    expected = torch.ones(1, 40, 8)
    found = expected.clone()
    found[0, :2] = 5.0
    assert relative_error(found, expected) == 0.0
    found[0, 2] = 1.5
    assert relative_error(found, expected) == pytest.approx(0.5)
    found[0, 3, 0] = math.nan
    assert math.isinf(relative_error(found, expected))
