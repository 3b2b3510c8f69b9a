"""Searches and quantizations by workers: what one process finds, whatever happens to them."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.errors import ConfigError
from alphaquant.specs.flat import flat, replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.result import SearchResult
from alphaquant.studies.shared.staffing import WorkerSource, check_workers
from alphaquant.work import processes
from alphaquant.work.tasks import WorkError

MakeSpec = Callable[..., SearchSpec]


def trials(result: SearchResult) -> list[dict[str, Any]]:
    """Everything of trials but how long they took."""
    return [{**asdict(row), "seconds": 0.0} for row in result.rows]


def points(result: SearchResult) -> list[dict[str, Any]]:
    """The front on held-out text."""
    return [asdict(row) for row in result.gate.rows]


def files_of(cache: Path) -> dict[str, bytes]:
    """Banks, costs and predictions."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for folder in ("banks", "teachers")
        for path in sorted((cache / folder).rglob("*"))
        if path.is_file()
        and path.suffix in (".safetensors", ".json")
        and "bank.json" not in str(path)
    }


def check_same(first: SearchResult, second: SearchResult) -> None:
    assert trials(second) == trials(first)
    assert points(second) == points(first)
    caches = [result.spec.run.cache for result in (first, second)]
    assert files_of(caches[1]) == files_of(caches[0])
    assert len(files_of(caches[0])) > 10
    assert list((caches[1] / "states").rglob("*")) == []


@pytest.fixture
def spec_in(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., SearchSpec]:
    """A search with a folder and a cache of its own: `spec_in("a", workers=2)`."""

    def make(name: str, **changes: Any) -> SearchSpec:
        spec = make_spec(tmp_path / name / "out", trials=16)
        own = tmp_path / name / "cache"
        return replaced(spec, evaluation_samples=24, cache=own, **changes)

    return make


@pytest.mark.slow
def test_two_workers_find_what_one_process_finds(spec_in: Callable[..., SearchSpec]) -> None:
    alone = search(spec_in("alone"))
    lines: list[tuple[str, int, int]] = []
    shared = search(spec_in("two", workers=2), progress=lambda *call: lines.append(call))
    check_same(alone, shared)
    assert {"states", "gradients", "bank", "costs", "gate"} <= {stage for stage, _, _ in lines}


class Killer(processes._ProcessCrew):
    """Kills workers at random while they work, `n_kills` times in all, no task more than twice."""

    n_kills = 20
    chance = 0.5

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.random, self.n_killed = random.Random(3), Counter[int]()

    def give(self, worker: int, task: Any) -> None:
        super().give(worker, task)
        n = self.n_killed
        is_hit = self.random.random() < self.chance and n[id(task)] < 2
        if is_hit and n.total() < self.n_kills:
            n[id(task)] += 1
            pid = self._members[worker].program.pid
            threading.Timer(self.random.uniform(0.0, 0.3), kill, [pid]).start()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # every kill costs the start of a worker
def test_twenty_kills_of_workers_lose_nothing_and_double_nothing(
    spec_in: Callable[..., SearchSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = search(spec_in("alone"))
    crews: list[Killer] = []

    def make(*args: Any) -> Killer:
        crews.append(Killer(*args))
        return crews[-1]

    monkeypatch.setattr(processes, "_ProcessCrew", make)
    shared = search(spec_in("two", workers=2))
    check_same(alone, shared)
    assert crews[0].n_killed.total() == Killer.n_kills
    numbers = [row.number for row in shared.rows]
    assert numbers == list(range(len(numbers)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_driver_that_is_killed_goes_on_with_its_workers_work(
    spec_in: Callable[..., SearchSpec],
) -> None:
    alone, spec = search(spec_in("alone")), spec_in("two", workers=2)
    options: list[str] = []
    for name, value in flat(spec).items():
        if value not in (None, False):
            option = f"--{name.replace('_', '-')}"
            options += [option] if value is True else [option, str(value)]
    code = "from alphaquant.cli.search import main; main()"
    n_files = [0]
    for more in (3, 3, 6):  # files until the next kill: predictions, bank, costs
        driver = subprocess.Popen([sys.executable, "-c", code, *options])
        while driver.poll() is None and len(files_of(spec.run.cache)) < n_files[-1] + more:
            time.sleep(0.05)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
        n_files.append(len(files_of(spec.run.cache)))
    assert n_files[-1] > n_files[-2] > n_files[-3]
    before = {
        path: path.stat().st_mtime_ns for path in spec.run.cache.rglob("layer-*.safetensors")
    }
    check_same(alone, search(spec))
    kept = [path for path in before if "banks" in path.parts]
    assert kept and all(path.stat().st_mtime_ns == before[path] for path in kept)


@pytest.mark.slow
def test_layers_quantized_by_workers_are_the_same_checkpoint(
    tiny: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"default": {"wq": "int4", "group_size": 32}}))

    def made(name: str, **changes: Any) -> dict[str, bytes]:
        spec = QuantizeSpec.of(
            model=str(tiny),
            config=config,
            out=tmp_path / name,
            cache=tmp_path / f"cache-{name}",
            calibration=str(texts["calibration"]),
            calibration_samples=20,
            seq_len=48,
            **changes,
        )
        quantize(spec)
        return {p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")}

    assert made("two", workers=2) == made("alone")


def test_workers_that_would_have_nothing_to_do_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"default": {"wq": "int4", "group_size": 32}}))
    for setting in ({"method": "rtn"}, {"sequential": True}):
        spec = QuantizeSpec.of(
            model=str(tiny), config=config, out=tmp_path / "o", workers=2, **setting
        )
        with pytest.raises(ConfigError, match="^--workers and --cluster share layers, and this"):
            quantize(spec)
    assert not (tmp_path / "o").exists()


def test_more_workers_than_gpus_and_one_gpu_for_all_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check_workers(2, None, "cuda")
    check_workers(None, None, "cuda:1")
    check_workers(16, "auto", "cuda")
    with pytest.raises(ConfigError, match="^--workers 3 on 2 GPUs; give 2 at most"):
        check_workers(3, None, "cuda")
    with pytest.raises(ConfigError, match="^--device cuda:1 is one GPU, and every worker"):
        check_workers(2, None, "cuda:1")


def test_a_worker_with_other_weights_or_versions_refuses(tiny: Path, tmp_path: Path) -> None:
    own = {"torch": "0.1"}
    given = (str(tiny), "cpu", "auto", (), tmp_path)
    with pytest.raises(WorkError, match=r"^a worker has torch 2\S+ and the driver 0.1; numbers"):
        WorkerSource(*given, "digest", own)()
    with pytest.raises(WorkError, match="has other weights in a worker .* same file everywhere"):
        WorkerSource(*given, "digest", {})()
