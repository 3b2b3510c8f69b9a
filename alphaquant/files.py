"""Files that appear whole or not at all, and folders that one process works on at a time."""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from alphaquant.errors import StoreError
from alphaquant.lease import Claim, Lease, record_of

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""No room on a disk, or none that is ours."""


@contextmanager
def whole_file(path: Path, n_bytes: int | None = None) -> Iterator[Path]:
    """Write a file under a name of its own and rename it when it is complete.

    A process that is killed leaves a `.part` behind that nobody reads. Two that write the same
    file at the same time write two parts; the later rename wins, and both contents are equal
    because names carry digests of what they hold.

    Args:
        path: the file; its folder is made if there is none.
        n_bytes: how large it becomes, where that is known.

    Yields:
        The path to write to, in the same folder.

    Raises:
        StoreError: the disk is full; nothing is left of the file.
    """
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    n_written = 0
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            part.replace(path)
        finally:
            with suppress(FileNotFoundError):
                n_written = part.stat().st_size
                part.unlink()
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise _cannot_write(path, error, n_bytes, n_written) from error


@contextmanager
def writing(path: Path, n_bytes: int | None = None) -> Iterator[None]:
    """Name the file and what it needs where a disk is full, a quota reached or a right missing.

    Args:
        path: what is being written.
        n_bytes: how large it becomes, where that is known.

    Raises:
        StoreError: instead of an error of the system.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error, n_bytes) from error


def _is_full(error: OSError | SafetensorError) -> bool:
    """Whether there is no room; safetensors has the system's number in its text only."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(f"os error {number}" in str(error) for number in _FULL)


def _cannot_write(
    path: Path, error: Exception, n_bytes: int | None, n_written: int = 0
) -> StoreError:
    """What is needed where, and that nothing is lost."""
    needed = "" if n_bytes is None else f"it needs {n_bytes} bytes, "
    if n_bytes is None and n_written:
        needed = f"it needs more than {n_written} bytes, "
    there = next(folder for folder in path.parents if folder.is_dir())
    return StoreError(
        f"cannot write {path} ({error}): {needed}{shutil.disk_usage(there).free} are free in "
        f"{there}; free space there or mend the reason, then run the same command, which goes on "
        "with what is finished"
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FolderBoard:
    """Claims as files of one folder, see `alphaquant.lease`.

    Attributes:
        folder: made with the first claim, and removed with the last.
    """

    folder: Path

    def read(self) -> dict[str, Claim]:
        """All claims by their token."""
        found = {}
        for file in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):  # given back meanwhile
                found[file.stem] = Claim.read(json.loads(file.read_text(encoding="utf-8")))
        return found

    def write(self, token: str, claim: Claim) -> None:
        """Make or replace a claim.

        It comes by a new file that is renamed: that changes the folder, so a client of a network
        file system forgets what it remembers of it, and lists it anew.
        """
        file = self.folder / f"{token}.json"
        part = file.with_suffix(".new")
        text = json.dumps(record_of(claim))
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the last claim went, and the folder with it
                part.write_text(text, encoding="utf-8")
                part.replace(file)
                return

    def remove(self, token: str) -> None:
        """Remove a claim, if it is there."""
        (self.folder / f"{token}.json").unlink(missing_ok=True)
        with suppress(OSError):  # other claims are in it
            self.folder.rmdir()


@contextmanager
def locked(path: Path, what: str, other: str = "--out", *, waits: bool = False) -> Iterator[Lease]:
    """Keep other processes out, on this host and on those that share the file system.

    A claim that a killed process of this machine left behind holds nobody up; one of another
    machine, or of a process that was paused, is taken over when it is old: see
    `alphaquant.lease`.

    Args:
        path: the folder of claims; its folder is made if there is none.
        what: what is locked, for messages, such as `--out q`.
        other: the option that gives another one.
        waits: wait for whoever holds it.

    Yields:
        The lease; whoever writes what others would not write the same asks it before.

    Raises:
        StoreError: another process holds it; the message names its host, number and start.
    """
    lease = Lease(FolderBoard(path), what, other)
    lease.acquire(waits=waits)
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def in_use(path: Path, what: str) -> Iterator[None]:
    """Say that this process reads what is in a folder, beside any others.

    Where nothing may be written nothing is said: a cache that somebody else keeps.

    Args:
        path: the folder of claims; its folder is made if there is none, and removed again where
            nothing else came into it.
        what: what is used, for messages.
    """
    lease, is_new = Lease(FolderBoard(path), what, ""), not path.parent.exists()
    try:
        lease.join()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lease.release()
        if is_new:
            with suppress(OSError):  # something is in it
                path.parent.rmdir()


def mark_used(path: Path) -> None:
    """Remember when something was last used: the time of the last change of a file or folder.

    Where it may not be written, as in a cache that somebody else keeps, nothing is remembered.
    """
    with suppress(OSError):
        os.utime(path)
