"""Files of other tools: told by name, and read where their meaning is exact."""

import json
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.spaces.config import load_config
from alphaquant.spaces.foreign import read_foreign, tool_of

GPTQMODEL: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "dynamic": {
        "-:.*self_attn": {},
        "+:.*down_proj$": {"bits": 8, "group_size": 64},
        r"model\.layers\.1\.": {"sym": False},
    },
}
AUTO_ROUND: dict[str, Any] = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "data_type": "int",
    "extra_config": {
        "down_proj": {"bits": 3, "group_size": 32},
        r".*layers\.1\..*": {"bits": 16, "data_type": "float"},
        "model.layers.0.mlp.experts.0.down_proj": {"bits": 8},
    },
}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        },
        "group_1": {
            "targets": ["re:.*experts.*"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 128,
                "symmetric": False,
            },
        },
    },
}
DOWN = "model.layers.0.mlp.experts.0.down_proj"
UP = "model.layers.0.mlp.experts.1.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"
LATER = "model.layers.1.mlp.experts.1.up_proj"
DENSE = "model.layers.0.mlp.up_proj"


def formats(data: Any) -> list[str]:
    plan = read_foreign(data, Path("q.json"))
    return [plan.format_of([name]).name for name in (DOWN, UP, QUERY, LATER, DENSE)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (GPTQMODEL, ["int8-g64", "int4-g128", "bf16", "int4-g128-asym", "int4-g128"]),
        ({**GPTQMODEL, "dynamic": None, "sym": False}, ["int4-g128-asym"] * 5),
        (AUTO_ROUND | {"extra_config": {}, "bits": 2}, ["int2-g128"] * 5),
        (COMPRESSED, ["int4-g128-asym", "int4-g128-asym", "bf16", "int4-g128-asym", "int8-row"]),
    ],
)
def test_formats_are_those_that_the_file_says(data: Any, expected: list[str]) -> None:
    assert formats(data) == expected


def test_whole_names_of_auto_round_come_before_patterns_and_parts() -> None:
    entry = json.loads(json.dumps(AUTO_ROUND))
    del entry["extra_config"][r".*layers\.1\..*"]["data_type"]
    expected = ["int8-g128", "int4-g128", "int4-g128", "bf16", "int4-g128"]
    assert formats(entry) == expected
    plan = read_foreign(entry, Path("q.json"))
    assert plan.format_of([DOWN.replace("experts.0", "experts.5")]).name == "int3-g32"


def test_any_name_of_a_matrix_counts_and_idle_rules_are_told() -> None:
    plan = read_foreign(GPTQMODEL | {"desc_act": True}, Path("q.json"))
    assert plan.format_of(["published.w2", DOWN]).name == "int8-g64"
    first, *inexact, idle = plan.warnings([UP], "q.json")
    assert first == "q.json is a configuration of GPTQModel, read as a plan"
    assert any("desc_act" in text for text in inexact)
    assert idle == "3 of its rules name no matrix here, e.g. '-:.*self_attn'"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (GPTQMODEL | {"bits": 7}, "bits 7 with group_size 128 is none of our formats"),
        (GPTQMODEL | {"dynamic": {"+:(": {}}}, "not as that tool writes it"),
        (GPTQMODEL | {"dynamic": {"+:a": 3}}, "not as that tool writes it"),
        (GPTQMODEL | {"group_size": 10**30}, "is not possible"),
        (AUTO_ROUND, "data_type 'float' of .* is not read"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "data_type 'mx_fp' is not read"),
        ({"quant_method": "awq", "bits": 4}, "a configuration of AWQ, not ours; ours is JSON"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8}}}},
            "weights of g are int of 8 bits by tensor, which is none of our formats",
        ),
    ],
)
def test_what_has_no_exact_meaning_is_refused(data: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_foreign(data, Path("q.json"))


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (GPTQMODEL, "q.json", "configuration of GPTQModel, not ours; aq-inspect .*q.json --model"),
        ({"bits": 4, "group_size": 64}, "q.json", "configuration of GPTQModel"),
        ({"model_type": "olmoe", "quantization_config": AUTO_ROUND}, "config.json", "AutoRound"),
        (COMPRESSED, "q.json", "configuration of compressed-tensors"),
        ({"quantization": {"quant_algo": "NVFP4"}}, "hf_quant_config.json", "of ModelOpt, not"),
        ({"quant_method": "hqq"}, "q.json", r"another quantizer \(hqq\), not ours; ours is"),
        ("quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n", "recipe.yaml", "llm-compressor"),
        ("a: 1\n", "a.yml", "is a YAML file, not ours"),
        ("GGUF\x03", "imatrix.gguf", "a GGUF file of llama.cpp"),
        ("\x01\x02", "imatrix.dat", "an importance matrix of llama.cpp"),
    ],
)
def test_commands_that_want_ours_say_whose_it_is_and_how_ours_is_written(
    content: Any, name: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert '{"default": {"wq": "int4"' in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [{}, [], None, {"default": {"wq": "int4"}}, {"bits": 4}])
def test_ours_and_nonsense_are_no_other_tool_s(data: Any) -> None:
    assert tool_of(data) is None
