"""Deterministic proposals: which parameters the next trial of a study gets.

The proposals depend only on the seed and on the trials that are finished: COMPLETE or PRUNED. A
sampler is made anew for each trial, seeded by (seed, number of finished trials), so it has no
state that a kill could lose; trials that a kill left RUNNING or WAITING become FAIL and are
proposed again. This is for one process per study: two that ask at the same count of finished
trials get the same proposal. A trial that always fails is proposed for ever; the caller decides
when to stop.

Objectives run elsewhere: a caller asks with `next_trial`, suggests, scores, and tells the study.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from alphaquant.errors import ConfigError

logger = logging.getLogger(__name__)

_POPULATION_SIZE = 20

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that count: both have numbers, and both are in the storage for good."""


@dataclass(frozen=True)
class PlannedTrial:
    """A trial whose parameters are known before anything is sampled.

    Attributes:
        params: fixed parameters; those it leaves out are sampled.
        attrs: user attributes of the trial, such as the allocator's name.
    """

    params: Mapping[str, bool | int | float | str]
    attrs: Mapping[str, str | int | float | bool] = field(default_factory=dict)


class _OrderedNSGAII(NSGAIISampler):
    """NSGA-II whose parents come in order of trial numbers.

    Optuna caches a generation's parents in the study, and gives them in order of selection before
    and in order of trials after: a kill between the two would change the next children.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        """The parents of a generation, by trial number."""
        return sorted(super().get_parent_population(study, generation), key=lambda t: t.number)


def _make_tpe(seed: int) -> BaseSampler:
    # Without the constant liar, which looks at RUNNING trials too.
    return TPESampler(seed=seed, constant_liar=False)


def _make_gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, warn_independent_sampling=False)


def _make_nsga2(seed: int) -> BaseSampler:
    return _OrderedNSGAII(seed=seed, population_size=_POPULATION_SIZE)


def _make_random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = MappingProxyType(
    {"tpe": _make_tpe, "gp": _make_gp, "nsga2": _make_nsga2, "random": _make_random}
)
"""Every sampler by name, made from a seed; `gp` needs torch, which Optuna imports at its use."""


def make_sampler(name: str, seed: int, n_finished: int) -> BaseSampler:
    """A fresh sampler for the trial after `n_finished` finished ones.

    Args:
        name: one of `SAMPLERS`.
        seed: of the study, >= 0.
        n_finished: finished trials of the study.

    Raises:
        ConfigError: an unknown name or a negative seed.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; use one of {', '.join(SAMPLERS)}")
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative; use 0 or more")
    return SAMPLERS[name](int(np.random.SeedSequence((seed, n_finished)).generate_state(1)[0]))


def next_trial(
    study: optuna.Study, fixed: PlannedTrial, sampler_name: str, seed: int
) -> optuna.Trial:
    """Ask for the next trial.

    Sets the study's sampler, and fails whatever waits in its queue, because `ask` would take that
    first.

    Args:
        study: the study; its finished trials alone decide.
        fixed: what is known of the trial; parameters that it leaves out are sampled.
        sampler_name: one of `SAMPLERS`.
        seed: of the study, >= 0.

    Returns:
        A RUNNING trial to suggest from and to tell about.

    Raises:
        ConfigError: an unknown sampler or a negative seed.
    """
    _fail_waiting(study)
    n_finished = len(study.get_trials(deepcopy=False, states=FINISHED))
    study.sampler = make_sampler(sampler_name, seed, n_finished)
    if fixed.params or fixed.attrs:
        study.enqueue_trial(dict(fixed.params), user_attrs=dict(fixed.attrs))
    return study.ask()


def fail_stale_trials(study: optuna.Study) -> int:
    """Turn trials that a killed process left RUNNING or WAITING into FAIL.

    Call it once when a process takes a study over; it would also fail the trials of another
    process that still runs.

    Args:
        study: the study.

    Returns:
        How many trials it failed.
    """
    n_stale = _fail_waiting(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        n_stale += 1
    return n_stale


def _fail_waiting(study: optuna.Study) -> int:
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    for _ in waiting:
        # Optuna tells RUNNING trials only; asking takes the oldest that waits and makes it one.
        study.tell(study.ask(), state=TrialState.FAIL)
    if waiting:
        logger.warning("failed %d trials that waited in the study's queue", len(waiting))
    return len(waiting)
