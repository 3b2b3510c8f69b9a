"""Small disks of their own, which tests and benchmarks fill. Linux, and the right to mount."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TRIES = 20


class NoDiskError(Exception):
    """No disk can be mounted here."""


@dataclass(frozen=True)
class SmallDisk:
    """A disk in memory.

    Attributes:
        folder: where it is mounted.
    """

    folder: Path

    def resize(self, size: str) -> None:
        """Let it hold so much from now on: `300k`; no less than what is on it."""
        _run("mount", "-o", f"remount,size={size}", str(self.folder))

    def fill(self) -> None:
        """Leave no byte free: it becomes as small as what is on it."""
        for _ in range(_TRIES):
            found = os.statvfs(self.folder)
            if found.f_blocks and found.f_bfree == 0:
                return
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            try:
                self.resize(str(max(used, found.f_frsize)))
            except OSError:  # somebody wrote meanwhile
                continue
        raise OSError(f"{self.folder} cannot be filled")


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[SmallDisk]:
    """A disk that is mounted, and gone with what is on it on leaving.

    Args:
        folder: where; it is made.
        size: what it holds: `100k`, `64m`.

    Raises:
        NoDiskError: it cannot be mounted here; says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    except OSError as error:
        raise NoDiskError(f"no disk can be mounted here ({error})") from error
    try:
        yield SmallDisk(folder)
    finally:
        _run("umount", "-l", str(folder))  # files that a killed process had may still be open


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
