"""The directory of a search's results: whose it is, and writing so that nothing is half-written.

Layout::

    .lock/                       while a search works here, see `locked_folder`
    run.json                     what was asked, of which model and texts; marks it as ours
    study.db                     Optuna's storage, see `alphaquant.studies.store.study`
    assignments/<digest>.json    every evaluated assignment
    artifacts/                   configurations of trials, as Optuna's artifacts; needed to see
                                 them in the dashboard
    front.json best.json recipe.json configs/ trials.csv report.md report.html
                                 see `alphaquant.reports.report`
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import optuna
from optuna.artifacts import upload_artifact

from alphaquant.errors import StoreError
from alphaquant.files import locked, whole_file
from alphaquant.lease import Lease
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.json_files import JsonError, read_object
from alphaquant.specs.run import EffortName
from alphaquant.studies.store.artifacts import artifact_store
from alphaquant.studies.store.urls import kept_url, sqlite_url

LOCK_FILE = ".lock"
RUN_FILE = "run.json"
CONFIG_FILE = "config.json"
"""Name of a trial's artifact."""
RUN_VERSION = 2
_TOOL = "aq-search"

# All that a search writes. `--overwrite` removes these and leaves anything else alone.
_REPORTS = ("report.md", "report.html")
_OWN_FILES = (
    "study.db",
    "best.json",
    "recipe.json",
    "front.json",
    "trials.csv",
    *_REPORTS,
    RUN_FILE,
)
_ARTIFACTS = "artifacts"
_OWN_FOLDERS = ("assignments", "configs", _ARTIFACTS)
_LEFT = re.compile(r"run\.[0-9a-f]{32}\.part")


@dataclass(frozen=True)
class RunFolder:
    """An output directory that belongs to one search.

    Attributes:
        path: the directory.
        bucket: `s3://BUCKET/PREFIX` where trials' configurations go there; None for a directory.
    """

    path: Path
    bucket: str | None = None

    def write_text(self, name: str, text: str) -> Path:
        """Write a file under another name, then rename it.

        Raises:
            StoreError: the disk is full.
        """
        target, content = self.path / name, text.encode()
        with whole_file(target, len(content)) as part:
            part.write_bytes(content)
        return target

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write JSON, indented."""
        return self.write_text(name, json.dumps(content, indent=1) + "\n")

    def save_assignment(self, assignment: Assignment) -> None:
        """Keep an evaluated assignment, named by its digest."""
        if not self.has_assignment(assignment.digest):
            self.write_text(
                _assignment_file(assignment.digest), json.dumps(dict(assignment.formats))
            )

    def attach(self, trial: optuna.Trial, config_text: str) -> None:
        """Keep a trial's configuration as its Optuna artifact, for the dashboard."""
        if self.bucket is None:
            (self.path / _ARTIFACTS).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="alphaquant-") as folder:
            file = Path(folder) / CONFIG_FILE
            file.write_text(config_text, encoding="utf-8")
            upload_artifact(
                artifact_store=artifact_store(self.artifacts),
                file_path=str(file),
                study_or_trial=trial,
                mimetype="application/json",
            )

    @property
    def artifacts(self) -> str | Path:
        """Where trials' configurations are, see `alphaquant.studies.store.artifacts`."""
        return self.bucket or self.path / _ARTIFACTS

    def has_assignment(self, digest: str) -> bool:
        """Whether an assignment was kept."""
        return (self.path / _assignment_file(digest)).exists()

    def load_assignment(self, digest: str) -> Assignment:
        """Read one back.

        Raises:
            StoreError: it is missing or damaged.
        """
        path = self.path / _assignment_file(digest)
        try:
            assignment = Assignment(read_object(path))
            is_whole = assignment.digest == digest
        except (OSError, JsonError, ValueError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); {self.remedy}") from error
        if not is_whole:
            raise StoreError(f"{path} is damaged: its content is not of its name; {self.remedy}")
        return assignment

    @property
    def remedy(self) -> str:
        """What to do about a damaged file in this directory."""
        return (
            f"delete {self.path} and run the same command again: banks, costs and predictions are "
            "kept in the cache"
        )


