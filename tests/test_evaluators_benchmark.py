"""The benchmark of the evaluators: its pieces on a tiny model."""

import json
from dataclasses import asdict
from types import ModuleType

import pytest
import torch

from alphaquant.testing.models import tiny_model, tiny_tokens
from tests.benches import import_benchmark

TOKENS = tiny_tokens(3, 8)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_benchmark("evaluators")


def test_every_evaluator_is_measured_beside_the_plain_pass(benchmark: ModuleType) -> None:
    rows = benchmark.measure_costs(tiny_model("olmoe"), TOKENS, 2)
    assert [row.name for row in rows] == ["forward", *benchmark.EVALUATORS]
    assert rows[0].ratio == 1.0
    assert all(row.seconds > 0 and row.ratio > 0 for row in rows)
    assert all((row.prepare_seconds > 0) == (row.name != "forward") for row in rows)
    json.dumps([asdict(row) for row in rows])
    assert benchmark.costs_table(rows).count("\n") == len(rows) + 1


def test_extra_memory_is_the_peak_and_not_what_stays(benchmark: ModuleType) -> None:
    found = benchmark.extra_memory(lambda: torch.ones(2**24).sum())  # 64 MiB, freed at once
    if found is None:
        pytest.skip("resident memory is read from /proc")
    assert 60 * 2**20 < found < 100 * 2**20
    assert benchmark.extra_memory(lambda: None) < 4 * 2**20


def test_drift_is_of_the_rounded_model_and_leaves_the_original(benchmark: ModuleType) -> None:
    model = tiny_model("olmoe")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = benchmark.measure_drift(model, TOKENS, ["int2-g64", "int8-g64"])
    coarse, fine = (row.scores[0].value for row in rows)
    assert coarse > 10 * fine > 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert benchmark.drift_table(rows).splitlines()[2].startswith("| int2-g64 | ")
