"""How an inspection looks: 80 columns, numbers as counted, no warning lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.inspect import Inspection, inspect_config
from alphaquant.commands.inspect_text import (
    MAX_WARNINGS,
    inspection_json,
    inspection_text,
    label_order,
    scores_of,
    source_text,
    summary_text,
    warnings_text,
)
from alphaquant.testing.models import tiny_model

SUMMARY: dict[str, Any] = {
    "model": "m",
    "budget": "5bits",
    "trial": 0,
    "origin": "knobs",
    "scores": [
        {"metric": "kl", "value": 0.25, "stderr": 0.125, "unit": "nats/token"},
        {"metric": "same_top", "value": 0.5, "unit": "share of positions"},
    ],
    "evaluation": {"source": "demo", "n_samples": 48, "seq_len": 256, "digest": "d"},
}


@pytest.fixture
def found(tmp_path: Path) -> Inspection:
    model: Any = tiny_model("olmoe")
    model.config.save_pretrained(tmp_path / "model")
    overrides = [
        {"pattern": "*.down_proj", "wq": "int3", "group_size": 32},
        {"pattern": "*.experts.7.*", "wq": "int8", "group_size": -1},
        {"pattern": "*.nothing", "wq": "int8"},
    ]
    path = tmp_path / "c.json"
    default = {"wq": "int4", "group_size": 32}
    path.write_text(json.dumps({"default": default, "overrides": overrides, "summary": SUMMARY}))
    return inspect_config(path, str(tmp_path / "model"))


def test_text_has_every_role_layer_format_and_warning(found: Inspection) -> None:
    text = inspection_text(found)
    lines = [line.split() for line in text.splitlines()]
    for part in (*found.roles, *found.layers):
        row = [str(part.n_matrices), str(part.n_weights), f"{part.bits_per_weight:.4f}"]
        assert [*part.name.split(), *row, str(part.n_bytes)] in [line[:-1] for line in lines]
    assert ["role", "int3-g32", "int4-g32", "int8-row"] in lines
    assert ["attention", "q", "100.0", "%"] in lines
    assert ["routed", "up", "87.5", "%", "12.5", "%"] in lines
    assert ["routed", "down", "87.5", "%", "12.5", "%"] in lines
    assert f"{found.counts.checkpoint_bytes} bytes" in text
    assert found.active is not None
    assert f"{found.active.n_bytes} bytes of {found.active.n_weights} weights (3 experts," in text
    joined = " ".join(text.split())
    assert all(warning in joined for warning in found.warnings)
    assert ["attention", "q", "int4-g32", "2"] in lines
    assert sum(line[0] in ("transformers", "vllm", "sglang") for line in lines if line) == 3


def test_lines_without_long_names_have_80_columns(found: Inspection) -> None:
    for line in inspection_text(found).splitlines():
        assert len(line) <= 80 or str(found.statement.path.parent) in line


def test_on_a_narrow_screen_nothing_is_wider_and_no_share_is_lost(found: Inspection) -> None:
    text = inspection_text(found, 50)
    for line in text.splitlines():
        assert len(line) <= 50 or str(found.statement.path.parent) in line, line
    lines = [line.split() for line in text.splitlines()]
    for part in (*found.roles, *found.layers):
        assert any(f"{part.bits_per_weight:.4f}" in line for line in lines)
    assert text.count(" %") == inspection_text(found).count(" %")


def test_json_has_what_the_text_has(found: Inspection) -> None:
    content = json.loads(json.dumps(inspection_json(found)))
    assert [part["name"] for part in content["roles"]] == [part.name for part in found.roles]
    assert content["layers"][1]["n_bytes"] == found.layers[1].n_bytes
    assert content["bits"]["bits_per_weight"] == found.counts.bits_per_weight
    assert content["active"]["experts_per_token"] == 3
    assert content["unnamed"][0] == {"role": "attention q", "format": "int4-g32", "n_matrices": 2}
    assert content["unmatched_patterns"] == ["*.nothing"]
    assert [engine["is_loadable"] for engine in content["engines"]] == [
        not engine.reasons for engine in found.engines
    ]
    assert content["summary"] == SUMMARY
    assert content["kept"]["n_bytes"] == found.model.inventory.kept_bytes
    assert len(content["warnings"]) == len(found.warnings) == 2


def test_summary_shows_what_is_there() -> None:
    lines = summary_text(SUMMARY).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("model", "budget", "origin", "trial", "evaluated", "kl", "same_top")
    ]
    assert lines[4].endswith("demo, 48 x 256 tokens")
    assert lines[5].endswith("0.250000 +- 0.125000 nats/token")
    assert summary_text({}) == ""


@pytest.mark.parametrize(
    "summary",
    [
        {"scores": "none"},
        {"scores": [3]},
        {"scores": [{"metric": "kl"}]},
        {"scores": [{"metric": "kl", "value": "low"}]},
        {"scores": [{"metric": "kl", "value": 1.0, "stderr": "low"}]},
        {"scores": [{"value": 1.0}]},
        {"evaluation": 3},
        {"evaluation": {"kl": 0.1}},
    ],
)
def test_scores_of_another_form_are_left_out(summary: dict[str, Any]) -> None:
    assert scores_of(summary) == {}
    assert summary_text(summary) == ""


def test_text_of_scores_may_be_of_another_form() -> None:
    assert "evaluated" not in summary_text({**SUMMARY, "evaluation": 3})
    assert source_text(SUMMARY["evaluation"]) == "demo, 48 x 256 tokens"


def test_warnings_are_cut_and_counted() -> None:
    text = warnings_text([f"number {i}" for i in range(MAX_WARNINGS + 2)])
    assert text.splitlines()[-1] == "and 2 more warnings; --json has all"
    assert f"number {MAX_WARNINGS - 1}" in text
    assert f"number {MAX_WARNINGS}" not in text


def test_formats_are_ordered_by_bits() -> None:
    labels = ["bf16", "int4-g64 of int8-row inputs", "int8-row", "int3-g64"]
    assert sorted(labels, key=label_order) == [labels[3], labels[1], labels[2], labels[0]]
