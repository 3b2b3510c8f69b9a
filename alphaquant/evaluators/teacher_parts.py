"""The original's predictions by workers: each takes some batches of the text.

What a task keeps of a batch is a file in a folder beside the teacher's; when all are there, they
are written into it and the folder is removed. The teacher's file is that of one process, bit for
bit.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alphaquant.evaluators.predictions import predict_walked
from alphaquant.evaluators.teacher import (
    Kept,
    Teacher,
    check_windows,
    kept_of,
    open_teacher,
    write_kept,
)
from alphaquant.files import locked, whole_file
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Progress, Stage
from alphaquant.work.tasks import Workers
from alphaquant.work.walked import StateFiles, Text

BATCH_WINDOWS = 8
"""Windows per forward pass."""

_KIND = "kept"


@dataclass(frozen=True)
class TeacherTask:
    """Predict a unit of batches.

    Attributes:
        files: where what is kept of each batch goes.
        unit: numbers of the batches.
        top_k: tokens that are kept of a position.
    """

    files: StateFiles
    unit: range
    top_k: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"the original's outputs on batches {self.unit.start} to {self.unit.stop - 1}"

    @torch.no_grad()
    def run(self, model_map: ModelMap) -> int:
        """See `Task.run`; the number of windows."""
        all_batches = self.files.text.batches
        numbers = [n for n in self.unit if not self.files.has(_KIND, range(n, n + 1))]
        batches = [all_batches[n] for n in numbers]
        predicted = predict_walked(model_map, batches) if batches else iter(())
        for number, batch, pieces in zip(numbers, batches, predicted, strict=True):
            tensors, vocabulary = dict[str, Tensor](), 0
            for index, kept in enumerate(kept_of(batch, pieces, 0, self.top_k)):
                cuts = (kept.windows, kept.positions)
                bounds = [end for cut in cuts for end in (cut.start, cut.stop)]
                found = {**kept.top, "losses": kept.losses, "bounds": torch.tensor(bounds)}
                tensors |= {f"{index}.{name}": tensor.cpu() for name, tensor in found.items()}
                vocabulary = kept.vocabulary
            facts = {"vocabulary": str(vocabulary)}
            self.files.save(_KIND, range(number, number + 1), tensors, facts)
        return sum(len(all_batches[n]) for n in self.unit)

    def smaller(self) -> "TeacherTask":
        """Itself: memory holds a part of one batch's predictions already."""
        return self


def store_teacher_by(
    workers: Workers, path: Path, tokens: Tensor, top_k: int, progress: Progress
) -> Teacher:
    """Let workers predict and store, or open what is there; see `store_teacher`.

    Args:
        workers: have opened the original model.
        path: the safetensors file, in a folder that all workers see.
        tokens: int64 [N, T].
        top_k: tokens stored per position, at most V.
        progress: called with ("teacher", windows done, windows).

    Raises:
        StoreError: the file exists and cannot be read, is of other windows, or cannot be written.
    """
    folder = path.with_suffix(".parts")
    with locked(path.with_suffix(".lock"), f"the teacher {path}", "--cache", waits=True):
        if path.exists():
            teacher = open_teacher(path)
            check_windows(teacher, tokens)
            return teacher
        files = StateFiles(folder, Text(tokens, BATCH_WINDOWS, folder))
        tasks = [TeacherTask(files, unit, top_k) for unit in files.text.units]
        n_windows, n_done = len(tokens), 0
        for n in workers.map(tasks, lambda done, total: None):
            n_done += n
            progress(Stage.TEACHER, min(n_done, n_windows - 1), n_windows)
        with whole_file(path) as part:
            facts = write_kept(part, _kept(files), tokens)
        shutil.rmtree(folder, ignore_errors=True)
    progress(Stage.TEACHER, n_windows, n_windows)
    return Teacher(path, facts)


def _kept(files: StateFiles) -> Iterator[Kept]:
    """What tasks kept, batch by batch."""
    first = 0
    for number, batch in enumerate(files.text.batches):
        tensors, facts = files.load(_KIND, range(number, number + 1))
        for index in sorted({int(name.partition(".")[0]) for name in tensors}):
            own = f"{index}."
            found = {n.removeprefix(own): x for n, x in tensors.items() if n.startswith(own)}
            start, stop, begin, end = found.pop("bounds").tolist()
            losses = found.pop("losses")
            windows = slice(first + start, first + stop)
            vocabulary = int(facts["vocabulary"])
            yield Kept(windows, slice(begin, end), found, losses, vocabulary)
        first += len(batch)
