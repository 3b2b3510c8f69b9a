"""Who works on something: a claim with a heartbeat, kept where that thing itself is kept.

Locks of a file system or a database hold on one host, or as long as a connection does. A claim is
a small record that its holder renews, so it holds wherever the record can be read: a folder on a
network file system, a database, a server. Three rules keep two holders apart, whatever clocks of
hosts say, as long as what was written is seen by whoever reads later:

* Whoever wants the lease writes its claim first and reads the others then. Of two that want it at
  the same time at least one sees the other; who sees a claim that is alive takes its own back.
* A claim of a process of this machine that ended counts for nothing. Any other one is taken over
  when it is old by its own time and was not renewed while it was watched for half its patience;
  the new claim names those that it took.
* A holder that has not renewed its claim for 0.4 of its patience asks first whether it still has
  the lease, before it writes anything. A process that was paused, and was taken for dead, learns
  it there.

Worked example with a patience of 60 s: a beat every 15 s; taken over after 60 s without one, and
30 s in which whoever takes it has seen none; a holder asks again when its last beat is 24 s ago.

What is left: a process that is paused between such a check and the write that follows, and wakes
after it was taken over, still does that one write.
"""

import logging
import os
import random
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from alphaquant.errors import StoreError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long a process may give no sign before another one takes over what it worked on."""

PATIENCE_VARIABLE = "ALPHAQUANT_LEASE_SECONDS"
"""Environment variable with another patience; every claim carries its own."""

_BEAT, _SURE, _WATCH = 0.25, 0.4, 0.5  # of the patience; see above
_TRIES, _PAUSE_SECONDS = 5, 0.05
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Claim:
    """What a process says of itself.

    Attributes:
        host: its name.
        process: its number there.
        place: where that number means this process: host, boot and namespace of processes.
        started: when the process started, in the words of its system; numbers come again.
        since: when it got the lease, seconds since 1970 by its clock.
        beat: when it renewed the claim.
        n_beats: how often it did.
        patience: seconds without a beat after which it may be taken over.
        took: claims that it took over.
    """

    host: str
    process: int
    place: str
    started: str
    since: float
    beat: float
    n_beats: int
    patience: float
    took: tuple[str, ...] = ()

    @classmethod
    def own(cls) -> "Claim":
        """Of this process, now."""
        now, number = time.time(), os.getpid()
        patience = float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE_SECONDS)
        return cls(socket.gethostname(), number, _place(), _start(number), now, now, 0, patience)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Claim":
        """From what `asdict` made of it.

        Raises:
            StoreError: it is no claim of this version.
        """
        if record.keys() != {f.name for f in fields(cls)}:
            raise StoreError(
                f"a claim with {', '.join(sorted(record))} is of another version of this program; "
                "end the process that made it, or use that version"
            )
        return cls(**{**record, "took": tuple(record["took"])})

    @property
    def holder(self) -> str:
        """The process in words: `process 7 on a since 2026-01-02 03:04:05+00:00`."""
        since = datetime.fromtimestamp(self.since, UTC).isoformat(" ", "seconds")
        return f"process {self.process} on {self.host} since {since}"

    @property
    def is_dead(self) -> bool:
        """Whether the process is known to have ended: one of this machine that is not there."""
        if self.place != _place():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # it is there, and somebody else's
        return _start(self.process) != self.started

    @property
    def may_live(self) -> bool:
        """Whether its process may still work: one of another machine that has beaten lately."""
        is_here = self.place == _place()
        return not self.is_dead and (is_here or abs(self.age) <= self.patience)

    @property
    def age(self) -> float:
        """Seconds since its last beat, by the clocks of both hosts; negative where they differ."""
        return time.time() - self.beat


class Board(Protocol):
    """Where claims on one thing are; what was written is seen by whoever reads later."""

    def read(self) -> Mapping[str, Claim]:
        """All claims by their token."""

    def write(self, token: str, claim: Claim) -> None:
        """Make or replace a claim."""

    def remove(self, token: str) -> None:
        """Remove a claim, if it is there."""


class Lease:
    """The right of one process to work on something, renewed by a thread while it is held.

    Args:
        board: where claims are.
        what: what is worked on, for messages, such as `--out q`.
        other: the option that gives another one.
    """

    def __init__(self, board: Board, what: str, other: str) -> None:
        self._board, self._what, self._other = board, what, other
        self._token = uuid4().hex[:12]
        self._claim = Claim.own()
        self._confirmed = 0.0
        self._lost: str | None = None  # how, in words
        self._guard = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def acquire(self, *, waits: bool = False) -> None:
        """Get the lease, and renew it from now on.

        Args:
            waits: wait for whoever holds it.

        Raises:
            StoreError: another process holds it; the message names its host, number and start.
        """
        seen: dict[str, _Seen] = {}
        n_left = _TRIES
        try:
            while not self._claimed(seen):
                alive = [s.claim for s in seen.values() if s.is_alive(_clock())]
                if not alive:  # old claims are watched; ours keeps others out meanwhile
                    time.sleep(min(1.0, self._claim.patience * _BEAT / 2))
                    continue
                self._board.remove(self._token)
                n_left -= 1
                if n_left == 0 and not waits:
                    raise self._refused(min(alive, key=lambda claim: claim.since))
                time.sleep(random.uniform(1, 2) * _PAUSE_SECONDS * (1 if n_left > 0 else 10))
        except BaseException:
            with suppress(Exception):
                self._board.remove(self._token)
            raise
        self._thread.start()

    def join(self) -> None:
        """Claim beside others: something that many use at once, and that nobody may remove."""
        for token, claim in self._board.read().items():
            if claim.is_dead:
                self._board.remove(token)
        self._confirmed = _clock()
        self._write(self._claim)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back; where its place cannot be reached, the claim grows old there."""
        self._is_over.set()
        self._thread.join(_JOIN_SECONDS)
        try:
            self._board.remove(self._token)
        except Exception as error:  # of whatever keeps the claims
            logger.debug("the claim on %s stays: %s", self._what, error)

    def check(self) -> None:
        """Make sure that the lease is held, before something is written.

        Raises:
            StoreError: another process took it over.
        """
        if self._lost is None and _clock() - self._confirmed > self._claim.patience * _SURE:
            self._beat()
        if self._lost is not None:
            raise StoreError(
                f"{self._what} {self._lost}, because this process gave no sign for more than "
                f"{self._claim.patience:g} s; it stops here and changes nothing any more: let the "
                "other one go on, or end it and run the same command again"
            )

    def _claimed(self, seen: dict[str, "_Seen"]) -> bool:
        """Write our claim and read the others; whether it is ours now."""
        started = _clock()
        self._write(replace(self._claim, since=time.time()))
        others = self._others()
        for token in seen.keys() - others.keys():
            del seen[token]
        for token, claim in others.items():
            known = seen.get(token)
            seen[token] = _Seen(claim, started) if known is None else known.again(claim, started)
        if not all(s.may_be_taken(_clock()) for s in seen.values()):
            return False
        if others and not self._took(others):
            return False
        self._confirmed = started
        return True

    def _took(self, others: Mapping[str, Claim]) -> bool:
        """Take old claims over; not where one of them was renewed, or another one came."""
        self._write(replace(self._claim, took=tuple(others)))
        again = self._others()
        if any(token not in others or others[token] != claim for token, claim in again.items()):
            self._claim = replace(self._claim, took=())
            self._board.remove(self._token)
            return False
        for token, claim in others.items():
            if claim.is_dead:
                logger.info("%s: %s ended and left its claim", self._what, claim.holder)
            else:
                logger.warning(
                    "took %s over from %s, which gave no sign for %.0f s",
                    *(self._what, claim.holder, claim.age),
                )
            self._board.remove(token)
        return True

    def _beat(self) -> None:
        """Renew the claim, or learn that it was taken over."""
        with self._guard:
            started = _clock()
            if self._lost is None and self._is_ours():
                self._write(self._claim)
                if self._is_ours():
                    self._confirmed = started
                else:  # taken over between the two: what was written is no claim
                    self._board.remove(self._token)

    def _is_ours(self) -> bool:
        found = self._board.read()
        takers = [claim for claim in found.values() if self._token in claim.took]
        if takers:
            self._lost = f"was taken over by {takers[0].holder}"
        elif self._token not in found:
            self._lost = "was taken over or moved away"
        return self._lost is None

    def _renew(self) -> None:
        """Beat until the lease is given back or lost."""
        while not self._is_over.wait(self._claim.patience * _BEAT) and self._lost is None:
            try:
                self._beat()
            except Exception as error:  # of whatever keeps the claims; whoever writes meets it too
                logger.debug("no beat for %s: %s", self._what, error)

    def _write(self, claim: Claim) -> None:
        self._claim = replace(claim, beat=time.time(), n_beats=claim.n_beats + 1)
        self._board.write(self._token, self._claim)

    def _others(self) -> dict[str, Claim]:
        return {t: claim for t, claim in self._board.read().items() if t != self._token}

    def _refused(self, holder: Claim) -> StoreError:
        ago, patience = max(holder.age, 0.0), holder.patience
        return StoreError(
            f"{self._what} is in use: {holder.holder} works on it (last sign {ago:.0f} s ago); "
            f"wait until it ends, stop it, or give another {self._other}; one that is gone is "
            f"taken over {patience:g} s after its last sign"
        )


