"""Names of original checkpoints, which are those of the files that transformers writes."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from alphaquant.errors import ConfigError
from alphaquant.exports.names import matrix_names, original_names
from alphaquant.models.mapping import map_model
from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import SERVED_FAMILIES


@pytest.mark.parametrize("family", [*SERVED_FAMILIES, "deepseek_v2"])
def test_names_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    model_map = map_model(model)
    names = original_names(model_map)
    matrices = matrix_names(model_map, "x")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        saved = set(opened.keys())
    kept = {names.tensor(kept.name) for kept in model_map.inventory.kept}
    assert {f"{name}.weight" for name in matrices.values()} | kept == saved
    assert len(set(matrices.values())) == len(model_map.inventory.matrices)


def test_mixtral_has_its_own_names() -> None:
    model_map = map_model(tiny_model("mixtral"))
    names = matrix_names(model_map, "x")
    up = "model.layers.1.mlp.experts.2.up_proj"
    assert names[up] == "model.layers.1.block_sparse_moe.experts.2.w3"
    router = original_names(model_map).tensor("model.layers.1.mlp.gate.weight")
    assert router == "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h"])
def test_experts_without_names_are_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=r"--export x: checkpoints of .* --export alphaquant"):
        matrix_names(map_model(tiny_model(family)), "x")
