"""What tests of benchmarks share: modules of theirs, and for kernels timers that make times up."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def import_benchmark(name: str) -> ModuleType:
    """A module of the folder, which imports its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module


def bench_with(load: Callable[[str], Any], timer: Any, l2_bytes: int = 0) -> Any:
    found = load("kernel_bench")
    return found.Bench(found.load_kernels(), timer, "cpu", l2_bytes)


class FakeTimer:
    """Runs every call and makes up times; what it was given is kept."""

    def __init__(self, made_up: Callable[[Any], float]) -> None:
        self.made_up, self.calls = made_up, []

    def __call__(self, calls: Sequence[Any]) -> Any:
        for call in calls:
            call()
        self.calls.append(calls)
        value = self.made_up(calls[0])
        return sys.modules["kernel_timing"].Timing(value, value, value, 2, len(calls))
