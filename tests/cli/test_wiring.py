"""Every option reaches its field of the specification."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.quant.engine import QuantSettings
from alphaquant.studies import evaluate, quantize, runner
from alphaquant.studies.evaluate import EvaluateSpec
from alphaquant.studies.quantize import QuantizeSpec
from alphaquant.studies.spec import DataSpec, SearchSpec, quant_settings


def capture(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> list[Any]:
    """Replace a library function by one that keeps its specification."""
    specs: list[Any] = []

    def keep(spec: Any, **_: Any) -> None:
        specs.append(spec)
        raise ConfigError("captured")

    monkeypatch.setattr(module, function, keep)
    return specs


QUANT = (
    *("--method", "rtn", "--percdamp", "0.5", "--route-exponent", "1", "--pooled-tokens", "9"),
    *("--actorder", "--static-groups", "--refine-sweeps", "1"),
)
SETTINGS = QuantSettings(
    method="rtn",
    percdamp=0.5,
    route_exponent=1,
    pooled_tokens=9,
    actorder=True,
    static_groups=True,
    refine_sweeps=1,
)

SEARCH = (
    *QUANT,
    *("--budget", "3bits", "--model", "m", "--formats", "int", "--profile", "vllm"),
    *("--trials", "7", "--timeout", "9.5", "--seed", "3", "--sampler", "gp"),
    *("--calibration", "a", "--evaluation", "b", "--heldout", "c"),
    *("--calibration-samples", "4", "--evaluation-samples", "5", "--heldout-samples", "6"),
    *("--seq-len", "64", "--storage", "sqlite:///s", "--study", "t", "--out", "o"),
    *("--cache", "k", "--device", "cpu", "--dtype", "bfloat16", "--overwrite"),
)


def test_options_of_search(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, runner, "search")
    assert run("aq-search", *SEARCH).code == 1
    assert specs == [
        SearchSpec(
            model="m",
            budget="3bits",
            formats="int",
            profile="vllm",
            trials=7,
            timeout=9.5,
            seed=3,
            data=DataSpec("a", "b", "c", 4, 5, 6, 64),
            quant=SETTINGS,
            sampler="gp",
            storage="sqlite:///s",
            study="t",
            out=Path("o"),
            cache=Path("k"),
            device="cpu",
            dtype="bfloat16",
            overwrite=True,
        )
    ]


def test_defaults_of_search_are_those_of_its_specification(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = capture(monkeypatch, runner, "search")
    run("aq-search", "--budget", "3bits")
    assert specs == [SearchSpec(budget="3bits")]


def test_options_of_quantize(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, quantize, "quantize")
    run(
        "aq-quantize",
        *("--model", "m", "--config", "c", "--out", "o", *QUANT),
        *("--calibration", "a", "--calibration-samples", "4", "--seq-len", "64", "--seed", "3"),
        *("--device", "cpu", "--dtype", "bfloat16", "--strict", "--overwrite"),
    )
    run("aq-quantize", "--model", "m", "--config", "c", "--out", "o")
    assert [quant_settings(**spec.quant) for spec in specs] == [SETTINGS, QuantSettings()]
    full = QuantizeSpec(
        model="m",
        config=Path("c"),
        out=Path("o"),
        calibration="a",
        n_calibration=4,
        seq_len=64,
        seed=3,
        device="cpu",
        dtype="bfloat16",
        strict=True,
        overwrite=True,
    )
    found = [replace(spec, quant={}) for spec in specs]
    assert found == [full, QuantizeSpec("m", Path("c"), Path("o"))]


def test_options_of_evaluate(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, evaluate, "evaluate")
    run(
        "aq-eval",
        *("--model", "m", "--reference", "r", "--tasks", "ppl, kl", "--data", "d"),
        *("--samples", "4", "--seq-len", "64", "--seed", "3", "--batch-size", "2"),
        *("--device", "cpu", "--dtype", "bfloat16"),
    )
    run("aq-eval", "--model", "m")
    run("aq-eval", "--model", "m", "--reference", "r")
    full = EvaluateSpec("m", "r", ("ppl", "kl"), "d", 4, 64, 3, "cpu", "bfloat16", 2)
    assert specs == [full, EvaluateSpec("m", tasks=("ppl",)), EvaluateSpec("m", "r")]
