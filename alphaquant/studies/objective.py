"""From assignments to the numbers of trials: measured together, remembered in a log."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from alphaquant.evaluators.base import Score
from alphaquant.evaluators.divergence import Divergence
from alphaquant.evaluators.teacher import Teacher
from alphaquant.models.sites import ModelMap
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.rounds import Rounds, Steps, tell_nobody
from alphaquant.studies.store.scores import EvaluationLog, first_windows
from alphaquant.texts.windows import TokenSet


@dataclass(frozen=True)
class EvaluationSet:
    """A text with the original model's predictions on it."""

    tokens: TokenSet
    teacher: Teacher


@dataclass(frozen=True)
class Measured:
    """What one evaluation found.

    Attributes:
        scores: KL, same-top, perplexity.
        kl: float32 [N], KL per window, for paired comparisons.
    """

    scores: tuple[Score, ...]
    kl: Tensor

    def score(self, metric: str) -> Score:
        """The score of a metric."""
        return next(s for s in self.scores if s.metric == metric)

    def stderr(self, metric: str) -> float:
        """The standard error of a metric."""
        stderr = self.score(metric).stderr
        assert stderr is not None, f"{metric} is a mean over windows"
        return stderr


class Measures(Protocol):
    """Measures assignments batch by batch: `Rounds`, or the same by workers."""

    @property
    def batch_size(self) -> int:
        """Windows of a batch."""

    @property
    def n_at_once(self) -> int:
        """Batches of a text that are measured at the same time."""

    def measure(
        self,
        assignments: Sequence[Assignment],
        tokens: Tensor,
        teacher: Teacher,
        batches: range,
        tell: Steps = tell_nobody,
    ) -> Iterator[tuple[Assignment, Divergence]]:
        """See `Rounds.measure`."""


@dataclass(frozen=True)
class Objective:
    """Evaluates assignments on one model, whose weights are the same afterwards.

    Attributes:
        swapper: the model and the bank.
        batch_size: windows per forward pass.
        spread: measures in place of this process; None for this process.
    """

    swapper: Swapper
    batch_size: int = 8
    spread: Measures | None = None

    def measure(self, assignment: Assignment, on: EvaluationSet) -> Measured:
        """Scores of an assignment on a text."""
        found = self.divergence(assignment, on)
        return Measured(tuple(found.scores(on.tokens.digest)), found.kl)

    def divergence(self, assignment: Assignment, on: EvaluationSet) -> Divergence:
        """What `measure` summarizes, per window."""
        return self.divergences([assignment], on)[0]

    def divergences(
        self,
        assignments: Sequence[Assignment],
        on: EvaluationSet,
        log: EvaluationLog | None = None,
        tell: Steps = tell_nobody,
    ) -> list[Divergence]:
        """The same of many assignments, measured together.

        Args:
            assignments: different ones.
            on: the text.
            log: what was measured before; it is given what is measured now.
            tell: told how much of the work is done.
        """
        n_windows = len(on.tokens.tokens)
        log = log or EvaluationLog(None, on.tokens.tokens.shape[1])
        rounds = self.spread or Rounds(self.swapper.map, self.swapper.open_layer, self.batch_size)
        for assignment, part in _lacking(rounds, assignments, on, log, n_windows, tell):
            log.add(assignment.digest, part)
        found = [log.get(assignment.digest) for assignment in assignments]
        return [one for one in found if one is not None]


@dataclass
class SearchObjective:
    """Evaluates assignments on the text that a search sees, as cheaply as it can.

    What was measured before is read from the log; a measurement can be of the first windows only
    and go on later.

    Attributes:
        swapper: the model and the bank.
        on: the text.
        log: what was measured before.
        batch_size: windows per forward pass.
        spread: measures in place of this process; None for this process.
        n_evaluations: assignments measured in this run, on however many windows.
        n_passes: windows measured in this run, in parts of the text.
    """

    swapper: Swapper
    on: EvaluationSet
    log: EvaluationLog
    batch_size: int = 8
    spread: Measures | None = None
    n_evaluations: int = field(default=0)
    n_passes: float = field(default=0.0)

    @property
    def model_map(self) -> ModelMap:
        """The model."""
        return self.swapper.map

    @property
    def n_windows(self) -> int:
        """Windows of the text."""
        return len(self.on.tokens.tokens)

    @property
    def rounds(self) -> Measures:
        """What measures."""
        return self.spread or Rounds(self.model_map, self.swapper.open_layer, self.batch_size)

    def measure(
        self, assignment: Assignment, n_windows: int | None = None, *, is_race: bool = False
    ) -> Measured:
        """Scores over the first windows, rounded up to whole batches; None for all.

        Args:
            assignment: what is measured.
            n_windows: how many of the first windows.
            is_race: more will be asked for soon, so workers that would be idle go ahead.
        """
        measured = n_windows
        if is_race and n_windows is not None:
            n_known, rounds = self.log.n_windows(assignment.digest), self.rounds
            if n_known < n_windows:
                measured = n_known + rounds.n_at_once * rounds.batch_size
        self.measure_together([assignment], measured)
        found = self.log.get(assignment.digest)
        assert found is not None, "a measurement is logged"
        found = first_windows(found, self._wanted(n_windows))
        return Measured(tuple(found.scores(self.on.tokens.digest)), found.kl)

    def measure_together(
        self,
        assignments: Sequence[Assignment],
        n_windows: int | None = None,
        tell: Steps = tell_nobody,
    ) -> None:
        """Measure what the log lacks of many assignments, so that `measure` finds it there.

        Args:
            assignments: any; equal ones are measured once.
            n_windows: how many of the first windows; None for all.
            tell: told how much of the work is done.
        """
        rounds = self.rounds
        wanted, measured = self._wanted(n_windows), set()
        for assignment, part in _lacking(rounds, assignments, self.on, self.log, wanted, tell):
            self.log.add(assignment.digest, part)
            measured.add(assignment.digest)
            self.n_passes += len(part.kl) / self.n_windows
        self.n_evaluations += len(measured)

    def _wanted(self, n_windows: int | None) -> int:
        return min(n_windows or self.n_windows, self.n_windows)


def _lacking(
    rounds: Measures,
    assignments: Sequence[Assignment],
    on: EvaluationSet,
    log: EvaluationLog,
    n_windows: int,
    tell: Steps,
) -> Iterator[tuple[Assignment, Divergence]]:
    """Measure what a log lacks of the first windows; those that lack the same go together."""
    lacking: dict[int, dict[str, Assignment]] = {}
    for assignment in assignments:
        n_known = log.n_windows(assignment.digest)
        if n_known < n_windows:
            first = n_known // rounds.batch_size
            lacking.setdefault(first, {})[assignment.digest] = assignment
    end, tokens = -(-n_windows // rounds.batch_size), on.tokens.tokens
    for number, (first, some) in enumerate(lacking.items()):

        def part(done: int, total: int, number: int = number) -> None:
            tell(number * total + done, len(lacking) * total)

        yield from rounds.measure(list(some.values()), tokens, on.teacher, range(first, end), part)
