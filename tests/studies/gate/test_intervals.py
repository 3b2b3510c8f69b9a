"""Paired differences and their bootstrap intervals, on cases that can be worked out by hand."""

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch

from alphaquant.studies.gate.intervals import bootstrap_interval, compare_kl, spearman_interval


def test_difference_is_above_zero_where_the_row_is_better() -> None:
    found = compare_kl(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), ["a", "a"])
    assert found.mean == 1.5
    assert found.stderr == pytest.approx(0.5)
    assert (found.low, found.high) == (1.0, 2.0)  # both windows the first, or the second: 1 in 4


def test_a_single_window_has_no_error_and_no_interval() -> None:
    found = compare_kl(torch.tensor([1.0]), torch.tensor([3.0]), ["a"])
    assert (found.mean, found.stderr, found.low, found.high) == (2.0, None, None, None)


def test_interval_of_three_windows_is_that_of_all_27_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0])
    means = sorted(sum(draw) / 3 for draw in product(values, repeat=3))
    # 1 in 27 is 3.7 %: the 2.5 % quantiles are the extremes themselves.
    assert bootstrap_interval(values, ["a"] * 3) == (means[0], means[-1])


def test_interval_of_many_windows_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values, ["a"] * 400)
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(400)
    # Quantiles of 10 000 resamples scatter by about 0.03 standard errors; 0.1 is three times that.
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_domains_keep_their_number_of_windows_in_every_resample() -> None:
    values = np.array([0.0, 0.0, 10.0, 10.0])
    assert bootstrap_interval(values, ["a", "a", "b", "b"]) == (5.0, 5.0)
    assert bootstrap_interval(values, ["a"] * 4) == (0.0, 10.0)


def test_domains_of_one_window_are_resampled_together() -> None:
    low, high = bootstrap_interval(np.array([0.0, 1.0]), ["a", "b"])
    assert (low, high) == (0.0, 1.0)


def test_the_same_windows_give_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=20)
    assert bootstrap_interval(values, ["a"] * 20) == bootstrap_interval(values, ["a"] * 20)


def test_worked_example_of_a_rank_correlation() -> None:
    found = spearman_interval(0.5, 28)
    assert found is not None and found == pytest.approx((0.133, 0.747), abs=5e-4)
    low, high = spearman_interval(1.0, 30) or (0.0, 0.0)
    assert 0.99 < low < high <= 1.0
    assert spearman_interval(0.5, 3) is None and spearman_interval(math.nan, 30) is None
