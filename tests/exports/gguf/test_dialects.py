"""What llama.cpp would not compute the same way is refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.exports.gguf.dialects import DIALECTS, find_dialect, inexact_of
from alphaquant.testing.llama.exported import EXPORTED
from alphaquant.testing.models import tiny_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
YARN["original_max_position_embeddings"] = 16

SLIDING, FULL = "sliding_attention", "full_attention"


def config_of(family: str, **changes: Any) -> Any:
    return tiny_model(family, **{**EXPORTED.get(family, {}), **changes}).config


def test_every_dialect_is_run_by_the_tests() -> None:
    assert set(EXPORTED) == set(DIALECTS)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is True .* computes with False"),
        ("olmoe", {"num_key_value_heads": 2}, "fewer heads of keys than of queries"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False .* computes with True"),
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8 .* computes with None"),
        ("deepseek_v2", {"q_lora_rank": None}, "2 layers and no q_lora_rank; .* 26 or 27 layers"),
        ("qwen3", {"rope_parameters": YARN}, "rope_type 'yarn' .* not carried over; default"),
        ("gpt_oss", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "beta_fast is 16.0 .* 32.0"),
        # Each of these loads without a word; the relative differences of logits that it gives:
        ("gpt_oss", {"swiglu_limit": 0.01}, "swiglu_limit is 0.01 .* with 7.0"),  # 0.95
        ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0 .* with 1.702"),  # 0.13
        ("gpt_oss", {"layer_types": [FULL, FULL]}, "layer_types full.* every 2 layers"),  # 0.91
        ("gemma3_text", {"layer_types": [*[SLIDING] * 2, FULL] * 2}, "every 6 layers"),  # 0.32
        ("gemma3_text", {"query_pre_attn_scalar": 8}, "scalar 8, and .* with 32"),  # 0.51
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True .* False"),  # 0.07
        # These llama.cpp does not load:
        ("gpt_oss", {"attention_bias": False}, "attention_bias is False .* True"),
        ("olmoe", {"attention_bias": True}, "attention_bias is True .* False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"--export gguf: .*{said}"):
        find_dialect(config_of(family, **changes))


def test_an_architecture_that_is_not_written_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="architecture mamba is not written; llama, mixtral, ol"):
        find_dialect(SimpleNamespace(model_type="mamba"))


def test_a_range_that_llama_cpp_rounds_is_told() -> None:
    assert inexact_of(config_of("gpt_oss")) == []
    config = config_of("gpt_oss", rope_parameters=YARN | {"truncate": False})
    assert "rounds the range" in inexact_of(config)[0]
