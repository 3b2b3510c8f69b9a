"""The benchmark of searches by workers: how tasks are handed out and what is compared."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.benches import import_benchmark


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return import_benchmark("workers")


def test_each_task_goes_to_the_first_worker_that_is_free(bench: ModuleType) -> None:
    assert bench.last_end([3.0, 2.0, 2.0], 2) == 4.0
    assert bench.last_end([1.0] * 16, 8) == 2.0
    assert bench.last_end([1.0] * 16, 6) == 3.0
    assert bench.last_end([5.0], 8) == 5.0


def test_processor_seconds_of_tasks_are_summed_by_kind(bench: ModuleType) -> None:
    log = (
        "DEBUG part 0 of the bank: 1.50 s\nDEBUG part 1 of the bank: 0.25 s\n"
        "DEBUG gradients on batches 0 to 0: 2.00 s\nWARNING part 1 of the bank: it is run again\n"
    )
    assert bench.tasks_of(log) == {"part": 1.75, "gradients": 2.0}


def test_results_are_equal_but_for_times_and_places(bench: ModuleType, tmp_path: Path) -> None:
    def write(name: str, kl: float, seconds: float) -> Path:
        root = tmp_path / name
        (root / "out" / "configs").mkdir(parents=True)
        row = f"number,kl,seconds\n0,{kl},{seconds}\n"
        (root / "out" / "trials.csv").write_text(row)
        front = {"front": [{"kl": kl, "seconds": seconds}], "settings": {"out": str(root)}}
        (root / "out" / "front.json").write_text(json.dumps(front))
        (root / "out" / "configs" / "a.json").write_text(json.dumps({"n_passes": seconds}))
        (root / "cache" / "banks").mkdir(parents=True)
        (root / "cache" / "banks" / "a.safetensors").write_bytes(str(kl).encode())
        return root

    first, slower, other = write("a", 0.5, 1.0), write("b", 0.5, 2.0), write("c", 0.25, 1.0)
    assert bench.results_of(first) == bench.results_of(slower) != bench.results_of(other)
    assert bench.files_of(first) == bench.files_of(slower) != bench.files_of(other)
