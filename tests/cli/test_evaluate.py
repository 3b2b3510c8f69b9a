"""`aq-eval`: a table or JSON on stdout; wrong input is one line."""

import json
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


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--tasks", "kl"), ("--reference",)),
        (("--tasks", "mmlu"), ("mmlu", "kl, ppl")),
        (("--tasks", ""), ("none", "kl, ppl")),
        (("--model", "/nowhere"), ("/nowhere",)),
        (("--reference", "/nowhere"), ("/nowhere",)),
        (("--data", "nothing.txt"), ("nothing.txt",)),
        (("--device", "quantum"), ("quantum",)),
    ],
)
def test_wrong_input_is_one_line(
    extra: tuple[str, ...], words: tuple[str, ...], run: Any, options: tuple[str, ...]
) -> None:
    done = run("aq-eval", *options, *extra)
    assert (done.code, done.out) == (1, "")
    error = done.err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in error


def test_damaged_checkpoint_is_one_line(
    run: Any, options: tuple[str, ...], tiny: Path, tmp_path: Path
) -> None:
    config, packed = tmp_path / "config.json", tmp_path / "packed"
    config.write_text('{"default": {"wq": "int4"}}')
    made = run(
        *("aq-quantize", "--model", str(tiny), "--config", str(config)),
        *("--method", "rtn", "--out", str(packed)),
    )
    assert made.code == 0
    file = packed / "model-layer-001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    done = run("aq-eval", *options, "--model", str(packed))
    assert done.code == 1
    assert "damaged" in done.err.splitlines()[-1]
