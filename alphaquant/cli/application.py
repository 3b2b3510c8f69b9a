"""A command line made from the typed fields of a specification, and how each command ends.

flag > file > default      `--spec FILE` reads options from a TOML file
--print-spec               writes such a file, with everything else that was given
exit 0 done, or SIGTERM where the same command goes on, 1 our error, 2 a wrong option, 130 Ctrl-C
"""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    Parameter,
    UnusedCliTokensError,
)
from cyclopts.config import Dict

from alphaquant.cli.console import INTERRUPTED, reported, set_up
from alphaquant.cli.screen import say
from alphaquant.specs.flat import flat, options_of, part_of, read_file

_COLUMNS = 97
"""Of a comment in a file, without its mark."""

_GENERAL = Group("General", sort_key=99)

Debug = Annotated[
    bool, Parameter(negative="", group=_GENERAL, help="Show tracebacks and debug logs.")
]
SpecFile = Annotated[
    Path | None,
    Parameter(
        group=_GENERAL, help="TOML file of options; what is given beside it wins; none by default."
    ),
]
PrintSpec = Annotated[
    bool,
    Parameter(
        negative="",
        group=_GENERAL,
        help="Print such a file with all options as they are now, and end.",
    ),
]
AsJson = Annotated[bool, Parameter(name="--json", negative="")]
Tokens = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


@dataclass(frozen=True)
class Command:
    """A program.

    Attributes:
        name: as people type it.
        run: what it does; its parameters are its options, its docstring is its help.
        interrupted: what to tell the user after Ctrl-C.
        resumes: whether the same command goes on where it stopped.
        stops_well: whether Ctrl-C is how it ends.
    """

    name: str
    run: Callable[..., None]
    interrupted: str = "stopped"
    resumes: bool = False
    stops_well: bool = False


def main_of(command: Command) -> Callable[[], None]:
    """The entry point of a program: runs it with the process's arguments, and exits."""

    def main() -> None:
        sys.exit(start(command, sys.argv[1:]))

    return main


def start(command: Command, arguments: list[str]) -> int:
    """Run a program.

    Args:
        command: the program.
        arguments: options as given on a command line.

    Returns:
        The exit code.
    """
    try:
        application(command).meta(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        say(f"error: {_usage_text(error)}; see {command.name} --help", sys.stderr)
        return 2
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
        return 0 if code == INTERRUPTED and command.stops_well else code
    return 0


def application(command: Command) -> App:
    """The parser of a program; its `meta` takes the options that all programs have."""
    app = App(
        name=command.name,
        help_flags=["--help"],
        version_flags=["--version"],
        version=version_text,
        group_commands=_GENERAL,
        default_parameter=Parameter(
            show_default=_default_text, show_choices=False, allow_repeating=True
        ),
        result_action="return_value",
    )
    app.default(command.run)
    app.meta.group_parameters = _GENERAL

    def run(tokens: tuple[str, ...], debug: bool, spec: Path | None, print_spec: bool) -> None:
        set_up(debug)
        with reported(debug, command.interrupted, command.resumes):
            if spec is not None:
                app.config = [Dict(read_file(spec), source=str(spec), use_commands_as_keys=False)]
            _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
            if print_spec:
                print(spec_text(bound.arguments["spec"]), end="")
            else:
                command.run(*bound.args, **bound.kwargs)

    def plain(*tokens: Tokens, debug: Debug = False) -> None:
        run(tokens, debug, None, False)

    def specified(
        *tokens: Tokens,
        spec: SpecFile = None,
        print_spec: PrintSpec = False,
        debug: Debug = False,
    ) -> None:
        run(tokens, debug, spec, print_spec)

    app.meta.default(specified if "spec" in signature(command.run).parameters else plain)
    return app


def version_text() -> str:
    """`aq-search 0.1.0 (torch 2.13.0, transformers 5.23.0)`, without loading any of them."""
    parts = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"aq-search {version('aq-search')} ({parts})"


def spec_text(spec: Any) -> str:
    """A TOML file of a specification: every option with its meaning, those left out commented.

    Args:
        spec: any dataclass of `alphaquant.specs`.
    """
    values, document, title = flat(spec), tomlkit.document(), ""
    for option in options_of(type(spec)):
        if option.subject != title:
            title = option.subject
            document.add(tomlkit.nl())
            document.add(tomlkit.comment(f"---- {title}"))
        value = values[option.name]
        for line in textwrap.wrap(option.text, _COLUMNS):
            document.add(tomlkit.comment(line))
        if value is None:
            document.add(tomlkit.comment(f"{option.name} ="))
        else:
            document.add(option.name, str(value) if isinstance(value, Path) else value)
    return tomlkit.dumps(document)


def _default_text(value: Any) -> str | None:
    """A default as `--help` shows it; that a flag is off, or a list empty, needs no words."""
    return None if value is None or value is False or value == "" else str(value)


def _usage_text(error: CycloptsError) -> str:
    """What is wrong with the options, in one line."""
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or [])} is no option"
    if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens:
        part = part_of(error.argument.hint)
        needed = [o.name for o in options_of(part) if o.default is MISSING] if part else []
        # A search needs a budget or a memory to fit, so neither is needed by itself.
        neither = "--budget" if error.argument.name == "*" else error.argument.name
        names = [f"--{name}" for name in needed] or [neither]
        if error.keyword is None:
            return _needed_text(names, error.unused_tokens or [])
    text = " ".join(str(error).split()).rstrip(".")
    return f"{text}{_source_text(error, text)}"


def _source_text(error: CycloptsError, text: str) -> str:
    """The file that a wrong value stands in, where the text does not name it."""
    tokens = [] if error.argument is None else error.argument.tokens
    files = [t.source for t in tokens if t.source and t.source != "cli" and t.source not in text]
    return f" in {files[0]}" if files else ""


def _needed_text(names: list[str], unused: list[str]) -> str:
    """Which option is missing, and which unknown one may stand for it."""
    near = [n for name in names for n in get_close_matches(name, unused, n=1)]
    slip = f" instead of {near[0]}" if near else ""
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} needed{slip}"
