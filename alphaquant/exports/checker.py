"""What an engine would refuse, or load wrong without a word, is refused here.

Some engines take the scheme of a layer's first expert for all its experts, or copy numbers of one
kind into memory of another without an error. So a plan is compared with the couplings of the
profile before weights are loaded, and each export compares its files once more.
"""

from alphaquant.errors import ConfigError
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import Profile, is_loadable, units_of
from alphaquant.spaces.units import Inventory, Unit


def check_plan(
    assignment: Assignment, inventory: Inventory, profile: Profile, export: str
) -> None:
    """Refuse a plan that breaks a profile's couplings or uses formats that it does not have.

    Args:
        assignment: format of every matrix.
        inventory: the model's matrices.
        profile: what the engine can load.
        export: name of the export, for the message.

    Raises:
        ConfigError: naming the unit, its formats, and the profile to search with.
    """
    for unit in units_of(inventory, profile):
        names = sorted({assignment.formats[matrix.name] for matrix in unit.matrices})
        if len(names) > 1:
            raise ConfigError(
                f"--export {export}: {unit.name} has {', '.join(names)}, and its "
                f"{len(unit.matrices)} matrices need one format there "
                f"({_example(unit, assignment)}); search with "
                f"--profile {profile.name}, or give them one format"
            )
        if not is_loadable(unit, parse_format(names[0]), profile):
            raise ConfigError(
                f"--export {export}: {unit.name} is {names[0]}, which cannot be loaded there; "
                f"{profile.text}; search with --profile {profile.name}"
            )


def _example(unit: Unit, assignment: Assignment) -> str:
    """Two matrices of a unit that differ."""
    first, *others = unit.matrices
    other = next(m for m in others if assignment.formats[m.name] != assignment.formats[first.name])
    return " and ".join(
        f"{assignment.formats[matrix.name]} for {matrix.name}" for matrix in (first, other)
    )
