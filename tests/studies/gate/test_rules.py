"""What is published is better beyond noise than uniform, and than every smaller row."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from alphaquant.evaluators.divergence import Divergence
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.gate.rules import Candidate, Rules, Verdicts
from alphaquant.studies.store.study import TrialRow

N = 32
NOISE = np.random.default_rng(3).normal(0, 1, (8, N))
NOISE -= NOISE.mean(axis=1, keepdims=True)  # so that means are the ones that a test asks for


def windows(kl: float, noise: float = 0.0, row: int = 0) -> np.ndarray:
    """KL per window with this mean, and noise of its own of so many times 1 % of it."""
    return kl * (1 + 0.01 * noise * NOISE[row])


def found(values: np.ndarray) -> Divergence:
    kl = torch.tensor(values)
    return Divergence(kl, torch.full((len(values),), 0.9), kl, 4, 0.0)


def point(
    number: int,
    n_bits: int,
    values: np.ndarray,
    seen: Sequence[float] = (0.1, 0.1),
    others: tuple[float, ...] | None = (),
) -> Candidate:
    row = TrialRow(
        *(number, "knobs", f"d{number}", n_bits / 1000, 1, float(np.mean(seen)), 0.0),
        *(tuple(seen), 0.9, 50.0, 0.0, None, 0.0),
    )
    return Candidate(Assignment({str(number): "x"}), row, None, n_bits, found(values), others)


def uniform(name: str, n_bits: int, values: np.ndarray) -> Candidate:
    return Candidate(Assignment({"all": name}), None, name, n_bits, found(values))


def decide(*candidates: Candidate, limit: int = 4250) -> Verdicts:
    menu = tuple(c.uniform for c in candidates if c.uniform)
    return Rules(candidates, menu, limit, ("books",) * N).verdicts()


INT4 = uniform("int4", 4250, windows(0.2))


def test_a_point_whose_interval_crosses_zero_is_withheld_though_its_mean_is_lower() -> None:
    unsure = point(1, 5000, windows(0.199, noise=5))
    assert unsure.kl < INT4.kl
    verdicts = decide(point(0, 4000, windows(0.1)), INT4, unsure)
    assert verdicts.reasons["trial-001"] == (
        "withheld: not better beyond noise than uniform int4, which is no larger"
    )
    assert verdicts.published == {"trial-000"}


def test_the_same_mean_with_an_interval_that_does_not_is_published() -> None:
    best = point(0, 4250, windows(0.199, noise=0.1))
    assert decide(best, INT4).published == {"trial-000"}
    unsure = decide(point(0, 4250, windows(0.199, noise=5)), INT4)
    assert unsure.winner is INT4
    assert unsure.published == {"int4"}
    assert unsure.takers == {"trial-000": INT4}


def test_the_interval_that_decides_is_the_one_that_the_report_shows() -> None:
    rules = Rules((INT4,), ("int4",), 4250, ("books",) * N)
    for noise in (0.5, 1.0, 1.4, 1.6, 2.0, 4.0):
        candidate = point(0, 4250, windows(0.199, noise=noise))
        gains = INT4.found.kl.numpy() - candidate.found.kl.numpy()
        draws = np.random.default_rng(0).integers(N, size=(10_000, N))
        low = np.quantile(gains[draws].sum(axis=1) / N, 0.025)
        assert rules.is_better(candidate, INT4) == (low > 0)


def test_more_bytes_must_buy_something_that_can_be_told_from_luck() -> None:
    verdicts = decide(
        point(0, 4250, windows(0.100)),
        point(1, 4600, windows(0.0995, noise=5, row=1)),  # within the noise of trial 0
        point(2, 5000, windows(0.050, noise=5, row=2)),
        INT4,
    )
    assert verdicts.published == {"trial-000", "trial-002"}
    assert verdicts.takers["trial-001"].name == "trial-000"
    assert verdicts.reasons["trial-001"] == (
        "withheld: not better beyond noise than trial-000, which is no larger"
    )


def test_rows_of_the_size_of_the_best_give_way_to_it_and_smaller_ones_do_not() -> None:
    verdicts = decide(
        point(12, 4250, windows(0.1000)),
        point(33, 4248, windows(0.1200)),  # by less than a thousandth smaller, and worse
        point(46, 4249, windows(0.0999, noise=5)),  # and as good
        point(25, 4200, windows(0.1010)),  # 1.2 % smaller: a choice of its own
        INT4,
    )
    assert verdicts.best.name == "trial-012"
    assert verdicts.published == {"trial-012", "trial-025"}
    assert verdicts.reasons["trial-046"] == (
        "withheld: not better beyond noise than trial-012, which is of the same size"
    )


def test_best_is_the_point_of_its_size_that_is_better_beyond_noise() -> None:
    verdicts = decide(
        point(12, 4250, windows(0.100), seen=(0.1, 0.1)),
        point(46, 4249, windows(0.080), seen=(0.11, 0.13)),
        point(47, 4251, windows(0.010), seen=(0.11, 0.13)),  # above the budget
        INT4,
    )
    assert (verdicts.first.name, verdicts.best.name) == ("trial-012", "trial-046")
    assert verdicts.published == {"trial-046", "trial-047"}
    assert verdicts.takers["trial-012"].name == "trial-046"


def test_a_point_that_beats_uniform_makes_up_for_a_best_that_does_not() -> None:
    verdicts = decide(
        point(0, 4250, windows(0.21), seen=(0.1, 0.1)),
        point(1, 4100, windows(0.15), seen=(0.2, 0.2)),
        INT4,
    )
    assert (verdicts.first.name, verdicts.best.name) == ("trial-000", "trial-001")
    assert verdicts.winner is None
    assert verdicts.published == {"trial-001"}


def test_where_nothing_passes_the_uniform_rows_stay() -> None:
    int3 = uniform("int3", 3250, windows(0.4))
    verdicts = decide(
        point(0, 3300, windows(0.5)), point(1, 4250, windows(0.3), seen=(0.0, 0.0)), int3, INT4
    )
    assert verdicts.winner is INT4
    assert verdicts.published == {"int3", "int4"}
    assert {name: c.name for name, c in verdicts.takers.items()} == {
        "trial-000": "int3",
        "trial-001": "int4",
    }


@pytest.mark.parametrize(
    ("others", "is_published"), [((1.0,), False), ((0.5,), True), (None, True)]
)
def test_a_row_that_is_ahead_in_a_further_objective_stays(
    others: tuple[float, ...] | None, is_published: bool
) -> None:
    best = point(0, 4250, windows(0.10), others=(1.0,))
    other = point(1, 4250, windows(0.11), seen=(0.2, 0.2), others=others)
    assert ("trial-001" in decide(best, other, INT4).published) == is_published


def test_a_single_window_tells_nothing() -> None:
    low, high = point(0, 4250, np.array([0.1])), uniform("int4", 4250, np.array([0.2]))
    assert not Rules((low, high), ("int4",), 4250, ("books",)).is_better(low, high)


@pytest.mark.parametrize("seed", range(10))
def test_no_published_row_is_dominated_beyond_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = [
        point(
            n,
            int(rng.integers(3000, 6000)),
            rng.lognormal(-2, 0.2, N) * rng.uniform(0.5, 2),
            seen=rng.uniform(0.1, 0.3, 4).tolist(),
        )
        for n in range(12)
    ]
    candidates += [
        uniform(f"u{i}", bits, rng.lognormal(-2, 0.2, N) * (6 - i))
        for i, bits in enumerate((2900, 3500, 4250, 5000))
    ]
    rules = Rules(candidates, ("u0", "u1", "u2", "u3"), 4250, ("books",) * N)
    verdicts = rules.verdicts()
    by_name = {c.name: c for c in candidates}
    rows = [by_name[name] for name in verdicts.published]
    assert (verdicts.winner or verdicts.best).name in verdicts.published
    for row in rows:
        for other in candidates:
            is_rival = other.n_bits <= row.n_bits and other is not row
            if is_rival and other.uniform and not row.uniform:
                assert rules.is_better(row, other)
            if is_rival and other in rows:
                assert not rules.is_better(other, row)
    withheld = {c.name for c in candidates if c.point} - verdicts.published
    assert verdicts.takers.keys() == withheld
    assert {c.name for c in verdicts.takers.values()} <= verdicts.published
