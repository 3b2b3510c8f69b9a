"""What differs between two configurations: numbers by hand, scores only where they compare."""

import json
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.compare import (
    MAP_WIDTH,
    Comparison,
    compare,
    comparison_json,
    comparison_text,
)
from alphaquant.errors import ConfigError, ModelError
from alphaquant.testing.models import tiny_model

INT4 = {"wq": "int4", "group_size": 32}
SUMMARY: dict[str, Any] = {
    "scores": [
        {"metric": "kl", "value": 0.25, "stderr": 0.125},
        {"metric": "same_top", "value": 0.5},
    ],
    "evaluation": {"source": "demo", "n_samples": 48, "seq_len": 256, "digest": "text"},
    "model_digest": "weights",
}


def save_model(folder: Path, family: str = "olmoe", **changes: Any) -> str:
    model: Any = tiny_model(family, **changes)
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return save_model(tmp_path / "model")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write(tmp_path / "a.json")


def write(path: Path, *overrides: dict[str, Any], **keys: Any) -> Path:
    path.write_text(json.dumps({"default": INT4, "overrides": overrides, **keys}))
    return path


@pytest.fixture
def found(first: Path, model: str, tmp_path: Path) -> Comparison:
    """Layer 1: expert 0 larger, expert 1 smaller, expert 7 of other formats of as many bits."""
    experts = "model.layers.1.mlp.experts"
    second = write(
        tmp_path / "b.json",
        {"pattern": f"{experts}.0.*", "wq": "int8"},
        {"pattern": f"{experts}.1.down_proj", "wq": "int2"},
        {"pattern": f"{experts}.7.up_proj", "aq": "int8"},
    )
    return compare(first, second, model)


def test_changed_matrices_are_those_of_other_formats(found: Comparison) -> None:
    names = [m.name.removeprefix("model.layers.1.mlp.experts.") for m in found.changed]
    assert sorted(names) == [
        *("0.down_proj", "0.gate_proj", "0.up_proj", "1.down_proj", "7.up_proj")
    ]
    assert not found.is_equal


def test_map_of_experts_has_a_character_for_each(found: Comparison) -> None:
    assert found.experts == {0: "........", 1: "+-.....~"}


def test_text_shows_what_changed_and_only_that(found: Comparison) -> None:
    text = comparison_text(found)
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "+-.....~"] in lines
    assert "layer  experts (" in text
    assert not any(line[:1] == ["0"] for line in lines)
    a, b = found.a.layers[1], found.b.layers[1]
    bits = [f"{a.bits_per_weight:.4f}", f"{b.bits_per_weight:.4f}"]
    difference = f"{b.bits_per_weight - a.bits_per_weight:+.4f}"
    more = f"{b.n_bytes - a.n_bytes:+d}"
    assert ["1", "5", "of", "28", *bits, difference, more] in lines
    assert ["routed", "down", "int4-g32", "int8-g32", "1"] in lines
    assert ["routed", "up", "int4-g32", "int4-g32", "of", "int8-row", "inputs", "1"] in lines
    assert "attention" not in text
    assert "experts.7.up_proj" not in text
    counts = [side.counts.checkpoint_bytes for side in (found.a, found.b)]
    words = [str(counts[0]), str(counts[1]), f"{counts[1] - counts[0]:+d}"]
    assert ["checkpoint", "bytes", *words] in lines


def test_on_a_narrow_screen_nothing_is_wider_and_every_number_of_a_side_is_there(
    found: Comparison,
) -> None:
    text = comparison_text(found, show_all=True, width=50)
    named = [m.name for m in found.changed]
    for line in text.splitlines()[2:]:  # below the two paths
        assert len(line) <= 50 or line in named, line
    for side in (found.a, found.b):
        assert str(side.counts.checkpoint_bytes) in text
        assert f"{side.layers[1].bits_per_weight:.4f}" in text
    assert "int4-g32 -> int8-g32" in text


def test_all_lists_every_matrix(found: Comparison) -> None:
    lines = [line.split() for line in comparison_text(found, show_all=True).splitlines()]
    for matrix in found.changed:
        assert [matrix.name, "int4-g32"] in [line[:2] for line in lines]


def test_json_lists_every_matrix_and_both_sides(found: Comparison) -> None:
    content = json.loads(json.dumps(comparison_json(found)))
    assert content["is_equal"] is False
    assert list(content["matrices"]) == [m.name for m in found.changed]
    changed = content["matrices"]["model.layers.1.mlp.experts.0.up_proj"]
    assert changed == {"a": "int4-g32", "b": "int8-g32"}
    assert content["b"]["bits"]["quantized_bytes"] == found.b.counts.quantized_bytes
    assert content["experts"] == {"0": "........", "1": "+-.....~"}


def test_equal_configurations_are_one_line(first: Path, model: str, tmp_path: Path) -> None:
    other = write(tmp_path / "same.json", {"pattern": "*.experts.*", **INT4})
    found = compare(first, other, model)
    assert found.is_equal
    text = comparison_text(found, show_all=True)
    assert text.startswith("equal: 56 matrices in the same formats, ")
    assert "\n" not in text
    assert comparison_json(found)["is_equal"] is True


