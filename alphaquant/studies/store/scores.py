"""Every measurement that searches paid for, kept in a file and never repeated.

One line of JSON per measured batch of windows, appended as it comes; a line that a kill cut short
is dropped. Races, probes and trials all read from here first, so a search that was stopped goes
through its steps again without running the model, and searches of other budgets start from what
was measured before. The file lies beside the bank that the weights are from; its name carries the
text. Where two processes measured the same windows, the first line counts.

Letters: N windows.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch

from alphaquant.errors import StoreError
from alphaquant.evaluators.divergence import Divergence, join
from alphaquant.spaces.json_files import JsonError, parse_json

_FIELDS = ("kl", "same_top", "nll")


class EvaluationLog:
    """Measurements by the digest of their assignment: always the first windows of the text."""

    def __init__(self, path: Path | None, seq_len: int) -> None:
        """Read what earlier runs measured.

        Args:
            path: the file; made at the first measurement. None remembers in memory alone.
            seq_len: tokens per window.

        Raises:
            StoreError: a line other than the last is damaged.
        """
        self._path, self._seq_len = path, seq_len
        self._found: dict[str, Divergence] = {}
        for number, line in enumerate(self._whole_lines(), 1):
            self._read(number, line)

    def get(self, digest: str) -> Divergence | None:
        """What was measured of an assignment so far."""
        return self._found.get(digest)

    def n_windows(self, digest: str) -> int:
        """How many windows were measured, 0 if none."""
        found = self._found.get(digest)
        return 0 if found is None else len(found.kl)

    def add(self, digest: str, part: Divergence) -> None:
        """Keep the measurement of the next windows."""
        first = self.n_windows(digest)
        line: dict[str, Any] = {"digest": digest, "first": first, "seconds": part.seconds}
        line |= {name: getattr(part, name).tolist() for name in _FIELDS}
        if self._path is None:
            self._remember(digest, first, part)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
        self._remember(digest, first, part)

    def _remember(self, digest: str, first: int, part: Divergence) -> None:
        """Keep windows that follow those known; others were measured twice."""
        if first == self.n_windows(digest):
            before = self._found.get(digest)
            self._found[digest] = part if before is None else join([before, part])

    def _read(self, number: int, text: bytes) -> None:
        """Take over one line of the file."""
        try:
            line: Any = parse_json(text)
            kl, same, nll = (torch.tensor(line[name], dtype=torch.float32) for name in _FIELDS)
            part = Divergence(kl, same, nll, self._seq_len, float(line["seconds"]))
            digest, first = str(line["digest"]), int(line["first"])
            if not len(kl) == len(same) == len(nll) > 0:
                raise ValueError("its lists differ in length")
        except (JsonError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise StoreError(
                f"{self._path}, line {number}, is damaged ({error}); delete the file and run "
                "the same command again: what it held is measured anew"
            ) from error
        self._remember(digest, first, part)

    def _whole_lines(self) -> list[bytes]:
        """The lines of the file; what a kill left of the last one is cut off."""
        if self._path is None or not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # Whoever writes a line holds the lock to its end, so half a line is of a killed one.
            fcntl.flock(file, fcntl.LOCK_EX)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(self._path, len(whole))
        return whole.splitlines()


def first_windows(found: Divergence, n_windows: int) -> Divergence:
    """The first windows of a measurement, at least one, with their share of its seconds."""
    return Divergence(
        found.kl[:n_windows],
        found.same_top[:n_windows],
        found.nll[:n_windows],
        found.seq_len,
        found.seconds * min(1.0, n_windows / len(found.kl)),
    )