@dataclass(frozen=True)
class _Seen:
    """Somebody else's claim as it was last renewed.

    Attributes:
        claim: as it is.
        first: when it was first seen so, by the clock of this process.
        is_moving: whether it was seen otherwise before.
    """

    claim: Claim
    first: float
    is_moving: bool = False

    def again(self, claim: Claim, now: float) -> "_Seen":
        """The same one, read again."""
        return self if claim.n_beats == self.claim.n_beats else _Seen(claim, now, True)

    def is_alive(self, now: float) -> bool:
        """Whether its process works, as far as can be known."""
        is_fresh = abs(self.claim.age) <= self.claim.patience
        moves = self.is_moving and not self._is_watched(now)
        return (moves or is_fresh) and not self.claim.is_dead

    def may_be_taken(self, now: float) -> bool:
        """Whether it is of a dead process, or old and watched for long enough."""
        return self.claim.is_dead or (self._is_watched(now) and not self.is_alive(now))

    def _is_watched(self, now: float) -> bool:
        return now - self.first >= self.claim.patience * _WATCH


def record_of(claim: Claim) -> dict[str, Any]:
    """A claim for JSON, which `Claim.read` takes back."""
    return asdict(claim)


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@cache
def _place() -> str:
    """Where numbers of processes mean the same: containers and boots have their own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start(process: int) -> str:
    """When a process started, in ticks since the boot; empty where the system does not say.

    One that ended and waits for its parent has not started.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    # The name may hold anything, so what follows its last bracket is counted: state, ..., start.
    rest = text[text.rindex(")") + 2 :].split()
    return "ended" if rest[0] in "ZX" else rest[19]
