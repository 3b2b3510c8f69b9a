"""The stages of all commands; seconds of each and how many are left, found from progress calls.

What a stage has taken is exact. What is left is an estimate: the mean of the last `N_RECENT` steps
for every step that is missing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum


class Stage(StrEnum):
    """What a command is busy with; equal to its name in files.

    Attributes:
        text: what people read, at most 20 characters.
    """

    text: str

    CONVERT = "convert", "decode the GGUF file"
    LOAD = "load", "load model and texts"
    PILOT = "pilot", "speed of the machine"
    PREPARE = "prepare", "copy of the weights"
    ROTATE = "rotate", "rotate the stream"
    WRITE = "write", "text by the model"
    TEACHER = "teacher", "original's outputs"
    SPECTRA = "spectra", "spectra of weights"
    STATES = "states", "hidden states"
    HESSIANS = "hessians", "Hessians"
    BANK = "bank", "bank of formats"
    GRADIENTS = "gradients", "gradients"
    COSTS = "costs", "costs of formats"
    OUTPUTS = "outputs", "output Hessians"
    PLANNED = "planned", "planned trials"
    STUDY = "study", "study"
    PROBE = "probe", "random assignments"
    SCORES = "scores", "original's scores"
    EVOLUTION = "evolution", "evolution: passes"
    GATE = "gate", "held-out comparison"
    RECIPES = "recipes", "recipes of best.json"
    REPORT = "report", "report"
    QUANTIZE = "quantize", "quantize"
    TUNE = "tune", "tune"
    FIRST_RUN = "first_run", "run the checkpoint"
    EXPORT = "export", "export"
    EVALUATE = "evaluate", "evaluate"

    def __new__(cls, value: str, text: str = "") -> "Stage":
        """A member that is its name and has a text."""
        made = str.__new__(cls, value)
        made._value_, made.text = value, text
        return made


Progress = Callable[[str, int, int], None]
"""Told how far a `Stage` is: the stage, steps done, steps."""

N_RECENT = 16
"""Steps that an estimate looks back on. In three studies of 28 to 48 trials, whose steps are as
uneven as any, the estimate was off by a factor of 1.19 in the mean with 16, of 1.20 with all
steps and 1.22 with 4."""

MIN_STEP_SECONDS = 0.001
"""Faster steps were found, in a cache or a study, and say nothing about those to come."""


ALTERNATING = ((Stage.HESSIANS, Stage.BANK),)
"""Stages whose steps take turns: what is left of one is left of both."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tell nobody; see `Progress`."""


def of_total(progress: Progress, stage: str, total: int) -> Progress:
    """Progress for what does the first steps of a stage and knows of no others.

    Args:
        progress: is told.
        stage: whose steps are `total`; others are told as they are.
        total: steps; 0 where those of the stage are not to be told.
    """

    def tell(name: str, done: int, n: int) -> None:
        """See `Progress`."""
        if name != stage:
            progress(name, done, n)
        elif total:
            progress(name, done, total)

    return tell


@dataclass
class _Pace:
    """How fast one stage goes.

    Attributes:
        done: steps done.
        total: steps.
        seconds_at_done: what the stage had taken when it got there.
        recent: (steps, seconds) of the last advances. Replaced and never changed, because a
            display reads it from a thread of its own.
        is_of_before: `recent` is of an earlier round, in which much may have been found done.
    """

    done: int = 0
    total: int = 0
    seconds_at_done: float = 0.0
    recent: tuple[tuple[int, float], ...] = ()
    is_of_before: bool = False

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.total

    def reach(self, done: int, total: int, seconds: float) -> None:
        """Note how far the stage is after so many seconds of its own."""
        n_steps, taken = done - self.done, seconds - self.seconds_at_done
        if n_steps > 0 and taken >= MIN_STEP_SECONDS * n_steps:
            kept = () if self.is_of_before else self.recent
            self.recent, self.is_of_before = (*kept, (n_steps, taken))[-N_RECENT:], False
        self.is_of_before |= n_steps < 0
        if n_steps != 0 or done == 0:
            self.seconds_at_done = seconds
        self.done, self.total = done, total

    def remaining(self, seconds: float) -> float | None:
        """Seconds that the stage will still take, None without a basis or with nothing left."""
        left = self.total - self.done
        if left <= 0 or not self.recent:
            return None
        each = sum(s for _, s in self.recent) / sum(n for n, _ in self.recent)
        return max(left * each - (seconds - self.seconds_at_done), (left - 1) * each)


