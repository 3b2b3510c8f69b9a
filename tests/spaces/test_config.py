"""Configurations: reading, merging, warnings, and the way back from an assignment."""

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaquant.errors import ConfigError
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.config import (
    Config,
    Plan,
    config_from_assignment,
    dump_config,
    load_config,
    parse_config,
    resolve,
)
from alphaquant.spaces.formats import (
    ACTIVATION_KINDS,
    BF16,
    FORMAT_KINDS,
    make_format,
    parse_format,
)
from alphaquant.spaces.menus import MENUS
from alphaquant.spaces.units import Inventory, Matrix

FORMATS = [
    *MENUS["all"],
    "int4-g64",
    "int8-row",
    "mxfp6-e2m3",
    "fp6-e2m3-g64",
    "fp8-e5m2-row",
    "int1-row",
]
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj"


def config(*overrides: dict[str, Any], **top: Any) -> Config:
    return parse_config(json.dumps({**top, "overrides": overrides}))


def plan(model: Inventory, *overrides: dict[str, Any], **default: Any) -> Plan:
    return resolve(config(*overrides, default=default), model)


def weights(found: Plan, name: str) -> str:
    return found.schemes[name].weight_format.name


def test_overrides_merge_field_by_field_in_file_order(olmoe: Inventory) -> None:
    found = plan(
        olmoe,
        {"pattern": "*.down_proj", "wq": "int3"},
        {"pattern": "*.experts.{0..7}.*", "symmetric": False, "aq": "int8"},
        {"pattern": "*.experts.3.*", "group_size": 32},
        {"pattern": "*.experts.3.up_proj", "wq": "int8", "symmetric": True},
        wq="int4",
        group_size=64,
    )
    assert weights(found, "model.layers.0.self_attn.q_proj") == "int4-g64"
    assert weights(found, EXPERT.format(9, "down")) == "int3-g64"
    assert weights(found, EXPERT.format(2, "down")) == "int3-g64-asym"
    assert weights(found, EXPERT.format(3, "down")) == "int3-g32-asym"
    assert weights(found, EXPERT.format(3, "up")) == "int8-g32"
    assert found.schemes[EXPERT.format(3, "up")].activation.name == "int8-row"
    assert found.warnings == ()


def test_the_last_match_wins_whatever_is_more_specific(llama: Inventory) -> None:
    name = "model.layers.0.mlp.up_proj"
    found = plan(llama, {"pattern": name, "wq": "int8"}, {"pattern": "*", "wq": "int3"})
    assert weights(found, name) == "int3-g128"


def test_absent_fields_are_bf16_and_the_format_s_group(llama: Inventory) -> None:
    name = "model.layers.0.mlp.up_proj"
    assert resolve(parse_config("{}"), llama).schemes[name].weight_format == BF16
    assert resolve(parse_config("{}"), llama).schemes[name].activation == BF16
    kinds = [kind for kind in FORMAT_KINDS if make_format(kind).fits(128)]
    groups = {kind: plan(llama, wq=kind).schemes[name].weight_format for kind in kinds}
    assert groups == {kind: make_format(kind) for kind in kinds}
    assert weights(plan(llama, wq="int8", group_size=-1), name) == "int8-row"


@pytest.mark.parametrize("aq", ACTIVATION_KINDS)
def test_activations_are_rounded_per_token_or_per_block(llama: Inventory, aq: str) -> None:
    found = plan(llama, wq="int4", group_size=64, symmetric=False, aq=aq)
    for scheme in found.schemes.values():
        assert scheme.weight_format.name == "int4-g64-asym"
        assert scheme.activation == make_format(aq, -1)


def test_skip_is_sticky_until_an_explicit_false(llama: Inventory) -> None:
    gate = "model.layers.0.mlp.gate_proj"
    skip = {"pattern": "*.gate_proj", "skip": True}
    quantize = {"pattern": "model.*", "wq": "mxfp6", "aq": "int8"}
    skipped = plan(llama, skip, quantize).schemes[gate]
    assert (skipped.weight_format, skipped.activation, skipped.skip) == (BF16, BF16, True)
    again = plan(llama, skip, quantize, {"pattern": "*.layers.0.*", "skip": False})
    assert weights(again, gate) == "mxfp6"
    assert weights(again, "model.layers.1.mlp.gate_proj") == "bf16"


