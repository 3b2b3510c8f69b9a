"""Gradients at the quantizable modules, from the last layer to the first.

Three passes: forward, every layer once more with a graph, and back. Memory holds the graph of one
layer for one batch; hidden states at every layer, their gradients and a layer's traces wait in
files (`alphaquant.costs.shelf`), so it does not grow with layers or windows. Predictions are made
part by part (`alphaquant.costs.endings`).
`trace_layers` yields, for each layer, what went into its modules and the gradients at their
outputs; products with weight errors are the caller's business. What is differentiated is the
log-likelihood of `Labels`, which the model itself draws or the text has, summed over positions
and sequences.

Letters: B sequences of a batch, S of all, T tokens each, V vocabulary, K inputs and N outputs of
a linear, H hidden size, D totals that are differentiated.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from alphaquant.costs.endings import Endings
from alphaquant.costs.labels import Labels
from alphaquant.costs.shelf import Shelf, Shelved
from alphaquant.costs.tape import Tape, TracedBatch
from alphaquant.models.dtypes import rough_products
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import LayerCall, LayerStep, check_walk, walk


@dataclass(frozen=True)
class LinearTrace:
    """What an nn.Linear saw: inputs [S, T, K] and output gradients [D, S, T, N].

    Both are memory-mapped, on the CPU, in the dtype in which the model computes.
    """

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class ExpertsTrace:
    """What routed experts saw; inputs and gradients are memory-mapped as in `LinearTrace`.

    Attributes:
        inputs: [S * T, H].
        expert_ids: int64 [S * T, k].
        weights: [S * T, k].
        gradients: [D, S * T, H], at the output of the module that sums the experts' outputs.
    """

    inputs: Tensor
    expert_ids: Tensor
    weights: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class EndTrace:
    """What is known beside the layers.

    Attributes:
        batches: token ids, int64 [B, T] each.
        outputs: what the last layer gave, by batch.
        at_embeddings: gradients of the D totals where the embeddings give something, batches of
            [D, B, T, H]; empty where these are not quantized.
        n_totals: D.
    """

    batches: list[Tensor]
    outputs: list[Any]
    at_embeddings: list[Tensor]
    n_totals: int


@dataclass(frozen=True)
class LayerTrace:
    """One layer's traces, and its inputs for whoever wants to run it again.

    Attributes:
        layer: the layer.
        linears: by matrix name.
        experts: by module name.
        calls: how the layer is called, by batch.
        at_output: gradients of the other totals at the layer's output, batches of
            [D', B, T, H].
        ends: of what is beside the layers; None for a layer.
    """

    layer: LayerSite
    linears: dict[str, LinearTrace]
    experts: dict[str, ExpertsTrace]
    calls: list[LayerCall]
    at_output: list[Tensor]
    ends: EndTrace | None = None

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states that go into the layer, batches of [B, T, H]."""
        return [call.hidden for call in self.calls]


def trace_layers(
    model_map: ModelMap,
    batches: list[Tensor],
    labels: Sequence[Labels],
    at_output: Sequence[Labels] = (),
    folder: Path | None = None,
) -> Iterator[LayerTrace]:
    """Walk the model backwards.

    Args:
        model_map: the model, with the weights at which gradients are taken.
        batches: token ids, int64 [B, T] each.
        labels: D in all, whose gradients are traced at every module, in this order.
        at_output: D' in all, whose gradients are wanted at the layers' outputs only.
        folder: for files without names, of the hidden states at all layers and the traces of one;
            None for the system's folder of temporary files.

    Yields:
        Traces from the last layer to the first, and then of what is beside the layers, where that
        is quantized. Dropping one frees its file; the layer's own weights are given back when the
        next is asked for.

    Raises:
        ModelError: the model cannot be walked.
        StoreError: the disk is full.
    """
    check_walk(model_map, batches)
    tapes, outputs = run_forward(model_map, batches, (labels, at_output), folder)
    for layer in reversed(model_map.layers):
        yield trace_layer(layer, tapes, [len(batch) for batch in batches], folder)
        layer.release()
        trim_heap()
    if model_map.ends is not None:
        at_embeddings = [tape.at_embeddings() for tape in tapes]
        ends = EndTrace(batches, outputs, at_embeddings, tapes[0].n_traced)
        yield LayerTrace(model_map.ends, {}, {}, [], [], ends)


def run_forward(
    model_map: ModelMap,
    batches: list[Tensor],
    labels: tuple[Sequence[Labels], Sequence[Labels]],
    folder: Path | None,
    n_before: int = 0,
    see: Callable[[LayerStep], None] = lambda step: None,
) -> tuple[list[Tape], list[Any]]:
    """Run all layers; tapes of the batches, with gradients at what the last layer gave, and that.

    What the last layer gave is kept where somebody wants to know what comes after it.

    Args:
        model_map: the model.
        batches: token ids, int64 [B, T] each.
        labels: those that are traced, and those at the layers' outputs.
        folder: see `trace_layers`.
        n_before: sequences of the text before these batches.
        see: called with every layer's step when it has run.
    """
    tapes, outputs = [Tape() for _ in batches], list[Any]()
    endings = Endings(model_map, batches, labels, tapes, Shelf(folder), n_before)
    with endings.caught(), torch.enable_grad(), rough_products(model_map.inventory.matrices):
        for step in walk(model_map, batches, []):
            shelf = Shelf(folder)
            with torch.no_grad():
                step.outputs = [
                    tape.record(step.layer, call, shelf)
                    for tape, call in zip(tapes, step.calls, strict=True)
                ]
            see(step)
            endings.outputs = step.outputs
            if model_map.ends is not None and step.layer is model_map.layers[-1]:
                outputs = tree_map(_without_graph, step.outputs)
    return tapes, outputs


def _without_graph(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def trace_layer(
    layer: LayerSite, tapes: Sequence[Tape], sizes: Sequence[int], folder: Path | None
) -> LayerTrace:
    """Trace the last layer of tapes, which are of batches of these sizes; it is off them then."""
    traces, gradients = _Traces(layer, sum(sizes), Shelf(folder)), Shelf(folder)
    at_output, calls = [], []
    with rough_products(layer.matrices()):
        for tape in tapes:
            at_output.append(tape.output_gradients())
            traces.add(tape.trace(layer, gradients))
            calls.append(tape.pop())
    return traces.joined(calls, at_output)


class _Traces:
    """A layer's traces on a shelf, filled batch by batch.

    Args:
        layer: the layer.
        n_sequences: S.
        shelf: where they are.
    """

    def __init__(self, layer: LayerSite, n_sequences: int, shelf: Shelf) -> None:
        self._layer, self._n_sequences, self._shelf = layer, n_sequences, shelf
        self._inputs: dict[str, Shelved] = {}
        self._leaders: dict[str, str] = {}  # whose inputs a module's are
        self._gradients: dict[str, Shelved] = {}
        self._routing: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._n_filled = 0

    def add(self, part: TracedBatch) -> None:
        """Write what a batch traced behind the ones before it."""
        if not self._leaders:
            self._leaders = _leaders(part.inputs)
        for name, x in part.inputs.items():  # [B, T, K]
            leader = self._leaders[name]
            if name != leader:
                first = part.inputs[leader]
                assert x.data_ptr() == first.data_ptr() or torch.equal(x, first)
                continue
            if name not in self._inputs:
                self._inputs[name] = self._shelf.reserve((self._n_sequences, *x.shape[1:]), x)
            self._inputs[name].write(self._n_filled * x[0].numel(), x)
        for name, g in part.gradients.items():  # [D, B, T, N]
            if name not in self._gradients:
                shape = (len(g), self._n_sequences, *g.shape[2:])
                self._gradients[name] = self._shelf.reserve(shape, g)
            for d, own in enumerate(g):
                n_before = d * self._n_sequences + self._n_filled
                self._gradients[name].write(n_before * own[0].numel(), own)
        for name, routing in part.routing.items():
            self._routing.setdefault(name, []).append(routing)
        self._n_filled += len(next(iter(part.inputs.values())))

    def joined(self, calls: list[LayerCall], at_output: list[Tensor]) -> LayerTrace:
        """All of them."""
        linears = {
            name: LinearTrace(
                self._inputs[self._leaders[name]].open(), self._gradients[name].open()
            )
            for name in (site.matrix.name for site in self._layer.linears)
        }
        experts = {
            name: ExpertsTrace(
                self._inputs[self._leaders[name]].open().flatten(0, 1),
                torch.cat([ids for ids, _ in self._routing[name]]),
                torch.cat([weights for _, weights in self._routing[name]]),
                self._gradients[name].open().flatten(1, 2),
            )
            for name in (site.name for site in self._layer.experts)
        }
        return LayerTrace(self._layer, linears, experts, calls, at_output)


def _leaders(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """For every module the first of those that were given the same tensor: q for q, k and v."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {n: first.setdefault((x.data_ptr(), x.shape), n) for n, x in inputs.items()}
