"""Files that appear whole or not at all, and folders that one process works on at a time."""

import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from alphaquant.errors import StoreError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a name of its own and rename it when it is complete.

    A process that is killed leaves a `.part` behind that nobody reads. Two that write the same
    file at the same time write two parts; the later rename wins, and both contents are equal
    because names carry digests of what they hold.

    Args:
        path: the file; its folder is made if there is none.

    Yields:
        The path to write to, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
        needed = "" if n_bytes is None else f"it needs {n_bytes} bytes, "
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"cannot write {path} ({error}): {needed}{free} are free in {path.parent}; free "
            "space there or mend the reason, then run the same command, which goes on with what "
            "is finished"
        ) from error


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, what: str, other: str = "--out", *, waits: bool = False) -> Iterator[None]:
    """Keep other processes out, on this host and on those that share the file system's locks.

    The kernel frees the lock when the process ends, however it ends: a file that a killed one left
    behind holds nobody up. On leaving, the file is removed; what moved it meanwhile removes it
    itself.

    Args:
        path: the lock file; its folder is made if there is none.
        what: what is locked, for messages, such as `--out q`.
        other: the option that gives another one.
        waits: wait for whoever holds it.

    Raises:
        StoreError: another process holds it; the message names its host, number and start.
    """
    file = _lock_file(path, what, other, waits)
    try:
        started = datetime.now(UTC).isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
        file.flush()
        yield
    finally:
        if _is_file_at(file, path):
            path.unlink(missing_ok=True)
        file.close()


def _lock_file(path: Path, what: str, other: str, waits: bool) -> TextIO:
    """The lock file, opened and locked; another one that a holder removed meanwhile is no lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise StoreError(
                f"{what} is in use: {holder} works on it; wait until it ends, stop it, or give "
                f"another {other}"
            ) from error
        if _is_file_at(file, path):
            return file
        file.close()


def _is_file_at(file: TextIO, path: Path) -> bool:
    """Whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
