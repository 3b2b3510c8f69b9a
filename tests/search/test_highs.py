"""HiGHS says nothing on standard output, and Python's own lines are kept."""

import ctypes
import os
import sys

import numpy as np
import pytest
from scipy.optimize import Bounds

from alphaquant.search import highs


def test_what_c_code_prints_meanwhile_is_dropped_and_the_rest_is_kept(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = ctypes.CDLL(None)

    def chatty(*args: object, **kwargs: object) -> str:
        libc.puts(b"from C, buffered")
        os.write(1, b"from C, at once\n")
        return "result"

    monkeypatch.setattr(highs, "milp", chatty)
    print("before")
    assert highs.quiet_milp() == "result"
    print("after")
    sys.stdout.flush()
    assert capfd.readouterr().out == "before\nafter\n"


def test_standard_output_is_back_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        highs.quiet_milp(np.zeros((2, 2, 2)))
    print("still here")
    assert capfd.readouterr().out == "still here\n"


def test_the_solution_is_that_of_scipy() -> None:
    found = highs.quiet_milp([-1.0, -2.0], integrality=[1, 1], bounds=Bounds(0, 1.5))
    assert found.x.tolist() == [1.0, 1.0]
    relaxed = highs.quiet_linprog([-1.0, -2.0], bounds=(0, 1.5))
    assert relaxed.x.tolist() == [1.5, 1.5]
