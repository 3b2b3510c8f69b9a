"""Expressions that name modules: they match what they are for and nothing else."""

import re

import pytest

from alphaquant.exports.targets import name_patterns

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{name}"
    for layer in range(12)
    for expert in range(4)
    for name in ("up_proj", "down_proj")
]
KNOWN = [*EXPERTS, *(f"model.layers.{layer}.self_attn.q_proj" for layer in range(12)), "head"]


def test_a_layer_s_experts_are_one_expression() -> None:
    names = [name for name in EXPERTS if ".1.mlp" in name and "up" in name]
    assert name_patterns(names, KNOWN) == (r"^model\.layers\.1\.mlp\.experts\.\d+\.up_proj$",)


def test_layers_of_one_kind_are_one_expression() -> None:
    names = [name for name in KNOWN if name.endswith("q_proj") and ".3." not in name]
    assert name_patterns(names, KNOWN) == (
        r"^model\.layers\.(0|1|2|4|5|6|7|8|9|10|11)\.self_attn\.q_proj$",
    )


@pytest.mark.parametrize(
    "wanted",
    [r"layers\.1\.", r"experts\.2\.", r"(layers\.1?1\.|head)", r"experts\.[13]\.up", "q_proj"],
)
def test_expressions_match_just_the_names_that_they_are_for(wanted: str) -> None:
    names = [name for name in KNOWN if re.search(wanted, name)]
    patterns = name_patterns(names, KNOWN)
    found = [name for name in KNOWN if any(re.match(pattern, name) for pattern in patterns)]
    assert found == names and len(patterns) < len(names)


def test_dots_are_dots() -> None:
    (pattern,) = name_patterns(["a.0.b"], ["a.0.b"])
    assert re.match(pattern, "a.0.b") and not re.match(pattern, "ax0xb")
