"""Costs by workers: the same files as in one process, bit for bit.

First each worker takes some batches through the model and back, and keeps what every layer gives
and the gradients of the totals there. Then each takes layers: it runs a layer once more on all
windows, with these gradients, and measures its matrices in all formats. So a layer is traced
twice, and the weights of a format are dequantized once, as in one process.

Letters: B sequences of a batch, T tokens each, D totals that are differentiated, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from alphaquant.costs.cost_store import CostStore, TableShape
from alphaquant.costs.end_costs import end_costs
from alphaquant.costs.fisher import CostSettings, cost_files, layer_costs
from alphaquant.costs.gradients import EndTrace, LayerTrace, run_forward, trace_layer
from alphaquant.costs.labels import SampledLabels
from alphaquant.costs.partial import Wanted, held_in, want_all, wanted_names
from alphaquant.costs.shelf import Shelf
from alphaquant.costs.tape import Tape
from alphaquant.models.mapping import device_of
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import check_walk
from alphaquant.progress import Progress, Stage
from alphaquant.quant.bank import Bank
from alphaquant.quant.filling import can_spread
from alphaquant.spaces.units import Matrix
from alphaquant.work.tasks import Workers
from alphaquant.work.walked import StateFiles, Text, steps_from

_EMBEDDINGS = "embeddings"
"""Kind of the files with gradients at what the embeddings give."""


def _gradients_of(layer: int) -> str:
    """Kind of the files with gradients at what a layer gives."""
    return f"gradients-{layer:03d}"


def measure_costs_by(
    workers: Workers,
    model_map: ModelMap,
    bank: Bank,
    text: Text,
    formats: Sequence[str],
    settings: CostSettings,
    *,
    wanted: Wanted = want_all,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Let workers measure the costs that are missing; `measure_costs` finds them then.

    Nothing is done where layers hand on more than hidden states, which is warned of.

    Args:
        workers: have opened the same model.
        model_map: the original model.
        bank: holds every format, in a folder that all workers see.
        text: the calibration windows, in batches of `CostSettings.batch_size`.
        formats: canonical names.
        settings: how.
        wanted: which matrices in which formats count.
        progress: called with ("gradients", units of batches done, units), then ("costs", layers).
    """
    store, shape = cost_files(bank, text.tokens, formats, settings, wanted)
    missing = store.missing(shape)
    if not missing or not can_spread(model_map, text, "costs are measured"):
        return
    check_walk(model_map, text.batches)
    labels = SampledLabels(settings.n_draws, settings.seed)
    states = StateFiles(text.folder / store.folder.name, text)
    back = [BackTask(states, unit, labels) for unit in text.units]
    for _ in workers.map(back, partial(progress, Stage.GRADIENTS)):
        pass
    tasks = []
    for layer, lacking in missing.items():
        names = {name: wanted_names(bank, name, layer, wanted) for name in lacking}
        tasks.append(CostTask(bank.path, store, shape, layer, names, states, settings.seed))
    n_layers = len(shape.sizes)
    n_before = n_layers - len(tasks)
    for _ in workers.map(tasks, lambda n, _: progress(Stage.COSTS, n_before + n, n_layers)):
        pass


