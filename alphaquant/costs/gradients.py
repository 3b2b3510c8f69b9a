"""Gradients at the quantizable modules, from the last layer to the first.

Three passes: forward, every layer once more with a graph, and back. Memory holds the graph of one
layer for one batch; hidden states at every layer, their gradients and a layer's traces wait in
files (`alphaquant.costs.shelf`), so it does not grow with layers or windows. The predictions of a
batch are gone before those of the next one are made.
`trace_layers` yields, for each layer, what went into its modules and the gradients at their
outputs; products with weight errors are the caller's business. What is differentiated is a
`Quantity`: the log-likelihood of labels that the model itself draws, that of the text, or
whatever else can be computed from the predictions.

Letters: B sequences of a batch, S of all, T tokens each, V vocabulary, K inputs and N outputs of
a linear, H hidden size, D totals that are differentiated.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphaquant.costs.shelf import Shelf, Shelved
from alphaquant.costs.tape import Tape, TracedBatch
from alphaquant.errors import ModelError
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.walk import LayerCall, LayerStep, check_walk, replaced_forwards, walk


class Quantity(Protocol):
    """What is differentiated: scalars that are sums over sequences."""

    def totals(self, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
        """The scalars of some sequences; each gives gradients of its own.

        Args:
            log_probs: predictions, float32 [B, T, V].
            batch: token ids, int64 [B, T], on the same device.
            first: index of the first of them among all S.
        """


@dataclass(frozen=True)
class SampledLabels:
    """Log-likelihoods of labels that are drawn from the model's own predictions.

    One label for every position; squares of the gradients' products with a perturbation estimate
    the Fisher term of the divergence. Each draw of each sequence has a generator of its own, so
    the labels do not depend on how sequences are batched.

    Attributes:
        n_draws: labels drawn per position, each for a total of its own.
        seed: of the draws.
    """

    n_draws: int
    seed: int

    def totals(self, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
        """One log-likelihood per draw."""
        seeds = _label_seeds(self.seed, range(first, first + len(batch)), self.n_draws)
        return [log_probs.gather(-1, _draw_labels(log_probs, of_draw)).sum() for of_draw in seeds]


@dataclass(frozen=True)
class TextLabels:
    """The cross-entropy of the text's next tokens, summed over T - 1 positions."""

    def totals(self, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
        """One cross-entropy, nats."""
        return [-log_probs[:, :-1].gather(-1, batch[:, 1:, None]).sum()]


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
        at_output: gradients of the other quantities at the layer's output, batches of
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
    quantities: Sequence[Quantity],
    at_output: Sequence[Quantity] = (),
    folder: Path | None = None,
) -> Iterator[LayerTrace]:
    """Walk the model backwards.

    Args:
        model_map: the model, with the weights at which gradients are taken.
        batches: token ids, int64 [B, T] each.
        quantities: D totals in all, whose gradients are traced at every module, in this order.
        at_output: D' totals in all, whose gradients are wanted at the layers' outputs only.
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
    tapes, outputs = run_forward(model_map, batches, (quantities, at_output), folder)
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
    quantities: tuple[Sequence[Quantity], Sequence[Quantity]],
    folder: Path | None,
    n_before: int = 0,
    see: Callable[[LayerStep], None] = lambda step: None,
) -> tuple[list[Tape], list[Any]]:
    """Run all layers; tapes of the batches, with gradients at what the last layer gave, and that.

    What the last layer gave is kept where somebody wants to know what comes after it.

    Args:
        model_map: the model.
        batches: token ids, int64 [B, T] each.
        quantities: those that are traced, and those at the layers' outputs.
        folder: see `trace_layers`.
        n_before: sequences of the text before these batches.
        see: called with every layer's step when it has run.
    """
    tapes, ends, outputs = [Tape() for _ in batches], Shelf(folder), list[Any]()
    first = list(accumulate((len(batch) for batch in batches), initial=n_before))
    n_ended = 0

    def end(logits: Tensor) -> None:
        """The model ends its batches one after the other, in their order."""
        nonlocal n_ended
        batch = batches[n_ended].to(logits.device)
        parts = [_at_logits(logits, batch, wanted, first[n_ended]) for wanted in quantities]
        tapes[n_ended].start(logits, parts, ends)
        n_ended += 1

    embeddings = () if model_map.ends is None else model_map.ends.embeddings
    with ExitStack() as stack:
        stack.enter_context(_caught_logits(model_map.model, end))
        for site in embeddings:
            stack.enter_context(_caught_embeddings(site.module, tapes, ends))
        stack.enter_context(torch.enable_grad())
        for step in walk(model_map, batches, []):
            shelf = Shelf(folder)
            with torch.no_grad():
                step.outputs = [
                    tape.record(step.layer, call, shelf)
                    for tape, call in zip(tapes, step.calls, strict=True)
                ]
            see(step)
            if model_map.ends is not None and step.layer is model_map.layers[-1]:
                outputs = tree_map(_without_graph, step.outputs)
    return tapes, outputs


@contextmanager
def _caught_embeddings(module: nn.Module, tapes: Sequence[Tape], shelf: Shelf) -> Iterator[None]:
    """Let what the embeddings give be a leaf of its batch's tape; batches come in their order."""
    waiting = iter(tapes)

    def caught(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            tape = next(waiting, None)
            if tape is None:
                raise ModelError(
                    "the model looks up its embeddings more than once, so what they cost cannot "
                    "be traced; leave embeddings out of --include"
                )
            return tape.start_with(forward(*args, **kwargs), shelf)

        return run

    with replaced_forwards([module], caught):
        yield


def _without_graph(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


@contextmanager
def _caught_logits(model: nn.Module, end: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand over what a model predicts, and let it give nothing."""

    def hook(_: nn.Module, args: object, output: Any) -> Any:
        end(output.logits)
        return ()

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _at_logits(
    logits: Tensor, batch: Tensor, quantities: Sequence[Quantity], first: int
) -> Tensor:
    """Gradients of the totals at predictions [B, T, V], [D, B, T, V]; float32 of one sequence."""
    rows = []
    for i in range(len(batch)):
        with torch.enable_grad():
            own = logits[i : i + 1].detach().float().requires_grad_(True)
            log_probs = torch.log_softmax(own, -1)
            tokens = batch[i : i + 1]
            totals = [t for q in quantities for t in q.totals(log_probs, tokens, first + i)]
        found = [torch.autograd.grad(t, own, retain_graph=True)[0] for t in totals]
        rows.append(torch.cat(found).to(logits.dtype) if found else logits.new_empty(0))
    return torch.stack(rows, 1) if len(rows[0]) else logits.new_empty(0, *logits.shape)


def _label_seeds(seed: int, sequences: range, n_draws: int) -> list[list[int]]:
    """Seeds of the label draws, [D][B]: 63 bits of a hash, so that no two streams are related."""

    def mixed(draw: int, sequence: int) -> int:
        digest = hashlib.sha256(f"{seed}/{draw}/{sequence}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    return [[mixed(draw, sequence) for sequence in sequences] for draw in range(n_draws)]


def _draw_labels(log_probs: Tensor, seeds: list[int]) -> Tensor:
    """One label per position from the predictions [B, T, V], int64 [B, T, 1]."""
    labels = []
    for predicted, seed in zip(log_probs.detach(), seeds, strict=True):
        generator = torch.Generator(device=predicted.device).manual_seed(seed)
        # [256, 4096] takes 3 to 6 ms, torch.multinomial 50 (one core, Intel Xeon).
        ends = predicted.exp().cumsum(-1)
        points = torch.rand(len(ends), 1, generator=generator, device=ends.device) * ends[:, -1:]
        labels.append(torch.searchsorted(ends, points, right=True).clamp_(max=ends.shape[-1] - 1))
    return torch.stack(labels)


def trace_layer(
    layer: LayerSite, tapes: Sequence[Tape], sizes: Sequence[int], folder: Path | None
) -> LayerTrace:
    """Trace the last layer of tapes, which are of batches of these sizes; it is off them then."""
    traces, gradients = _Traces(layer, sum(sizes), Shelf(folder)), Shelf(folder)
    at_output, calls = [], []
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
        self._gradients: dict[str, Shelved] = {}
        self._routing: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._n_filled = 0

    def add(self, part: TracedBatch) -> None:
        """Write what a batch traced behind the ones before it."""
        for name, x in part.inputs.items():  # [B, T, K]
            if name not in self._inputs:
                self._inputs[name] = self._shelf.reserve((self._n_sequences, *x.shape[1:]), x)
            self._inputs[name].open()[self._rows(len(x))] = x
        for name, g in part.gradients.items():  # [D, B, T, N]
            if name not in self._gradients:
                shape = (len(g), self._n_sequences, *g.shape[2:])
                self._gradients[name] = self._shelf.reserve(shape, g)
            self._gradients[name].open()[:, self._rows(g.shape[1])] = g
        for name, routing in part.routing.items():
            self._routing.setdefault(name, []).append(routing)
        self._n_filled += len(next(iter(part.inputs.values())))

    def joined(self, calls: list[LayerCall], at_output: list[Tensor]) -> LayerTrace:
        """All of them."""
        linears = {
            name: LinearTrace(self._inputs[name].open(), self._gradients[name].open())
            for name in (site.matrix.name for site in self._layer.linears)
        }
        experts = {
            name: ExpertsTrace(
                self._inputs[name].open().flatten(0, 1),
                torch.cat([ids for ids, _ in self._routing[name]]),
                torch.cat([weights for _, weights in self._routing[name]]),
                self._gradients[name].open().flatten(1, 2),
            )
            for name in (site.name for site in self._layer.experts)
        }
        return LayerTrace(self._layer, linears, experts, calls, at_output)

    def _rows(self, n: int) -> slice:
        return slice(self._n_filled, self._n_filled + n)
