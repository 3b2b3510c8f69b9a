"""The directory of a search's results: whose it is, and writing into it so that nothing is half-written."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaquant.errors import StoreError
from alphaquant.spaces.assignment import Assignment

RUN_FILE = "run.json"
RUN_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """An output directory that belongs to one search."""

    path: Path

    def write_text(self, name: str, text: str) -> Path:
        """Write a file under another name, then rename it."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write JSON, indented."""
        return self.write_text(name, json.dumps(content, indent=1) + "\n")

    def save_assignment(self, assignment: Assignment) -> None:
        """Keep an evaluated assignment, named by its digest."""
        name = f"assignments/{assignment.digest}.json"
        if not (self.path / name).exists():
            self.write_text(name, json.dumps(dict(assignment.formats)))

    def load_assignment(self, digest: str) -> Assignment:
        """Read one back.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.path / "assignments" / f"{digest}.json"
        try:
            assignment = Assignment(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); start again with --overwrite") from error
        if assignment.digest != digest:
            raise StoreError(f"{path} is damaged: its digest differs from its name; start again with --overwrite")
        return assignment


def open_folder(path: Path, digest: str, facts: Mapping[str, Any], *, overwrite: bool) -> RunFolder:
    """Create the directory of a search, or take it up again.

    Args:
        path: the directory.
        digest: of the search's specification.
        facts: the specification, kept in `run.json`.
        overwrite: replace the directory if it belongs to another search.

    Raises:
        StoreError: it belongs to another search, or is none of ours.
    """
    folder = RunFolder(path)
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        found = _read_run(path)
        if found is not None and found.get("digest") == digest:
            return folder
        if found is None:
            raise StoreError(f"{path} exists and holds no search of ours; give another --out (it is never deleted)")
        if not overwrite:
            changed = sorted(k for k in facts if found.get("spec", {}).get(k) != json.loads(json.dumps(facts[k])))
            raise StoreError(
                f"{path} holds a search with other settings ({', '.join(changed) or 'another version'}); give another --out, "
                "repeat the first command to resume it, or --overwrite to replace it"
            )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    folder.write_json(RUN_FILE, {"version": RUN_VERSION, "digest": digest, "spec": dict(facts)})
    return folder


def _read_run(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
