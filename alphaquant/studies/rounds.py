"""Divergence of many assignments at once, layer by layer.

One walk (`alphaquant.models.walk`) over the windows of a text evaluates them all: at each decoder
layer every assignment's hidden states go through the layer with that assignment's weights. A
matrix in a format is read and dequantized once per layer for all of them where memory holds it,
those that share all formats up to a layer share what it gives, and the model's own weights are
back when the walk leaves the layer. The order of operations on a window is that of an ordinary
forward pass, so numbers are those of the assignment alone, bit for bit.

Hidden states that do not fit are taken in turns: fewer assignments first, then fewer batches.

Letters: R assignments, B windows in a batch, T tokens, H hidden size.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from alphaquant.evaluators.divergence import Divergence, compare_batch
from alphaquant.evaluators.predictions import predict_pieces
from alphaquant.evaluators.teacher import Teacher, check_windows
from alphaquant.models.mapping import device_of
from alphaquant.models.pages.memory import free_memory
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import LayerStep, batches_of, layers_skipped, shared_state, walk
from alphaquant.quant.swap import LayerWeights, OpenLayer, swapped_layer
from alphaquant.spaces.assignment import Assignment

HIDDEN_SHARE = 4
"""Part of the free memory that hidden states of a turn may take; weights may take half of that."""

_STATES = 3
"""Hidden states that a forward pass holds: embeddings, a layer's inputs and its outputs."""

Steps = Callable[[int, int], None]
"""Told how many steps are done, of how many."""


def tell_nobody(done: int, total: int) -> None:
    """See `Steps`."""


