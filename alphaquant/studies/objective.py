"""From an assignment to the numbers of a trial: swap the weights in, compare with the teacher."""

from dataclasses import dataclass, field

from torch import Tensor

from alphaquant.evaluators.base import Score
from alphaquant.evaluators.data import TokenSet
from alphaquant.evaluators.divergence import (
    Divergence,
    Teacher,
    compare_predictions,
    measure_divergence,
)
from alphaquant.evaluators.suffix import SuffixModel
from alphaquant.quant.sites import ModelMap
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.evaluations import EvaluationLog, first_windows


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


@dataclass
class Objective:
    """Evaluates assignments on one model; counts the evaluations that ran the model.

    Attributes:
        swapper: the model.
        batch_size: windows per forward pass.
        n_evaluations: how often the model ran over a text.
    """

    swapper: Swapper
    batch_size: int = 8
    n_evaluations: int = field(default=0)

    def measure(self, assignment: Assignment, on: EvaluationSet) -> Measured:
        """Scores of an assignment on a text."""
        found = self.divergence(assignment, on)
        return Measured(tuple(found.scores(on.tokens.digest)), found.kl)

    def divergence(self, assignment: Assignment, on: EvaluationSet) -> Divergence:
        """What `measure` summarizes, per window."""
        self.swapper.apply(assignment)
        self.n_evaluations += 1
        return measure_divergence(
            self.swapper.model, on.tokens.tokens, on.teacher, batch_size=self.batch_size
        )


@dataclass
class SearchObjective:
    """Evaluates assignments on the text that a search sees, as cheaply as it can.

    What was measured before is read from the log; layers below the first one in which an
    assignment differs from the incumbent are not run; a measurement can be of the first windows
    only and go on later. Numbers depend on the assignment alone, not on the incumbent.

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
    _incumbent: Assignment | None = field(default=None)
    _remembered: Assignment | None = field(default=None)
    _suffix: SuffixModel | None = field(default=None)

    @property
    def n_windows(self) -> int:
        """Windows of the text."""
        return len(self.on.tokens.tokens)

    def accept(self, assignment: Assignment) -> None:
        """Make an assignment the incumbent: the next ones differ from it in few layers."""
        self._incumbent = assignment  # its hidden states are made when a measurement needs them

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
        suffix, first_layer = self._ready(assignment)
        self.swapper.apply(assignment)
        first_batch = self.log.n_windows(assignment.digest) // self.batch_size
        compared = compare_predictions(
            suffix.predict(first_layer, first_batch),
            self.on.tokens.tokens,
            self.on.teacher,
            batch_size=self.batch_size,
            first_batch=first_batch,
        )
        share = (suffix.n_layers - first_layer) / suffix.n_layers
        self.n_evaluations += 1
        for part in compared:
            self.log.add(assignment.digest, part)
            self.n_passes += share * len(part.kl) / self.n_windows
            if self.log.n_windows(assignment.digest) >= n_windows:
                break

    def _ready(self, assignment: Assignment) -> tuple[SuffixModel, int]:
        """Hidden states to start from, and the first layer that has to run on them."""
        if self._suffix is None or self._remembered is None:
            self._remembered = self._incumbent or assignment
            self.swapper.apply(self._remembered)
            self._suffix = SuffixModel(self.model_map, self.on.tokens.tokens, self.batch_size)
            self._count_remembering(0)
        # Remembering costs as much as a measurement; it pays where lower layers are then spared.
        incumbent = self._incumbent or self._remembered
        if incumbent != self._remembered and self._first_change(incumbent, assignment) > 0:
            first = self._first_change(self._remembered, incumbent)
            self.swapper.apply(incumbent)
            self._suffix.remember(first)
            self._count_remembering(first)
            self._remembered = incumbent
        return self._suffix, self._first_change(self._remembered, assignment)

    def _count_remembering(self, first_layer: int) -> None:
        """Hidden states behind the last layer are not kept, so that one does not run."""
        n_layers = len(self.model_map.layers)
        self.n_passes += (n_layers - 1 - first_layer) / n_layers

    def _first_change(self, old: Assignment, new: Assignment) -> int:
        """The first layer in which two assignments differ, the last one if in none."""
        matrices = self.model_map.inventory.matrices
        changed = [m.layer for m in matrices if old.formats[m.name] != new.formats[m.name]]
        return min(changed, default=len(self.model_map.layers) - 1)
