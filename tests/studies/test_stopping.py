"""When sampling ends: the gain still to be expected against the noise of the text."""

import numpy as np
import pytest

from alphaquant.search.arrays import FloatArray
from alphaquant.studies.stopping import (
    LEAST_GAIN,
    N_STAGNANT,
    ROUND,
    Outlook,
    outlook,
    stagnation,
)
from alphaquant.studies.store.study import TrialRow

LOWEST = np.linspace(0.5, 1.5, 16)


def row(number: int, kl: FloatArray, pruned: bool = False) -> TrialRow:
    return TrialRow(
        number=number,
        origin="knobs",
        digest=f"digest-{number}",
        bits_per_weight=4.0,
        checkpoint_bytes=1,
        kl=float(kl.mean()),
        kl_stderr=0.0,
        same_top=1.0,
        perplexity=1.0,
        predicted_kl=1.0,
        gap=None,
        seconds=0.0,
        kl_per_window=tuple(kl.tolist()),
        is_pruned=pruned,
    )


def trial(number: int, share: float, noise: float = 0.0, pruned: bool = False) -> TrialRow:
    """A trial above the lowest by a share of its mean, more or less by window."""
    return row(number, LOWEST + share + noise * np.tile([1.0, -1.0], 8), pruned)


@pytest.mark.parametrize(
    ("noise", "is_over"),
    [
        (0.20, True),  # 8 % to gain, 2 standard errors are 10 %
        (0.04, False),  # 2 standard errors are 2 %
    ],
)
def test_sampling_ends_where_the_gain_is_below_the_noise(noise: float, is_over: bool) -> None:
    planned = trial(0, 0.1, noise)
    sampled = [trial(n + 1, share) for n, share in enumerate([0.0, 0.2, 0.3, 0.2, 0.4])]
    found = outlook(sampled, [planned, *sampled])
    assert found is not None
    assert found.room == pytest.approx(0.1 * 4 / 5)
    assert found.error == pytest.approx(2 * noise * np.sqrt(16 / 15) / 4, rel=1e-5)
    assert found.is_over is is_over


@pytest.mark.parametrize(
    ("shares", "room"),
    [
        ([0.3, 0.1, 0.2, 0.2], 0.0),  # the planned one is the lowest
        ([-0.1, 0.2, 0.2, 0.2], 0.1 / 0.9),  # one of four has all of the lead
        ([-0.1, -0.1, 0.2, 0.2], 0.0),  # found twice
        ([-0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], 0.1 / 0.9 / 2),
    ],
)
def test_room_is_the_lead_of_a_sampled_trial_shared_by_all_of_them(
    shares: list[float], room: float
) -> None:
    sampled = [trial(n + 1, share) for n, share in enumerate(shares)]
    found = outlook(sampled, [trial(0, 0.0), *sampled])
    assert found is not None
    assert found.room == pytest.approx(room, abs=1e-6)
    assert found.error == LEAST_GAIN
    assert found.is_over is (room == 0.0)


def test_nothing_is_said_before_a_round_of_sampled_trials() -> None:
    assert outlook([trial(1, 0.1)] * (ROUND - 1), [trial(0, 0.0)]) is None


def test_trial_that_ended_early_is_one_of_the_sampled_and_no_rival() -> None:
    sampled = [trial(1, -0.1), trial(2, 0.2), trial(3, -0.4, pruned=True), trial(4, 0.2)]
    found = outlook(sampled, [trial(0, 0.0), *sampled])
    assert found is not None
    assert found.room == pytest.approx(0.1 / 0.9, abs=1e-6)


def test_reason_names_both_sides() -> None:
    assert Outlook(5, 0.008, 0.02).text == (
        "after 5 sampled trials at the budget, 4 more are expected to lower the KL by 0.8 %, and "
        "less than 2 % is noise or not worth them"
    )


def test_further_objectives_end_when_nothing_new_is_on_the_front() -> None:
    assert stagnation([False] * (N_STAGNANT - 1)) is None
    assert stagnation([True, *[False] * (N_STAGNANT - 1)]) is None
    said = stagnation([True, *[False] * N_STAGNANT])
    assert said == "none of the last 8 sampled trials is on the front of all objectives"
