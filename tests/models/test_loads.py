"""Expert load as reports state it."""

import pytest

from alphaquant.models.loads import Utilization, utilization_facts


def test_fractions_and_ratios_of_a_worked_example() -> None:
    # 80 routed tokens on 4 experts: uniform is 20
    load = Utilization((40, 30, 6, 4), in_features=5)
    assert load.fraction == (0.5, 0.375, 0.075, 0.05)
    assert load.ratio_to_uniform == pytest.approx((2.0, 1.5, 0.3, 0.2))
    assert load.under_utilized == (3,)  # 0.2 < 0.25, and 4 tokens for 5 inputs


def test_an_expert_with_fewer_tokens_than_inputs_is_under_utilized() -> None:
    assert Utilization((40, 30, 6, 4), in_features=7).under_utilized == (2, 3)


def test_the_threshold_is_a_parameter() -> None:
    assert Utilization((40, 30, 6, 4), in_features=1, ratio=0.5).under_utilized == (2, 3)


def test_no_tokens_at_all_are_zero_shares_and_no_error() -> None:
    load = Utilization((0, 0), in_features=8)
    assert load.fraction == (0.0, 0.0)
    assert load.under_utilized == (0, 1)


def test_facts_name_counts_as_users_know_them() -> None:
    facts = utilization_facts({"a.experts": [3, 1]}, {"a.experts": 2})
    assert facts["a.experts"]["utilization_count"] == [3, 1]
    assert facts["a.experts"]["under_utilized"] == [1]
