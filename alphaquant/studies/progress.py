"""Seconds per stage, measured from the progress calls themselves."""

import time
from dataclasses import dataclass, field

from alphaquant.quant.bank import Progress


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody; see `Progress`."""


@dataclass
class StageClock:
    """Forwards progress calls and books the time between them to the stage of the earlier call.

    Worked example: calls load at 0 s, load at 2 s, bank at 3 s, `stop` at 7 s make load 3 s, bank
    4 s.

    Attributes:
        forward: where the calls go.
        seconds: wall time by stage, in order of first appearance.
    """

    forward: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str = ""
    _since: float = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `Progress`: the stage that runs from now on, and how far it is."""
        self._book()
        self._stage = stage
        self.seconds.setdefault(stage, 0.0)
        self.forward(stage, done, total)

    def shifted(self, offset: int, total: int) -> Progress:
        """Progress of one part of a stage: `offset` steps were done before it, of `total`."""
        return lambda stage, done, _: self(stage, offset + done, total)

    def stop(self) -> None:
        """Book the time of the last stage."""
        self._book()
        self._stage = ""

    def _book(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._since = now
