"""From an assignment to the numbers of a trial: swap the weights in, compare with the teacher."""

from dataclasses import dataclass, field

from torch import Tensor

from alphaquant.evaluators.base import Score
from alphaquant.evaluators.data import TokenSet
from alphaquant.evaluators.divergence import Divergence, Teacher, measure_divergence
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment


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
        self.swapper.apply(assignment)
        found: Divergence = measure_divergence(
            self.swapper.model, on.tokens.tokens, on.teacher, batch_size=self.batch_size
        )
        self.n_evaluations += 1
        return Measured(tuple(found.scores(on.tokens.digest)), found.kl)