@dataclass(frozen=True)
class BackTask:
    """Take a unit of batches through the model and back.

    Attributes:
        states: where what layers give goes, and the gradients there.
        unit: numbers of the batches.
        labels: what is differentiated.
    """

    states: StateFiles
    unit: range
    labels: SampledLabels

    @property
    def name(self) -> str:
        """For messages."""
        return f"gradients on batches {self.unit.start} to {self.unit.stop - 1}"

    def run(self, model_map: ModelMap) -> None:
        """See `Task.run`."""
        states, unit, text = self.states, self.unit, self.states.text
        last = _EMBEDDINGS if model_map.ends is not None else _gradients_of(0)
        if states.has(last, unit):
            return
        batches = [text.batches[n] for n in unit]
        tapes, _ = run_forward(
            model_map,
            batches,
            ([self.labels], []),
            states.folder,
            unit.start * text.batch_size,
            lambda step: states.write(step.layer.index, unit, step.outputs),
        )
        for layer in reversed(model_map.layers):
            self._save(_gradients_of(layer.index), [tape.traced_gradients() for tape in tapes])
            if layer.index > 0 or model_map.ends is not None:
                trace_layer(layer, tapes, [len(batch) for batch in batches], states.folder)
            layer.release()
            trim_heap()
        if model_map.ends is not None:
            self._save(_EMBEDDINGS, [tape.at_embeddings() for tape in tapes])

    def smaller(self) -> "BackTask":
        """Itself: memory holds the graph of one layer for one batch."""
        return self

    def _save(self, kind: str, tensors: Sequence[Tensor]) -> None:
        named = {str(n): x for n, x in zip(self.unit, tensors, strict=True)}
        facts = {"n_totals": str(self.labels.n_draws)}
        self.states.save(kind, self.unit, named, facts)


@dataclass(frozen=True)
class CostTask:
    """Measure the costs of a part of the model.

    Attributes:
        folder: of the bank.
        store: where costs go.
        shape: what is there when all is done.
        layer: number of the layer, or of what is beside the layers.
        names: formats that are lacking, each with the matrices that count.
        states: of all layers, with gradients.
        seed: of the tokens that are drawn.
    """

    folder: Path
    store: CostStore
    shape: TableShape
    layer: int
    names: Mapping[str, frozenset[str]]
    states: StateFiles
    seed: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"costs of part {self.layer}"

    def run(self, model_map: ModelMap) -> None:
        """See `Task.run`."""
        bank = Bank(self.folder, model_map.inventory, {})
        formats = list(self.names)
        if model_map.ends is not None and self.layer == model_map.ends.index:
            costs = end_costs(model_map, self._end_trace(model_map), bank, formats, self._wanted)
        else:
            held = held_in(bank, self.layer, formats, self._wanted)
            costs = layer_costs(
                trace_again(model_map, self.states, self.layer), held, formats, self.seed
            )
        self.store.write(self.shape, self.layer, costs)

    def smaller(self) -> "CostTask":
        """Itself: traces are in files, and intermediate results of bounded size."""
        return self

    def _wanted(self, matrix: Matrix, name: str) -> bool:
        return matrix.name in self.names[name]

    def _end_trace(self, model_map: ModelMap) -> EndTrace:
        steps = steps_from(model_map, self.states, len(model_map.layers))
        outputs = next(steps).outputs
        steps.close()
        at_embeddings = _tensors(self.states, _EMBEDDINGS, device_of(model_map.model))
        n_totals = self.states.load(_EMBEDDINGS, self.states.text.units[0])[1]["n_totals"]
        return EndTrace(self.states.text.batches, outputs, at_embeddings, int(n_totals))


def trace_again(model_map: ModelMap, states: StateFiles, index: int) -> LayerTrace:
    """A layer's traces, from its inputs and the gradients at its outputs.

    Args:
        model_map: the original model.
        states: what `BackTask` left.
        index: number of the layer.
    """
    layer, shelf = model_map.layers[index], Shelf(states.folder)
    steps = steps_from(model_map, states, index)
    calls = next(steps).calls
    gradients = _tensors(states, _gradients_of(index), calls[0].hidden.device)
    n_outputs = states.n_outputs(index)
    tapes = [Tape.at(call, g, n_outputs, shelf) for call, g in zip(calls, gradients, strict=True)]
    steps.close()
    sizes = [len(batch) for batch in states.text.batches]
    return trace_layer(layer, tapes, sizes, states.folder)


def _tensors(states: StateFiles, kind: str, device: torch.device) -> list[Tensor]:
    """Of all batches."""
    found: list[Tensor] = []
    for unit in states.text.units:
        tensors, _ = states.load(kind, unit)
        found += [tensors[str(n)].to(device) for n in unit]
    return found
