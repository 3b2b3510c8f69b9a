"""Means over windows with their standard errors, and paired differences."""

import math

import pytest
import torch

from alphaquant.evaluators.base import mean_and_stderr, paired_difference


def test_mean_and_error_of_four_windows_by_hand() -> None:
    mean, stderr = mean_and_stderr(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt(14 / 3 / 4), rel=1e-12)


def test_the_error_of_one_window_is_nan() -> None:
    mean, stderr = mean_and_stderr(torch.tensor([2.5]))
    assert mean == 2.5
    assert math.isnan(stderr)


def test_the_error_covers_the_true_mean_about_as_often_as_it_says() -> None:
    values = torch.randn(2_000, 50, generator=torch.Generator().manual_seed(0))
    found = [mean_and_stderr(row) for row in values]
    n_covered = sum(abs(mean) <= 2 * stderr for mean, stderr in found)
    # Student t with 49 degrees of freedom: P(|t| <= 2) = 0.949; five binomial sigmas of 2000
    # trials are 0.025.
    assert n_covered / 2_000 == pytest.approx(0.949, abs=0.025)


def test_sums_are_in_float64() -> None:
    # In float32, 2**24 + 1 is 2**24.
    mean, _ = mean_and_stderr(torch.tensor([2.0**24, 1.0], dtype=torch.float32))
    assert mean == (2**24 + 1) / 2


def test_what_both_share_cancels_in_a_paired_difference() -> None:
    common = 100 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    a, b = common + torch.tensor([0.5, 1.5]).repeat(32), common
    mean, stderr = paired_difference(a.double(), b.double())
    # float32 sums of numbers up to 256 are rounded to 2**-16 at worst.
    assert mean == pytest.approx(1.0, abs=2**-16)
    assert stderr == pytest.approx(0.5 * math.sqrt(64 / 63) / 8, rel=1e-3)
    assert stderr < mean_and_stderr(a)[1] / 50


def test_a_paired_difference_has_a_sign() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 4.0])
    assert paired_difference(a, b) == (-2.5, 0.5)
    assert paired_difference(b, a) == (2.5, 0.5)
