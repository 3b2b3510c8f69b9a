"""What an engine would refuse, or load wrong without a word, is refused here.

Some engines take the scheme of a layer's first expert for all its experts, or copy numbers of one
kind into memory of another without an error. So a plan is compared with the couplings of the
profile before weights are loaded, and each export compares its files once more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import Profile, is_loadable, units_of
from alphaquant.spaces.units import ENDS, Inventory, Unit

_SERVERS: Mapping[str, str] = MappingProxyType(
    {
        "vllm": "vllm serve {directory}",
        "sglang": "python -m sglang.launch_server --model-path {directory}",
    }
)
"""Profile -> the command that serves files; transformers has none for these."""


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
    problem = plan_problem(assignment, inventory, profile)
    if problem is not None:
        raise ConfigError(f"--export {export}: {problem}; search with {profile.option}")


def check_quantized(assignment: Assignment, export: str) -> None:
    """Refuse a plan without a quantized matrix.

    Raises:
        ConfigError: there is none.
    """
    if not any(parse_format(name).is_quantized for name in assignment.formats.values()):
        raise ConfigError(
            f"--export {export}: every matrix is bf16, so there is nothing to quantize; serve the "
            "original checkpoint, or use another configuration"
        )


def plan_problem(assignment: Assignment, inventory: Inventory, profile: Profile) -> str | None:
    """Why an engine would not load a plan, naming a unit; None where it would.

    Args:
        assignment: format of every matrix.
        inventory: the model's matrices.
        profile: what the engine can load.
    """
    for unit in units_of(inventory, profile):
        names = sorted({assignment.formats[matrix.name] for matrix in unit.matrices})
        if len(names) > 1:
            return (
                f"{unit.name} has {', '.join(names)}, and its {len(unit.matrices)} matrices need "
                f"one format there ({_example(unit, assignment)})"
            )
        if not is_loadable(unit, parse_format(names[0]), profile):
            first = unit.matrices[0]
            if unit.kind in ENDS.values() and not profile.includes:
                return (
                    f"{unit.name} is {names[0]}, and lm_head and embeddings stay bf16 there: give "
                    'a configuration without "include"'
                )
            return (
                f"{unit.name} is {names[0]}, {first.rows} x {first.cols}, which cannot be loaded "
                f"there; {profile.text}, in shapes that its groups and kernels divide"
            )
    return None


@dataclass(frozen=True)
class Served:
    """Whether an engine loads a plan.

    Attributes:
        engine: its name and version.
        loads: whether it does.
        reason: what was run there and what was only read, or why it does not.
    """

    engine: str
    loads: bool
    reason: str


def served_by(
    assignment: Assignment, inventory: Inventory, profiles: Iterable[Profile], export: str
) -> dict[str, Served]:
    """Which engines load a plan, by profile.

    Args:
        assignment: format of every matrix.
        inventory: the model's matrices.
        profiles: of the engines that read the files of the export, the first is named first.
        export: name of the export, for the message.

    Raises:
        ConfigError: none does; the message has the reason of the first.
    """
    problems = {p: plan_problem(assignment, inventory, p) for p in profiles}
    options = " or ".join(profile.option for profile in problems)
    found = {
        profile.name: Served(profile.engine, problem is None, problem or profile.checked)
        for profile, problem in problems.items()
    }
    if not any(served.loads for served in found.values()):
        name, first = next(iter(found.items()))
        raise ConfigError(
            f"--export {export}: none of {', '.join(found)} loads this. For {name}, "
            f"{first.reason}; search with {options}, or use --export alphaquant, which holds "
            "every mix"
        )
    return found


def served_facts(served: Mapping[str, Served]) -> dict[str, Any]:
    """What the report says of engines.

    Args:
        served: by profile.

    Returns:
        As `loads_in` whether each loads the files, and as `run` the command of the first server
        that does, with `{directory}` where they are; without it where none serves them.
    """
    facts: dict[str, Any] = {"loads_in": {name: asdict(found) for name, found in served.items()}}
    run = next((_SERVERS[n] for n, s in served.items() if s.loads and n in _SERVERS), None)
    return facts if run is None else {**facts, "run": run}


def _example(unit: Unit, assignment: Assignment) -> str:
    """Two matrices of a unit that differ."""
    first, *others = unit.matrices
    other = next(m for m in others if assignment.formats[m.name] != assignment.formats[first.name])
    return " and ".join(
        f"{assignment.formats[matrix.name]} for {matrix.name}" for matrix in (first, other)
    )
