"""What a recipe may choose: settings of the quantizer, the calibration text, a rotation.

Costs are measured with one recipe and say nothing of others, so these choices are outside of what
an allocator can weigh. The first option of every choice is what the search itself used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from alphaquant.spaces.units import Inventory
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.texts.windows import EBSS, mixed, shares_of

Option = bool | int | float | str
"""What Optuna keeps of a choice."""

CALIBRATION, ROTATE = "calibration", "rotate"

_SETTINGS: Mapping[str, tuple[Option, ...]] = MappingProxyType(
    {
        "sequential": (True,),
        "two_sided": (True,),
        "percdamp": (0.003, 0.01, 0.03, 0.1),
        "shrinkage": (True, False),
        "route_exponent": (0, 1, 2),
        "pooled_tokens": (0, 512, 2048),
    }
)
"""Values that are tried of settings, beside the search's own."""

_OF_EXPERTS = ("route_exponent", "pooled_tokens")
"""Settings that change nothing in a model without routed experts."""
_FIRST = ("sequential", "two_sided")
"""Settings that are worth most, so they are tried first, and then both together."""


@dataclass(frozen=True)
class Choice:
    """Something that a recipe chooses.

    Attributes:
        name: of the parameter in the study.
        options: different ones; the first is the search's own.
    """

    name: str
    options: tuple[Option, ...]

    @property
    def default(self) -> Option:
        """The search's own."""
        return self.options[0]


@dataclass(frozen=True)
class Recipe:
    """How an assignment is quantized.

    Attributes:
        settings: of the quantizer.
        calibration: name of the calibration text.
        rotate: seed of a rotation of the residual stream; None for none.
    """

    settings: QuantSettings
    calibration: str
    rotate: int | None = None


def choices_of(own: Recipe, inventory: Inventory) -> tuple[Choice, ...]:
    """The choices that a model leaves.

    Args:
        own: the recipe of the search.
        inventory: the model's matrices.
    """
    has_experts = any(matrix.expert is not None for matrix in inventory.matrices)
    names = [name for name in _SETTINGS if has_experts or name not in _OF_EXPERTS]
    every = [_with_own(name, getattr(own.settings, name), _SETTINGS[name]) for name in names]
    found = [choice for choice in every if len(choice.options) > 1]
    if has_experts and EBSS not in shares_of(own.calibration):
        found.append(_with_own(CALIBRATION, own.calibration, (mixed(own.calibration, EBSS), EBSS)))
    if own.rotate is None:
        found.append(Choice(ROTATE, (False, True)))
    return tuple(found)


def planned_params(choices: Sequence[Choice]) -> list[dict[str, Option]]:
    """The search's own recipe, then every other option alone: what each choice does by itself.

    Layer after layer and two-sided, which are worth most, come first and then both together.
    """
    own = {choice.name: choice.default for choice in choices}
    planned = [own, *({**own, c.name: option} for c in choices for option in c.options[1:])]
    if _has_both(choices):
        planned.insert(1 + len(_FIRST), {**own, **dict.fromkeys(_FIRST, True)})
    return planned


def reached(choices: Sequence[Choice], n_trials: int) -> list[Choice]:
    """The first choices, those of which so many trials try an option alone."""
    found, n_before = list[Choice](), 1
    for choice in choices:
        if n_before < n_trials:
            found.append(choice)
        n_before += len(choice.options) - 1
        if choice.name == _FIRST[-1] and _has_both(choices):
            n_before += 1
    return found


def _has_both(choices: Sequence[Choice]) -> bool:
    """Whether the choices begin with layer after layer and two-sided."""
    return tuple(choice.name for choice in choices[: len(_FIRST)]) == _FIRST


def recipe_of(own: Recipe, params: Mapping[str, Option], seed: int) -> Recipe:
    """The recipe of a trial's parameters; what they leave out is the search's own.

    Args:
        own: the recipe of the search.
        params: by the names of choices.
        seed: of a rotation.
    """
    settings: dict[str, Any] = {name: value for name, value in params.items() if name in _SETTINGS}
    return Recipe(
        replace(own.settings, **settings),
        str(params.get(CALIBRATION, own.calibration)),
        seed if params.get(ROTATE) else own.rotate,
    )


def _with_own(name: str, own: Option, others: Sequence[Option]) -> Choice:
    """The search's own option first, then the others."""
    return Choice(name, (own, *(option for option in others if option != own)))
