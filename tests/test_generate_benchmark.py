"""The benchmark of text per second: every step on a tiny model, timings from a fake clock."""

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def generate() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("generate")


def start(program: ModuleType, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]) -> None:
    """Run a program in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with mock.patch.dict(os.environ):
        program.main()


def test_a_tiny_model_takes_every_step_of_the_generation(
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "result.json"
    words = ["--device", "cpu", "--tiny", "--out", str(out), "--batch-sizes", "1"]
    words += ["--prompt-tokens", "3", "--new-tokens", "2", "--turns", "1"]
    start(generate, monkeypatch, [*words, "--formats", "int3-g128", "int6-g64"])
    result = json.loads(out.read_text())
    assert [(row["model"], row["mode"], row["batch_size"]) for row in result["rows"]] == [
        (model, mode, 1) for model in ("bfloat16", "packed") for mode in ("eager", "compiled")
    ]
    for row in result["rows"]:
        assert row["error"] == "" and row["is_compiled"] is False
        measured = ("tokens_per_second", "prefill_seconds", "peak_bytes")
        assert [row[name] for name in measured] == [None] * 3
    assert abs(result["bits_per_weight"] - 4.25) < 0.2
    n_bits = result["bits_per_weight"] * result["quantized_weights"]
    assert result["quantized_bytes"] == pytest.approx(n_bits / 8)
    assert result["settings"]["tiny"] is True and result["versions"]["triton"]
    assert capsys.readouterr().out.count("\n") == len(result["rows"]) + 2


def test_the_mixed_model_has_the_bits_that_were_asked_for(generate: Any) -> None:
    with torch.device("meta"):
        model = generate.OlmoeForCausalLM(generate.olmoe_config(64, is_tiny=False))
    inventory = generate.map_model(model).inventory
    found = generate.mixed_formats(inventory, 4.25, generate.UNIFORM)
    assert found.count_bits(inventory).bits_per_weight == pytest.approx(4.25, abs=0.001)
    assert set(found.formats.values()) == set(generate.UNIFORM)
    for name, chosen in found.formats.items():
        if name.endswith("gate_proj"):
            assert found.formats[name.replace("gate_proj", "up_proj")] == chosen
    # 16 layers of attention and of 64 experts, without embeddings and routers.
    assert inventory.n_weights == 16 * (4 * 2048**2 + 64 * 3 * 2048 * 1024)


def test_formats_on_one_side_of_the_bits_are_refused(generate: Any) -> None:
    for menu in (["int2-g128", "int3-g128"], ["int8-g128"]):
        with pytest.raises(ValueError, match="cannot be mixed to 4.25 bits"):
            generate.mixed_formats(mock.Mock(), 4.25, menu)


def test_speed_is_that_of_the_tokens_after_the_first(generate: Any) -> None:
    """Prefill takes 2 s and a text of 5 tokens 10 s: 3 texts make 4 tokens each in 8 s."""
    lengths: list[int] = []

    class Model:
        config = SimpleNamespace(vocab_size=9)
        device = torch.device("cpu")

        def generate(self, prompts: Tensor, **given: Any) -> Tensor:
            lengths.append(given["max_new_tokens"])
            assert given["disable_compile"] is (len(lengths) <= 7)
            return torch.zeros(len(prompts), prompts.shape[1] + given["max_new_tokens"])

    clock = mock.Mock(side_effect=lambda run: (run(), {1: 2.0, 5: 10.0}[lengths[-1]])[1])
    sizes = generate.Sizes(prompt_tokens=3, new_tokens=5, turns=3)
    eager, compiled = generate.measure("packed", Model(), clock, sizes, [3])
    assert lengths == [5, 1, 5, 1, 5, 1, 5] * 2
    assert (eager.mode, eager.tokens_per_second, eager.prefill_seconds) == ("eager", 1.5, 2.0)
    assert compiled == replace(eager, mode="compiled")
    text = generate.table([replace(eager, model="bfloat16", tokens_per_second=0.5), eager])
    assert "| packed | eager | 3 | 1.5 | 3.00 | 2000.0 |" in text


def test_a_model_that_fails_is_a_row_with_its_error(generate: Any) -> None:
    model = mock.Mock(device=torch.device("cpu"), config=SimpleNamespace(vocab_size=9))
    model.generate.side_effect = RuntimeError("no\nmemory")
    rows = list(generate.measure("packed", model, generate.no_clock, generate.Sizes(3, 5, 1), [1]))
    assert [(r.mode, r.error, r.tokens_per_second) for r in rows] == [
        ("eager", "RuntimeError: no memory", None),
        ("compiled", "RuntimeError: no memory", None),
    ]
    model.generate.side_effect = None
    model.generate.return_value = torch.zeros(1, 7)  # a text that ended too early
    rows = list(generate.measure("packed", model, generate.no_clock, generate.Sizes(3, 5, 1), [1]))
    assert {row.error for row in rows} == {"RuntimeError: made [1, 7] tokens"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "--device cpu --tiny"),
        (["--device", "cpu", "--tiny", "--new-tokens", "1"], "at least 2"),
    ],
)
def test_generation_that_cannot_be_timed_is_one_clear_error(
    generate: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        start(generate, monkeypatch, [*words, "--out", str(tmp_path / "result.json")])
    assert caught.value.code == 2 and message in capsys.readouterr().err
