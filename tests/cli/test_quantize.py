"""`aq-quantize`: JSON on stdout, warnings on stderr; wrong input is in tests/corpus."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with a pattern that matches nothing."""
    path = tmp_path / "config.json"
    overrides = [{"pattern": "*.nothing", "wq": "int8"}]
    path.write_text(json.dumps({"default": {"wq": "int4"}, "overrides": overrides}))
    return path


@pytest.fixture
def options(tiny: Path, config: Path) -> tuple[str, ...]:
    return ("--model", str(tiny), "--config", str(config), "--method", "rtn")


def test_summary_is_json_on_stdout(run: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("aq-quantize", *options, "--out", str(out))
    assert done.code == 0
    summary = json.loads(done.out)
    assert summary["path"] == str(out)
    assert summary["quantized_bytes"] < summary["checkpoint_bytes"]
    assert "quantize: 2 of 2" in done.err
    again = run("aq-quantize", *options, "--out", str(out))
    assert again.code == 1
    assert again.err.splitlines()[-1].startswith(f"error: {out} exists already")


def test_dry_run_prints_the_plan_and_writes_nothing(
    run: Any, options: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("aq-quantize", *options, "--dry-run")
    assert done.code == 0
    assert "int4-g128" in done.out
    assert "bits per weight" in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_warning_reaches_stderr_once(
    run: Any, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a new process
    done = run("aq-quantize", *options, "--dry-run")
    assert done.code == 0, done.err
    assert done.err.count("matches nothing") == 1
    assert done.err.startswith("WARNING ")
    assert "matches nothing" not in done.out
