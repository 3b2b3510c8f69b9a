"""A node-local copy of the large files that a process reads again and again.

A cache on a network file system is read by every node; a disk of the node itself is nearer. What
is read often (prepared weights, the bank's matrices) is copied there once, under the sha256 of its
content, and read from there by every process of the node. A copy is compared with that sha256
while it is made, and again when it was changed since. Nothing here is needed: where there is no
room, or the disk fails, the file is read where it is, and the report says so.

Layout::

    <root>/copies/<sha256>.safetensors
    <root>/read.json                     see `alphaquant.models.pages.file_digests`
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alphaquant.errors import StoreError
from alphaquant.files import whole_file
from alphaquant.models.pages.file_digests import file_digests

logger = logging.getLogger(__name__)

LEAST_FREE = 1 << 30
"""Bytes that stay free on the disk, or a twentieth of it where that is less."""

_CHUNK = 1 << 22


class Scratch:
    """Copies in one directory of this machine; made when they are first asked for.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places: dict[Path, Path] = {}
        self._n_copied = self._n_bytes = 0
        self._problems: dict[Path, str] = {}

    def local(self, file: Path, sha256: Callable[[], str]) -> Path:
        """Where to read a file: its copy, or the file itself where there is none.

        Args:
            file: the file; it must not change.
            sha256: gives that of its content, asked once.

        Raises:
            StoreError: the file is not of that sha256.
        """
        if file not in self._places:
            self._places[file] = self._found(file, sha256())
        return self._places[file]

    def report(self) -> dict[str, Any]:
        """What was copied and what was not, with the first reason, ready for JSON."""
        found = {
            "directory": str(self._root),
            "files": len(self._places),
            "copied": self._n_copied,
            "copied_bytes": self._n_bytes,
            "read_where_they_are": len(self._problems),
        }
        return found | ({"why": next(iter(self._problems.values()))} if self._problems else {})

    def _found(self, file: Path, sha256: str) -> Path:
        copy = self._root / "copies" / f"{sha256}{file.suffix}"
        try:
            if copy.exists():
                if file_digests([copy], self._root / "read.json")[copy] == sha256:
                    return copy
                logger.warning("%s is damaged (its sha256 is another); it is copied anew", copy)
            return self._copied(file, copy, sha256)
        except OSError as error:
            return self._not_copied(file, str(error))

    def _copied(self, file: Path, copy: Path, sha256: str) -> Path:
        n_bytes = file.stat().st_size
        copy.parent.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(copy.parent)
        if disk.free - n_bytes < min(LEAST_FREE, disk.total // 20):
            free = f"{disk.free} bytes are free in {self._root}, {n_bytes} are needed"
            return self._not_copied(file, f"{free} beside {min(LEAST_FREE, disk.total // 20)}")
        digest = hashlib.sha256()
        try:
            with whole_file(copy, n_bytes) as part:
                with file.open("rb") as source, part.open("wb") as target:
                    while chunk := source.read(_CHUNK):
                        digest.update(chunk)
                        target.write(chunk)
                if digest.hexdigest() != sha256:
                    raise _Damaged(file)
        except _Damaged:
            raise StoreError(
                f"{file} is damaged (its sha256 is not the one written with it); delete "
                f"{file.parent} and run the same command again: it is made anew"
            ) from None
        except StoreError as error:  # no room after all: others write there too
            return self._not_copied(file, str(error))
        self._n_copied += 1
        self._n_bytes += n_bytes
        return copy

    def _not_copied(self, file: Path, why: str) -> Path:
        if not self._problems:
            logger.warning(
                "files are read from where they are, not from --scratch %s: %s", self._root, why
            )
        self._problems[file] = why
        return file


class _Damaged(Exception):
    """The file is not what it was."""
