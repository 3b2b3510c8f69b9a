"""Workers on a Ray cluster: one actor per GPU, or per node where there are none.

Ray places the actors and tells when one is gone; what is given to whom, and what is repeated, is
`scheduling.py`, as for processes. All nodes see the same cache and the same model under the same
paths, and have the same packages. Ray is imported when a cluster is asked for.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alphaquant.work.crew import Numbered
from alphaquant.work.messages import Outcome
from alphaquant.work.processes import SILENCE_SECONDS
from alphaquant.work.scheduling import Scheduled
from alphaquant.work.tasks import OpenModel, Task, WorkError
from alphaquant.work.worker import outcome_of

_BEAT_SECONDS = 5.0
_LEAST_SHARE = 0.03
"""Of a core, from which on a worker shows a sign of life: Ray's own threads in one that sleeps
spend 0.01 (Ray 2.60)."""
_CONNECT_SECONDS = 10.0
_START_SECONDS = 600.0
"""Without any worker that has opened the model."""


@dataclass(frozen=True)
class Share:
    """What a cluster gives to workers.

    Attributes:
        n_workers: how many.
        n_nodes: that have room for one.
        n_cpus: cores of each worker.
        n_gpus: GPUs of each, 0 or 1.
    """

    n_workers: int
    n_nodes: int
    n_cpus: int
    n_gpus: int

    @property
    def n_together(self) -> int:
        """Workers of a node, at most, where they are spread evenly."""
        return -(-self.n_workers // self.n_nodes)


def share_of(nodes: Sequence[dict[str, Any]], n_asked: int | None, device: str) -> Share:
    """How many workers a cluster has, and what each gets.

    Worked example: two nodes of 32 cores and 4 GPUs give 8 workers of 8 cores and a GPU; without
    GPUs two workers of 32 cores, or, with 6 asked for, 6 of 10.

    Args:
        nodes: as `ray.nodes()` lists them.
        n_asked: workers in all; None for one per GPU or node.
        device: `cpu` or `cuda`.

    Raises:
        WorkError: no node has a core, or a GPU where the device is one.
    """
    kind = "GPU" if device == "cuda" else "CPU"
    found = [n["Resources"] for n in nodes if n["Alive"] and n["Resources"].get(kind, 0) >= 1]
    if not found:
        raise WorkError(
            f"none of the cluster's {len(nodes)} nodes has a {kind}; add nodes that have, or give "
            f"--device {'cpu' if kind == 'GPU' else 'cuda'}"
        )
    if kind == "GPU":
        n_gpus = sum(int(node["GPU"]) for node in found)
        n_workers = min(n_asked or n_gpus, n_gpus)
        n_cpus = min(int(node.get("CPU", 1) // node["GPU"]) for node in found)
        return Share(n_workers, len(found), max(1, n_cpus), 1)
    n_workers = n_asked or len(found)
    per_node = -(-n_workers // len(found))
    n_cpus = min(int(node["CPU"]) for node in found) // per_node
    return Share(n_workers, len(found), max(1, n_cpus), 0)


@dataclass
class _Actor:
    """One worker.

    Attributes:
        handle: Ray's handle.
        call: what it does now: opening the model, or a task; None for nothing.
        is_open: whether it has opened the model.
        life: a question for its processor time that is not answered yet.
        alive: when its last sign of life came, seconds of `time.monotonic`.
        seconds: processor time that it had spent when it was last asked.
        answered: when that was, seconds of `time.monotonic`.
    """

    handle: Any
    call: Any
    is_open: bool = False
    life: Any = None
    alive: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    answered: float = field(default_factory=time.monotonic)


class _RayCrew(Numbered[_Actor]):
    """See `alphaquant.work.crew.Crew`."""

    look_at = "look at their logs in Ray's dashboard"

    def __init__(self, ray: Any, share: Share, open_model: OpenModel, silence: float) -> None:
        self._ray, self._share, self._silence = ray, share, silence
        self._open, self._kind = open_model, _actor_kind(ray)
        super().__init__(share.n_workers)
        self._had_one = self._asked = time.monotonic()

    @property
    def idle(self) -> list[int]:
        """See `Crew`."""
        return [n for n, a in self._members.items() if a.is_open and a.call is None]

    @property
    def n_together(self) -> int:
        """See `Crew`."""
        return -(-len(self._members) // self._share.n_nodes)

    def give(self, worker: int, task: Task[Any]) -> None:
        """See `Crew`."""
        actor = self._members[worker]
        actor.alive = time.monotonic()
        actor.call = actor.handle.run.remote(task)

    def wait(self) -> list[tuple[int, Outcome]]:
        """See `Crew`."""
        while True:
            calls = {a.call: n for n, a in self._members.items() if a.call is not None}
            done, _ = self._ray.wait(list(calls), num_returns=1, timeout=_BEAT_SECONDS)
            found: list[tuple[int, Outcome]] = []
            for call in done:
                found += self._finished(calls[call])
            found += self._hanging()
            if found or self.idle:
                return found

    def close(self) -> None:
        """End all."""
        for worker in list(self._members):
            self.drop(worker)

    def _start(self, number: int) -> _Actor:
        share = self._share
        handle = self._kind.options(
            num_cpus=share.n_cpus,
            num_gpus=share.n_gpus,
            max_restarts=0,  # the schedule starts another one
            scheduling_strategy="SPREAD",
        ).remote()
        return _Actor(handle, handle.open.remote(self._open))

    def _finished(self, worker: int) -> list[tuple[int, Outcome]]:
        """Take what a call gave.

        Raises:
            AlphaQuantError: a worker could not open the model.
        """
        actor, exceptions = self._members[worker], self._ray.exceptions
        call, actor.call = actor.call, None
        try:
            outcome: Outcome = self._ray.get(call)
        except exceptions.OutOfMemoryError:
            return self._gone(worker, Outcome("memory", reason="a node ran out of memory"))
        except exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            return self._gone(worker, Outcome("lost", reason=f"its worker is gone ({first})"))
        if actor.is_open:
            self._n_starts = 0
            return [(worker, outcome)]
        if outcome.kind == "error":
            raise outcome.value
        actor.is_open = True
        return []

    def _gone(self, worker: int, outcome: Outcome) -> list[tuple[int, Outcome]]:
        """What became of a task whose worker is gone; one that had none is replaced."""
        if self._members[worker].is_open:
            self._members[worker].is_open = False
            return [(worker, outcome)]
        self.replace(worker)
        return []

    def _hanging(self) -> list[tuple[int, Outcome]]:
        """Workers that have a task and show no sign of life.

        Raises:
            WorkError: none could be placed.
        """
        now, found = time.monotonic(), list[tuple[int, Outcome]]()
        if any(actor.is_open for actor in self._members.values()):
            self._had_one = now
        if now - self._had_one > _START_SECONDS:
            raise WorkError(
                f"no worker of {self._share.n_cpus} cores and {self._share.n_gpus} GPUs has "
                f"opened the model in {_START_SECONDS:g} s; look at Ray's dashboard for what is "
                "free, and give more or fewer --workers"
            )
        if now - self._asked < _BEAT_SECONDS:
            return found
        self._asked = now
        for worker, actor in list(self._members.items()):
            if actor.is_open and actor.call is not None:
                self._listen(actor)
                if now - actor.alive > self._silence:
                    why = f"its worker used no processor time for {self._silence:g} s"
                    actor.call = None
                    found += self._gone(worker, Outcome("lost", reason=why))
        return found

    def _listen(self, actor: _Actor) -> None:
        """Take the answer to the last question, if there is one, and ask again."""
        if actor.life is not None:
            if not self._ray.wait([actor.life], timeout=0)[0]:
                return
            try:
                seconds = float(self._ray.get(actor.life))
            except self._ray.exceptions.RayError:
                return  # the call of its task tells
            now = time.monotonic()
            if seconds - actor.seconds >= _LEAST_SHARE * (now - actor.answered):
                actor.alive = now
            actor.seconds, actor.answered = seconds, now
        actor.life = actor.handle.seconds.remote()

    def _end(self, worker: int) -> None:
        actor = self._members[worker]
        actor.is_open, actor.call = False, None
        self._ray.kill(actor.handle)


class RayWorkers(Scheduled):
    """Workers of a Ray cluster; a context manager, whose end ends them.

    Args:
        address: `auto`, or the address of the cluster's head.
        n_workers: how many; None for one per GPU, or per node where there are none.
        open_model: opens the model in each.
        device: `cpu` or `cuda`.
        silence_seconds: without processor time until a worker counts as hanging.

    Raises:
        WorkError: Ray is not installed, or there is no cluster or no room in it.
    """

    def __init__(
        self,
        address: str,
        n_workers: int | None,
        open_model: OpenModel,
        device: str = "cpu",
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._ray, self._is_ours = _connected(address)
        self.share = share_of(self._ray.nodes(), n_workers, device)
        self._crew = _RayCrew(self._ray, self.share, open_model, silence_seconds)
        super().__init__(self._crew)

    @property
    def n_together(self) -> int:
        """Those of one node."""
        return self.share.n_together

    @property
    def dashboard_url(self) -> str | None:
        """Ray's own dashboard; None where it is not running."""
        url: str | None = self._ray._private.worker.get_dashboard_url()
        return f"http://{url}" if url else None

    @property
    def text(self) -> str:
        """How many there are and where to look at them, a line."""
        share, url = self.share, self.dashboard_url
        linked = "" if url is None else f"; Ray's dashboard: {url}"
        return f"{share.n_workers} workers on {share.n_nodes} nodes of a Ray cluster{linked}"

    def __exit__(self, *error: object) -> None:
        """End them, and leave the cluster if it was entered here."""
        self._crew.close()
        if self._is_ours:
            self._ray.shutdown()


