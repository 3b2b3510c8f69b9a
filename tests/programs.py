"""The programs of the package, by name, and their command lines without running them."""

import shlex
import tomllib
from importlib import import_module
from inspect import BoundArguments
from pathlib import Path

from alphaquant.cli.application import Command, application

ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {name: target.partition(":")[0] for name, target in _PROJECT["scripts"].items()}


def program(name: str) -> Command:
    """The command of a program: `program("aq-search")`."""
    module = import_module(MODULES[name])
    (found,) = (value for value in vars(module).values() if isinstance(value, Command))
    return found


def parse(command: str) -> BoundArguments:
    """The arguments that a program gets from a command as typed.

    Raises:
        CycloptsError: what it does not take.
    """
    name, *words = shlex.split(command)
    app = application(program(name))
    _, general, _ = app.meta.parse_args(words, exit_on_error=False, print_error=False)
    _, bound, _ = app.parse_args(general.args, exit_on_error=False, print_error=False)
    return bound
