"""The benchmark of the packed runtime: its pieces on tiny models."""

import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.modules import cache_dequantized
from alphaquant.testing.models import tiny_model, tiny_tokens
from tests.benches import import_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_benchmark("runtime")


def test_every_variant_makes_text_beside_the_original(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    original = tiny_model("olmoe")
    packed = benchmark.write_packed(map_model(original), tmp_path / "packed")
    models = {"original": original, "packed": load(packed), "1MiB": load(packed)}
    cache_dequantized(models["1MiB"], "1MiB")
    rows = benchmark.measure_speeds(models, tiny_tokens(2, 5), 4, 2, {"packed": 7})
    assert [(row.name, row.batch_size) for row in rows] == [(name, 2) for name in models]
    assert rows[0].ratio == 1.0 and all(row.tokens_per_second > 0 for row in rows)
    # All weights fit and were made before the measured turns.
    assert [row.found for row in rows] == [None, None, 1.0]
    assert [row.peak_bytes for row in rows] == [None, 7, None]
    json.dumps([asdict(row) for row in rows])
    assert benchmark.speeds_table(rows).count("\n") == len(rows) + 1


def test_a_variant_with_another_text_is_an_error(benchmark: ModuleType, tmp_path: Path) -> None:
    paths = [
        benchmark.write_packed(map_model(tiny_model("olmoe", seed)), tmp_path / str(seed))
        for seed in (0, 1)
    ]
    models = {"original": tiny_model("olmoe"), "packed": load(paths[0]), "1MiB": load(paths[1])}
    with pytest.raises(RuntimeError, match="1MiB makes another text than packed"):
        benchmark.measure_speeds(models, tiny_tokens(2, 5), 8, 1, {})


def test_experts_are_measured_packed_and_kept(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = benchmark.measure_grouping(tmp_path, 20, 8, 32, 1)
    assert [row.weights for row in rows] == ["packed", "kept"]
    assert all(row.ratio == row.loop_seconds / row.grouped_seconds > 1 for row in rows)
    json.dumps([asdict(row) for row in rows])
    assert benchmark.grouping_table(rows).count("\n") == len(rows) + 1
