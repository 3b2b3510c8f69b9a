"""The folder that a checkpoint is made in: what a stopped run finished is there for the next one.

Layout, beside the target::

    <out>.part/job.json          what is being made; a run that makes something else is refused
    <out>.part/lock              held by the process that works here
    <out>.part/layers/003.json   a finished layer: its file with sha256, and its part of the report
    <out>.part/checkpoint/       becomes the target when everything is there
    <out>.part/export/           becomes it instead, where another program's files were asked for
    <out>.part/replaced/         the old target, for the moment of the exchange

A folder of that name without our `job.json` is someone else's and is never touched. Nothing here
knows what a layer is made of: `alphaquant.runtime.pipeline` does.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphaquant.errors import StoreError
from alphaquant.files import locked, sha256_of, whole_file, writing
from alphaquant.models.quantization_config import is_made_by_us

_MADE_BY = "aq-quantize"
_JOB, _LOCK, _LAYERS, _CHECKPOINT, _EXPORT, _REPLACED = (
    *("job.json", "lock", "layers", "checkpoint", "export", "replaced"),
)
_LONGEST_PATH = 3800
"""Bytes that the path of a checkpoint may have: systems take 4096, with the names of its files."""

NO_JOB: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Part:
    """An unfinished checkpoint.

    Attributes:
        asked: the target as it was asked for.
        target: the same, without links.
        overwrite: whether a packed checkpoint or an export there, or an unfinished checkpoint of
            another job, may be replaced.
    """

    asked: Path
    target: Path
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """Where everything unfinished is."""
        return self.target.with_name(self.target.name + ".part")

    @property
    def checkpoint(self) -> Path:
        """The directory that becomes the target."""
        return self.folder / _CHECKPOINT

    def claim(self, job: Mapping[str, Any]) -> None:
        """Say what is being made; called again when more is known.

        Args:
            job: everything that the files depend on, ready for JSON; values that are objects are
                compared key by key.

        Raises:
            StoreError: layers of another job are finished here, and `overwrite` is off.
        """
        stored, asked = self._job(), _flat(json.loads(json.dumps(job)))
        other = [key for key, value in asked.items() if stored.get(key, value) != value]
        if other and any(self._records()):
            if not self.overwrite:
                raise StoreError(
                    f"{self.folder} holds an unfinished checkpoint of another job ({other[0]} was "
                    f"{_short(stored[other[0]])}, now {_short(asked[other[0]])}); run the command "
                    "of then to go on with it, give another --out, or --overwrite to drop it"
                )
            self.clear()
        self._write(_JOB, {"made_by": _MADE_BY, "job": stored | asked})
        for name in (_LAYERS, _CHECKPOINT):
            (self.folder / name).mkdir(exist_ok=True)

    def finished(self) -> dict[int, dict[str, Any]]:
        """What was stored of every layer whose file is as it was written."""
        found: dict[int, dict[str, Any]] = {}
        for path in self._records():
            try:
                record = json.loads(path.read_text())
                is_intact = sha256_of(self.checkpoint / record["file"]) == record["sha256"]
            except (OSError, ValueError, KeyError, TypeError):
                is_intact = False
            if is_intact:
                found[int(path.stem)] = record
            else:
                path.unlink()
        return found

    def add_layer(self, index: int, record: Mapping[str, Any]) -> None:
        """Note that a layer is finished; the next run does not make it again.

        Args:
            index: of the layer.
            record: ready for JSON, with the `file` in `checkpoint` and its `sha256`.
        """
        self._write(f"{_LAYERS}/{index:03d}.json", record)

    def make_export(self) -> Path:
        """An empty directory for another program's files, which `place` then takes."""
        folder = self.folder / _EXPORT
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        return folder

    def place(self, made: Path | None = None) -> Path:
        """Move what is finished to the target.

        Args:
            made: the directory; the packed checkpoint by default.

        Returns:
            The target as it was asked for.

        Raises:
            StoreError: it cannot be moved there; it stays where it is.
        """
        made = self.checkpoint if made is None else made
        _check_free(self.asked, self.target, self.overwrite)
        replaced = self.folder / _REPLACED
        try:
            if self.target.exists() and any(self.target.iterdir()):
                self.target.rename(replaced)
            made.rename(self.target)
        except OSError as error:
            self._put_back()
            raise StoreError(
                f"the checkpoint is complete in {made} and cannot be moved to "
                f"{self.target} ({error}); mend this and run the same command, or move it yourself"
            ) from error
        self.clear()
        return self.asked

    def clear(self) -> None:
        """Remove what is ours in the folder; a target that was being replaced comes back."""
        self._put_back()
        for name in (_LAYERS, _CHECKPOINT, _EXPORT, _REPLACED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / _JOB).unlink(missing_ok=True)

    def prepare(self) -> None:
        """Drop what was begun and not finished."""
        for file in self.folder.rglob("*.part"):
            file.unlink()
        if not any(self._records()):
            self.clear()

    def leave(self) -> None:
        """Remove the folder unless a layer is finished in it."""
        if any(self._records()):
            return
        self.clear()
        shutil.rmtree(self.folder / _LOCK, ignore_errors=True)
        with suppress(OSError):  # someone else's files are in it
            self.folder.rmdir()

    def _records(self) -> list[Path]:
        return sorted((self.folder / _LAYERS).glob("*.json"))

    def _job(self) -> dict[str, Any]:
        found = _read_job(self.folder)
        return {} if found is None else found

    def _put_back(self) -> None:
        replaced = self.folder / _REPLACED
        if replaced.exists() and not self.target.exists():
            replaced.rename(self.target)

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1) + "\n"
        path = self.folder / name
        with writing(path, len(text)), whole_file(path, len(text)) as part:
            part.write_text(text)


