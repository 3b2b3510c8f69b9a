"""Rows over families of tiny models."""

import pytest

from alphaquant.testing.models import FAMILIES

TIED = ("llama", "olmoe", "listed_moe")
"""Dense, routed, and of a class that transformers lacks: the head is the same in all others."""

FAMILIES_AND_HEADS = [
    pytest.param(
        family,
        tied,
        id=f"{family}-{'tied' if tied else 'untied'}",
        marks=[pytest.mark.slow] if tied and family not in TIED else [],
    )
    for family in FAMILIES
    for tied in (False, True)
]
"""Every family with a head of its own; tied to the embedding where that is fast or asked for."""
