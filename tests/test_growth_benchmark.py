"""The benchmark of growth: what it writes loads, and what it prints adds up."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.models.mapping import map_model
from alphaquant.models.walk import walk
from alphaquant.testing.models import tiny_tokens
from tests.benches import import_benchmark


@pytest.fixture(scope="module")
def growth() -> ModuleType:
    return import_benchmark("growth")


@pytest.fixture(scope="module")
def models(growth: ModuleType) -> ModuleType:
    return sys.modules["growth_models"]


@pytest.mark.parametrize(
    ("name", "n_weights"),
    [
        ("10m", 10e6),
        ("40m", 40e6),
        ("160m", 160e6),
        ("640m", 640e6),
        ("1.3b", 1.3e9),
        ("olmoe", 6.919e9),
        ("qwen3-30b", 30.53e9),
    ],
)
def test_models_are_of_the_size_that_they_are_called(
    models: ModuleType, name: str, n_weights: float
) -> None:
    with torch.device("meta"):
        model = models.AutoModelForCausalLM.from_config(models.SHAPES[name].config())
    rel = 0.001 if name in ("olmoe", "qwen3-30b") else 0.06
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(n_weights, rel=rel)


def counting(counts: torch.Tensor) -> Any:
    """A hook of a router that adds up the tokens of each expert."""

    def hook(_: nn.Module, args: object, output: Any) -> None:
        counts.add_(output[-1].flatten().bincount(minlength=len(counts)))

    return hook


@pytest.mark.parametrize("name", ["10m", "qwen3-30b"])
@torch.no_grad()
def test_a_written_model_is_finite_and_its_routers_spread_tokens(
    models: ModuleType, name: str, tmp_path: Path
) -> None:
    small = {"hidden": 64, "width": 32, "n_experts": 8, "top_k": 2, "n_layers": 2, "n_heads": 4}
    shape = replace(models.SHAPES[name], vocabulary=4096, **small)
    if name == "qwen3-30b":
        shape = replace(shape, others={**shape.others, "num_key_value_heads": 2, "head_dim": 16})
    n_weights = models.write_model(tmp_path / "model", shape)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    model = load_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == n_weights
    assert len(load_tokenizer(tmp_path / "model")) == 4096
    found = map_model(model)
    for step in walk(found, [tiny_tokens(2, 64)]):
        counts = torch.zeros(8)
        router = next(m for n, m in step.layer.module.named_modules() if n.endswith("mlp.gate"))
        router.register_forward_hook(counting(counts))
        (hidden,) = step.run()
        assert bool(hidden.isfinite().all())
        assert counts.sum() == 2 * 64 * 2 and int((counts > 0).sum()) >= 7


def test_exponents_are_those_of_powers(growth: ModuleType) -> None:
    rows = [(10**n, {"walk": growth.Spent("walk", 1.0, 4.0**n, 100 * 10**n)}) for n in range(1, 4)]
    expected = f"{math.log10(4):.2f}, 1.00"
    assert growth.exponents(rows) == [["walk", expected, expected]]


def test_stages_get_their_own_processor_seconds(growth: ModuleType) -> None:
    meter = growth.StageMeter()
    for stage in ("load", "walk"):
        for done in range(3):
            meter(stage, done, 2)
    spent = meter.spent()
    assert [s.stage for s in spent] == ["load", "walk"]
    assert all(s.peak_bytes > 2**20 and s.cpu_seconds >= 0 for s in spent)


def test_a_walk_is_measured_in_a_process_of_its_own_and_nothing_is_left(
    growth: ModuleType,
    models: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = models.Shape(64, 32, 8, 2, 2, 4)
    monkeypatch.setitem(models.SHAPES, "10m", tiny)
    monkeypatch.setattr(growth, "measure_apart", lambda worker, job: growth.measure_walk(job))
    folder, out = tmp_path / "models", tmp_path / "out.json"
    folder.mkdir()
    options = ["--sizes", "10m", "--windows", "2", "--seq-len", "16", "--folder", str(folder)]
    monkeypatch.setattr(sys, "argv", ["growth.py", *options, "--out", str(out)])
    growth.main()
    printed = capsys.readouterr().out
    assert "| first prepare |" in printed and "| again walk |" in printed
    assert "again prepare" not in printed
    assert not list(folder.iterdir())
    (row,) = json.loads(out.read_text())
    assert set(row["stages"]["again walk"]) == {"stage", "seconds", "cpu_seconds", "peak_bytes"}