def test_one_config_gives_one_plan_by_canonical_names_and_aliases(mixtral: Inventory) -> None:
    canonical = plan(
        mixtral,
        {"pattern": "*.mlp.experts.*.gate_proj", "wq": "mxfp4"},
        {"pattern": "*.mlp.experts.7.down_proj", "wq": "int3"},
    )
    aliases = plan(
        mixtral,
        {"pattern": "*.block_sparse_moe.experts.*.w1", "wq": "mxfp4"},
        {"pattern": "*.block_sparse_moe.experts.7.w2", "wq": "int3"},
    )
    assert canonical == aliases
    assert weights(aliases, EXPERT.format(7, "down")) == "int3-g128"
    assert weights(aliases, EXPERT.format(7, "up")) == "bf16"


def test_layer_1_does_not_address_layer_10(olmoe: Inventory) -> None:
    found = plan(olmoe, {"pattern": "model.layers.1.*", "wq": "int3"}, wq="int8")
    assert weights(found, "model.layers.1.self_attn.q_proj") == "int3-g128"
    assert weights(found, "model.layers.10.self_attn.q_proj") == "int8-g128"
    assert weights(found, "model.layers.11.mlp.experts.1.up_proj") == "int8-g128"


# The five recommended configurations of the source documents, and six named matrices of each.
DEFAULT = {"wq": "int4", "aq": "bf16", "group_size": 128}
OLD = "model.layers.*.block_sparse_moe.experts.*"
RECOMMENDED = {
    "olmoe": (
        "olmoe",
        [
            {"pattern": "*.mlp.experts.*", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.mlp.gate", "skip": True},
        ],
        ["int4-g128", "int4-g128", "mxfp4", "mxfp4", "mxfp4", "mxfp4"],
    ),
    "olmoe with best practice": (
        "olmoe",
        [
            {"pattern": "model.layers.*.self_attn.*", "wq": "mxfp6", "group_size": 64},
            {
                "pattern": "model.layers.*.mlp.experts.*.gate_proj",
                "wq": "mxfp4",
                "group_size": 32,
                "comment": "Expert gates use MXFP4 with small groups",
            },
            {"pattern": "model.layers.*.mlp.experts.*.up_proj", "wq": "mxfp4", "group_size": 32},
            {"pattern": "model.layers.*.mlp.experts.*.down_proj", "wq": "int4", "group_size": 64},
            {"pattern": "model.layers.*.mlp.shared_expert.*", "wq": "mxfp6", "group_size": 64},
            {"pattern": "*.mlp.*gate", "skip": True, "comment": "Never quantize routers!"},
        ],
        ["mxfp6", "mxfp6", "mxfp4", "mxfp4", "int4-g64", "int4-g64"],
    ),
    "qwen2_moe": (
        "qwen2_moe",
        [
            {"pattern": "*.mlp.experts.*", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.mlp.shared_expert.*", "wq": "mxfp6", "group_size": 64},
            {"pattern": "*.mlp.*gate", "skip": True},
        ],
        ["int4-g128", "int4-g128", "mxfp4", "mxfp4", "mxfp4", "mxfp4"],
    ),
    "mixtral": (
        "mixtral",
        [
            {"pattern": "*.block_sparse_moe.experts.*.w1", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.block_sparse_moe.experts.*.w3", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.block_sparse_moe.experts.*.w2", "wq": "int4", "group_size": 128},
            {"pattern": "*.block_sparse_moe.gate", "skip": True},
        ],
        ["int4-g128", "int4-g128", "mxfp4", "mxfp4", "int4-g128", "int4-g128"],
    ),
    "mixtral with best practice": (
        "mixtral",
        [
            {"pattern": f"{OLD}.w1", "wq": "mxfp4", "group_size": 32},
            {"pattern": f"{OLD}.w2", "wq": "int4", "group_size": 128},
            {"pattern": f"{OLD}.w3", "wq": "mxfp4", "group_size": 32},
            {"pattern": "*.block_sparse_moe.gate", "skip": True},
        ],
        ["int4-g128", "int4-g128", "mxfp4", "mxfp4", "int4-g128", "int4-g128"],
    ),
}
NAMED = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.o_proj",
    EXPERT.format(0, "gate"),
    EXPERT.format(7, "up"),
    EXPERT.format(0, "down"),
    EXPERT.format(7, "down"),
]


@pytest.mark.parametrize("title", RECOMMENDED)
def test_recommended_configurations_resolve(title: str, request: pytest.FixtureRequest) -> None:
    model, overrides, expected = RECOMMENDED[title]
    found = resolve(config(*overrides, default=DEFAULT), request.getfixturevalue(model))
    assert [weights(found, name) for name in NAMED] == expected
    shared = "*.mlp.shared_expert.*" if model == "qwen2_moe" else None
    if shared:
        assert weights(found, "model.layers.0.mlp.shared_expert.up_proj") == "mxfp6"
    absent = ("model.layers.*.mlp.shared_expert.*",) if "best" in title else ()
    assert found.unmatched_patterns == (absent if model == "olmoe" else ())


def test_a_pattern_that_matches_nothing_is_a_warning_or_an_error(olmoe: Inventory) -> None:
    found = config({"pattern": "*.q_proj", "wq": "int4"}, {"pattern": "*.shared_expert.*"})
    loose = resolve(found, olmoe)
    text = "overrides[1] (pattern '*.shared_expert.*') matches nothing in this olmoe model"
    assert loose.unmatched_patterns == ("*.shared_expert.*",)
    assert len(loose.warnings) == 1
    assert text in loose.warnings[0]
    with pytest.raises(ConfigError, match=re.escape(text)):
        resolve(found, olmoe, strict=True)


def test_an_ignored_group_size_is_one_warning_and_changes_no_bits(olmoe: Inventory) -> None:
    overrides = (
        {"pattern": "*.self_attn.*", "wq": "mxfp6", "group_size": 64},
        {"pattern": "*.experts.*", "wq": "mxfp4", "group_size": 128},
    )
    found = plan(olmoe, *overrides)
    assert len(found.warnings) == 1
    assert "group_size is ignored for 2352 matrices" in found.warnings[0]
    assert "64 on model.layers.0.self_attn.q_proj" in found.warnings[0]
    without = [{k: v for k, v in o.items() if k != "group_size"} for o in overrides]
    assert found.schemes == plan(olmoe, *without).schemes


SUPER = {"wq": "int3", "group_size": 32, "super_block": 256}


def test_a_super_block_on_what_cannot_have_one_names_override_and_matrix(
    llama: Inventory,
) -> None:
    with pytest.raises(ConfigError, match=r"overrides\[0\].*int8 with group size 32 has no super"):
        plan(llama, {"pattern": "*", "super_block": 256}, wq="int8", group_size=32)


@pytest.mark.parametrize(
    ("default", "override", "expected", "n_warnings"),
    [
        ({"wq": "int4", "group_size": 128}, {"wq": "mxfp6"}, "mxfp6", 0),  # meant for int4
        ({"wq": "mxfp4"}, {"group_size": 64}, "mxfp4", 1),
        ({"group_size": 64}, {"wq": "mxfp4"}, "mxfp4", 0),
        ({"wq": "mxfp4", "group_size": 32}, {}, "mxfp4", 0),  # its own block
        ({"wq": "nvfp4", "group_size": 32}, {}, "nvfp4", 1),
        ({"wq": "mxfp4", "group_size": 64}, {"wq": "int4"}, "int4-g64", 0),  # survives
        ({"wq": "mxfp4", "group_size": 64}, {"skip": True}, "bf16", 0),
        ({"wq": "int4", "symmetric": False}, {"wq": "mxfp4"}, "mxfp4", 0),
        ({"wq": "int4", "symmetric": False}, {"wq": "int1"}, "int1-g128", 0),
        ({"wq": "int4", "symmetric": False}, {"wq": "bf16"}, "bf16", 0),
        ({"wq": "bf16"}, {"symmetric": False}, "bf16", 0),
        ({"symmetric": False}, {"wq": "int4"}, "int4-g128-asym", 0),
        ({"wq": "fp6", "extra": {"format": "e2m3"}}, {"wq": "int4"}, "int4-g128", 0),
        ({"wq": "fp6", "extra": {"format": "e2m3"}}, {"wq": "mxfp6"}, "mxfp6-e2m3", 0),
        ({"wq": "fp6", "extra": {"format": "e2m3"}}, {"extra": {}}, "fp6-e3m2-g128", 0),
        ({"wq": "mxfp8"}, {"extra": {"format": "e5m2"}}, "mxfp8-e5m2", 0),
        ({"wq": "int3", "group_size": 32}, {"super_block": 256}, "int3-g32-s256", 0),
        ({**SUPER}, {"wq": "nl4"}, "nl4-g32-s256", 0),  # survives
        ({**SUPER}, {"wq": "int8"}, "int8-g32", 0),  # meant for int3
        ({**SUPER}, {"wq": "mxfp4"}, "mxfp4", 0),
        ({**SUPER}, {"group_size": 128}, "int3-g128", 0),
        ({**SUPER}, {"symmetric": False}, "int3-g32-asym", 0),
        ({**SUPER}, {"super_block": 0}, "int3-g32", 0),
    ],
)
def test_fields_speak_of_the_wq_before_them(
    llama: Inventory,
    default: dict[str, Any],
    override: dict[str, Any],
    expected: str,
    n_warnings: int,
) -> None:
    found = plan(llama, {"pattern": "*", **override}, **default)
    assert set(found.assignment.formats.values()) == {expected}
    assert len(found.warnings) == n_warnings


def test_an_element_on_an_integer_names_override_and_matrix(llama: Inventory) -> None:
    overrides = (
        {"pattern": "*.o_proj", "group_size": 64},
        {"pattern": "*.up_proj", "extra": {"format": "e2m3"}},
    )
    text = (
        "overrides[1] (pattern '*.up_proj'), on model.layers.0.mlp.up_proj: "
        "int4 cannot store e2m3 elements; drop the element"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        plan(llama, *overrides, wq="int4")
    plan(llama, *overrides, wq="fp6")


def test_an_asymmetry_on_mxfp_names_override_and_matrix(llama: Inventory) -> None:
    where = "overrides[0] (pattern '*'), on model.layers.0.self_attn.q_proj: mxfp4 has no zero"
    with pytest.raises(ConfigError, match=re.escape(where)):
        plan(llama, {"pattern": "*", "symmetric": False}, wq="mxfp4")


@pytest.mark.parametrize("name", ["*.mlp.gate", "*_gate", "lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_naming_a_router_or_an_end_warns_that_it_stays(
    qwen2_moe: Inventory, name: str, suffix: str
) -> None:
    found = plan(qwen2_moe, {"pattern": name + suffix, "wq": "int8"}, wq="int4")
    assert found.unmatched_patterns == ()
    assert len(found.warnings) == 1
    assert f"overrides[0] (pattern '{name + suffix}') names only tensors" in found.warnings[0]
    assert "stay bf16" in found.warnings[0]
    assert set(found.schemes) == set(qwen2_moe.by_name)


@pytest.mark.parametrize(
    "override",
    [
        {"pattern": "*.mlp.gate", "skip": True},
        {"pattern": "*.mlp.gate", "wq": "int4", "skip": True},
        {"pattern": "*.mlp.gate", "wq": "bf16"},
        {"pattern": "*.block_sparse_moe.gate", "skip": True},  # an alias of a kept tensor
        {"pattern": "*", "wq": "int4"},  # names everything, and the router only with the rest
        {"pattern": "model.layers.*.mlp.*", "wq": "int4"},
    ],
)
def test_leaving_the_router_alone_does_not_warn(
    mixtral: Inventory, override: dict[str, Any]
) -> None:
    found = plan(mixtral, override, wq="mxfp4")
    assert (found.warnings, found.unmatched_patterns) == ((), ())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "top level: "),
        ({"overrides": {}}, "overrides: "),
        ({"overrides": [{"wq": "int4"}]}, "overrides[0].pattern: is required and missing; add"),
        ({"overrides": [{"pattern": ""}]}, "overrides[0].pattern: "),
        ({"overrides": [{"pattern": "a["}]}, "overrides[0].pattern: pattern 'a[', character 2"),
        (
            {"overrides": [{"pattern": "a"}, {"pattern": "b"}, {"pattern": "c", "wq": "int7"}]},
            f"overrides[2].wq: unknown value 'int7'; known are {', '.join(FORMAT_KINDS)}",
        ),
        ({"default": {"aq": "int4-g128"}}, "default.aq: unknown value 'int4-g128'"),
        ({"default": {"wq": None}}, "default.wq: null is not a value; leave the key out"),
        ({"default": {"wq": 4}}, "default.wq: must be a text in quotes, not 4"),
        ({"default": {"group_size": "128"}}, "default.group_size: must be a whole number"),
        ({"default": {"group_size": 64.0}}, "default.group_size: must be a whole number"),
        ({"default": {"group_size": True}}, "default.group_size: must be a whole number"),
        ({"default": {"group_size": 4}}, "default.group_size: 4 is not possible; use -1"),
        ({"default": {"skip": 1}}, "default.skip: must be true or false, not 1"),
        ({"default": {"symmetric": "no"}}, 'default.symmetric: must be true or false, not "n'),
        ({"default": {"pattern": "*"}}, "default.pattern: unknown key; known are wq, aq, group_s"),
        ({"default": {"groupsize": 64}}, "default.groupsize: unknown key; known are wq, aq, "),
        ({"default": {"groupsize": 64}}, "did you mean group_size?"),
        ({"default": {"zzzz": 64}}, "precision; remove it"),
        ({"override": []}, "override: unknown key; known are description, comment, default, "),
        ({"default": {"extra": {"fmt": 1}}}, "default.extra.fmt: unknown key; known are format;"),
        ({"default": {"extra": {"format": "e1m2"}}}, "default.extra.format: unknown value 'e1m2'"),
        ({"default": {"alpha_hill": "3"}}, "default.alpha_hill: must be a "),
        ({"default": {"category": 3}}, "default.category: must be a text in quotes, not 3"),
        ({"summary": "good"}, "summary: must be an object {...}, not"),
        (
            {"overrides": [{"pattern": "*", "wq": "int4", "extra": {"format": "e2m1"}}]},
            "overrides[0]: int4 cannot store e2m1 elements; drop the element",
        ),
        (
            {"default": {"wq": "mxfp4", "symmetric": False}},
            "default: mxfp4 has no zero point; only int formats of 2 bits and more can be",
        ),
        (
            {"default": {"wq": "int1", "symmetric": False}},
            "default: int1 has no zero point; only int formats of 2 bits and more can be",
        ),
        (
            {"default": {"aq": "int1"}},
            f"default.aq: unknown value 'int1'; known are {', '.join(ACTIVATION_KINDS)}; use",
        ),
    ],
)
def test_what_does_not_follow_the_schema_is_refused_with_its_path(
    data: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_config(json.dumps(data), "my.json")
    assert str(error.value).startswith("my.json: ")
    assert "\n" not in str(error.value)


def test_many_problems_are_listed_in_one_line_and_counted() -> None:
    overrides = [{"pattern": "a", "wq": "int7"} for _ in range(9)]
    with pytest.raises(ConfigError, match=r"overrides\[4\]\.wq: .*; and 4 more"):
        parse_config(json.dumps({"overrides": overrides}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"default": {"wq": "int4"}}  // low', "line 1, column 30: JSON has no // comments; put"),
        ('// top\n{"default": {}}', "line 1, column 1: JSON has no // comments"),
        ('{"overrides": [\n{"pattern": "a"}, // first\n]}', "JSON has no // comments"),
        ('{"default": {"wq": "int4" // low\n}}', "JSON has no // comments"),
        ('{"default": {"wq": "int4", // low\n"aq": "bf16"}}', "JSON has no // comments"),
        ('{"default": {} /* x */}', "JSON has no /* comments"),
        ('{"default": {}, # x\n "comment": ""}', "JSON has no # comments"),
        ('{"default": }', "line 1, column 13: not JSON"),
        ('{"comment": "see http://x"', "line 1, column 27: not JSON"),
        ("", "line 1, column 1: not JSON"),
        ('{"default": {"wq": "int4", "wq": "int3"}}', "the key 'wq' stands twice in one object"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(text)


def test_a_comment_error_points_to_the_comment_key() -> None:
    with pytest.raises(ConfigError, match='put the remark in a "comment" key'):
        parse_config("{} // remark")


ANNOTATED = {
    "description": "Größe",
    "comment": "by hand",
    "default": {"wq": "int4", "aq": "bf16", "group_size": 128, "comment": "basis"},
    "overrides": [
        {"wq": "int3", "comment": "rarely used", "alpha_hill": 3, "pattern": "a.{0..7}.b"},
        {"category": "attention", "precision": "high", "alpha_hill": 2.5, "pattern": "*.q_proj"},
        {"skip": True, "extra": {}, "pattern": "*.gate"},
        {"wq": "mxfp8", "extra": {"format": "e5m2"}, "symmetric": True, "pattern": "c"},
    ],
    "summary": {"bits_per_weight": 4.249, "scores": [{"metric": "kl"}], "trial": None},
    "search_summary": {},
}


def test_a_round_trip_preserves_comments_and_annotations_and_adds_nothing() -> None:
    first = parse_config(json.dumps(ANNOTATED))
    text = dump_config(first)
    assert json.loads(text) == ANNOTATED
    assert parse_config(text) == first
    assert dump_config(parse_config(text)) == text


@pytest.mark.parametrize("text", ["{}", '{"overrides": []}', '{"default": {}}'])
def test_a_round_trip_of_little_is_little(text: str) -> None:
    assert json.loads(dump_config(parse_config(text))) == json.loads(text)


def test_annotations_are_never_interpreted(llama: Inventory) -> None:
    bare = plan(llama, {"pattern": "*.q_proj"}, wq="int4")
    noted = plan(
        llama,
        {"pattern": "*.q_proj", "precision": "int2", "category": "skip", "alpha_hill": 9.0},
        wq="int4",
    )
    assert bare == noted


def test_a_file_is_read_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ANNOTATED), encoding="utf-8")
    assert load_config(path) == load_config(str(path)) == parse_config(json.dumps(ANNOTATED))
    with pytest.raises(ConfigError, match="cannot read the configuration .*absent.json"):
        load_config(tmp_path / "absent.json")
    path.write_bytes(b'{"comment": "\xff"}')
    with pytest.raises(ConfigError, match="config.json: it is not UTF-8 .*; save it as UTF-8"):
        load_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: line 1, column 2")):
        load_config(path)


@settings(max_examples=25, deadline=None)
@given(menu=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=6), seed=st.integers())
def test_any_assignment_comes_back_from_its_configuration(
    inventory: Inventory, menu: list[str], seed: int
) -> None:
    random = Random(seed)
    names = [parse_format(name).name for name in menu]
    assignment = Assignment({m.name: random.choice(names) for m in inventory.matrices})
    written = config_from_assignment(assignment, inventory, {"trial": 41})
    read = parse_config(dump_config(written))
    found = resolve(read, inventory, strict=True)
    assert found.assignment == assignment
    assert found.warnings == ()
    assert read == written
    assert read.summary == {"trial": 41}


