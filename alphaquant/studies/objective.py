"""From an assignment to the numbers of a trial: swap the weights in, compare with the teacher."""

from dataclasses import dataclass, field

from torch import Tensor

from alphaquant.evaluators.base import Score
from alphaquant.evaluators.divergence import (
    Divergence,
    Teacher,
    compare_predictions,
    measure_divergence,
)
from alphaquant.evaluators.perplexity import predict
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import batches_of
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment
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


@dataclass(frozen=True)
class Objective:
    """Evaluates assignments on one model.

    Attributes:
        swapper: the model.
        batch_size: windows per forward pass.
    """

    swapper: Swapper
    batch_size: int = 8

    def measure(self, assignment: Assignment, on: EvaluationSet) -> Measured:
        """Scores of an assignment on a text."""
        found = self.divergence(assignment, on)
        return Measured(tuple(found.scores(on.tokens.digest)), found.kl)

    def divergence(self, assignment: Assignment, on: EvaluationSet) -> Divergence:
        """What `measure` summarizes, per window."""
        self.swapper.apply(assignment)
        return measure_divergence(
            self.swapper.model, on.tokens.tokens, on.teacher, batch_size=self.batch_size
        )


@dataclass
class SearchObjective:
    """Evaluates assignments on the text that a search sees, as cheaply as it can.

    What was measured before is read from the log; a measurement can be of the first windows only
    and go on later.

    Attributes:
        model_map: the model.
        swapper: writes its weights.
        on: the text.
        log: what was measured before.
        batch_size: windows per forward pass.
        n_evaluations: assignments measured in this run, on however many windows.
        n_passes: work of this run in passes of the whole model over the whole text.
    """

    model_map: ModelMap
    swapper: Swapper
    on: EvaluationSet
    log: EvaluationLog
    batch_size: int = 8
    n_evaluations: int = field(default=0)
    n_passes: float = field(default=0.0)

    @property
    def n_windows(self) -> int:
        """Windows of the text."""
        return len(self.on.tokens.tokens)

    def measure(self, assignment: Assignment, n_windows: int | None = None) -> Measured:
        """Scores over the first windows, rounded up to whole batches; None for all."""
        wanted = min(n_windows or self.n_windows, self.n_windows)
        if self.log.n_windows(assignment.digest) < wanted:
            self._run(assignment, wanted)
        found = self.log.get(assignment.digest)
        assert found is not None, "a measurement is logged"
        found = first_windows(found, wanted)
        return Measured(tuple(found.scores(self.on.tokens.digest)), found.kl)

    def _run(self, assignment: Assignment, n_windows: int) -> None:
        """Measure the batches that are missing, up to `n_windows`."""
        self.swapper.apply(assignment)
        first_batch = self.log.n_windows(assignment.digest) // self.batch_size
        tokens = self.on.tokens.tokens
        batches = batches_of(tokens, self.batch_size)[first_batch:]
        compared = compare_predictions(
            (predict(self.swapper.model, batch) for batch in batches),
            tokens,
            self.on.teacher,
            batch_size=self.batch_size,
            first_batch=first_batch,
        )
        self.n_evaluations += 1
        for part in compared:
            self.log.add(assignment.digest, part)
            self.n_passes += len(part.kl) / self.n_windows
            if self.log.n_windows(assignment.digest) >= n_windows:
                break
