"""Every option reaches its field of the specification."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.specs.quantizer import QuantSettings
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
    *("--actorder", "--static-groups", "--refine-sweeps", "1", "--n-starts", "1"),
    *("--blocksize", "64", "--scale-search", "mse"),
)
SETTINGS = QuantSettings(
    method="rtn",
    percdamp=0.5,
    route_exponent=1,
    pooled_tokens=9,
    actorder=True,
    static_groups=True,
    refine_sweeps=1,
    n_starts=1,
    blocksize=64,
    scale_search="mse",
)

SEARCH = (
    *QUANT,
    *("--budget", "3bits", "--model", "m", "--formats", "int", "--profile", "vllm"),
    *("--mode", "groups", "--grouping", "utilization", "--sweep", "never"),
    *("--allocator", "fisher", "--max-formats-per-layer", "2"),
    *("--layer-minimum-bits", "2.5", "--active-budget", "1MiB"),
    *("--trials", "7", "--timeout", "9.5", "--seed", "3", "--sampler", "gp"),
    *("--calibration", "a", "--evaluation", "b", "--heldout", "c"),
    *("--calibration-samples", "4", "--evaluation-samples", "5", "--heldout-samples", "6"),
    *(
        "--seq-len",
        "64",
        "--bos",
        "never",
        "--storage",
        "sqlite:///s",
        "--study",
        "t",
        "--out",
        "o",
    ),
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
            mode="groups",
            grouping="utilization",
            sweep="never",
            allocator="fisher",
            max_formats_per_layer=2,
            layer_minimum_bits=2.5,
            active_budget="1MiB",
            trials=7,
            timeout=9.5,
            seed=3,
            data=DataSpec("a", "b", "c", 4, 5, 6, 64, "never"),
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
        *("--sequential", "--model-type", "olmoe", "--bos", "always"),
    )
    run("aq-quantize", "--model", "m", "--config", "c", "--out", "o")
    expected = [replace(SETTINGS, sequential=True), QuantSettings()]
    assert [quant_settings(**spec.quant) for spec in specs] == expected
    full = QuantizeSpec(
        model="m",
        config=Path("c"),
        out=Path("o"),
        calibration="a",
        n_calibration=4,
        seq_len=64,
        seed=3,
        bos="always",
        device="cpu",
        dtype="bfloat16",
        model_type="olmoe",
        strict=True,
        overwrite=True,
    )
    found = [replace(spec, quant={}) for spec in specs]
    assert found == [full, QuantizeSpec("m", Path("c"), Path("o"))]


def test_other_spellings_are_the_same_options(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, quantize, "quantize")
    common = ("--model", "m", "--config", "c")
    spellings = (
        *(("--out", "--save", "o"), ("--calibration", "--dataset", "a")),
        *(("--calibration-samples", "--nsamples", "4"), ("--seq-len", "--seqlen", "64")),
        *(("--static-groups", "--static_groups"), ("--model-type", "--model_type", "qwen")),
    )
    run("aq-quantize", *common, *(o for first, _, *value in spellings for o in (first, *value)))
    run("aq-quantize", *common, *(o for _, other, *value in spellings for o in (other, *value)))
    assert specs[0] == specs[1]
    assert specs[0] != QuantizeSpec("m", Path("c"), Path("o"))
    assert (specs[0].n_calibration, specs[0].quant["static_groups"]) == (4, True)


def test_a_switch_can_be_turned_off_again(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, quantize, "quantize")
    off = ("--no-sequential", "--no-static-groups", "--no-actorder")
    run("aq-quantize", "--model", "m", "--config", "c", "--out", "o", *off)
    names = ("sequential", "static_groups", "actorder")
    assert {name: specs[0].quant[name] for name in names} == dict.fromkeys(names, False)


def test_options_of_evaluate(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = capture(monkeypatch, evaluate, "evaluate")
    run(
        "aq-eval",
        *("--model", "m", "--reference", "r", "--tasks", "ppl, kl", "--data", "d"),
        *("--samples", "4", "--seq-len", "64", "--seed", "3", "--batch-size", "2"),
        *("--device", "cpu", "--dtype", "bfloat16", "--bos", "never"),
    )
    run("aq-eval", "--model", "m")
    run("aq-eval", "--model", "m", "--reference", "r")
    full = EvaluateSpec("m", "r", ("ppl", "kl"), "d", 4, 64, 3, "cpu", "bfloat16", 2, bos="never")
    assert specs == [full, EvaluateSpec("m", tasks=("ppl",)), EvaluateSpec("m", "r")]
