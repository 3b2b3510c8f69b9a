"""Drawn tokens: the worked example, sums that are exact, means, and sizes that are zero."""

import pytest
import torch

from alphaquant.costs.sampling import draw_tokens, shift_of, squared_norms


def test_the_worked_example() -> None:
    drawn = draw_tokens(torch.tensor([1.0, 3.0, 4.0]), 2)
    assert drawn.rows.tolist() == [1, 2]
    assert drawn.counts.tolist() == pytest.approx([4 / 3, 1], rel=1e-5)


@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_all_tokens_are_taken_once_where_they_are_few(n_tokens: int) -> None:
    drawn = draw_tokens(torch.rand(n_tokens), 7, 0.3)
    assert drawn.rows.tolist() == list(range(n_tokens))
    assert drawn.counts.tolist() == [1.0] * n_tokens


@pytest.mark.parametrize("shift", [0.0, 0.5, 1 - 2**-48])
def test_the_sum_of_the_sizes_is_exact(shift: float) -> None:
    sizes = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4
    drawn = draw_tokens(sizes, 50, shift)
    assert float(drawn.counts @ sizes[drawn.rows].double()) == pytest.approx(
        float(sizes.sum()), rel=1e-3
    )


def test_equal_sizes_give_evenly_spaced_tokens() -> None:
    drawn = draw_tokens(torch.ones(400), 100, 0.4)
    assert drawn.rows.tolist() == list(range(1, 400, 4))
    assert drawn.counts.tolist() == pytest.approx([4.0] * 100)


def test_a_large_token_is_drawn_again_and_again() -> None:
    sizes = torch.ones(100)
    sizes[30] = 1e6
    drawn = draw_tokens(sizes, 10)
    assert 30 in drawn.rows.tolist()
    assert float(drawn.counts[drawn.rows == 30]) == pytest.approx(1, rel=1e-3)


def test_any_sum_is_right_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, values = (torch.rand(200, generator=generator) for _ in range(2))
    found = []
    for i in range(2000):
        drawn = draw_tokens(sizes, 10, i / 2000)
        found.append(float(drawn.counts @ values[drawn.rows].double()))
    # The mean over evenly spaced shifts is the integral over shifts, up to steps of 1 / 2000.
    assert sum(found) / len(found) == pytest.approx(float(values.sum()), rel=0.02)


def test_sizes_of_zero_are_drawn_evenly() -> None:
    assert draw_tokens(torch.zeros(40), 10, 0.4).rows.tolist() == list(range(1, 40, 4))


def test_a_shift_is_of_the_seed_and_the_name() -> None:
    shifts = [shift_of(seed, name) for seed in range(20) for name in "ab"]
    assert len(set(shifts)) == 40
    assert min(shifts) < 0.2 and max(shifts) > 0.8
    assert shift_of(3, "a") == shift_of(3, "a")


def test_squared_norms_of_half_precision_are_float32_sums() -> None:
    x = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert squared_norms(x).tolist() == [pytest.approx(4096.0)]