@contextmanager
def locked_folder(path: Path) -> Iterator[Lease]:
    """Keep other searches out of a directory; it is removed again if nothing was written to it.

    The claim lies inside, so that it holds wherever the directory is mounted.

    Yields:
        The lease, to ask before something is written.

    Raises:
        StoreError: another process works on it; the message names that.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with locked(path / LOCK_FILE, f"--out {path}") as lease:
            yield lease
    finally:
        with suppress(OSError):  # one that holds something stays, and so do those around it
            for folder in made:
                folder.rmdir()


def check_place(path: Path, option: str) -> None:
    """Refuse a directory that cannot be made or written to; makes nothing.

    Args:
        path: the directory.
        option: that it was asked for with, for messages.

    Raises:
        StoreError: a file is in the way, or a right is missing.
    """
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise StoreError(
            f"{option} {path}: {there} is no directory; give another {option} or move it away"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(
            f"{option} {path}: {there} cannot be written to; give another {option} or the right"
        )


def facts_digest(facts: Mapping[str, Any]) -> str:
    """sha256 of a search's facts: equal for runs that give the same sequence of trials."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_folder(path: Path, facts: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse a directory that another search, or something else, occupies; writes nothing.

    Args:
        path: the directory.
        facts: what is known so far of what decides the trials; only these are compared.
        overwrite: another search may be replaced.

    Raises:
        StoreError: the directory is none of ours, or belongs to a search with other facts.
    """
    found = _read_run(path)
    if found is None and not _is_free(path):
        raise StoreError(
            f"{path} exists and holds no search of ours{_why_not(path)}; give another "
            "--out (--overwrite replaces searches only)"
        )
    if found is not None and not overwrite:
        changed = _changed(found, facts)
        if changed:
            raise StoreError(
                f"{path} holds a search with other settings ({', '.join(changed)}); give another "
                "--out, repeat the first command to resume it, or --overwrite to replace it"
            )


def default_storage(path: Path) -> str:
    """The URL of the study of a directory where no storage was asked for."""
    return sqlite_url(path / "study.db")


def storage_of(path: Path) -> str:
    """The URL of the storage where the search of a directory keeps its study.

    Raises:
        StoreError: the directory is not that of a search.
    """
    found = _read_run(path)
    if found is None:
        what = "holds no search of ours" if path.exists() else "does not exist"
        raise StoreError(
            f"{path} {what}; give the --out of aq-search, or the study itself with --storage"
        )
    return str(found.get("storage") or default_storage(path))


def artifacts_of(path: Path) -> str | Path:
    """Where the search of a directory keeps its trials' configurations."""
    found = _read_run(path) or {}
    return RunFolder(path, found.get("artifacts")).artifacts


def effort_in(path: Path) -> EffortName | None:
    """The effort of the search that a directory holds; None where there is none."""
    found = (_read_run(path) or {}).get("facts", {}).get("effort")
    return found if found in get_args(EffortName) else None


def claim_folder(
    path: Path,
    facts: Mapping[str, Any],
    *,
    overwrite: bool,
    storage: str | None = None,
    bucket: str | None = None,
) -> RunFolder:
    """Create the directory of a search, or take it up again if its facts are the same.

    Args:
        path: the directory.
        facts: everything that decides the trials, ready for JSON; kept in `run.json`.
        overwrite: replace what another search left there.
        storage: URL of the study where that is not in the directory; kept in `run.json` without
            its password.
        bucket: see `RunFolder`; kept in `run.json`.

    Raises:
        StoreError: see `check_folder`.
    """
    check_folder(path, facts, overwrite=overwrite)
    found = _read_run(path)
    folder = RunFolder(path, bucket)
    content: dict[str, Any] = {"tool": _TOOL, "version": RUN_VERSION, "facts": dict(facts)}
    if storage is not None:
        content["storage"] = kept_url(storage)
    if bucket is not None:
        content["artifacts"] = bucket
    is_same = found is not None and not _changed(found, facts)
    if found is not None and not is_same:
        _remove_own(path)
    places = ("storage", "artifacts")
    if not is_same or any((found or {}).get(name) != content.get(name) for name in places):
        path.mkdir(parents=True, exist_ok=True)
        folder.write_json(RUN_FILE, content)
    return folder


def _assignment_file(digest: str) -> str:
    return f"assignments/{digest}.json"


def _read_run(path: Path) -> dict[str, Any] | None:
    """The content of a directory's `run.json` if one of our searches wrote it."""
    try:
        content = read_object(path / RUN_FILE)
    except (OSError, JsonError):
        return None
    is_ours = content.get("tool") == _TOOL
    return content if is_ours and isinstance(content.get("facts"), dict) else None


def _why_not(path: Path) -> str:
    """What is wrong with a `run.json` that cannot be read."""
    try:
        read_object(path / RUN_FILE)
    except JsonError as error:
        return f" ({RUN_FILE} is damaged: {error})"
    except OSError:
        return ""
    return ""


def _changed(found: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Names of the facts that differ from those in `run.json`."""
    if found.get("version") != RUN_VERSION:
        return [f"version {found.get('version')} of this program's files, now {RUN_VERSION}"]
    asked = json.loads(json.dumps(dict(facts)))
    return sorted(name for name, value in asked.items() if found["facts"].get(name) != value)


def _is_free(path: Path) -> bool:
    """Whether nothing is there but, at most, a lock and what a kill in `claim_folder` leaves."""
    if not path.exists():
        return True
    return path.is_dir() and all(
        file.name == LOCK_FILE or _LEFT.fullmatch(file.name) for file in path.iterdir()
    )


def _remove_own(path: Path) -> None:
    """Remove what a search wrote; `run.json` last, so that a kill leaves a directory of ours."""
    for name in _OWN_FOLDERS:
        shutil.rmtree(path / name, ignore_errors=True)
    for name in _OWN_FILES:
        (path / name).unlink(missing_ok=True)