@pytest.mark.parametrize("name", FORMATS)
def test_a_uniform_assignment_needs_no_overrides(qwen2_moe: Inventory, name: str) -> None:
    written = config_from_assignment(uniform_assignment(qwen2_moe, name), qwen2_moe)
    assert written.overrides == ()
    assert resolve(written, qwen2_moe).assignment == uniform_assignment(qwen2_moe, name)
    assert "summary" not in dump_config(written)


def test_consecutive_experts_share_a_range(olmoe: Inventory) -> None:
    def name_of(m: Matrix) -> str:
        if m.layer == 10 and m.projection == "up_proj" and m.expert in (0, 1, 2, 9, 10, 63):
            return "int3-g64-asym"
        return "bf16" if m.name == "model.layers.0.self_attn.o_proj" else "int4-g128"

    assignment = Assignment({m.name: name_of(m) for m in olmoe.matrices})
    written = config_from_assignment(assignment, olmoe)
    low = {"wq": "int3", "group_size": 64, "symmetric": False}
    stem = "model.layers.10.mlp.experts"
    assert json.loads(dump_config(written)) == {
        "default": {"wq": "int4", "aq": "bf16", "group_size": 128},
        "overrides": [
            {"pattern": "model.layers.0.self_attn.o_proj", "wq": "bf16"},
            {"pattern": f"{stem}.{{0..2}}.up_proj", **low},
            {"pattern": f"{stem}.{{9..10}}.up_proj", **low},
            {"pattern": f"{stem}.63.up_proj", **low},
        ],
    }