def _connected(address: str) -> tuple[Any, bool]:
    """Ray, connected to a cluster; whether it was connected here.

    Raises:
        WorkError: it is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise WorkError(
            "--cluster needs Ray, which is not installed; run: pip install 'aq-search[ray]'"
        ) from error
    if ray.is_initialized():
        return ray, False
    try:
        _check_answers(address)
        # Workers' output is in Ray's logs and dashboard; standard output belongs to the command.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkError(
            f"there is no Ray cluster at {address} ({str(error).splitlines()[0]}); start one with "
            "ray start --head, or give the address of its head"
        ) from error
    return ray, True


def _check_answers(address: str) -> None:
    """Refuse a head that does not answer at once; Ray 2.60 tries again for more than five minutes.

    Raises:
        OSError: nothing listens at the host and port of an address; others are left to Ray.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _actor_kind(ray: Any) -> Any:
    """The class of the actors; Ray is needed to make it."""

    class Worker:
        """Opens the model and runs tasks; tells its processor time meanwhile."""

        def __init__(self) -> None:
            self._map: Any = None

        @ray.method(concurrency_group="work")  # type: ignore[untyped-decorator]
        def open(self, open_model: OpenModel) -> Outcome:
            """Open the model: what became of it."""
            os.dup2(2, 1)
            try:
                self._map = open_model()
            except Exception as error:
                return Outcome("error", error)
            return Outcome("done")

        @ray.method(concurrency_group="work")  # type: ignore[untyped-decorator]
        def run(self, task: Task[Any]) -> Outcome:
            """Run a task: what became of it."""
            found: Outcome = outcome_of(task, self._map)
            return found

        @ray.method(concurrency_group="life")  # type: ignore[untyped-decorator]
        def seconds(self) -> float:
            """Processor time of this process so far."""
            return time.process_time()

    return ray.remote(concurrency_groups={"work": 1, "life": 1})(Worker)