@dataclass(frozen=True)
class Rounds:
    """Evaluates assignments together.

    Attributes:
        model_map: the model; its weights are the same afterwards.
        open_layer: opens the packed matrices (`Bank.layer`).
        batch_size: windows per forward pass.
        most_bytes: of hidden states in memory; None for a part of what is free.
    """

    model_map: ModelMap
    open_layer: OpenLayer
    batch_size: int = 8
    most_bytes: int | None = None

    @property
    def n_at_once(self) -> int:
        """Batches that are measured at the same time: one after the other here."""
        return 1

    @torch.no_grad()
    def measure(
        self,
        assignments: Sequence[Assignment],
        tokens: Tensor,
        teacher: Teacher,
        batches: range,
        tell: Steps = tell_nobody,
    ) -> Iterator[tuple[Assignment, Divergence]]:
        """Compare assignments with the stored predictions, some batches of the text.

        Args:
            assignments: different ones.
            tokens: int64 [N, T], T >= 2, the whole text.
            teacher: stored predictions of it.
            batches: which of its batches, successive ones.
            tell: told of every layer.

        Yields:
            An assignment and what one batch gave; the batches of an assignment in order.

        Raises:
            StoreError: the teacher belongs to another text, or a file of the bank is damaged.
            DataError: windows of one token.
        """
        check_windows(teacher, tokens)
        all_batches = batches_of(tokens, self.batch_size)
        turns = self._turns(len(assignments), batches, tokens.shape[1])
        n_layers, n_done = len(self.model_map.layers), 0
        total = len(turns) * n_layers
        tell(0, total)
        for some, numbers in turns:
            started = time.perf_counter()
            chosen = [all_batches[number] for number in numbers]
            outputs: list[Any] = []
            for _ in self._walk(assignments[some], chosen, outputs):
                n_done += 1
                if n_done % n_layers:  # the last layer is done when predictions are compared
                    tell(n_done, total)
            first = numbers.start * self.batch_size
            parts = list(self._compare(assignments[some], chosen, outputs, teacher, first))
            tell(n_done, total)
            yield from _timed(parts, time.perf_counter() - started)

    def _turns(
        self, n_assignments: int, batches: range, seq_len: int
    ) -> list[tuple[slice, range]]:
        """Which assignments and batches are in memory together."""
        model = self.model_map.model
        config: Any = model.config
        width = int(getattr(config.get_text_config(), "hidden_size", 4096))
        size = next(model.parameters()).element_size()
        n_bytes = _STATES * self.batch_size * seq_len * width * size  # of a batch
        n_passes = max(1, self._most_bytes // n_bytes)
        together = _even(range(n_assignments), n_passes)
        return [
            (slice(some.start, some.stop), numbers)
            for some in together
            for numbers in _even(batches, max(1, n_passes // len(some)))
        ]

    @property
    def _most_bytes(self) -> int:
        if self.most_bytes is not None:
            return self.most_bytes
        return memory_left(device_of(self.model_map.model)) // HIDDEN_SHARE

    def _walk(
        self, assignments: Sequence[Assignment], batches: Sequence[Tensor], outputs: list[Any]
    ) -> Iterator[None]:
        """Run all layers; `outputs` gets what the last gives, by assignment and batch."""
        passes = [batch for _ in assignments for batch in batches]
        groups = [0] * len(assignments)  # equal numbers: equal formats so far
        with self._ends() as ends:
            if self.model_map.ends is not None:
                beside = [_formats_in(self.model_map.ends, a) for a in assignments]
                groups = _regrouped(groups, beside)

            def embed(number: int) -> None:
                ends.write(assignments[number // len(batches)].formats)

            steps = cast("Generator[LayerStep]", walk(self.model_map, passes, before=embed))
            with closing(steps):
                for step in steps:
                    groups = self._run_layer(step, assignments, groups, len(batches))
                    outputs[:] = step.outputs
                    yield

    def _run_layer(
        self,
        step: LayerStep,
        assignments: Sequence[Assignment],
        groups: Sequence[int],
        n_batches: int,
    ) -> list[int]:
        """Run one layer for all of them; which are equal after it."""
        formats = [_formats_in(step.layer, a) for a in assignments]
        groups = _regrouped(groups, formats)
        n_kept = self._most_bytes // 2 if len(set(formats)) > 1 else 0
        with swapped_layer(step.layer, self.open_layer, n_kept) as weights:
            by_group = {g: a for g, a in zip(groups, assignments, strict=True)}
            order = sorted(by_group, key=lambda g: formats[groups.index(g)])
            step.outputs = [None] * len(step.calls)
            for group in order:
                weights.write(by_group[group].formats)
                _run_group(step, [g == group for g in groups], n_batches)
        return groups

    def _compare(
        self,
        assignments: Sequence[Assignment],
        batches: Sequence[Tensor],
        outputs: list[Any],
        teacher: Teacher,
        first: int,
    ) -> Iterator[tuple[Assignment, Divergence]]:
        """Norm and head of every pass, and the comparison; the batches begin at window `first`."""
        model, n_batches = self.model_map.model, len(batches)
        with teacher.opened() as stored, self._ends() as ends:
            for index, assignment in enumerate(assignments):
                ends.write(assignment.formats)
                window = first
                for number, batch in enumerate(batches):
                    with layers_skipped(self.model_map, outputs[index * n_batches + number]):
                        pieces = predict_pieces(model, batch)
                        found = compare_batch(pieces, batch, teacher, stored, window)
                    yield assignment, found
                    window += len(batch)

    @contextmanager
    def _ends(self) -> Iterator[LayerWeights]:
        """What is beside the layers, to be written, and its own again on leaving."""
        ends = self.model_map.ends or LayerSite(0, "", self.model_map.model, (), ())
        with swapped_layer(ends, self.open_layer) as weights:
            yield weights


def memory_left(device: torch.device) -> int:
    """Bytes that this process can take on a device; caches of files count as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def _run_group(step: LayerStep, is_member: Sequence[bool], n_batches: int) -> None:
    """Run a layer for assignments that were equal so far; one run of a batch serves them all.

    Where layers leave state in what they are called with, every forward pass needs its own.
    """
    members = [index for index, is_one in enumerate(is_member) if is_one]
    for number in range(n_batches):
        shared: Any = None
        for index in members:
            call = step.calls[index * n_batches + number]
            if shared is None or shared_state(call.kwargs):
                shared = call.run(step.layer)
            step.outputs[index * n_batches + number] = shared


def _regrouped(groups: Sequence[int], formats: Sequence[tuple[str, ...]]) -> list[int]:
    """Numbers of groups whose members have been equal so far and have equal formats now."""
    known: dict[tuple[int, tuple[str, ...]], int] = {}
    return [known.setdefault(key, len(known)) for key in zip(groups, formats, strict=True)]


def _formats_in(layer: LayerSite, assignment: Assignment) -> tuple[str, ...]:
    """Formats of a layer's matrices in their order."""
    return tuple(assignment.formats[matrix.name] for matrix in layer.matrices())


def _timed(
    parts: Sequence[tuple[Assignment, Divergence]], seconds: float
) -> Iterator[tuple[Assignment, Divergence]]:
    """The same with every window's share of the time."""
    n_windows = sum(len(found.kl) for _, found in parts)
    for assignment, found in parts:
        yield assignment, replace(found, seconds=seconds * len(found.kl) / n_windows)


def _even(numbers: range, most: int) -> list[range]:
    """Successive parts of at most `most`, as few and as equal as can be: 7 by 3 are 3, 2, 2."""
    n_parts = -(-len(numbers) // most)
    bounds = [len(numbers) * part // n_parts for part in range(n_parts + 1)]
    return [numbers[a:b] for a, b in pairwise(bounds)]
