"""The recommended configurations mean on the real models what they say."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaquant.models.mapping import map_model
from alphaquant.spaces.config import load_config, parse_config, resolve
from alphaquant.spaces.units import Inventory
from alphaquant.testing.listed import ListedBlock
from alphaquant.testing.published import skeleton

CONFIGS = Path(__file__).parents[1] / "configs" / "recommended"

OLMOE, QWEN, MIXTRAL = "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "mixtral-8x7b"
LISTED = "mixtral-8x7b listed"
"""Mixtral as transformers 4 has it: a ModuleList of experts in `block_sparse_moe`."""

ATTENTION = "model.layers.0.self_attn"

# Configuration, model -> formats of six matrices.
EXPECTED: dict[tuple[str, str], dict[str, str]] = {
    ("olmoe", OLMOE): {
        f"{ATTENTION}.q_proj": "int4-g128",
        "model.layers.15.self_attn.o_proj": "int4-g128",
        "model.layers.0.mlp.experts.0.gate_proj": "mxfp4",
        "model.layers.7.mlp.experts.31.up_proj": "mxfp4",
        "model.layers.10.mlp.experts.10.down_proj": "mxfp4",
        "model.layers.15.mlp.experts.63.down_proj": "mxfp4",
    },
    ("olmoe_by_projection", OLMOE): {
        f"{ATTENTION}.q_proj": "mxfp6",
        "model.layers.15.self_attn.o_proj": "mxfp6",
        "model.layers.0.mlp.experts.0.gate_proj": "mxfp4",
        "model.layers.7.mlp.experts.31.up_proj": "mxfp4",
        "model.layers.10.mlp.experts.10.down_proj": "int4-g64",
        "model.layers.15.mlp.experts.63.down_proj": "int4-g64",
    },
    ("qwen2_moe", QWEN): {
        f"{ATTENTION}.k_proj": "int4-g128",
        "model.layers.0.mlp.experts.0.gate_proj": "mxfp4",
        "model.layers.12.mlp.experts.59.up_proj": "mxfp4",
        "model.layers.23.mlp.experts.5.down_proj": "mxfp4",
        "model.layers.0.mlp.shared_expert.up_proj": "mxfp6",
        "model.layers.23.mlp.shared_expert.down_proj": "mxfp6",
    },
    **{
        (config, MIXTRAL): {
            f"{ATTENTION}.v_proj": "int4-g128",
            "model.layers.0.mlp.experts.0.gate_proj": "mxfp4",
            "model.layers.12.mlp.experts.7.gate_proj": "mxfp4",
            "model.layers.31.mlp.experts.5.up_proj": "mxfp4",
            "model.layers.0.mlp.experts.1.down_proj": "int4-g128",
            "model.layers.31.mlp.experts.7.down_proj": "int4-g128",
        }
        for config in ("mixtral", "mixtral_by_layer_path")
    },
    **{
        (config, LISTED): {
            f"{ATTENTION}.v_proj": "int4-g128",
            "model.layers.0.block_sparse_moe.experts.0.w1": "mxfp4",
            "model.layers.12.block_sparse_moe.experts.7.w1": "mxfp4",
            "model.layers.31.block_sparse_moe.experts.5.w3": "mxfp4",
            "model.layers.0.block_sparse_moe.experts.1.w2": "int4-g128",
            "model.layers.31.block_sparse_moe.experts.7.w2": "int4-g128",
        }
        for config in ("mixtral", "mixtral_by_layer_path")
    },
}

UNMATCHED = {"olmoe_by_projection": ("model.layers.*.mlp.shared_expert.*",)}
"""OLMoE has no shared expert, which the source of this configuration did not know."""

ROUTERS = {
    OLMOE: ["model.layers.3.mlp.gate.weight"],
    QWEN: ["model.layers.3.mlp.gate.weight", "model.layers.3.mlp.shared_expert_gate.weight"],
    MIXTRAL: ["model.layers.3.mlp.gate.weight"],
    LISTED: ["model.layers.3.block_sparse_moe.gate.weight"],
}


@cache
def inventory(model: str) -> Inventory:
    found: Any = skeleton(model.split()[0])
    if model == LISTED:
        sizes = SimpleNamespace(
            hidden_size=4096, intermediate_size=14336, num_experts=8, num_experts_per_tok=2
        )
        for layer in found.model.layers:
            with torch.device("meta"):
                block: Any = ListedBlock(sizes)  # type: ignore[arg-type]
            del layer.mlp, block.shared_expert
            layer.block_sparse_moe = block
    return map_model(found).inventory


@pytest.fixture(params=EXPECTED, ids=" on ".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


def test_every_recommended_configuration_is_tested_and_described() -> None:
    names = {path.stem for path in CONFIGS.glob("*.json")}
    assert names == {config for config, _ in EXPECTED}
    for name in names:
        assert "source rule" in (load_config(CONFIGS / f"{name}.json").description or "")


def test_six_matrices_have_the_formats_of_the_rule(pair: tuple[str, str]) -> None:
    config, model = pair
    formats = resolve(load_config(CONFIGS / f"{config}.json"), inventory(model)).assignment.formats
    assert len(EXPECTED[pair]) == 6
    assert {name: formats[name] for name in EXPECTED[pair]} == EXPECTED[pair]


def test_every_pattern_matches_or_is_warned_of(pair: tuple[str, str]) -> None:
    config, model = pair
    plan = resolve(load_config(CONFIGS / f"{config}.json"), inventory(model))
    unmatched = UNMATCHED.get(config, ())
    assert plan.unmatched_patterns == unmatched
    texts = [w for w in plan.warnings if "group_size is ignored" not in w]
    assert len(texts) == len(unmatched)
    assert all(p in t and "matches nothing" in t for p, t in zip(unmatched, texts, strict=True))
    # Attention's mxfp6 is written with groups of 64, mxfp blocks are 32: one line, not one each.
    ignored = sum("group_size is ignored" in w for w in plan.warnings)
    assert ignored == (config in ("olmoe_by_projection", "qwen2_moe"))


def test_routers_are_named_and_stay(pair: tuple[str, str]) -> None:
    config, model = pair
    kept = {k.name for k in inventory(model).kept}
    assert kept.issuperset(ROUTERS[model])
    assert not any("gate.weight" in f"{m.name}.weight" for m in inventory(model).matrices)
    data = load_config(CONFIGS / f"{config}.json")
    assert all(o.pattern != "*.mlp.*gate*" and o.pattern != "*.mlp.gate*" for o in data.overrides)
    # Without `skip` the same pattern would ask to quantize routers, and say so.
    asking = {"overrides": [{"pattern": data.overrides[-1].pattern, "wq": "int4"}]}
    plan = resolve(parse_config(json.dumps(asking)), inventory(model))
    assert "are not quantized" in plan.warnings[0]


def test_both_recommendations_for_mixtral_are_the_same_plan() -> None:
    plans = [
        resolve(load_config(CONFIGS / f"{name}.json"), inventory(MIXTRAL)).assignment
        for name in ("mixtral", "mixtral_by_layer_path")
    ]
    assert plans[0] == plans[1]
