"""The benchmarks of the allocation: their pieces on a tiny model, without other tools."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphaquant.search.solver import solve
from alphaquant.specs.search import SearchSpec
from alphaquant.testing.allocators import example_problem
from alphaquant.testing.checkpoints import save_texts, save_tiny
from tests.benches import import_benchmark

BUDGET = 5.2


@pytest.fixture(scope="module")
def load() -> Callable[[str], ModuleType]:
    return import_benchmark


@pytest.fixture(scope="module")
def measured(load: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bench on which allocators, a search and evolution ran at one budget."""
    allocation = load("allocation")
    folder = tmp_path_factory.mktemp("allocation")
    texts = save_texts(tmp_path_factory.mktemp("texts"))
    spec = SearchSpec.of(
        model=str(save_tiny(tmp_path_factory.mktemp("tiny"))),
        budget=f"{BUDGET}bits",
        formats="int3-g32,int4-g32,int8-row",
        trials=6,
        calibration=str(texts["calibration"]),
        evaluation=str(texts["search"]),
        heldout=str(texts["heldout"]),
        calibration_samples=12,
        evaluation_samples=6,
        heldout_samples=6,
        seq_len=48,
        out=folder / "out",
        cache=folder / "cache",
    )
    bench = allocation.Bench(spec, folder / "rows.json")
    allocation.run_uniform(bench)
    allocation.run_allocators(bench, BUDGET)
    allocation.run_costs(bench, BUDGET)
    allocation.run_search(bench, BUDGET, folder)
    allocation.run_evolution(bench, BUDGET, 8)
    return bench


def test_every_row_is_within_its_budget_and_written_down(measured: Any, tmp_path: Path) -> None:
    assert all(row.bits_per_weight <= row.budget + 1e-9 for row in measured.rows)
    groups = {row.group for row in measured.rows}
    assert groups == {"uniform", "allocator", "cost", "stage", "ours"}
    measured.write()
    written = json.loads(measured._out.read_text())
    assert len(written["rows"]) == len(measured.rows)
    assert written["commit"] and written["model_digest"]


def test_the_checkpoint_measures_as_the_bank_does(measured: Any) -> None:
    ours = next(row for row in measured.rows if row.group == "ours")
    stage = [row for row in measured.rows if row.group == "stage"][-1]
    assert ours.kl == pytest.approx(stage.kl, rel=0.05)  # the best may be an earlier trial's
    assert ours.kl < next(r.kl for r in measured.rows if r.name == "uniform")


def test_tables_have_a_row_per_method_and_ratios_the_best_published(
    load: Callable[[str], ModuleType], measured: Any
) -> None:
    allocation = load("allocation")
    rows = [row for row in measured.rows if row.group != "uniform"]
    assert len(allocation.table(rows).splitlines()) == 2 + len({(r.group, r.name) for r in rows})
    kl = {row.name: row.kl for row in rows if row.group in ("allocator", "ours")}
    best = min(kl[name] for name in allocation.PUBLISHED_NAMES)
    assert f"| best published allocator | {kl['aq-search'] / best:.3f} |" in allocation.ratios(
        rows
    )


def test_formats_are_removed_in_order_of_their_loss(load: Callable[[str], ModuleType]) -> None:
    menu, problem = load("menu"), example_problem(0)
    cost = problem.costs["fisher"]
    order = menu.removals(problem, cost)
    assert [step["n_left"] for step in order] == list(range(len(problem.formats) - 1, 3, -1))
    losses = np.array([np.log(step["ratios"]).mean() for step in order])
    assert (np.diff(losses) >= -1e-12).all()
    kept = [n not in {step["removed"] for step in order} for n in problem.formats]
    allowed = problem.allowed & np.array(kept)
    limit_bits = problem.limit_bits(menu.BUDGETS[2])
    ends = solve(cost, problem.bits, allowed, limit_bits).cost
    whole = solve(cost, problem.bits, problem.allowed, limit_bits).cost
    assert order[-1]["ratios"][2] == pytest.approx(ends / whole)


def test_the_spread_over_seeds_and_the_worst_ratio(load: Callable[[str], ModuleType]) -> None:
    rows = [{"kl": 1.0, "uniform": {"a": 4.0, "b": 2.0}}, {"kl": 3.0, "uniform": {"a": 4.0}}]
    found = load("seeds").summary(rows)
    assert (found["mean"], found["least"], found["most"]) == (2.0, 1.0, 3.0)
    assert found["standard_deviation"] == pytest.approx(2**0.5)
    assert found["worst_ratio_to_uniform"] == 0.75
