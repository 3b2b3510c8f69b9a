"""The Optuna study behind a search: opened, checked, taken up again, and read back as rows."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, get_storage
from optuna.trial import FrozenTrial, TrialState

from alphaquant.errors import StoreError
from alphaquant.evaluators.base import Metric
from alphaquant.lease import Lease
from alphaquant.search.sampler import FINISHED, fail_stale_trials
from alphaquant.spaces.assignment import BitCount
from alphaquant.studies.objective import Measured
from alphaquant.studies.store.guarded import OUTAGE_SECONDS, GuardedStorage, StudyBoard
from alphaquant.studies.store.storages import explained, open_storage
from alphaquant.studies.store.urls import is_served, shown_url

OBJECTIVES = ("bits_per_weight", "kl")
_DIGEST = "facts_digest"
_ROW = "alphaquant:row"
_ATTRIBUTES = (
    *("origin", "digest", "bits_per_weight", "checkpoint_bytes"),
    *("kl", "kl_stderr", "predicted_kl"),
)


@dataclass(frozen=True)
class TrialRow:
    """A finished trial.

    Attributes:
        number: place among the finished trials, from 0. Not Optuna's number, which also counts
            trials that a kill cut short, so that an interrupted study numbers as one that was not.
        origin: `uniform:int4-g64`, `allocator:error`, `size`, `knobs`, `groups`.
        digest: of its assignment.
        bits_per_weight: stored bits per quantizable weight.
        checkpoint_bytes: bytes of all tensors.
        kl: nats per token on the evaluation text.
        kl_stderr: its standard error over windows.
        kl_per_window: KL of each measured window.
        same_top: share of positions with the same first token.
        perplexity: on the evaluation text.
        predicted_kl: sum of the Fisher costs.
        gap: the solver's certified gap, None for uniform.
        seconds: wall time.
        duplicate_of: earlier trial with the same assignment, whose numbers were taken over.
        is_pruned: measured on its first windows only, because a trial that is no larger was
            better there beyond doubt; its numbers are those of these windows.
        extra: other scores on the evaluation text, by metric; see
            `alphaquant.evaluators.scores`.
        extra_stderr: their standard errors, of those that are means.
    """

    number: int
    origin: str
    digest: str
    bits_per_weight: float
    checkpoint_bytes: int
    kl: float
    kl_stderr: float
    kl_per_window: tuple[float, ...]
    same_top: float
    perplexity: float
    predicted_kl: float
    gap: float | None
    seconds: float
    duplicate_of: int | None = None
    is_pruned: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)
    extra_stderr: Mapping[str, float] = field(default_factory=dict)

    def score(self, metric: str) -> float:
        """A number of the trial by its metric."""
        return self.extra[metric] if metric in self.extra else float(getattr(self, metric))


@contextmanager
def open_study(
    url: str, name: str, digest: str, objectives: Sequence[Metric] = ()
) -> Iterator[optuna.Study]:
    """Create a study, or take up the one of the same name and facts; closed on leaving.

    No other search can open it meanwhile: the study itself holds the claim of this process, see
    `alphaquant.lease`. Trials that a killed process left running are failed; their parameters come
    again, because proposals depend on finished trials only.

    Args:
        url: of the Optuna storage.
        name: of the study.
        digest: of the search's facts.
        objectives: those besides bits and KL.

    Raises:
        StoreError: the storage is damaged or unreachable, also later while the study is open, or
            the study belongs to another search or is in use by another process.
    """
    what = f"study {name!r} in {shown_url(url)}"
    with open_storage(url) as storage:
        with explained(url):
            found = _made(storage, name, objectives)
            _check_owner(found, digest, what)
            lease = Lease(StudyBoard(storage, found._study_id), what, "--study")
            lease.acquire()
        try:
            with explained(url):
                seconds = OUTAGE_SECONDS if is_served(url) else 0.0
                inner, study_id = get_storage(storage), found._study_id
                guarded = GuardedStorage(inner, study_id, lease.check, shown_url(url), seconds)
                study = optuna.load_study(study_name=name, storage=guarded)
                _check_owner(study, digest, what)  # whoever had the lease before may have taken it
                _take_up(study, digest, objectives)
            yield study
        finally:
            lease.release()


def our_studies(storage: BaseStorage) -> list[str]:
    """Names of the studies in a storage that searches made."""
    return [s.study_name for s in storage.get_all_studies() if _DIGEST in s.user_attrs]


def finish_trial(
    study: optuna.Study, trial: optuna.Trial, row: TrialRow, objectives: Sequence[Metric] = ()
) -> None:
    """Store a trial's numbers, then finish it; a kill between the two leaves it unfinished.

    The row is one system attribute, which is read back; a dashboard does not show those, and a
    row is wider than any page. Some of it is there a second time, one by one, for whoever sorts
    and filters trials; not all, because SQLite takes 20 to 40 ms for each on a common disk.
    """
    stored = {k: v for k, v in asdict(row).items() if k != "number"}
    known = trial.user_attrs
    for key in _ATTRIBUTES:
        # The origin is known since the trial was planned; pages cannot read infinite numbers.
        if known.get(key) != stored[key] and stored[key] != math.inf:
            trial.set_user_attr(key, stored[key])
    storage = trial.storage
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    storage.set_trial_system_attr(trial_id, _ROW, stored)
    if row.is_pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        others = [row.score(metric.name) for metric in objectives]
        study.tell(trial, [row.bits_per_weight, row.kl, *others])


def finished_rows(study: optuna.Study) -> list[TrialRow]:
    """Rows of all finished trials, in the order in which they started.

    Raises:
        StoreError: a trial lacks its numbers.
    """
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    ordered = sorted(finished, key=lambda t: t.number)
    return [_row(number, trial, study.study_name) for number, trial in enumerate(ordered)]


def make_row(number: int, origin: str, digest: str, counts: BitCount, found: Measured) -> TrialRow:
    """The row of a trial that was just measured; prediction and gap are still to be filled in."""
    kl = found.score("kl")
    return TrialRow(
        number=number,
        origin=origin,
        digest=digest,
        bits_per_weight=counts.bits_per_weight,
        checkpoint_bytes=counts.checkpoint_bytes,
        kl=kl.value,
        kl_stderr=found.stderr("kl"),
        kl_per_window=tuple(float(v) for v in found.kl),
        same_top=found.score("same_top").value,
        perplexity=found.score("perplexity").value,
        predicted_kl=0.0,
        gap=None,
        seconds=kl.seconds,
    )


def find_duplicate(rows: Sequence[TrialRow], digest: str) -> TrialRow | None:
    """The first row with this assignment."""
    return next((row for row in rows if row.digest == digest), None)


def _made(storage: BaseStorage, name: str, objectives: Sequence[Metric]) -> optuna.Study:
    """The study of a name, made if there is none."""
    return optuna.create_study(
        storage=storage,
        study_name=name,
        directions=["minimize", "minimize", *(metric.direction for metric in objectives)],
        load_if_exists=True,
    )


def _check_owner(study: optuna.Study, digest: str, what: str) -> None:
    """Refuse the study of another search, or of somebody else.

    Raises:
        StoreError: naming it.
    """
    found = study.user_attrs.get(_DIGEST)
    if found != digest and (found is not None or study.trials):
        raise StoreError(f"{what} belongs to another search; give another --study")


def _take_up(study: optuna.Study, digest: str, objectives: Sequence[Metric]) -> None:
    """Make a study ours where it is new, and end what a killed process left running in it."""
    if _DIGEST not in study.user_attrs:
        with warnings.catch_warnings():
            # Names for dashboards only; nothing reads them back.
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names([*OBJECTIVES, *(metric.name for metric in objectives)])
        study.set_user_attr(_DIGEST, digest)
    fail_stale_trials(study)


def _row(number: int, trial: FrozenTrial, study_name: str) -> TrialRow:
    stored = trial.system_attrs.get(_ROW)
    wanted = {f.name for f in fields(TrialRow)} - {"number"}
    if not isinstance(stored, dict) or stored.keys() != wanted:
        raise StoreError(
            f"trial {trial.number} of study {study_name!r} lacks its numbers: another program "
            "changed the study; give another --study, and another --out"
        )
    values: dict[str, Any] = {**stored, "kl_per_window": tuple(stored["kl_per_window"])}
    return TrialRow(number=number, **values)
