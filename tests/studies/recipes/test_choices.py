"""What recipes choose: the search's own first, nothing that a model has no use for."""

from dataclasses import replace

import pytest

from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.recipes.choices import (
    Choice,
    Recipe,
    choices_of,
    planned_params,
    reached,
    recipe_of,
)

OWN = Recipe(QuantSettings(percdamp=0.02, route_exponent=1), "demo")
DENSE = Inventory("llama", (Matrix("a.down_proj", 8, 8, "mlp", 0),))
ROUTED = Inventory("olmoe", (Matrix("a.experts.0.down_proj", 8, 8, "expert", 0, expert=0),))


def test_the_first_option_is_the_searchs_own_also_where_nobody_lists_it() -> None:
    found = {choice.name: choice.options for choice in choices_of(OWN, ROUTED)}
    assert found["percdamp"] == (0.02, 0.003, 0.01, 0.03, 0.1)
    assert found["route_exponent"] == (1, 0, 2)
    assert found["calibration"] == ("demo", "demo=0.5,ebss=0.5", "ebss")
    assert found["rotate"] == (False, True)
    assert list(found)[:2] == ["sequential", "two_sided"], "what is worth most is tried first"


@pytest.mark.parametrize(
    ("own", "inventory", "lacking"),
    [
        (OWN, DENSE, {"route_exponent", "pooled_tokens", "calibration"}),
        (replace(OWN, calibration="demo=0.5,ebss=0.5"), ROUTED, {"calibration"}),
        (replace(OWN, rotate=3), ROUTED, {"rotate"}),
        (Recipe(QuantSettings(two_sided=True), "demo"), ROUTED, {"two_sided"}),
    ],
)
def test_what_makes_no_difference_or_was_chosen_is_no_choice(
    own: Recipe, inventory: Inventory, lacking: set[str]
) -> None:
    every = {choice.name for choice in choices_of(OWN, ROUTED)}
    assert {choice.name for choice in choices_of(own, inventory)} == every - lacking


def test_every_option_comes_alone_after_the_searchs_own() -> None:
    choices = [Choice("percdamp", (0.02, 0.1)), Choice("shrinkage", (True, False))]
    own, damped, plain = planned_params(choices)
    assert [len(reached(choices, n)) for n in (1, 2, 3)] == [0, 1, 2]
    both = [Choice("sequential", (False, True)), Choice("two_sided", (False, True)), *choices]
    planned = [(p["sequential"], p["two_sided"]) for p in planned_params(both)]
    assert planned == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
        *planned[:1] * 2,
    ]
    assert [len(reached(both, n)) for n in (1, 2, 3, 4, 5, 6)] == [0, 1, 2, 2, 3, 4]
    assert own == {"percdamp": 0.02, "shrinkage": True}
    assert damped == {**own, "percdamp": 0.1}
    assert plain == {**own, "shrinkage": False}
    assert recipe_of(OWN, own, 7) == OWN
    assert recipe_of(OWN, damped, 7).settings == replace(OWN.settings, percdamp=0.1)
    assert recipe_of(OWN, {"rotate": True, "calibration": "ebss"}, 7) == Recipe(
        OWN.settings, "ebss", 7
    )
