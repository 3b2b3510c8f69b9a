"""`aq-compare`: 0 whether or not the two are equal; wrong input is in tests/corpus."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_compare(run: Any) -> Any:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*options: str) -> tuple[int, str, str]:
        done = run("aq-compare", *options)
        return done.code, done.out, done.err

    return command


@pytest.fixture
def sides(tmp_path: Path, tiny: Path) -> tuple[str, ...]:
    """Two configurations that differ in one matrix, and their model."""
    name = "model.layers.1.self_attn.q_proj"
    for file, overrides in (("a", []), ("b", [{"pattern": name, "wq": "int8"}])):
        default = {"wq": "int4", "group_size": 32}
        content = {"default": default, "overrides": overrides}
        (tmp_path / f"{file}.json").write_text(json.dumps(content))
    return (str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--model", str(tiny))


def test_differences_are_tables_and_exit_0(run_compare: Any, sides: tuple[str, ...]) -> None:
    code, out, err = run_compare(*sides)
    assert (code, err) == (0, "")
    assert "1 of 2" in out
    assert "q_proj" not in out
    assert "model.layers.1.self_attn.q_proj  int4-g32  int8-g32" in run_compare(*sides, "--all")[1]


def test_json_is_for_programs(run_compare: Any, sides: tuple[str, ...]) -> None:
    code, out, err = run_compare(*sides, "--json")
    assert (code, err) == (0, "")
    assert list(json.loads(out)["matrices"]) == ["model.layers.1.self_attn.q_proj"]


def test_equal_ones_are_one_line_and_exit_0(run_compare: Any, sides: tuple[str, ...]) -> None:
    code, out, err = run_compare(sides[0], sides[0], *sides[2:])
    assert (code, err) == (0, "")
    assert out.startswith("equal: 32 matrices")
    assert out.count("\n") == 1
