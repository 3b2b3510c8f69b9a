"""Gradients at the quantizable modules, from the last layer to the first.

Memory holds the hidden states at every layer and one layer's graph, never the graph of the model.
What layers give are leaves; what the model makes of them before it calls the next layer, usually
nothing, has a graph of its own. So gradients also reach state that layers hand on beside the
hidden states, and modules whose outputs nothing depends on get zeros.
`trace_layers` yields, for each layer, what went into its modules and the gradients at their
outputs; products with weight errors are the caller's business. What is differentiated is a
`Quantity`: the log-likelihood of labels that the model itself draws, that of the text, or
whatever else can be computed from the predictions.

Letters: B sequences of a batch, S of all, T tokens each, V vocabulary, K inputs and N outputs of
a linear, H hidden size, D totals that are differentiated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from alphaquant.errors import ModelError
from alphaquant.models.sites import ExpertsSite, LayerSite, LinearSite, ModelMap
from alphaquant.models.walk import (
    LayerCall,
    check_walk,
    hidden_of,
    observe_layer,
    shared_state,
    walk,
)


class Quantity(Protocol):
    """What is differentiated: scalars that are sums over the sequences of a batch."""

    def totals(self, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
        """The scalars of one batch; each gives gradients of its own.

        Args:
            log_probs: predictions, float32 [B, T, V].
            batch: token ids, int64 [B, T], on the same device.
            first: index of the batch's first sequence among all S.
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
    """What an nn.Linear saw: inputs [S, T, K] and output gradients [D, S, T, N]."""

    inputs: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class ExpertsTrace:
    """What routed experts saw.

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
class LayerTrace:
    """One layer's traces, and its inputs for whoever wants to run it again.

    Attributes:
        layer: the layer.
        linears: by matrix name.
        experts: by module name.
        calls: how the layer is called, by batch.
        at_output: gradients of the other quantities at the layer's output, batches of
            [D', B, T, H].
    """

    layer: LayerSite
    linears: dict[str, LinearTrace]
    experts: dict[str, ExpertsTrace]
    calls: list[LayerCall]
    at_output: list[Tensor]

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states that go into the layer, batches of [B, T, H]."""
        return [call.hidden for call in self.calls]


@dataclass
class _Tap:
    """Observer that keeps what goes into a layer's modules and comes out, call by call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    routing: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        self.inputs.setdefault(site.matrix.name, []).append(inputs.detach())

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        if site.name in self.inputs:
            raise ModelError(
                f"{site.name} is called more than once per layer, so its routing cannot be "
                "traced; use --method rtn or report the architecture"
            )
        self.inputs[site.name] = [inputs.detach()]
        self.routing[site.name] = (expert_ids, weights.detach())


def trace_layers(
    model_map: ModelMap,
    batches: list[Tensor],
    quantities: Sequence[Quantity],
    at_output: Sequence[Quantity] = (),
) -> Iterator[LayerTrace]:
    """Walk the model backwards.

    Args:
        model_map: the model, with the weights at which gradients are taken.
        batches: token ids, int64 [B, T] each.
        quantities: D totals in all, whose gradients are traced at every module, in this order.
        at_output: D' totals in all, whose gradients are wanted at the layers' outputs only.

    Yields:
        Traces from the last layer to the first.
    """
    check_walk(model_map, batches)
    tapes = [_Tape(len(model_map.layers)) for _ in batches]
    results: list[Any] = []
    with torch.enable_grad():
        for step in walk(model_map, batches, results):
            with torch.no_grad():
                step.outputs = [
                    tape.record(step.layer, call)
                    for tape, call in zip(tapes, step.calls, strict=True)
                ]
    n_before = 0
    for batch, tape, result in zip(batches, tapes, results, strict=True):
        tape.start(result.logits, batch, (quantities, at_output), n_before)
        n_before += len(batch)
    results.clear()
    for layer in reversed(model_map.layers):
        at = [tape.output_gradients(layer.index)[1] for tape in tapes]
        traced = [tape.trace(layer) for tape in tapes]
        calls = [tape.pop() for tape in tapes]
        yield _join(layer, traced, calls, at)


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
        labels.append(torch.multinomial(predicted.exp(), 1, generator=generator))
    return torch.stack(labels)


@dataclass(frozen=True)
class _Recorded:
    """One layer's call of one batch, flat.

    Attributes:
        inputs: arguments; tensors that depend on earlier layers have the graph of what the model
            does between layers.
        spec: their structure.
        outputs: what the layer gave, and the state that it left; new tensors are leaves.
        hidden: its hidden states, one of the inputs.
    """

    inputs: list[Any]
    spec: TreeSpec
    outputs: list[Any]
    hidden: Tensor


class _Tape:
    """One batch's way through the layers, and the gradients on the way back.

    Gradients of both kinds of quantities are kept per leaf, [D + D', ...].
    """

    def __init__(self, n_layers: int) -> None:
        self._layers: list[_Recorded] = []
        self._gradients: dict[int, Tensor] = {}
        self._n_traced = 0

    def record(self, layer: LayerSite, call: LayerCall) -> Any:
        """Run a layer without a graph; what it gives, as leaves, goes back to the model."""
        # State that the model keeps between layers is compared by its contents.
        inputs, spec = tree_flatten((call.args, {**call.kwargs, **shared_state(call.kwargs)}))
        detached = [_detached(x) for x in inputs]
        known = {id(new): old for new, old in zip(detached, inputs, strict=True)}
        args, kwargs = tree_unflatten(detached, spec)
        output = layer.module(*args, **kwargs)

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return known[id(x)] if id(x) in known else x.detach().requires_grad_(True)

        output, state = tree_map(leaf, (output, shared_state(kwargs)))
        for name, content in state.items():
            call.kwargs[name].update(content)
        self._layers.append(_Recorded(inputs, spec, tree_leaves((output, state)), call.hidden))
        return output

    def start(
        self,
        logits: Tensor,
        batch: Tensor,
        quantities: tuple[Sequence[Quantity], Sequence[Quantity]],
        first: int,
    ) -> None:
        """Gradients at the leaves that the predictions [B, T, V] are made of."""
        with torch.enable_grad():
            log_probs = torch.log_softmax(logits.float(), -1)
            traced, others = (
                [t for q in wanted for t in q.totals(log_probs, batch.to(logits.device), first)]
                for wanted in quantities
            )
        self._n_traced = len(traced)
        leaves = self._leaves()
        found = [
            torch.autograd.grad(t, leaves, retain_graph=True, allow_unused=True)
            for t in (*traced, *others)
        ]
        for leaf, gradients in zip(leaves, zip(*found, strict=True), strict=True):
            self._add(leaf, gradients)

    def output_gradients(self, index: int) -> tuple[Tensor, Tensor]:
        """Gradients at a layer's hidden states, [D, B, T, H] and [D', B, T, H]."""
        hidden = self._layers[index].outputs[0]
        found = self._gradients[id(hidden)]
        return found[: self._n_traced], found[self._n_traced :]

    def trace(self, layer: LayerSite) -> "_TracedBatch":
        """Run the last layer on the tape again, with a graph; its inputs get their gradients."""
        recorded = self._layers[-1]
        leaves = [_as_leaf(x, recorded.hidden) for x in recorded.inputs]
        args, kwargs = tree_unflatten(leaves, recorded.spec)
        tap = _Tap()
        with torch.enable_grad(), observe_layer(layer, tap), _keep_outputs(layer, tap):
            output = layer.module(*args, **kwargs)
        outputs = tree_leaves((output, shared_state(kwargs)))
        pairs = [
            (new, self._gradients[id(old)])
            for new, old in zip(outputs, recorded.outputs, strict=True)
            if id(old) in self._gradients and new.requires_grad
        ]
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        calls = [(n, y) for n, outputs in tap.outputs.items() for y in outputs]
        reached = [y for _, y in calls if y.requires_grad]
        at: list[list[Tensor]] = [[] for _ in calls]
        at_inputs = []
        for d in range(len(pairs[0][1])):
            found = torch.autograd.grad(
                [new for new, _ in pairs],
                [*inputs, *reached] if d < self._n_traced else inputs,
                [gradient[d] for _, gradient in pairs],
                retain_graph=True,
                allow_unused=True,
            )
            at_inputs.append(found[: len(inputs)])
            of_modules = iter(found[len(inputs) :])
            if d < self._n_traced:
                for kept, (_, y) in zip(at, calls, strict=True):
                    kept.append(_or_zeros(next(of_modules) if y.requires_grad else None, y))
        self._hand_back(recorded, leaves, at_inputs)
        named = [(n, torch.stack(kept)) for (n, _), kept in zip(calls, at, strict=True)]
        return _by_window(tap, named, len(hidden_of(output)))

    def pop(self) -> LayerCall:
        """Take the last layer off the tape; its call, without graph."""
        recorded = self._layers.pop()
        for old in recorded.outputs:
            self._gradients.pop(id(old), None)
        args, kwargs = tree_unflatten([_detached(x) for x in recorded.inputs], recorded.spec)
        return LayerCall(args, kwargs)

    def _hand_back(
        self, recorded: _Recorded, leaves: list[Any], at_inputs: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """Gradients at a layer's inputs become gradients at the leaves that these are made of."""
        pairs = zip(recorded.inputs, leaves, strict=True)
        originals = [old for old, x in pairs if isinstance(x, Tensor) and x.requires_grad]
        if not self._layers[:-1]:
            return
        earlier = self._leaves(-1)
        for original, gradients in zip(originals, zip(*at_inputs, strict=True), strict=True):
            if not original.requires_grad:
                continue
            if original.is_leaf:
                self._add(original, gradients)
                continue
            found = [
                torch.autograd.grad(
                    original, earlier, _or_zeros(g, original), retain_graph=True, allow_unused=True
                )
                for g in gradients
            ]
            for leaf, parts in zip(earlier, zip(*found, strict=True), strict=True):
                self._add(leaf, parts)

    def _leaves(self, end: int | None = None) -> list[Tensor]:
        """Leaves of the layers on the tape, without repeats."""
        found = {
            id(x): x
            for recorded in self._layers[:end]
            for x in recorded.outputs
            if isinstance(x, Tensor) and x.requires_grad and x.is_leaf
        }
        return list(found.values())

    def _add(self, leaf: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Add to a leaf's gradients; all None is nothing."""
        if any(g is not None for g in gradients):
            total = torch.stack([_or_zeros(g, leaf) for g in gradients]).detach()
            known = self._gradients.get(id(leaf))
            self._gradients[id(leaf)] = total if known is None else known + total


@contextmanager
def _keep_outputs(layer: LayerSite, tap: _Tap) -> Iterator[None]:
    """Let the tap see what the layer's modules give.

    What is made of token ids alone (n-gram embeddings) depends on no hidden state and would have
    no graph; it starts one.
    """

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: object, output: Any) -> Any:
            kept = tap.outputs.setdefault(name, [])
            if len(kept) >= len(tap.inputs.get(name, ())):  # while routing is measured
                return None
            starts = isinstance(output, Tensor) and not output.requires_grad
            kept.append(output.detach().requires_grad_() if starts else hidden_of(output))
            return kept[-1].clone() if starts else None  # leaves cannot be written in place

        return hook

    sites = [(s.matrix.name, s.module) for s in layer.linears]
    sites += [(s.name, s.hooked) for s in layer.experts]  # type: ignore[misc]
    handles = [module.register_forward_hook(keep(name)) for name, module in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) and x.requires_grad else x


def _as_leaf(x: Any, hidden: Tensor) -> Any:
    """A leaf of a new graph for what depends on earlier layers or is `hidden`, else the thing."""
    needs = isinstance(x, Tensor) and (x.requires_grad or x is hidden)
    return x.detach().requires_grad_(True) if needs else x


@dataclass(frozen=True)
class _TracedBatch:
    """Inputs [B, T, K], routing and output gradients [D, B, T, N] of modules, by name.

    Where a module is called more than once, its calls follow each other in T.
    """

    inputs: dict[str, Tensor]
    routing: dict[str, tuple[Tensor, Tensor]]
    gradients: dict[str, Tensor]


def _by_window(tap: _Tap, gradients: list[tuple[str, Tensor]], n_windows: int) -> _TracedBatch:
    """Give what was seen its windows B, and join the calls of a module along T."""
    joined: dict[str, list[Tensor]] = {}
    for name, found in gradients:  # [D, ..., N]
        by_window = found.detach().reshape(len(found), n_windows, -1, found.shape[-1])
        joined.setdefault(name, []).append(by_window)
    inputs = {
        name: torch.cat([x.reshape(n_windows, -1, x.shape[-1]) for x in parts], 1)
        for name, parts in tap.inputs.items()
    }
    return _TracedBatch(inputs, tap.routing, {n: torch.cat(g, 2) for n, g in joined.items()})


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _join(
    layer: LayerSite,
    parts: list[_TracedBatch],
    calls: list[LayerCall],
    at_output: list[Tensor],
) -> LayerTrace:
    """Concatenate batches along the sequences."""
    linears = {
        name: LinearTrace(
            torch.cat([p.inputs[name] for p in parts]),
            torch.cat([p.gradients[name] for p in parts], 1),
        )
        for name in (site.matrix.name for site in layer.linears)
    }
    experts = {
        name: ExpertsTrace(
            torch.cat([p.inputs[name].flatten(0, 1) for p in parts]),
            torch.cat([p.routing[name][0] for p in parts]),
            torch.cat([p.routing[name][1] for p in parts]),
            torch.cat([p.gradients[name].flatten(1, 2) for p in parts], 1),
        )
        for name in (site.name for site in layer.experts)
    }
    return LayerTrace(layer, linears, experts, calls, at_output)
