"""What a model's layers give on a text, in files that all workers see.

Some workers walk the windows, each some batches of them, and write what every layer gives
(`WalkTask`). With these files any layer can be worked on alone, on all windows (`steps_from`):
the model runs as it is, but layers below it are not run, they give what is in the files. Numbers
are those of one walk over all batches, bit for bit, because a batch's numbers do not depend on
other batches.

That needs layers that hand on nothing but hidden states. Where one leaves state in its arguments
or gives more, `hands_on_more` says so, and the work is done in one process.

Layout, in a folder that is removed when the work is done::

    <folder>/layer-003/batch-0016.safetensors    hidden states [B, T, H] of batches 16, 17, ...

Letters: B windows in a batch, T tokens, H hidden size.
"""

import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.files import locked, whole_file, writing
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import LayerStep, batches_of, hidden_of, shared_state, walk

MOST_UNITS = 32
"""Units at most that batches are cut into, so that a walk reads the weights for several."""


@dataclass(frozen=True)
class Text:
    """Windows in batches, and the units of batches that tasks take.

    Attributes:
        tokens: int64 [N, T].
        batch_size: B.
        folder: where files of it go, see `folder_of_states`.
    """

    tokens: Tensor
    batch_size: int
    folder: Path

    @property
    def batches(self) -> list[Tensor]:
        """All batches."""
        return batches_of(self.tokens, self.batch_size)

    @property
    def units(self) -> list[range]:
        """Numbers of the batches that are walked together, by unit; never by who walks them."""
        n_batches = -(-len(self.tokens) // self.batch_size)
        return even_parts(range(n_batches), MOST_UNITS)


@dataclass(frozen=True)
class StateFiles:
    """Hidden states of a text.

    Attributes:
        folder: where they are.
        text: of what.
    """

    folder: Path
    text: Text

    def write(self, layer: int, unit: range, outputs: Sequence[Any]) -> None:
        """Keep what a layer gave for the batches of a unit.

        Raises:
            StoreError: the disk is full.
        """
        hidden = {str(n): hidden_of(x) for n, x in zip(unit, outputs, strict=True)}
        n_items = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
        self.save(_kind_of(layer), unit, hidden, {"n_items": str(n_items)})

    def read(self, layer: int) -> list[Any]:
        """What a layer gave, by batch; tensors come from the files when they are read."""
        found: list[Any] = []
        for unit in self.text.units:
            tensors, facts = self.load(_kind_of(layer), unit)
            others = (None,) * (int(facts["n_items"]) - 1)
            outputs = [tensors[str(n)] for n in unit]
            found += [(x, *others) for x in outputs] if int(facts["n_items"]) else outputs
        return found

    def n_outputs(self, layer: int) -> int:
        """Things that a layer gives, hidden states first."""
        _, facts = self.load(_kind_of(layer), self.text.units[0])
        return max(1, int(facts["n_items"]))

    def save(
        self, kind: str, unit: range, tensors: Mapping[str, Tensor], facts: Mapping[str, str]
    ) -> None:
        """Write a file of a unit.

        Raises:
            StoreError: the disk is full.
        """
        path = self._file(kind, unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        with writing(path, sum(x.nbytes for x in plain.values())), whole_file(path) as part:
            save_file(plain, part, dict(facts))

    def load(self, kind: str, unit: range) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors of a file, memory-mapped, and its facts."""
        with safe_open(self._file(kind, unit), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}

    def has(self, kind: str, unit: range) -> bool:
        """Whether a file of a unit is there."""
        return self._file(kind, unit).exists()

    def has_layer(self, layer: int, unit: range) -> bool:
        """Whether what a layer gave for a unit is there."""
        return self.has(_kind_of(layer), unit)

    def _file(self, kind: str, unit: range) -> Path:
        return self.folder / kind / f"batch-{unit.start:04d}.safetensors"


@contextmanager
def folder_of_states(folder: Path) -> Iterator[Path]:
    """A folder for files of texts, which is removed when the work with them is done.

    What a driver that was stopped left there is used. A second driver waits for the first, and
    finds what that has made.

    Args:
        folder: its path depends on the model and how it computes, and on the text.
    """
    with locked(folder.with_suffix(".lock"), f"the folder {folder}", "--cache", waits=True):
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class WalkTask:
    """Walk a unit of batches and keep what the layers up to one give.

    Attributes:
        states: where.
        unit: numbers of the batches.
        last: number of the last layer that is kept.
    """

    states: StateFiles
    unit: range
    last: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"hidden states of batches {self.unit.start} to {self.unit.stop - 1}"

    @torch.no_grad()
    def run(self, model_map: ModelMap) -> None:
        """See `Task.run`."""
        if all(self.states.has_layer(layer, self.unit) for layer in range(self.last + 1)):
            return
        batches = self.states.text.batches
        for step in walk(model_map, [batches[n] for n in self.unit], is_rough=True):
            if step.layer.index > self.last:
                break
            step.run()
            self.states.write(step.layer.index, self.unit, step.outputs)

    def smaller(self) -> "WalkTask":
        """Itself: a walk takes hidden states to disk where memory is short."""
        return self


def walk_tasks(states: StateFiles, last: int) -> list[WalkTask]:
    """Tasks that keep what the layers up to number `last` give; none where that is below 0."""
    return [WalkTask(states, unit, last) for unit in states.text.units] if last >= 0 else []


@torch.no_grad()
def steps_from(model_map: ModelMap, states: StateFiles, first: int) -> Generator[LayerStep]:
    """The steps of a walk over all batches from one layer on, without running those below.

    Args:
        model_map: the model.
        states: of the layers below.
        first: number of the first step's layer. Behind the last layer it is that layer's step,
            with what it gave.
    """
    n_layers = len(model_map.layers)
    for step in walk(model_map, states.text.batches, first=first, is_rough=True):
        if step.layer.index < first:
            step.outputs = states.read(step.layer.index)
            device = step.calls[0].hidden.device
            if device.type != "cpu":
                step.outputs = [_moved(x, device) for x in step.outputs]
        if step.layer.index >= min(first, n_layers - 1):
            yield step


@torch.no_grad()
def hands_on_more(model_map: ModelMap, window: Tensor) -> str | None:
    """The first layer that hands on more than hidden states, None where there is none.

    Args:
        model_map: the model.
        window: int64 [1, T].
    """
    for step in walk(model_map, [window]):
        had_state = any(shared_state(call.kwargs) for call in step.calls)
        step.run()
        output = step.outputs[0]
        others = output[1:] if isinstance(output, tuple) else ()
        if had_state or any(x is not None for x in others):
            return step.layer.name
    return None


def even_parts(numbers: range, most: int) -> list[range]:
    """Successive numbers in at most so many parts, as equal as can be: 7 by 3 are 2, 2, 3."""
    n_parts = min(most, len(numbers))
    bounds = [len(numbers) * part // n_parts for part in range(n_parts + 1)]
    return [numbers[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _kind_of(layer: int) -> str:
    return f"layer-{layer:03d}"


def _moved(output: Any, device: torch.device) -> Any:
    return (output[0].to(device), *output[1:]) if isinstance(output, tuple) else output.to(device)