def test_an_assignment_of_another_model_is_refused(olmoe: Inventory, mixtral: Inventory) -> None:
    with pytest.raises(ConfigError, match="the assignment has 56 matrices, the model has 2352"):
        config_from_assignment(uniform_assignment(mixtral, "mxfp4"), olmoe)


@pytest.mark.parametrize("data", [{}, {"default": {}}, {"overrides": [{"pattern": "*"}]}])
def test_a_configuration_that_changes_nothing_is_warned_of(data: Any, llama: Inventory) -> None:
    plan = resolve(parse_config(json.dumps(data)), llama)
    n = len(llama.matrices)
    assert plan.warnings[-1].startswith(f"nothing is quantized: all {n} matrices stay bf16; name")


def test_bf16_on_purpose_is_not_warned_of(llama: Inventory) -> None:
    for default in ({"wq": "bf16"}, {"skip": True}):
        assert resolve(parse_config(json.dumps({"default": default})), llama).warnings == ()


def test_a_width_that_blocks_do_not_divide_is_refused(llama: Inventory) -> None:
    with pytest.raises(
        ConfigError,
        match=r"layers.0.mlp.down_proj has 128 inputs, and q4_k has blocks of 256; give",
    ):
        plan(llama, wq="q4_k")
    found = plan(llama, {"pattern": "*.down_proj", "wq": "q4_1"}, wq="q4_k")
    assert weights(found, "model.layers.0.mlp.down_proj") == "q4_1"
    assert weights(found, "model.layers.0.mlp.up_proj") == "q4_k"


