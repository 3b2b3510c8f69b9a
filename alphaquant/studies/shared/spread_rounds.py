"""Divergence of many assignments, measured by workers: some assignments on some batches each.

A batch's numbers depend neither on other batches nor on other assignments, so they are those of
`Rounds.measure` in one process, bit for bit. Every task dequantizes weights anew, so a text is cut
into `MOST_PARTS` parts at most, and as many as `TOGETHER` assignments stay together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from alphaquant.evaluators.divergence import Divergence
from alphaquant.evaluators.teacher import Teacher
from alphaquant.models.mapping import device_of
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import Bank
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.rounds import HIDDEN_SHARE, Rounds, Steps, memory_left, tell_nobody
from alphaquant.work.tasks import Workers
from alphaquant.work.walked import even_parts

MOST_PARTS = 8
"""Parts of a text, at most."""

TOGETHER = 8
"""Assignments of a task, at most; a probe's text is one batch, and its assignments are many."""


@dataclass(frozen=True)
class RoundTask:
    """Measure assignments on some batches of a text.

    Attributes:
        bank: folder of the bank.
        assignments: different ones.
        tokens: int64 [N, T], the whole text.
        teacher: stored predictions of it.
        batches: numbers of the batches.
        batch_size: windows of a batch.
        share: the part of the free memory that hidden states may take is one in so many.
    """

    bank: Path
    assignments: tuple[Assignment, ...]
    tokens: Tensor
    teacher: Teacher
    batches: range
    batch_size: int
    share: int

    @property
    def name(self) -> str:
        """For messages."""
        first, last = self.batches.start, self.batches.stop - 1
        return f"measuring {len(self.assignments)} of the assignments on batches {first} to {last}"

    def run(self, model_map: ModelMap) -> list[tuple[int, Divergence]]:
        """See `Task.run`; numbers of assignments, each with what one batch gave."""
        bank = Bank(self.bank, model_map.inventory, {})
        most_bytes = memory_left(device_of(model_map.model)) // self.share
        rounds = Rounds(model_map, bank.layer, self.batch_size, most_bytes)
        number = {assignment.digest: n for n, assignment in enumerate(self.assignments)}
        found = rounds.measure(self.assignments, self.tokens, self.teacher, self.batches)
        return [(number[assignment.digest], part) for assignment, part in found]

    def smaller(self) -> "RoundTask":
        """The same with a quarter of the memory for hidden states."""
        return replace(self, share=4 * self.share)


@dataclass(frozen=True)
class SpreadRounds:
    """Measures as `Rounds` does, by workers.

    Attributes:
        workers: have opened the same model.
        bank: folder of the bank.
        batch_size: windows per forward pass.
    """

    workers: Workers
    bank: Path
    batch_size: int = 8

    @property
    def n_at_once(self) -> int:
        """Batches that are measured at the same time."""
        return self.workers.n_workers

    def measure(
        self,
        assignments: Sequence[Assignment],
        tokens: Tensor,
        teacher: Teacher,
        batches: range,
        tell: Steps = tell_nobody,
    ) -> Iterator[tuple[Assignment, Divergence]]:
        """See `Rounds.measure`."""
        share = HIDDEN_SHARE * self.workers.n_together
        n_groups = -(-len(assignments) // TOGETHER)
        tasks = [
            RoundTask(
                self.bank,
                tuple(assignments[numbers.start : numbers.stop]),
                *(tokens, teacher, part),
                *(self.batch_size, share),
            )
            for numbers in even_parts(range(len(assignments)), n_groups)
            for part in even_parts(batches, MOST_PARTS)
        ]
        for task, found in zip(tasks, self.workers.map(tasks, tell), strict=True):
            for number, measured in found:
                yield task.assignments[number], measured


def n_tasks(n_assignments: int, n_batches: int) -> int:
    """Tasks that so many assignments on so many batches are cut into."""
    return -(-n_assignments // TOGETHER) * min(MOST_PARTS, n_batches)
