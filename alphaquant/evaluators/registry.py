"""Every evaluator by name: the one list behind `aq-eval --tasks`, `--objectives` and `--also`.

An evaluator is asked for by its own name, or by one of its metrics. Tasks of lm-eval are every
other name (`alphaquant.evaluators.harness`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Evaluator, Metric
from alphaquant.evaluators.divergence import DivergenceEvaluator
from alphaquant.evaluators.drift import RoutingDriftEvaluator
from alphaquant.evaluators.footprint import FootprintEvaluator
from alphaquant.evaluators.latency import LatencyEvaluator
from alphaquant.evaluators.perplexity import PerplexityEvaluator
from alphaquant.evaluators.routes import keep_routes
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.evaluators.utilization import UtilizationEvaluator
from alphaquant.progress import Progress, no_progress


@dataclass(frozen=True)
class Ground:
    """What evaluators are made from; each takes what it needs.

    Attributes:
        model: the original, its weights in place; the measured model where there is none.
        tokens: int64 [N, T], windows of text.
        batch_size: windows per forward pass.
        folder: for what is kept of the original's predictions; needed for `kl`.
        active_share: matrix name -> share of tokens that reach it, of routed experts.
        latency: with its table of measured times; needed for `latency`.
        progress: called with a stage's name, steps done, steps.
    """

    model: nn.Module
    tokens: Tensor
    batch_size: int = 8
    folder: Path | None = None
    active_share: Mapping[str, float] = field(default_factory=dict)
    latency: LatencyEvaluator | None = None
    progress: Progress = no_progress


@dataclass(frozen=True)
class Entry:
    """An evaluator that can be asked for.

    Attributes:
        metrics: what its name stands for; the first is what a study optimizes.
        make: makes it.
        compares: whether it needs the original model.
        counts: whether it looks at an assignment of formats instead of running the model.
    """

    metrics: tuple[Metric, ...]
    make: Callable[[Ground], Evaluator]
    compares: bool = False
    counts: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""
        return tuple(metric.name for metric in self.metrics)


def find(name: str) -> str | None:
    """The evaluator of a name, which is its own or one of its metrics'; None if there is none."""
    if name in EVALUATORS:
        return name
    return next((known for known, entry in EVALUATORS.items() if name in entry.names), None)


def metrics_of(name: str) -> tuple[Metric, ...]:
    """What a name asks for: one metric, or all of an evaluator.

    Raises:
        KeyError: no evaluator has it.
    """
    if name in EVALUATORS:
        return EVALUATORS[name].metrics
    return tuple(m for entry in EVALUATORS.values() for m in entry.metrics if m.name == name)[:1]


def nearest(name: str) -> str | None:
    """The known name that a wrong one may have meant, None if none is like it."""
    known = [*EVALUATORS, *(n for entry in EVALUATORS.values() for n in entry.names)]
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.75)), None)


def _divergence(ground: Ground) -> Evaluator:
    assert ground.folder is not None, "kl keeps the original's predictions"
    path, size = ground.folder / "teacher.safetensors", ground.batch_size
    teacher = store_teacher(
        path, ground.model, ground.tokens, batch_size=size, progress=ground.progress
    )
    return DivergenceEvaluator(ground.tokens, teacher, size)


def _perplexity(ground: Ground) -> Evaluator:
    return PerplexityEvaluator(ground.tokens, ground.batch_size)


def _utilization(ground: Ground) -> Evaluator:
    return UtilizationEvaluator(ground.tokens, ground.batch_size)


def _drift(ground: Ground) -> Evaluator:
    routes = keep_routes(ground.model, ground.tokens, ground.batch_size, progress=ground.progress)
    return RoutingDriftEvaluator(ground.tokens, routes)


def _footprint(ground: Ground) -> Evaluator:
    return FootprintEvaluator(ground.active_share)


def _latency(ground: Ground) -> Evaluator:
    if ground.latency is None:
        raise ConfigError(
            "latency needs a measured table; give --latency-table FILE (docs/sensitivity.md)"
        )
    return replace(ground.latency, active_share=ground.active_share)


EVALUATORS: Mapping[str, Entry] = MappingProxyType(
    {
        "kl": Entry(DivergenceEvaluator.metrics[:2], _divergence, compares=True),
        "perplexity": Entry(PerplexityEvaluator.metrics, _perplexity),
        "utilization": Entry(UtilizationEvaluator.metrics, _utilization),
        "drift": Entry(RoutingDriftEvaluator.metrics, _drift, compares=True),
        "footprint": Entry(FootprintEvaluator.metrics[2:], _footprint, counts=True),
        "latency": Entry(LatencyEvaluator.metrics, _latency, counts=True),
    }
)
"""All of them. Of the footprint only active bytes: bits and bytes come with every trial."""
