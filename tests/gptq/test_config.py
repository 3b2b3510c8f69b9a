"""Defaults, ranges, and which group size counts."""

import subprocess
import sys
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pytest

import alphaquant.gptq
from alphaquant.errors import ConfigError
from alphaquant.gptq import GPTQConfig
from alphaquant.gptq.config import choose_formats, read_layer_config
from alphaquant.spaces.config import parse_config
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.quantizer import QuantSettings

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
INVENTORY = Inventory(
    "llama", (Matrix(UP, 64, 128, "dense", 0), Matrix(DOWN, 128, 64, "dense", 0))
)


def test_names_and_defaults_are_those_of_the_old_pipeline() -> None:
    assert [f.name for f in fields(GPTQConfig)] == [
        *("blocksize", "percdamp", "groupsize", "actorder", "static_groups")
    ]
    assert astuple(GPTQConfig()) == (128, 0.01, -1, False, False)
    assert set(alphaquant.gptq.__all__) == {
        *("gptq_quantize_model", "GPTQConfig", "GPTQMoE", "MoEGPTQContext"),
        *("detect_moe_architecture", "get_layers_for_model"),
    }
    assert all(hasattr(alphaquant.gptq, name) for name in alphaquant.gptq.__all__)


def test_the_package_alone_does_not_load_it() -> None:
    probe = "import sys, alphaquant; print([n for n in sys.modules if 'gptq' in n])"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_every_option_reaches_the_engine() -> None:
    config = GPTQConfig(7, 0.5, 64, actorder=True, static_groups=True)
    assert config.settings() == QuantSettings(
        percdamp=0.5,
        blocksize=7,
        actorder=True,
        static_groups=True,
        n_starts=1,
        sequential=True,
        correction=0.0,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groupsize": 0}, r"groupsize is 0; use -1 .* at least 8"),
        ({"groupsize": -2}, "groupsize is -2"),
        ({"blocksize": 0}, "blocksize is 0; must be >= 1"),
        ({"percdamp": -0.1}, "percdamp is -0.1; must be >= 0"),
    ],
)
def test_impossible_options_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GPTQConfig(**change)


@pytest.mark.parametrize(
    ("groupsize", "data", "up", "down"),
    [
        # The three rows of the table in alphaquant/gptq/config.py.
        (-1, {"default": {"wq": "int4"}}, "int4-g128", "int4-g128"),
        (64, {"default": {"wq": "int4"}}, "int4-g64", "int4-g64"),
        (64, {"default": {"wq": "int4", "group_size": 32}}, "int4-g32", "int4-g32"),
        # One scale per row is what JSON says with -1, which groupsize does not change.
        (64, {"default": {"wq": "int4", "group_size": -1}}, "int4-row", "int4-row"),
        # An override with a group size wins where it matches, and only there.
        (
            64,
            {
                "default": {"wq": "int4"},
                "overrides": [{"pattern": "*.up_proj", "group_size": 32}],
            },
            "int4-g32",
            "int4-g64",
        ),
        # An override without one takes it over, also with another kind.
        (
            64,
            {
                "default": {"wq": "int4"},
                "overrides": [
                    {"pattern": "*.up_proj", "wq": "int3"},
                    {"pattern": "*.down_proj", "wq": "mxfp4"},
                ],
            },
            "int3-g64",
            "mxfp4",
        ),
    ],
)
def test_group_size_of_the_layers_wins(
    groupsize: int, data: dict[str, Any], up: str, down: str
) -> None:
    config = read_layer_config(data)
    assert choose_formats(config, INVENTORY, groupsize) == {UP: up, DOWN: down}


def test_a_configuration_may_be_data_a_path_or_read_already(tmp_path: Path) -> None:
    text = '{"default": {"wq": "int3"}, "overrides": [{"pattern": "*.up_proj", "skip": true}]}'
    path = tmp_path / "config.json"
    path.write_text(text)
    expected = parse_config(text)
    data = {"default": {"wq": "int3"}, "overrides": [{"pattern": "*.up_proj", "skip": True}]}
    for given in (data, path, str(path), expected):
        assert read_layer_config(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"default": {"wq": "int7"}}, "layer_config: default.wq: unknown value 'int7'"),
        ({"default": {"wq": object()}}, "give a path, a Config, or a dictionary"),
        (3, "give a path, a Config, or a dictionary"),
        ("/nowhere.json", "cannot read the configuration /nowhere.json"),
    ],
)
def test_bad_configurations_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_layer_config(given)


def test_activation_formats_are_refused() -> None:
    config = parse_config('{"default": {"wq": "int4", "aq": "int8"}}')
    with pytest.raises(ConfigError, match="only weights are quantized in place: set aq to bf16"):
        choose_formats(config, INVENTORY, -1)