def test_types_of_llama_cpp_come_back_from_a_configuration(llama: Inventory) -> None:
    kinds = {"down_proj": "iq4_nl", "up_proj": "iq3_s", "gate_proj": "mxfp6-e2m3"}
    formats = {m.name: kinds.get(m.projection, "q3_k") for m in llama.matrices}
    made = config_from_assignment(Assignment(formats), llama)
    assert resolve(made, llama).assignment.formats == formats


def with_ends(model: Inventory) -> Inventory:
    ends = (
        Matrix("model.embed_tokens", 512, 256, "embedding", model.n_layers),
        Matrix("lm_head", 512, 256, "head", model.n_layers),
    )
    return replace(model, matrices=(*model.matrices, *ends))


def test_head_and_embeddings_are_quantized_where_include_says_so(mixtral: Inventory) -> None:
    model, override = with_ends(mixtral), {"pattern": "lm_head", "wq": "int8"}
    found = resolve(config(override, default={"wq": "int4"}, include=["head"]), model)
    assert weights(found, "lm_head") == "int8-g128"
    assert weights(found, "model.embed_tokens") == "bf16"
    bare = resolve(config(default={"wq": "int4"}), model)
    assert {weights(bare, m.name) for m in model.matrices if m.kind == "head"} == {"bf16"}
    with pytest.raises(ConfigError, match="include"):
        config(include=["norms"])


def test_a_configuration_of_an_assignment_says_what_it_includes(mixtral: Inventory) -> None:
    model = with_ends(mixtral)
    mixed = {m.name: "int6-g64" if m.kind == "head" else "int4-g64" for m in model.matrices}
    made = config_from_assignment(Assignment(mixed), model)
    assert made.include == ("head", "embeddings")
    again = parse_config(dump_config(made))
    assert resolve(again, model).assignment == Assignment(mixed)
    assert not config_from_assignment(uniform_assignment(mixtral, "mxfp4"), mixtral).include


def test_a_rotation_is_written_and_read_and_changes_no_format(inventory: Inventory) -> None:
    assignment = Assignment({m.name: "int4-g64" for m in inventory.matrices})
    plain = config_from_assignment(assignment, inventory)
    turned = config_from_assignment(assignment, inventory, rotate=7)
    assert plain.rotate is None
    assert "rotate" not in dump_config(plain)
    assert parse_config(dump_config(turned)) == turned
    assert turned.rotate == 7
    assert resolve(turned, inventory).assignment == resolve(plain, inventory).assignment
    with pytest.raises(ConfigError, match="rotate"):
        parse_config('{"rotate": -1}')
