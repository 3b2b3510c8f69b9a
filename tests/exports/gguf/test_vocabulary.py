"""How texts are split into words is known by its pattern, or told to be unknown."""

from typing import Any

import pytest
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from alphaquant.exports.gguf.vocabulary import inexact_split, split_rule

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def sequence(pattern: str) -> dict[str, Any]:
    """A rule as published tokenizers have it: a pattern, then bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-4o", "qwen35"])
def test_a_pattern_has_the_name_that_llama_cpp_has_for_it(name: str) -> None:
    assert split_rule(sequence(GGUF_PRE_TOKENIZER_SPLITS[name])) == name


def test_the_rule_of_gpt_2_has_no_pattern() -> None:
    assert split_rule({**BYTES, "use_regex": True}) == "gpt-2"


@pytest.mark.parametrize(
    "rule",
    [
        sequence(r"\w+"),
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits"}, {**BYTES, "use_regex": True}],
        },
        {},
    ],
)
def test_any_other_rule_is_told_to_be_unknown(rule: dict[str, Any]) -> None:
    told = f"gpt2 split as {split_rule(rule)}"
    assert "may become other tokens" in inexact_split(told)[0]
    assert inexact_split("gpt2 split as qwen2") == inexact_split("llama") == []


def test_a_file_without_a_tokenizer_is_told() -> None:
    assert "no tokenizer.json" in inexact_split("none")[0]
