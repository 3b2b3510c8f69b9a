"""A storage before Optuna's: it asks the lease before it writes, and waits for servers.

A server that restarts is waited for, for `OUTAGE_SECONDS` at most. What was sent when it went may
have arrived or not, so sending it again must not do it twice: attributes and parameters are set to
the same values, a state that is already the wanted one is taken for ours (nobody else writes while
the lease is held), and a trial that was made twice waits in the queue, where
`alphaquant.search.sampler` fails it before the next one.
"""

import logging
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from alphaquant.lease import Board, Claim, record_of

logger = logging.getLogger(__name__)

OUTAGE_SECONDS = 300.0
"""How long a server that went away is waited for."""

_CLAIM = "alphaquant:claim:"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
# What a proxy says when its database went away; it has no code of its own for that.
_BEHIND_PROXY = ("OperationalError", "InterfaceError", "raised during the commit")

T = TypeVar("T")


@dataclass(frozen=True)
class StudyBoard(Board):
    """Claims as attributes of a study that no dashboard shows, see `alphaquant.lease`.

    Attributes:
        storage: as it was opened, not guarded.
        study_id: of the study in it.
    """

    storage: BaseStorage
    study_id: int

    def read(self) -> dict[str, Claim]:
        """All claims by their token."""
        found = self.storage.get_study_system_attrs(self.study_id)
        claims = {k.removeprefix(_CLAIM): v for k, v in found.items() if k.startswith(_CLAIM)}
        return {token: Claim.read(record) for token, record in claims.items() if record}

    def write(self, token: str, claim: Claim) -> None:
        """Make or replace a claim."""
        self.storage.set_study_system_attr(self.study_id, _CLAIM + token, record_of(claim))

    def remove(self, token: str) -> None:
        """Empty a claim: Optuna removes no attributes."""
        self.storage.set_study_system_attr(self.study_id, _CLAIM + token, None)


class GuardedStorage(BaseStorage):
    """See above.

    Args:
        backend: the storage itself.
        study_id: of the study in it that is written to.
        check: asks whether the lease is held; raises where it is not.
        shown: the storage's URL, for messages.
        seconds: how long an outage may last; 0 for files, which have none.
    """

    def __init__(
        self,
        backend: BaseStorage,
        study_id: int,
        check: Callable[[], None],
        shown: str,
        seconds: float,
    ) -> None:
        self._backend, self._study_id, self._check = backend, study_id, check
        self._shown, self._seconds = shown, seconds

    def _read(self, ask: Callable[[], T], settled: Callable[[], T | None] | None = None) -> T:
        """Ask, again and again while the server is away.

        Args:
            ask: what is asked.
            settled: whether an earlier attempt did it although no answer came: its answer, or
                None.
        """
        began: float | None = None
        pause = _FIRST_PAUSE
        while True:
            try:
                found = None if began is None or settled is None else settled()
                answer = ask() if found is None else found
            except Exception as error:
                if not is_outage(error) or self._is_over(began):
                    raise
                if began is None:
                    began = time.monotonic()
                    logger.warning(
                        "the study storage %s does not answer; it is tried again for up to %.0f s",
                        *(self._shown, self._seconds),
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if began is not None:
                lasted = time.monotonic() - began
                logger.warning(
                    "the study storage %s answers again after %.1f s", self._shown, lasted
                )
            return answer

    def _is_over(self, began: float | None) -> bool:
        return time.monotonic() - (time.monotonic() if began is None else began) >= self._seconds

    def _write(self, do: Callable[[], T], settled: Callable[[], T | None] | None = None) -> T:
        """Write, if the lease is held."""

        def held() -> T:
            self._check()
            return do()

        return self._read(held, settled)

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """See Optuna."""
        return self._write(lambda: self._backend.create_new_study(directions, study_name))

    def delete_study(self, study_id: int) -> None:
        """See Optuna."""
        self._write(lambda: self._backend.delete_study(study_id))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._write(lambda: self._backend.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._write(lambda: self._backend.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        """See Optuna."""
        return self._read(lambda: self._backend.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        """See Optuna."""
        return self._read(lambda: self._backend.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See Optuna."""
        return self._read(lambda: self._backend.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See Optuna."""
        return self._read(lambda: self._backend.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See Optuna."""
        return self._read(lambda: self._backend.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[FrozenStudy]:
        """See Optuna."""
        return self._read(self._backend.get_all_studies)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See Optuna."""
        return self._write(lambda: self._backend.create_new_trial(study_id, template_trial))

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """See Optuna; a proxy that was restarted knows trials again when all were read."""

        def set_it() -> None:
            self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution)

        def set_or_read_first() -> None:
            try:
                set_it()
            except KeyError:  # of the proxy's cache, see Optuna 5.0.0, `_CachedStorage`
                self._backend.get_all_trials(self._study_id, deepcopy=False)
                set_it()

        self._write(set_or_read_first)

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See Optuna."""
        return self._read(
            lambda: self._backend.get_trial_id_from_study_id_trial_number(study_id, trial_number)
        )

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """See Optuna; a state that an unanswered attempt has set already counts as set."""

        def settled() -> bool | None:
            found = self._backend.get_trial(trial_id)
            wanted = None if values is None else list(values)
            return True if found.state == state and found.values == wanted else None

        return self._write(
            lambda: self._backend.set_trial_state_values(trial_id, state, values), settled
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """See Optuna."""
        self._write(
            lambda: self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._write(lambda: self._backend.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._write(lambda: self._backend.set_trial_system_attr(trial_id, key, value))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See Optuna."""
        return self._read(lambda: self._backend.get_trial(trial_id))

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See Optuna."""
        return self._read(lambda: self._backend.get_all_trials(study_id, deepcopy, states))

    def remove_session(self) -> None:
        """See Optuna."""
        self._backend.remove_session()


def is_outage(error: BaseException) -> bool:
    """Whether an error says that a server is away, rather than that something is wrong.

    Args:
        error: of a storage; Optuna wraps what a database says.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
            return True
        if isinstance(cause, sqlalchemy.exc.DBAPIError) and cause.connection_invalidated:
            return True
        if type(cause).__module__.startswith("grpc"):
            return _is_away(cause)
        cause = cause.__cause__
    return False


def _is_away(error: Any) -> bool:
    """Whether a call failed because a proxy, or the database behind it, is away."""
    code, details = error.code().name, str(error.details())
    is_behind = code == "UNKNOWN" and any(word in details for word in _BEHIND_PROXY)
    return code in ("UNAVAILABLE", "CANCELLED") or is_behind
