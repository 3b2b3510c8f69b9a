"""`aq-sensitivity`: what quantizing each routed expert of a model costs, per saved bit and use."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from alphaquant.cli.application import Command, main_of
from alphaquant.cli.console import Bars, quiet_libraries
from alphaquant.cli.screen import say, screen_width
from alphaquant.specs.sensitivity import SensitivitySpec


def command(*, spec: Annotated[SensitivitySpec, Parameter(name="*")], out: Path) -> None:
    """Rank the routed experts of a model by what quantizing them costs.

    Prints the five most and five least sensitive and writes all of them to --out. The bank and the
    costs stay in --cache, where aq-search finds them.

    Args:
        spec: What to measure.
        out: JSON file with all experts; written anew.
    """
    from alphaquant.commands import sensitivity as commands

    quiet_libraries()
    commands.check_target(out)
    with Bars() as bars:
        found = commands.measure_expert_sensitivity(spec, progress=bars)
    commands.write_sensitivity(found, out)
    say(commands.sensitivity_text(found, screen_width()))


SENSITIVITY = Command(
    "aq-sensitivity", command, "stopped; run the same command again to resume", resumes=True
)
main = main_of(SENSITIVITY)
