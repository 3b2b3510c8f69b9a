"""Costs by workers: the same files as in one process, layer by layer and beside the layers."""

from pathlib import Path

import pytest

from alphaquant.costs.cost_tasks import measure_costs_by
from alphaquant.costs.fisher import CostSettings
from alphaquant.costs.output_gradients import (
    measure_output_hessians,
    measure_output_hessians_by,
)
from alphaquant.models.mapping import map_model
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.cost_cases import (
    COST_FAMILIES,
    COST_FORMATS,
    COST_TOKENS,
    CostCase,
    make_cost_case,
)
from alphaquant.testing.models import tiny_model
from alphaquant.work.tasks import InProcess
from alphaquant.work.walked import Text

SETTINGS = CostSettings(seed=3, n_draws=2, batch_size=4)


def contents(case: CostCase) -> dict[str, bytes]:
    folder = case.bank.path / "costs"
    return {str(p.relative_to(folder)): p.read_bytes() for p in case.stored()}


def measure_by_tasks(case: CostCase) -> None:
    text = Text(COST_TOKENS, SETTINGS.batch_size, case.bank.path / "states")
    given = (case.map, case.bank, text, COST_FORMATS, SETTINGS)
    measure_costs_by(InProcess(case.map), *given)


def check_same(alone: CostCase, tasks: CostCase) -> None:
    alone.costs(seed=3, n_draws=2, batch_size=4)
    measure_by_tasks(tasks)
    assert contents(tasks) == contents(alone)
    assert len(contents(tasks)) > 0


@pytest.mark.parametrize(
    "family",
    [f if f == "qwen2_moe" else pytest.param(f, marks=pytest.mark.slow) for f in COST_FAMILIES],
)
def test_tasks_write_the_files_of_one_walk_back(family: str, tmp_path: Path) -> None:
    check_same(*(make_cost_case(tmp_path / name, family) for name in "ab"))


def test_head_and_embeddings_are_measured_by_a_task_too(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"), include=("head", "embeddings"))
    cases = []
    for name in "ab":
        bank = open_bank(tmp_path / name, "bank", model_map.inventory, {})
        fill_bank(
            bank, model_map, COST_TOKENS, BankRequest(COST_FORMATS, QuantSettings(method="rtn"))
        )
        cases.append(CostCase(model_map, bank))
    check_same(*cases)


def test_output_hessians_of_tasks_are_those_of_one_walk_back(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"))
    workers = InProcess(model_map)
    text = Text(COST_TOKENS, SETTINGS.batch_size, tmp_path / "states")
    measure_output_hessians_by(workers, model_map, text, tmp_path / "b", SETTINGS)
    for name in "ab":
        measure_output_hessians(model_map, COST_TOKENS, tmp_path / name, SETTINGS)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir()) and len(files) == 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