@contextmanager
def open_part(
    target: Path, overwrite: bool = False, job: Mapping[str, Any] = NO_JOB
) -> Iterator[Part]:
    """Work on the checkpoint of a target; nobody else does meanwhile.

    What is finished stays when it is left by an error; with no finished layer nothing stays.

    Args:
        target: directory to make.
        overwrite: replace a packed checkpoint or an export there, or an unfinished one of another
            job.
        job: see `Part.claim`.

    Raises:
        StoreError: the target is taken or cannot be written, another process works on it, or
            another job is unfinished there.
    """
    part = check_target(target, overwrite)
    made = _make_folder(part.folder)
    try:
        with locked(part.folder / _LOCK, f"--out {target}"):
            try:
                part.prepare()
                part.claim(job)
                yield part
            finally:
                part.leave()
    finally:
        for folder in made:  # what is not empty stays
            with suppress(OSError):
                folder.rmdir()


def check_target(path: Path, overwrite: bool = False) -> Part:
    """Refuse a target that cannot be written; nothing is made.

    Args:
        path: as asked for.
        overwrite: whether a packed checkpoint or an export there may be replaced.

    Raises:
        StoreError: naming what is in the way.
    """
    try:
        target = path.resolve()
        _check_place(path, target)
        _check_free(path, target, overwrite)
        part = Part(path, target, overwrite)
        is_ours = not os.path.lexists(part.folder) or _is_ours(part.folder)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"--out {_short(str(path))} cannot be used ({_short(error)})") from error
    if not is_ours:
        raise StoreError(
            f"{part.folder} is in the way: aq-quantize works there while it makes {path}, and did "
            "not make this; move it, or give another --out"
        )
    return part


def _check_place(path: Path, target: Path) -> None:
    """Refuse places where no directory can appear by renaming."""
    if len(os.fsencode(target)) > _LONGEST_PATH:
        raise StoreError(
            f"--out {_short(str(path))} has {len(os.fsencode(target))} bytes; systems take about "
            f"{_LONGEST_PATH}: give a shorter one"
        )
    if Path.cwd().is_relative_to(target):
        raise StoreError(
            f"--out {path} is the working directory or holds it, and a checkpoint appears as a "
            f"whole directory; give a name in it, such as --out {path / 'checkpoint'}"
        )
    if os.path.ismount(target):
        raise StoreError(
            f"--out {path} is the root of a file system, which no directory can replace; give a "
            f"name in it, such as --out {path / 'checkpoint'}"
        )
    above = next(folder for folder in target.parents if folder.exists())
    if not above.is_dir():
        raise StoreError(f"--out {path}: {above} is a file; give a place in a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise StoreError(
            f"--out {path}: nothing can be written in {above}; change its rights, or give another "
            "--out"
        )


def _check_free(path: Path, target: Path, overwrite: bool) -> None:
    """Refuse to write where something else is; `overwrite` replaces what we wrote only."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_made_by_us(target):
        raise StoreError(
            f"{path} exists and is no packed checkpoint and no export of one; give another --out "
            "(--overwrite replaces only these)"
        )
    if not overwrite:
        raise StoreError(
            f"{path} exists already; give another --out, or --overwrite to replace it"
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is one of ours, also one that was killed before it had a `job.json`."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return names <= {_LOCK} or _read_job(folder) is not None


def _read_job(folder: Path) -> dict[str, Any] | None:
    """The job of a folder; None where there is none of ours."""
    try:
        content = json.loads((folder / _JOB).read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(content, dict) and content.get("made_by") == _MADE_BY
    job = content.get("job") if is_ours else None
    return job if isinstance(job, dict) else None


def _make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it; the ones that were missing above, the deepest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with writing(path):
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    return missing[1:]


def _flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Objects in objects as `outer.inner`."""
    found: dict[str, Any] = {}
    for key, value in job.items():
        found |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
