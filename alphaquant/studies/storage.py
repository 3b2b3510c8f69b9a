"""The Optuna study behind a search: opened, checked, taken up again, and read back as rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from alphaquant.errors import StoreError
from alphaquant.evaluators.base import Score
from alphaquant.search.sampler import fail_stale_trials
from alphaquant.spaces.assignment import BitCount
from alphaquant.studies.objective import Measured

OBJECTIVES = ("bits_per_weight", "kl")
_DIGEST = "spec_digest"


@dataclass(frozen=True)
class TrialRow:
    """A finished trial.

    Attributes:
        number: in the study.
        origin: `uniform:int4-g64`, `allocator:error`, `knobs`.
        digest: of its assignment.
        bits_per_weight: stored bits per quantizable weight.
        checkpoint_bytes: bytes of all tensors.
        kl: nats per token on the evaluation text, its standard error, and KL per window.
        kl_stderr: see `kl`.
        kl_per_window: see `kl`.
        same_top: share of positions with the same first token.
        perplexity: on the evaluation text.
        predicted_kl: sum of the Fisher costs.
        gap: the solver's certified gap, None for uniform.
        seconds: wall time.
        duplicate_of: earlier trial with the same assignment, whose numbers were taken over.
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


def open_study(storage: str, name: str, spec_digest: str) -> optuna.Study:
    """Create a study, or take up the one of the same name and specification.

    Trials that a killed process left running are failed; their parameters come again, because proposals depend on complete
    trials only.

    Raises:
        StoreError: the storage is damaged or unreachable, or the study belongs to another search.
    """
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=["minimize", "minimize"], load_if_exists=True
        )
        study.set_metric_names(list(OBJECTIVES))
        found = study.user_attrs.get(_DIGEST)
        if found is None:
            study.set_user_attr(_DIGEST, spec_digest)
        fail_stale_trials(study)
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ValueError, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise StoreError(
            f"the study storage {storage} cannot be used ({first_line}); if it is damaged, delete it or start again with "
            "--overwrite: banks and costs are kept in the cache"
        ) from error
    if found not in (None, spec_digest):
        raise StoreError(f"study {name!r} in {storage} belongs to a search with other settings; give another --study")
    return study


def finish_trial(study: optuna.Study, trial: optuna.Trial, row: TrialRow) -> None:
    """Store a trial's numbers, then complete it; a kill between the two leaves it unfinished."""
    for key, value in row.__dict__.items():
        if key != "number":
            trial.set_user_attr(key, list(value) if isinstance(value, tuple) else value)
    study.tell(trial, [row.bits_per_weight, row.kl])


def finished_rows(study: optuna.Study) -> list[TrialRow]:
    """Rows of all complete trials, by number."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [_row(trial) for trial in sorted(complete, key=lambda t: t.number)]


def make_row(
    number: int, origin: str, digest: str, counts: BitCount, measured: Measured, predicted_kl: float, gap: float | None
) -> TrialRow:
    """The row of a trial that was just measured."""
    kl, top, perplexity = (measured.score(m) for m in ("kl", "same_top", "perplexity"))
    return TrialRow(
        number,
        origin,
        digest,
        counts.bits_per_weight,
        counts.checkpoint_bytes,
        kl.value,
        _stderr(kl),
        tuple(float(v) for v in measured.kl),
        top.value,
        perplexity.value,
        predicted_kl,
        gap,
        kl.seconds,
    )


def find_duplicate(rows: Sequence[TrialRow], digest: str) -> TrialRow | None:
    """The first row with this assignment."""
    return next((row for row in rows if row.digest == digest), None)


def _stderr(score: Score) -> float:
    assert score.stderr is not None
    return score.stderr


def _row(trial: FrozenTrial) -> TrialRow:
    attrs: dict[str, Any] = {k: v for k, v in trial.user_attrs.items() if k in TrialRow.__dataclass_fields__}
    attrs["kl_per_window"] = tuple(attrs["kl_per_window"])
    return TrialRow(number=trial.number, **attrs)
