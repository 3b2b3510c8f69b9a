"""`aq-cache`: what the cache holds, whether it is whole, and removing what is not used."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from alphaquant.cli.application import AsJson, Command, main_of
from alphaquant.cli.console import quiet_libraries
from alphaquant.cli.screen import say
from alphaquant.errors import ConfigError, StoreError

Kind = Literal[
    "weights", "teachers", "banks", "costs", "spectra", "outputs", "states", "recipes", "rotated",
    "written", "gguf",
]  # fmt: skip


def command(
    action: Literal["list", "verify", "prune"] = "list",
    /,
    *,
    cache: Path | None = None,
    kind: Kind | None = None,
    older_than: str | None = None,
    keep: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: AsJson = False,
) -> None:
    """List, verify or prune the cache of weights, predictions, banks and costs.

    Whatever is removed is made anew by the next command that needs it. What a process that runs
    may use is never removed. The exit code of verify is 1 where a file is damaged.

    Args:
        action: What to do: list shows sizes, verify compares files with their checksums, prune
            removes.
        cache: Directory of the cache; default $ALPHAQUANT_CACHE or ~/.cache/alphaquant.
        kind: Only these: weights, teachers, banks, costs, spectra, outputs, states, recipes,
            rotated, written or gguf; default all.
        older_than: Prune what was not used for so long: 12h, 30d, 4w; none by default.
        keep: Prune what was not used for longest, until the rest takes no more than this:
            50GiB; none by default.
        dry_run: Say what prune would remove, and remove nothing.
        as_json: Print JSON instead of tables.
    """
    from alphaquant.commands.cache import cache_json, cache_text, list_cache
    from alphaquant.studies.inputs import cache_dir

    quiet_libraries()
    root = cache_dir(cache)
    entries = [entry for entry in list_cache(root) if kind in (None, entry.kind)]
    if action == "verify":
        _verify(entries)
    elif action == "prune":
        if older_than is None and keep is None and kind is None:
            raise ConfigError(
                "prune would remove all of the cache; say what may go with --older-than 30d, "
                "--keep 50GiB or --kind costs"
            )
        _prune(root, entries, Limits(older_than, keep), dry_run, as_json)
    elif as_json:
        print(json.dumps(cache_json(entries), indent=1))
    else:
        say(cache_text(entries))


@dataclass(frozen=True)
class Limits:
    """What may go: of an age, and until the rest takes no more than a size; None for any."""

    older_than: str | None
    keep: str | None


def _verify(entries: Sequence[Any]) -> None:
    """One line for each entry, and for each file that is damaged.

    Raises:
        StoreError: there are damaged files.
    """
    from alphaquant.commands.cache import verify_cache

    damaged: list[str] = []
    for checked in verify_cache(entries):
        damaged += checked.damaged
        what = f"{checked.n_files} files are whole, {len(checked.damaged)} damaged"
        say("\n  ".join([f"{checked.entry.kind} {checked.entry.path}: {what}", *checked.damaged]))
    if damaged:
        raise StoreError(
            f"{len(damaged)} files of the cache are damaged, the first is {damaged[0]}; delete "
            "what is named above and run the same search again: it is made anew"
        )


def _prune(
    root: Path, entries: Sequence[Any], limits: Limits, dry_run: bool, as_json: bool
) -> None:
    """Remove, and say what went and what stays."""
    from alphaquant.commands.cache import cache_json, cache_text, prune_cache, size_text

    found = prune_cache(
        root, entries, older_than=limits.older_than, keep=limits.keep, dry_run=dry_run
    )
    if as_json:
        print(json.dumps(cache_json(found.removed), indent=1))
        return
    for entry in found.in_use:
        say(f"stays, because it is in use: {entry.kind} {entry.path}")
    if found.removed:
        say(cache_text(found.removed))
    freed = size_text(sum(entry.n_bytes for entry in found.removed))
    say(f"{'would free' if dry_run else 'freed'} {freed} of {root}")


CACHE = Command("aq-cache", command)
main = main_of(CACHE)
