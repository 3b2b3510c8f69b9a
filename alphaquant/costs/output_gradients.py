"""Output Hessians of a model, measured: sums of g g' over the tokens of calibration text.

g is the gradient at a matrix's outputs of the log-likelihood of a label that is drawn from the
model's own prediction, the same gradients as those of the costs (`gradients.py`). What is made of
the sums is in `alphaquant.quant.two_sided.output_hessian`.

Letters: S windows, T tokens of each.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from alphaquant.costs.cost_tasks import BackTask, trace_again
from alphaquant.costs.fisher import CostSettings, gradients_key
from alphaquant.costs.gradients import LayerTrace, trace_layers
from alphaquant.costs.labels import SampledLabels
from alphaquant.costs.matrix_costs import trace_matrices
from alphaquant.files import mark_used
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import batches_of, check_walk
from alphaquant.progress import Progress, Stage
from alphaquant.quant.filling import can_spread
from alphaquant.quant.two_sided.output_hessian import OutputHessians, OutputSums, owners
from alphaquant.work.tasks import Workers
from alphaquant.work.walked import StateFiles, Text

OUTPUTS_VERSION = 1
"""Part of the key of stored output Hessians; another number measures them anew."""


def output_hessians_key(weights: str, calibration: str, settings: CostSettings) -> str:
    """Digest that names the output Hessians of a model's weights on a text."""
    facts = {
        "weights": weights,
        "calibration": calibration,
        "settings": asdict(settings),
        "version": OUTPUTS_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


@torch.no_grad()
def measure_output_hessians(
    model_map: ModelMap,
    tokens: Tensor,
    folder: Path,
    settings: CostSettings,
    progress: Progress = lambda stage, done, total: None,
) -> OutputHessians:
    """Measure, or find, the output Hessians of every layer.

    A layer's file is written when it is done; a run that was killed goes back through the layers
    again and measures only those that are missing.

    Args:
        model_map: the original model; its weights are not touched.
        tokens: calibration windows, int64 [S, T].
        folder: for the files, of these weights, windows and settings alone.
        settings: how gradients are taken.
        progress: called with ("outputs", layers done, layers).

    Raises:
        ModelError: the model cannot be walked backwards.
        StoreError: the disk is full.
    """
    found, n_layers = OutputHessians(folder), len(model_map.layers)
    lacking = {layer.index for layer in model_map.layers if not found.has(layer)}
    if not lacking:
        mark_used(folder)
        return found
    progress(Stage.OUTPUTS, n_layers - len(lacking), n_layers)
    labels = SampledLabels(settings.n_draws, settings.seed)
    batches = batches_of(tokens, settings.batch_size)
    for trace in trace_layers(model_map, batches, [labels], folder=folder):
        if trace.ends is not None or trace.layer.index not in lacking:
            continue
        found.save(trace.layer, _sums_of(trace))
        lacking.discard(trace.layer.index)
        progress(Stage.OUTPUTS, n_layers - len(lacking), n_layers)
        if not lacking:
            break
    return found


@torch.no_grad()
def measure_output_hessians_by(
    workers: Workers,
    model_map: ModelMap,
    text: Text,
    folder: Path,
    settings: CostSettings,
    progress: Progress = lambda stage, done, total: None,
) -> None:
    """Let workers measure what is missing; `measure_output_hessians` finds it then.

    Nothing is done where layers hand on more than hidden states, which is warned of.

    Args:
        workers: have opened the same model.
        model_map: the original model.
        text: the calibration windows, in batches of `CostSettings.batch_size`.
        folder: see `measure_output_hessians`; all workers see it.
        settings: how gradients are taken.
        progress: called with ("gradients", units of batches done, units), then with ("outputs",
            layers done, layers).
    """
    found, n_layers = OutputHessians(folder), len(model_map.layers)
    lacking = [layer.index for layer in model_map.layers if not found.has(layer)]
    if not lacking or not can_spread(model_map, text, "output Hessians are measured"):
        return
    check_walk(model_map, text.batches)
    labels, n_before = SampledLabels(settings.n_draws, settings.seed), n_layers - len(lacking)
    # Where costs keep theirs: with equal settings both want the same gradients.
    states = StateFiles(text.folder / gradients_key(text.tokens, settings), text)
    back = [BackTask(states, unit, labels) for unit in text.units]
    for _ in workers.map(back, partial(progress, Stage.GRADIENTS)):
        pass
    tasks = [OutputsTask(found, layer, states) for layer in lacking]
    for _ in workers.map(tasks, lambda n, _: progress(Stage.OUTPUTS, n_before + n, n_layers)):
        pass


@dataclass(frozen=True)
class OutputsTask:
    """Measure the output Hessians of a layer.

    Attributes:
        outputs: where they go.
        layer: its number.
        states: of all layers, with gradients.
    """

    outputs: OutputHessians
    layer: int
    states: StateFiles

    @property
    def name(self) -> str:
        """For messages."""
        return f"output Hessians of layer {self.layer}"

    @torch.no_grad()
    def run(self, model_map: ModelMap) -> None:
        """See `Task.run`."""
        layer = model_map.layers[self.layer]
        if not self.outputs.has(layer):
            trace = trace_again(model_map, self.states, self.layer)
            self.outputs.save(layer, _sums_of(trace))

    def smaller(self) -> "OutputsTask":
        """Itself: traces are in files."""
        return self


def _sums_of(trace: LayerTrace) -> Mapping[str, OutputSums]:
    """Of a layer, by the name of the matrix, of the first of those that share one."""
    shared, sums = owners(trace.layer), dict[str, OutputSums]()
    for of_matrix in trace_matrices(trace):
        name, n_rows = shared[of_matrix.matrix.name], of_matrix.matrix.rows
        own = sums.setdefault(name, OutputSums(n_rows))
        for gradients in of_matrix.gradients:  # of every draw
            own.add(gradients)
    return sums