def test_skipped_and_unquantized_are_equal(model: str, tmp_path: Path) -> None:
    sides = [
        write(tmp_path / "skip.json", {"pattern": "*.q_proj", "skip": True}),
        write(tmp_path / "bf16.json", {"pattern": "*.q_proj", "wq": "bf16"}),
    ]
    assert compare(*sides, model).is_equal


def with_summaries(folder: Path, model: str, second: dict[str, Any]) -> Comparison:
    changed = {"pattern": "*.q_proj", "wq": "int8"}
    a = write(folder / "sa.json", summary=SUMMARY)
    return compare(a, write(folder / "sb.json", changed, summary=second), model)


def test_scores_on_the_same_text_stand_side_by_side(model: str, tmp_path: Path) -> None:
    scores = [{"metric": "kl", "value": 0.375}, {"metric": "ppl", "value": 9.0}]
    found = with_summaries(tmp_path, model, {**SUMMARY, "scores": scores})
    assert found.why_not_comparable is None
    lines = [line.split() for line in comparison_text(found).splitlines()]
    assert ["on", "demo,", "48", "x", "256", "tokens"] in lines
    assert ["kl", "0.250000", "+-", "0.125000", "0.375000", "+0.125000"] in lines
    assert not any(line[:1] in (["ppl"], ["same_top"]) for line in lines)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": []}, "not both configurations carry scores"),
        ({"evaluation": {"digest": "other"}}, "not measured on the same text"),
        ({"evaluation": {}}, "not measured on the same text"),
        ({"model_digest": "other"}, "not measured on the same weights"),
        ({"model_digest": None}, "not measured on the same weights"),
    ],
)
def test_other_scores_are_not_compared(
    change: dict[str, Any], why: str, model: str, tmp_path: Path
) -> None:
    found = with_summaries(tmp_path, model, {**SUMMARY, **change})
    assert found.why_not_comparable is not None
    assert why in found.why_not_comparable
    text = comparison_text(found)
    assert f"scores are not comparable: {found.why_not_comparable}" in text
    assert "0.250000" not in text
    assert comparison_json(found)["scores_are_comparable"] is False


def test_scores_without_a_digest_on_both_sides_are_not_compared(
    model: str, tmp_path: Path
) -> None:
    for key, why in (("evaluation", "text"), ("model_digest", "weights")):
        summary = {name: value for name, value in SUMMARY.items() if name != key}
        a = write(tmp_path / "sa.json", summary=summary)
        found = compare(a, write(tmp_path / "sb.json", summary=summary), model)
        assert found.why_not_comparable is not None
        assert why in found.why_not_comparable


def test_model_comes_from_the_side_that_names_one(first: Path, model: str, tmp_path: Path) -> None:
    named = write(tmp_path / "named.json", summary={"model": model})
    for sides in ((first, named), (named, first)):
        assert compare(*sides).a.model.name == model


def test_no_model_is_asked_for(first: Path) -> None:
    with pytest.raises(ModelError, match="neither"):
        compare(first, first)


def test_configurations_of_two_models_are_refused(model: str, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", intermediate_size=40)
    a = write(tmp_path / "a.json", summary={"model": model})
    b = write(tmp_path / "b.json", summary={"model": wide})
    with pytest.raises(ConfigError, match="whose matrices differ"):
        compare(a, b)


def test_copies_of_one_model_are_one_model(model: str, tmp_path: Path) -> None:
    copy = save_model(tmp_path / "copy")
    a = write(tmp_path / "a.json", summary={"model": model})
    assert compare(a, write(tmp_path / "b.json", summary={"model": copy})).is_equal


def test_map_of_many_experts_is_broken_into_lines(first: Path, tmp_path: Path) -> None:
    many = save_model(tmp_path / "many", num_experts=MAP_WIDTH + 6)
    last = f"model.layers.0.mlp.experts.{MAP_WIDTH + 5}.*"
    found = compare(first, write(tmp_path / "b.json", {"pattern": last, "wq": "int8"}), many)
    lines = comparison_text(found).splitlines()
    at = lines.index(f"    0  {'.' * MAP_WIDTH}")
    assert lines[at + 1] == f"       {'.' * 5}+"


def test_model_without_experts_has_no_map(first: Path, tmp_path: Path) -> None:
    dense = save_model(tmp_path / "dense", "llama")
    changed = write(tmp_path / "b.json", {"pattern": "*.q_proj", "wq": "int8"})
    text = comparison_text(compare(first, changed, dense))
    assert "layer  experts" not in text
    assert "attention" in text


def test_warnings_of_both_sides_are_shown(first: Path, model: str, tmp_path: Path) -> None:
    changed = {"pattern": "*.q_proj", "wq": "int8"}
    b = write(tmp_path / "b.json", changed, {"pattern": "*.nothing", "wq": "int8"})
    text = comparison_text(compare(first, b, model))
    assert "warning: overrides[1] (pattern '*.nothing') matches nothing" in text
