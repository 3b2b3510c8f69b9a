"""Evaluations of assignments: the original has no divergence, and every run counts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.evaluators.divergence import Divergence
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.quant.bank import Bank, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.inputs import Source, load_source, read_text
from alphaquant.studies.objective import EvaluationSet, Objective, SearchObjective
from alphaquant.studies.rounds import Rounds
from alphaquant.studies.store.scores import EvaluationLog

NAMES = ("int2-g32", "bf16")
N_WINDOWS = 7
"""In batches of 2, with one left over."""

MakeObjective = Callable[..., SearchObjective]


@pytest.fixture
def source(tiny: Path) -> Source:
    return load_source(str(tiny), "cpu", "auto")


@pytest.fixture
def evaluation(source: Source, texts: dict[str, Path], tmp_path: Path) -> EvaluationSet:
    tokens = read_text(source, str(texts["search"]), "search", N_WINDOWS, 32, 0)
    return EvaluationSet(
        tokens, store_teacher(tmp_path / "t.safetensors", source.map.model, tokens.tokens)
    )


@pytest.fixture
def bank(source: Source, evaluation: EvaluationSet, tmp_path: Path) -> Bank:
    bank = open_bank(tmp_path, "key", source.map.inventory, {})
    fill_bank(
        bank, source.map, evaluation.tokens.tokens, BankRequest(NAMES, QuantSettings(method="rtn"))
    )
    return bank


@pytest.fixture
def make_objective(
    source: Source, evaluation: EvaluationSet, bank: Bank, tmp_path: Path
) -> MakeObjective:
    """An objective with a log of a name: `make_objective("b")`; equal names share a file."""

    def make(name: str = "a") -> SearchObjective:
        log = EvaluationLog(tmp_path / f"{name}.jsonl", 32)
        swapper = Swapper(source.map, bank.layer)
        return SearchObjective(swapper, evaluation, log, batch_size=2)

    return make


def coarse_from(source: Source, first: int, kind: str = "") -> Assignment:
    """2 bits for the matrices of a kind (default: all) from a layer on, the original before it."""
    return Assignment(
        {
            m.name: "int2-g32" if m.layer >= first and kind in m.kind else "bf16"
            for m in source.map.inventory.matrices
        }
    )


def test_measurement_depends_on_the_assignment_and_not_on_the_one_before(
    source: Source, evaluation: EvaluationSet, bank: Bank
) -> None:
    objective = Objective(Swapper(source.map, bank.layer))
    coarse, exact = (uniform_assignment(source.map.inventory, name) for name in NAMES)
    first = objective.measure(coarse, evaluation)
    original = objective.measure(exact, evaluation)
    again = objective.measure(coarse, evaluation)
    # The weights are bfloat16 numbers, so bf16 is the original.
    assert original.score("kl").value == pytest.approx(0.0, abs=1e-9)
    assert first.score("kl").value > 1e-4
    assert first.stderr("kl") > 0
    assert first.kl.tolist() == again.kl.tolist()
    assert first.score("kl").value == pytest.approx(float(first.kl.mean()), rel=1e-6)


def test_numbers_do_not_depend_on_measuring_in_parts(
    source: Source, make_objective: MakeObjective
) -> None:
    assignment = coarse_from(source, 0)
    whole = make_objective("whole").measure(assignment).kl
    objective = make_objective("parts")
    parts: list[Tensor] = []
    for n in (1, 2, 3, N_WINDOWS):
        objective.measure(coarse_from(source, n % 2))
        parts.append(objective.measure(assignment, n).kl)
    assert [len(part) for part in parts] == [1, 2, 3, N_WINDOWS]
    for part in parts:
        assert torch.equal(part, whole[: len(part)])
    assert torch.equal(objective.measure(assignment, 5).kl, whole[:5])
    assert torch.equal(objective.measure(assignment, 99).kl, whole)


def test_many_together_are_found_by_each_and_nothing_runs_twice(
    source: Source, make_objective: MakeObjective
) -> None:
    objective = make_objective("together")
    some = [coarse_from(source, 0), coarse_from(source, 1), coarse_from(source, 1, "attention")]
    objective.measure(some[1], 3)  # two batches of it are known
    steps: list[tuple[int, int]] = []
    objective.measure_together([*some, some[0]], tell=lambda *step: steps.append(step))
    assert (objective.n_evaluations, objective.n_passes) == (4, pytest.approx(3.0))
    assert steps[-1] == (4, 4)  # two layers for those without any, two for the one with some
    known = [objective.log.n_windows(assignment.digest) for assignment in some]
    assert known == [N_WINDOWS] * 3
    for assignment in some:
        alone = make_objective(assignment.digest[:8]).measure(assignment)
        assert torch.equal(objective.measure(assignment).kl, alone.kl)
    objective.measure_together(some)
    assert objective.n_passes == pytest.approx(3.0)


def test_a_round_that_is_stopped_keeps_its_finished_turns(
    source: Source, make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Rounds.measure

    def stopped(self: Rounds, *args: Any) -> Iterator[tuple[Assignment, Divergence]]:
        turns = honest(replace(self, most_bytes=0), *args)  # one assignment and batch at a time
        for _ in range(5):
            yield next(turns)
        raise KeyboardInterrupt

    some = [coarse_from(source, 0), coarse_from(source, 1)]
    objective = make_objective("shared")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rounds, "measure", stopped)
        objective.measure_together(some)
    again = make_objective("shared")
    assert [again.log.n_windows(a.digest) for a in some] == [7, 2]
    again.measure_together(some)
    assert again.n_passes == pytest.approx(5 / 7)
    assert torch.equal(again.measure(some[1]).kl, make_objective("b").measure(some[1]).kl)


def test_numbers_are_those_of_the_plain_evaluation(
    source: Source, evaluation: EvaluationSet, bank: Bank, make_objective: MakeObjective
) -> None:
    objective, plain = make_objective(), Objective(Swapper(source.map, bank.layer), batch_size=2)
    for assignment in (coarse_from(source, 0), coarse_from(source, 1, "attention")):
        mine, theirs = objective.measure(assignment), plain.measure(assignment, evaluation)
        assert mine.kl.tolist() == theirs.kl.tolist()
        assert [s.value for s in mine.scores] == [s.value for s in theirs.scores]


def test_passes_count_the_windows_that_ran(source: Source, make_objective: MakeObjective) -> None:
    objective = make_objective()
    objective.measure(coarse_from(source, 1))
    assert objective.n_passes == pytest.approx(1.0)
    objective.measure(coarse_from(source, 0), 3)
    assert objective.n_passes == pytest.approx(1.0 + 4 / 7)  # two batches of two
    objective.measure(coarse_from(source, 0))
    assert objective.n_passes == pytest.approx(2.0)
    assert objective.n_evaluations == 3


def test_what_the_log_has_is_never_run_again(
    source: Source, make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    assignment = coarse_from(source, 0)
    first = make_objective("shared").measure(assignment)
    second = make_objective("shared")

    def no_work(*args: object) -> None:
        raise AssertionError("the model is touched")

    monkeypatch.setattr(Rounds, "measure", no_work)
    found = second.measure(assignment)
    assert found.kl.tolist() == first.kl.tolist()
    assert [s.value for s in found.scores] == [s.value for s in first.scores]
    assert second.measure(assignment, 3).kl.tolist() == first.kl[:3].tolist()
    assert (second.n_evaluations, second.n_passes) == (0, 0.0)
