"""What workers make of the time of a stage: units of work, as many at once as there are workers.

Units are taken as equal. Workers of one CPU share its cores, so that they are no faster together
than one process with all of them; with a GPU or a node each they are.
"""

import os
from dataclasses import dataclass

import torch

from alphaquant.specs.run import RunSpec
from alphaquant.work.processes import threads_of


@dataclass(frozen=True)
class Crew:
    """Who shares the work.

    Attributes:
        n_workers: at the same time.
        speed: of each, in times of this process.
        n_together: of them in the memory of one machine.
    """

    n_workers: int = 1
    speed: float = 1.0
    n_together: int = 1

    def seconds(self, alone: float, n_units: int) -> float:
        """Seconds of a stage that takes this process so many.

        Worked example: 16 layers of 1 s each take 8 workers 2 s, and 6 workers 3 s.

        Args:
            alone: seconds of one process.
            n_units: equal units that it is cut into, at least 1.
        """
        n_turns = -(-n_units // self.n_workers)
        return alone * n_turns / n_units / self.speed


ALONE = Crew()
"""This process."""


def crew_of(run: RunSpec, device: torch.device) -> Crew:
    """Who shares the work of a search.

    Workers of a cluster count where `workers` says how many they are.

    Args:
        run: what was asked.
        device: of the model.
    """
    n_workers = run.workers or 1
    if run.cluster is not None or device.type == "cuda":
        return Crew(n_workers)
    if n_workers == 1:
        return ALONE
    stated = os.environ.get("OMP_NUM_THREADS", "")
    n_threads = int(stated) if stated.isdecimal() else threads_of(n_workers)
    n_cores = len(os.sched_getaffinity(0))
    n_busy = min(n_workers, max(1, n_cores // n_threads))
    return Crew(n_busy, n_threads / torch.get_num_threads(), n_workers)
