"""Sizes that follow from a model and an effort."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.sizing import EFFORTS, MOST_CALIBRATION, size_lines, sized


def spec_of(**settings: Any) -> SearchSpec:
    return SearchSpec.of(**{"budget": "4bits", "model": "m", **settings})


def skeleton(**sizes: Any) -> ModelMap:
    """An OLMoE without numbers."""
    config = AutoConfig.for_model(
        "olmoe",
        **{
            **{"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 1},
            **{"num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16},
            **{"vocab_size": 64, "max_position_embeddings": 4096, "pad_token_id": 0},
            **sizes,
        },
    )
    with torch.device("meta"):
        return map_model(AutoModelForCausalLM.from_config(config))


def test_an_expert_gets_two_tokens_for_every_input_by_default() -> None:
    found = sized(spec_of(), skeleton())
    texts = found.texts
    assert (texts.seq_len, texts.calibration_samples) == (512, 2 * 2048 * 8 // 512)
    assert (texts.evaluation_samples, texts.heldout_samples) == (24, 32)
    assert (found.quantizer.n_starts, found.quantizer.refine_sweeps) == (2, 3)
    assert found.run.trials is None


def test_what_was_given_stays() -> None:
    given = {"calibration_samples": 5, "seq_len": 64, "n_starts": 2, "trials": 99}
    found = sized(spec_of(effort="quick", **given), skeleton())
    assert (found.texts.calibration_samples, found.texts.seq_len) == (5, 64)
    assert (found.quantizer.n_starts, found.quantizer.refine_sweeps) == (2, 1)
    assert found.run.trials == 99
    assert found.texts.evaluation_samples == EFFORTS["quick"].evaluation // 64
    assert sized(found, skeleton()) == found


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"num_experts_per_tok": 64}, EFFORTS["default"].least_calibration),
        ({"num_experts": 256, "num_experts_per_tok": 1}, MOST_CALIBRATION),
        ({"num_experts": 128}, 2 * 2048 * 16),
    ],
)
def test_calibration_follows_from_the_share_of_tokens_of_an_expert(
    sizes: dict[str, int], expected: int
) -> None:
    texts = sized(spec_of(), skeleton(**sizes)).texts
    assert texts.calibration_samples == expected // 512


def test_efforts_are_in_order() -> None:
    found = [sized(spec_of(effort=effort), skeleton()).texts for effort in EFFORTS]
    for name in ("calibration_samples", "evaluation_samples", "heldout_samples"):
        sizes = [getattr(texts, name) for texts in found]
        assert sizes == sorted(set(sizes))


def test_sizes_are_told() -> None:
    first, second = size_lines(sized(spec_of(effort="quick"), skeleton()))
    assert first == (
        "effort quick: windows of 512 tokens, 32 of calibration, 16 of evaluation, "
        "16 of held-out text"
    )
    assert second == "rounding from 1 starts with 1 sweeps; at most 10 trials"


def test_facts_name_the_effort_and_only_known_sizes(
    make_spec: Callable[..., SearchSpec], tmp_path: Path
) -> None:
    facts = spec_of().facts()
    assert facts["effort"] == "default"
    assert "calibration_samples" not in facts
    assert sized(spec_of(), skeleton()).facts().items() >= facts.items()
    assert make_spec(tmp_path).facts()["seq_len"] == 48
