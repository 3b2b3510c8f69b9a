"""Scores: measured numbers of a model, with everything needed to trust them; and what gives them.

An `Evaluator` turns a model whose weights are in place into scores; each keeps the contract suite
of `alphaquant.testing.evaluators`. Also here: the mean over windows that most scores are, and the
paired comparison of two models. Runs no model.

Letters: N windows (the sequences of a text, which are the independent samples).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Inventory

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Metric:
    """What a score is a measurement of.

    Attributes:
        name: `kl`, `same_top`, `perplexity`, ...
        unit: e.g. `nats/token`.
        direction: whether less or more is better.
    """

    name: str
    unit: str
    direction: Direction


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        metric: `kl`, `same_top`, `perplexity`, ...
        value: the number.
        unit: of the number, e.g. `nats/token`.
        direction: whether less or more is better.
        stderr: standard error of the mean over sequences, which are the independent samples; NaN
            from a single sequence, None for a number that is no mean.
        n_samples: sequences.
        n_tokens: predicted positions.
        seconds: wall time of the measurement (shared by scores of one pass).
        data_digest: sha256 of the token windows.
    """

    metric: str
    value: float
    unit: str
    direction: Direction
    stderr: float | None
    n_samples: int
    n_tokens: int
    seconds: float
    data_digest: str


@dataclass(frozen=True)
class Subject:
    """What an evaluator measures.

    Attributes:
        model: a causal language model with its weights in place, packed or not.
        inventory: its quantizable matrices; None where they are not known.
        assignment: the formats of these; None where they are not known.
    """

    model: nn.Module
    inventory: Inventory | None = None
    assignment: Assignment | None = None


@dataclass(frozen=True)
class Evaluated:
    """What an evaluator found.

    Attributes:
        scores: one of each of its metrics, in their order.
        details: tables behind the scores, ready for JSON; empty where there are none.
    """

    scores: tuple[Score, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


class Evaluator(Protocol):
    """Measures a model; keeps what it needs of texts and of the original model.

    Equal subjects give equal scores, seconds apart. The model is left as it was found: weights,
    training mode, hooks.
    """

    @property
    def name(self) -> str:
        """What it is asked for by: `kl`, `drift`, ..."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What it measures."""

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure.

        Raises:
            AlphaQuantError: the subject lacks what is measured, such as routed experts.
        """


def mean_and_stderr(per_sequence: Tensor) -> tuple[float, float]:
    """Mean and its standard error over sequences.

    (1, 2, 3, 6) gives 3 and sqrt(14 / 3 / 4) = 1.0801: squares of -2, -1, 0, 3 over N - 1, over N.

    Args:
        per_sequence: one number per sequence, [N].

    Returns:
        (mean, standard error); the error of one sequence is NaN.
    """
    values = per_sequence.double()
    n = values.numel()
    stderr = float(values.std(unbiased=True)) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), stderr


def paired_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and standard error of a - b over the same sequences; far sharper than the errors apart.

    Args:
        a: one number per sequence, [N].
        b: the other model's numbers on the same sequences, [N].

    Returns:
        (mean, standard error); the error of one sequence is NaN.
    """
    return mean_and_stderr(a.double() - b.double())
