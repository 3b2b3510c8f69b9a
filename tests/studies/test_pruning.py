"""Trials that are worse beyond doubt end early, and no others."""

import numpy as np
import pytest

from alphaquant.studies.pruning import LEAST_WINDOWS, is_hopeless


def windows(n: int, seed: int = 0) -> list[float]:
    return [float(v) for v in np.random.default_rng(seed).lognormal(-6, 0.3, n)]


def test_a_trial_that_is_worse_on_every_window_is_hopeless() -> None:
    rival = windows(16)
    assert is_hopeless([1.2 * v for v in rival[:8]], rival)


@pytest.mark.parametrize("factor", [0.5, 0.98])
def test_a_trial_that_is_better_is_not(factor: float) -> None:
    rival = windows(16)
    assert not is_hopeless([factor * v for v in rival[:8]], rival)


def test_a_trial_that_is_worse_on_half_of_the_windows_is_not() -> None:
    rival = windows(16)
    signs = [1.1 if i % 2 else 0.9 for i in range(16)]
    assert not is_hopeless([s * v for s, v in zip(signs, rival, strict=True)], rival)


def test_few_windows_decide_nothing() -> None:
    rival = windows(16)
    n = LEAST_WINDOWS - 1
    assert not is_hopeless([2.0 * v for v in rival[:n]], rival)


def test_trials_as_good_as_their_rival_are_rarely_called_hopeless() -> None:
    rng = np.random.default_rng(1)
    rival = windows(8, 1)
    called = sum(
        is_hopeless([v * float(rng.lognormal(0, 0.05)) for v in rival], rival) for _ in range(100)
    )
    assert called <= 8  # P_VALUE = 0.02 of 100, 99.9 % of binomial draws are at most 7