@dataclass
class StageTimes:
    """Books the time between progress calls to stages, and estimates what is left.

    Time counts for the stage of the earlier call, or, where that was its last step, for the stage
    of the later one.

    Worked example: load 0 of 1 at 0 s, load 1 of 1 at 2 s, bank 0 of 4 at 3 s, bank 1 of 4 at 8 s
    make load 2 s and bank 6 s. The step took 5 s, so the bank has 15 s left; at 10 s, 13 s.

    Attributes:
        seconds: wall time by stage, in order of first appearance.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _paces: dict[str, _Pace] = field(default_factory=dict)
    _stage: str | None = None
    _is_over: bool = False
    _since: float = 0.0

    def record(self, stage: str, done: int, total: int, now: float) -> None:
        """Note a progress call.

        Args:
            stage: that runs from now on.
            done: steps.
            total: steps.
            now: seconds of any clock.
        """
        self.seconds.setdefault(stage, 0.0)
        self._book(stage if self._is_over else self._stage, now)
        self._stage, self._is_over = stage, done >= total
        self._paces.setdefault(stage, _Pace()).reach(done, total, self.seconds[stage])

    def stop(self, now: float) -> None:
        """Book the time of the last stage, also where it had ended."""
        self._book(self._stage, now)
        self._stage = None

    def elapsed(self, stage: str, now: float) -> float:
        """Seconds that a stage has taken until now."""
        runs = stage == self._stage and not self._is_over
        return self.seconds[stage] + (now - self._since if runs else 0.0)

    def remaining(self, stage: str, now: float) -> float | None:
        """Seconds that a stage will still take, None where nothing can be said or is left."""
        return self._paces[stage].remaining(self.elapsed(stage, now))

    def remaining_with_others(self, stage: str, now: float) -> float | None:
        """The same with the work of other stages that comes before its last step.

        That is what is left of a stage that takes turns with it, and of one that runs in between.

        Worked example: hessians 1 of 4 after 1 s, then bank 1 of 4 after another 9 s: 3 s and 27 s
        are left, so both stages have 30 s left. While the bank's first step runs nothing is known.
        """
        pace = self._paces[stage]
        if pace.is_over:
            return None
        others = {self._stage} if not self._is_over else set()
        others |= {name for pair in ALTERNATING if stage in pair for name in pair}
        open_ = [n for n in others if n in self._paces and not self._paces[n].is_over]
        parts = [self.remaining(n, now) for n in {stage, *open_}]
        known = [seconds for seconds in parts if seconds is not None]
        return sum(known) if len(known) == len(parts) else None

    def _book(self, stage: str | None, now: float) -> None:
        if self._stage is not None and stage is not None:
            self.seconds[stage] += now - self._since
        self._since = now


@dataclass
class StageClock:
    """Forwards progress calls and books the seconds of each stage, see `StageTimes`.

    Attributes:
        forward: where the calls go.
        times: of the stages so far.
    """

    forward: Progress
    times: StageTimes = field(default_factory=StageTimes)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by stage, in order of first appearance."""
        return self.times.seconds

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `Progress`: the stage that runs from now on, and how far it is."""
        self.times.record(stage, done, total, time.perf_counter())
        self.forward(stage, done, total)

    def shifted(self, offset: int, total: int) -> Progress:
        """Progress of one part of a stage: `offset` steps were done before it, of `total`."""
        return lambda stage, done, _: self(stage, offset + done, total)

    def stop(self) -> None:
        """Book the time of the last stage."""
        self.times.stop(time.perf_counter())
