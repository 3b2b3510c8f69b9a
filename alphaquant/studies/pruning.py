"""When a trial need not be measured to its end: Optuna's Wilcoxon test on paired windows.

Optuna prunes studies of one objective only, and ours has two. So the test is asked about a study
of one objective that holds nothing but the rival.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from optuna.trial import FrozenTrial, TrialState, create_trial

P_VALUE = 0.02
"""Chance of calling a trial worse that is as good, at each of a handful of looks."""

LEAST_WINDOWS = 8


def is_hopeless(found: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether a trial is worse than its rival beyond doubt.

    Args:
        found: KL of the trial's first windows.
        rival: KL of all windows of a trial that is no larger.
    """
    with _quiet():
        study = optuna.create_study(direction="minimize")
        study.add_trial(
            create_trial(value=fmean(rival), intermediate_values=dict(enumerate(rival)))
        )
        pruner = WilcoxonPruner(p_threshold=P_VALUE, n_startup_steps=LEAST_WINDOWS)
    running: FrozenTrial = create_trial(
        state=TrialState.PRUNED, value=fmean(found), intermediate_values=dict(enumerate(found))
    )
    return pruner.prune(study, running)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces every study, and that the pruner may change."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
