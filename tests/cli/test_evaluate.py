"""`aq-eval`: a table or JSON on stdout; wrong input is in tests/corpus."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def options(tiny: Path, texts: dict[str, Path]) -> tuple[str, ...]:
    text = str(texts["heldout"])
    return ("--model", str(tiny), "--data", text, "--samples", "4", "--seq-len", "24")


def test_table_and_json_say_the_same(run: Any, options: tuple[str, ...], tiny: Path) -> None:
    table = run("aq-eval", *options, "--reference", str(tiny))
    assert table.code == 0
    assert [line.split()[0] for line in table.out.splitlines()[:4]] == [
        *("metric", "kl", "same_top", "perplexity")
    ]
    content = json.loads(run("aq-eval", *options, "--reference", str(tiny), "--json").out)
    values = {s["metric"]: f"{s['value']:.6f}" for s in content["scores"]}
    assert all(value in table.out for value in values.values())
    assert content["data"]["n_samples"] == 4


def test_without_a_reference_it_is_perplexity(run: Any, options: tuple[str, ...]) -> None:
    done = run("aq-eval", *options)
    assert done.code == 0
    assert "perplexity" in done.out
    assert "kl" not in done.out.splitlines()[1]


def test_mmlu_of_local_files(run: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install .[tasks]")
    for part in ("test", "dev"):
        (tmp_path / part).mkdir()
        rows = [f"Question {i}?,w,x,y,z,{'ABCD'[i]}\n" for i in range(3)]
        (tmp_path / part / f"anatomy_{part}.csv").write_text("".join(rows))
    local = ("--task-data", str(tmp_path), "--shots", "1", "--limit", "2")
    tasks = ("--tasks", "perplexity,utilization,mmlu_anatomy")
    done = run("aq-eval", *options, *tasks, *local)
    assert done.code == 0
    content = json.loads(run("aq-eval", *options, *tasks, *local, "--json").out)
    assert [s["metric"] for s in content["scores"]] == [
        *("perplexity", "load_imbalance", "load_entropy", "starved_experts", "mmlu_anatomy.acc")
    ]
    assert all(f"{s['value']:.6f}" in done.out for s in content["scores"])
    (row,) = content["details"]["mmlu_anatomy"]["tasks"]
    assert (row["n_shots"], row["n_samples"], row["n_available"]) == (1, 2, 3)
    assert "it/s" not in done.err


def test_help_needs_neither_torch_nor_lm_eval() -> None:
    probe = (
        "import sys\n"
        "from alphaquant.cli import evaluate\n"
        "try:\n evaluate.main()\nexcept SystemExit:\n pass\n"
        "print(sorted({'torch', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", probe, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--task-data" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
