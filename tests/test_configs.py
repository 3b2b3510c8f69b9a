"""The configurations that ship with the project load, resolve and mean what they say."""

from pathlib import Path

import pytest

from alphaquant import demo
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.spaces.config import load_config, resolve
from alphaquant.spaces.units import Inventory

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def inventory() -> Inventory:
    return map_model(load_skeleton(demo.model_path())).inventory


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_config_matches_modules_of_an_olmoe(
    path: Path, inventory: Inventory
) -> None:
    plan = resolve(load_config(path), inventory, strict=True)
    assert not plan.unmatched_patterns
    assert not plan.warnings
    assert all(scheme.weight_format.is_quantized for scheme in plan.schemes.values())


def test_the_olmoe_config_gives_each_role_its_format(inventory: Inventory) -> None:
    formats = resolve(load_config(CONFIGS / "gptq_olmoe_mixed.json"), inventory).assignment.formats
    assert formats["model.layers.3.self_attn.q_proj"] == "mxfp6"
    assert formats["model.layers.3.mlp.experts.15.gate_proj"] == "mxfp4"
    assert formats["model.layers.3.mlp.experts.15.up_proj"] == "mxfp4"
    assert formats["model.layers.3.mlp.experts.15.down_proj"] == "int4-g64"
    assert formats["model.layers.0.mlp.experts.15.down_proj"] == "int8-g128"


def test_the_example_config_is_uniform(inventory: Inventory) -> None:
    formats = resolve(load_config(CONFIGS / "gptq_example.json"), inventory).assignment.formats
    assert set(formats.values()) == {"int4-g128"}
