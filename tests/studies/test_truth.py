"""Choices measured as their assignments are."""

from collections.abc import Callable

import numpy as np
import pytest

from alphaquant.studies.program import Run

MakeRun = Callable[..., Run]


@pytest.mark.parametrize("n_windows", [1, 8, 24])
def test_a_choice_has_the_kl_of_its_assignment(n_windows: int, make_run: MakeRun) -> None:
    run = make_run()
    choice = np.arange(len(run.problem.units)) % 3
    found = run.truth.measure(choice, n_windows)
    expected = run.truth.objective.measure(run.proposer.spread(choice), n_windows)
    assert found.dtype == np.float64
    assert found.tolist() == expected.kl.tolist()
    assert len(found) == n_windows
    assert run.truth.n_windows == 24
