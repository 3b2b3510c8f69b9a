"""What a study measures of every trial besides bits and KL: further objectives, or only reported.

A score is asked for by the name of its metric (`expert_overlap`, `mmlu.acc`), or by the name of
its evaluator, which stands for that evaluator's first metric (`drift` for `router_kl`,
`mmlu_anatomy` for `mmlu_anatomy.acc`). `plan_scores` finds the names before anything long runs;
`open_scores` makes what needs the original model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Evaluator, Metric, Score, Subject
from alphaquant.evaluators.divergence import DivergenceEvaluator
from alphaquant.evaluators.harness import HarnessEvaluator
from alphaquant.evaluators.harness_tasks import HarnessRequest
from alphaquant.evaluators.latency import LatencyEvaluator, read_latency_table
from alphaquant.evaluators.local_tasks import check_tasks, open_harness
from alphaquant.evaluators.registry import EVALUATORS, Ground, find, metrics_of, nearest
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, no_progress
from alphaquant.specs.scores import ScoreSpec

ALWAYS = ("bits", "kl")
"""Objectives of every study."""

WITH_KL = ("kl", "perplexity")
"""Evaluators whose metrics come with every KL, so that they are not made."""

IN_ROW = tuple(m for m in DivergenceEvaluator.metrics if m.name != "kl")
"""What comes with every KL, so that it needs no evaluator of its own."""


@dataclass(frozen=True)
class ScorePlan:
    """What was asked for, found.

    Attributes:
        objectives: what the study optimizes besides bits and KL.
        reported: what is only written down.
        windows: names of the evaluators on windows and sizes that this takes.
        latency: the latency evaluator, where asked for.
        harness: the evaluator of lm-eval's tasks, where asked for.
    """

    objectives: tuple[Metric, ...] = ()
    reported: tuple[Metric, ...] = ()
    windows: tuple[str, ...] = ()
    latency: LatencyEvaluator | None = None
    harness: HarnessEvaluator | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All of them, objectives first."""
        return (*self.objectives, *self.reported)

    @property
    def measured(self) -> frozenset[str]:
        """Names of those that an evaluator has to measure."""
        in_row = {m.name for m in IN_ROW}
        return frozenset(m.name for m in self.metrics if m.name not in in_row)

    def facts(self) -> dict[str, str]:
        """sha256 of the latency table, which trials depend on too."""
        return {} if self.latency is None else {"latency_table": self.latency.table.digest}


@dataclass(frozen=True)
class Scorer:
    """Measures what a plan asks for.

    Attributes:
        plan: what was asked for.
        evaluators: what measures it.
    """

    plan: ScorePlan = field(default_factory=ScorePlan)
    evaluators: tuple[Evaluator, ...] = ()

    def measure(self, subject: Subject) -> tuple[Score, ...]:
        """The scores that were asked for, those aside that come with every KL."""
        found = [s for e in self.evaluators for s in e.evaluate(subject).scores]
        return tuple(score for score in found if score.metric in self.plan.measured)


def check_scores(spec: ScoreSpec) -> None:
    """Refuse what is wrong whatever the model.

    Raises:
        ConfigError: bits or KL are missing, a name is asked for twice, or an option is missing or
            of no use.
        DataError: the latency table cannot be read.
    """
    asked = split_names(spec.objectives)
    if asked[:2] != ALWAYS:
        raise ConfigError(
            f"objectives {spec.objectives!r}: a study trades bits for KL, so they begin with "
            f"{','.join(ALWAYS)}; add others behind them, such as bits,kl,drift"
        )
    names = (*asked, *split_names(spec.also))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{', '.join(twice)} asked for twice; name every score once")
    found = {name: find(name) for name in names[2:]}
    tasks = [name for name, evaluator in found.items() if evaluator is None]
    has_table = spec.latency_table is not None
    if ("latency" in found.values()) != has_table:
        raise ConfigError(
            "latency needs a measured table; give --latency-table FILE (docs/sensitivity.md)"
            if not has_table
            else f"--latency-table {spec.latency_table} without latency; add it to --objectives "
            "or --also"
        )
    if spec.latency_table is not None:
        read_latency_table(spec.latency_table)
    _check_tasks(spec, tasks)


def _check_tasks(spec: ScoreSpec, tasks: Sequence[str]) -> None:
    """Refuse tasks of lm-eval that cannot be, and their options where there are none."""
    for name in tasks:
        near = nearest(name)
        if near:
            raise ConfigError(f"unknown score {name!r}; did you mean {near}?")
    if not tasks and (spec.task_data, spec.shots) != (None, None):
        raise ConfigError(
            "--task-data and --shots are for tasks of lm-eval, and none is asked for; add one "
            "such as mmlu_anatomy to --objectives or --also"
        )
    check_tasks([name.partition(".")[0] for name in tasks], spec.task_data)


def plan_scores(spec: ScoreSpec, tokenizer: Any, bos: str = "auto") -> ScorePlan:
    """Find every name.

    Args:
        spec: what was asked for, see `check_scores`.
        tokenizer: of transformers, the model's.
        bos: what texts of lm-eval's tasks start with, as in `TextSpec`.

    Raises:
        ConfigError, DataError: a name that does not exist, lm-eval's tasks without lm-eval or
            data, or a table that cannot be read.
    """
    objectives, reported = split_names(spec.objectives)[2:], split_names(spec.also)
    evaluators = {name: find(name) for name in (*objectives, *reported)}
    tasks = tuple(name.partition(".")[0] for name, found in evaluators.items() if found is None)
    harness = None
    if tasks:
        names = tuple(dict.fromkeys(tasks))
        request = HarnessRequest(names, n_shots=spec.shots, limit=spec.task_limit)
        harness = open_harness(request, tokenizer, bos, spec.task_data)
    latency = None
    if spec.latency_table is not None:
        latency = LatencyEvaluator(read_latency_table(spec.latency_table))
    return ScorePlan(
        tuple(_metric(name, harness) for name in objectives),
        tuple(_metric(name, harness) for name in reported),
        tuple(sorted({found for found in evaluators.values() if found} - set(WITH_KL))),
        latency,
        harness,
    )


def open_scores(
    plan: ScorePlan,
    model_map: ModelMap,
    tokens: Tensor,
    active_share: Mapping[str, float],
    progress: Progress = no_progress,
) -> Scorer:
    """Make the evaluators of a plan.

    Args:
        plan: what was asked for.
        model_map: the original model, its weights in place.
        tokens: int64 [N, T], windows of the evaluation text.
        active_share: matrix name -> share of tokens that reach it, of routed experts.
        progress: called with ("scores", windows done, windows) where the original is run.

    Raises:
        ModelError: the model has no routed experts, and drift or utilization is asked for.
    """
    ground = Ground(
        model_map.model,
        tokens,
        active_share=active_share,
        latency=plan.latency,
        progress=progress,
    )
    made = [EVALUATORS[name].make(ground) for name in plan.windows]
    return Scorer(plan, (*made, *(() if plan.harness is None else (plan.harness,))))


def split_names(text: str) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _metric(name: str, harness: HarnessEvaluator | None) -> Metric:
    """The metric behind a name."""
    if find(name) is not None:
        return metrics_of(name)[0]
    assert harness is not None, "tasks were asked for"
    task, _, rest = name.partition(".")
    known = [m for m in harness.metrics if m.name.partition(".")[0] == task]
    found = next((m for m in known if not rest or m.name == name), None)
    if found is None:
        raise ConfigError(
            f"unknown score {name!r}; of {task} there is "
            f"{', '.join(m.name for m in known) or 'none that aggregates'}"
        )
    return found
