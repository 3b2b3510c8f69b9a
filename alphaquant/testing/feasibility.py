"""The definition of feasible, for tests of what proposes assignments."""

from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.profiles import is_loadable
from alphaquant.spaces.space import SearchSpace


def is_feasible(space: SearchSpace, assignment: Assignment) -> bool:
    """Whether an assignment is within a space's budget and can be loaded.

    The menu does not count, so that a baseline in another format can be compared.
    """
    for unit in space.units:
        names = {assignment.formats[matrix.name] for matrix in unit.matrices}
        if len(names) > 1:
            return False
        if not is_loadable(unit, assignment.format_of(unit.matrices[0].name), space.profile):
            return False
    return assignment.storage_bits(space.inventory) <= space.limit_bits
