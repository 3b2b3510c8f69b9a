"""The search space: units, candidate formats and a budget, checked to be reachable.

It holds what a search may choose from and nothing of how it chooses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from alphaquant.errors import FormatError
from alphaquant.spaces.budget import Budget, achievable_range, check_reachable, idle_text
from alphaquant.spaces.profiles import (
    Profile,
    allowed_formats,
    narrow_menu,
    units_of,
)
from alphaquant.spaces.units import Inventory, Matrix, Unit


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose from; build it with `make_space`.

    Attributes:
        inventory: the model's matrices and kept tensors.
        profile: what the serving engine can load.
        units: what gets one format each, in model order.
        menu: names of the candidate formats that the profile loads.
        budget: how large the result may be.
        held: where matrices are in the formats in which they exist already, by matrix and format;
            None where every one can be made.
    """

    inventory: Inventory
    profile: Profile
    units: tuple[Unit, ...]
    menu: tuple[str, ...]
    budget: Budget
    held: Mapping[str, Mapping[str, str]] | None = None

    @property
    def profile_name(self) -> str:
        """Name of the profile, as `--profile` takes it."""
        return self.profile.name

    @cached_property
    def reach_bits(self) -> tuple[int, int]:
        """Fewest and most bits that the quantizable matrices can take in the menu's formats."""
        ranges = [achievable_range((unit,), self.allowed(unit)) for unit in self.units]
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)

    @property
    def idle_budget(self) -> str | None:
        """The sentence for a budget that binds nothing; None for one that does."""
        return idle_text(self.budget, self.inventory, self.reach_bits[1])

    @cached_property
    def limit_bits(self) -> int:
        """Bits that all quantizable matrices together may take."""
        return self.budget.limit_bits(self.inventory)

    def allowed(self, unit: Unit) -> tuple[str, ...]:
        """Names of the menu's formats that the profile loads for a unit; never empty."""
        shape = (unit.kind, tuple(_facts(m) for m in unit.matrices))
        if shape not in self._allowed:
            self._allowed[shape] = allowed_formats(unit, self.menu, self.profile)
        return self._held_of(unit, self._allowed[shape])

    def _held_of(self, unit: Unit, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some formats in which all matrices of a unit exist.

        Raises:
            FormatError: there is none.
        """
        held = self.held
        if held is None:
            return names
        found = tuple(n for n in names if all(n in held[m.name] for m in unit.matrices))
        if not found:
            raise FormatError(
                f"the candidates have {unit.name} in no format that profile {self.profile.name} "
                f"loads ({', '.join(names)}); use --profile any, or give other candidates"
            )
        return found

    @cached_property
    def _allowed(self) -> dict[tuple[object, ...], tuple[str, ...]]:
        """What was found by what an engine looks at of a unit and its matrices."""
        return {}


def _facts(matrix: Matrix) -> tuple[object, ...]:
    return matrix.kind, matrix.projection, matrix.rows, matrix.cols


def make_space(
    inventory: Inventory,
    profile: Profile,
    menu: Sequence[str],
    budget: Budget,
    held: Mapping[str, Mapping[str, str]] | None = None,
) -> SearchSpace:
    """Build a space in which every unit has a format and the budget can be reached.

    Args:
        inventory: the model's matrices and kept tensors.
        profile: what the serving engine can load.
        menu: names of the candidate formats.
        budget: how large the result may be.
        held: where matrices are that exist already; None where every format can be made.

    Raises:
        FormatError: the profile loads no format of the menu, or none for some unit.
        BudgetError: the smallest formats take more than the budget.
    """
    space = SearchSpace(
        inventory, profile, units_of(inventory, profile), narrow_menu(menu, profile), budget, held
    )
    check_reachable(budget, inventory, *space.reach_bits)
    return space
