"""Filling a bank by workers: the same files as in one process."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import Bank, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank, fill_bank_by
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens
from alphaquant.work.tasks import InProcess, R, Task, Tell, tell_no_one
from alphaquant.work.walked import Text

FORMATS = ["int3-g32-asym", "mxfp4"]
SETTINGS = QuantSettings(refine_sweeps=0, n_starts=1)
TOKENS, BATCH_WINDOWS = tiny_tokens(5, 16), 2


class Twice(InProcess):
    """Runs every task a second time, as after a worker that was lost at its end."""

    def map(self, tasks: Sequence[Task[R]], tell: Tell = tell_no_one) -> Iterator[R]:
        self.results: list[Any] = []
        for task, result in zip(tasks, super().map(tasks, tell), strict=True):
            self.results.append(task.run(self._map))
            yield result


def contents(bank: Bank) -> dict[str, bytes]:
    return {
        str(p.relative_to(bank.path)): p.read_bytes()
        for p in sorted(bank.path.rglob("*"))
        if p.is_file()
    }


def text_in(path: Path) -> Text:
    return Text(TOKENS, BATCH_WINDOWS, path / "states")


def fill_in_turn(model_map: ModelMap, path: Path) -> Bank:
    bank = open_bank(path, "key", model_map.inventory, {})
    fill_bank(bank, model_map, TOKENS, BankRequest(FORMATS, SETTINGS), batch_size=BATCH_WINDOWS)
    return bank


def fill_by_tasks(model_map: ModelMap, path: Path) -> Bank:
    bank = open_bank(path, "key", model_map.inventory, {})
    workers = InProcess(model_map)
    assert (
        fill_bank_by(workers, bank, model_map, text_in(path), BankRequest(FORMATS, SETTINGS)) > 0
    )
    return bank


def quick(family: str) -> bool:
    return family in ("qwen2_moe", "gpt_oss")


@pytest.mark.parametrize(
    "family",
    [f if quick(f) else pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES)],
)
def test_tasks_write_the_files_of_one_walk(family: str, tmp_path: Path) -> None:
    model_map = map_model(tiny_model(family))
    expected = contents(fill_in_turn(model_map, tmp_path / "a"))
    assert contents(fill_by_tasks(model_map, tmp_path / "b")) == expected


def test_tasks_fill_what_is_beside_the_layers(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"), include=("head", "embeddings"))
    expected = contents(fill_in_turn(model_map, tmp_path / "a"))
    assert contents(fill_by_tasks(model_map, tmp_path / "b")) == expected


def test_a_task_that_is_run_again_writes_nothing_and_changes_nothing(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"))
    bank = open_bank(tmp_path, "key", model_map.inventory, {})
    again = Twice(model_map)
    assert (
        fill_bank_by(again, bank, model_map, text_in(tmp_path), BankRequest(FORMATS, SETTINGS))
        == len(FORMATS) * 2
    )
    assert again.results[-1] == 0
    expected = contents(fill_in_turn(model_map, tmp_path / "b"))
    assert contents(bank) == expected
