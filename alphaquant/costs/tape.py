"""One batch's way through the layers, and the gradients on the way back.

What layers give are leaves; what the model makes of them before it calls the next layer, usually
nothing, has a graph of its own. So gradients also reach state that layers hand on beside the
hidden states, and modules whose outputs nothing depends on get zeros. Leaves and their gradients
wait on shelves: memory holds what the model itself still refers to, and one layer's graph.

Letters: B sequences of the batch, T tokens each, K inputs and N outputs of a module, D totals
whose gradients are traced at modules, D' others.
"""

import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from alphaquant.costs.shelf import Shelf, Shelved
from alphaquant.errors import ModelError
from alphaquant.models.sites import ExpertsSite, LayerSite, LinearSite
from alphaquant.models.walk import LayerCall, hidden_of, observe_layer, shared_state


@dataclass(frozen=True)
class TracedBatch:
    """Inputs [B, T, K], routing and output gradients [D, B, T, N] of modules, by name.

    Where a module is called more than once, its calls follow each other in T.
    """

    inputs: dict[str, Tensor]
    routing: dict[str, tuple[Tensor, Tensor]]
    gradients: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Leaf:
    """What a layer gave; the model goes on with a leaf of this content."""

    content: Shelved


@dataclass(frozen=True)
class _Recorded:
    """One layer's call of one batch, flat.

    Attributes:
        inputs: arguments. Leaves, and the hidden states where they are none, are on a shelf;
            tensors that the model made of leaves have the graph of what it does between layers.
        spec: their structure.
        hidden: which of them are the hidden states.
        outputs: the leaves among what the layer gave and the state that it left, else None.
    """

    inputs: list[Any]
    spec: TreeSpec
    hidden: int
    outputs: list[_Leaf | None]


@dataclass
class _Tap:
    """Observer that keeps what goes into a layer's modules and comes out, call by call."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    routing: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """Keep the inputs of a linear."""
        self.inputs.setdefault(site.matrix.name, []).append(inputs.detach())

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """Keep the inputs and the routing of experts.

        Raises:
            ModelError: they are called a second time.
        """
        if site.name in self.inputs:
            raise ModelError(
                f"{site.name} is called more than once per layer, so its routing cannot be "
                "traced; use --method rtn or report the architecture"
            )
        self.inputs[site.name] = [inputs.detach()]
        self.routing[site.name] = (expert_ids, weights.detach())


class Tape:
    """The layers that a batch went through, and gradients at what they gave.

    Gradients of all totals are kept together, [D + D', ...].

    Attributes:
        n_traced: D.
    """

    def __init__(self) -> None:
        self.n_traced = 0
        self._layers: list[_Recorded] = []
        self._leaves: MutableMapping[Tensor, _Leaf] = WeakTensorKeyDictionary()
        self._gradients: dict[_Leaf, Shelved] = {}
        self._embedded: _Leaf | None = None

    def start_with(self, embedded: Tensor, shelf: Shelf) -> Tensor:
        """Take what the embeddings give, [B, T, H]; the model goes on with a leaf of it."""
        leaf = self._new_leaf(embedded.detach(), shelf)
        self._embedded = self._leaves[leaf]
        return leaf

    def at_embeddings(self) -> Tensor:
        """Gradients of the traced totals at what the embeddings gave, [D, B, T, H].

        Nothing, [0], where the embeddings were not watched.
        """
        if self._embedded is None:
            return torch.zeros(0)
        return self._gradients[self._embedded].read()[: self.n_traced]

    def record(self, layer: LayerSite, call: LayerCall, shelf: Shelf) -> Any:
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
            return known[id(x)] if id(x) in known else self._new_leaf(x, shelf)

        output, state = tree_map(leaf, (output, shared_state(kwargs)))
        for name, content in state.items():
            call.kwargs[name].update(content)
        hidden = next(i for i, x in enumerate(inputs) if x is call.hidden)
        kept = [self._kept(x, i == hidden, shelf) for i, x in enumerate(inputs)]
        leaves = [self._leaf_of(x) for x in tree_leaves((output, state))]
        self._layers.append(_Recorded(kept, spec, hidden, leaves))
        return output

    def start(self, made: Tensor, gradients: Sequence[Tensor], shelf: Shelf) -> None:
        """Take gradients at what the model makes behind its layers to the leaves it is made of.

        Args:
            made: what the head is given, or all logits, [B, T, ...], with its graph.
            gradients: there, of the totals that are traced, [D, B, T, ...], and of the others.
            shelf: for the gradients at the leaves.
        """
        self.n_traced = len(gradients[0])
        self._back(made, [g for part in gradients for g in part], shelf)

    def output_gradients(self) -> Tensor:
        """Gradients of the other totals at the last layer's hidden states, [D', B, T, H]."""
        hidden = self._layers[-1].outputs[0]
        assert hidden is not None, "a layer's first output is its hidden states"
        return self._gradients[hidden].read()[self.n_traced :]

    def traced_gradients(self) -> Tensor:
        """Gradients of the traced totals at the last layer's hidden states, [D, B, T, H]."""
        hidden = self._layers[-1].outputs[0]
        assert hidden is not None, "a layer's first output is its hidden states"
        return self._gradients[hidden].read()[: self.n_traced]

    @classmethod
    def at(cls, call: LayerCall, gradients: Tensor, n_outputs: int, shelf: Shelf) -> "Tape":
        """A tape with one layer on it that hands on nothing but hidden states.

        Args:
            call: how it is called, without graph.
            gradients: of the totals at its hidden states, [D, B, T, H].
            n_outputs: things that it gives, hidden states first.
            shelf: for hidden states and gradients.
        """
        inputs, spec = tree_flatten((call.args, dict(call.kwargs)))
        hidden = next(i for i, x in enumerate(inputs) if x is call.hidden)
        leaf = _Leaf(shelf.put(gradients[:0]))  # nobody reads its content
        outputs: list[_Leaf | None] = [leaf, *[None] * (n_outputs - 1)]
        tape = cls()
        tape.n_traced = len(gradients)
        tape._layers.append(_Recorded(inputs, spec, hidden, outputs))
        tape._gradients[leaf] = shelf.put(gradients)
        return tape

    def trace(self, layer: LayerSite, shelf: Shelf) -> TracedBatch:
        """Run the last layer again, with a graph; its inputs get their gradients, on the shelf."""
        recorded = self._layers[-1]
        leaves = [_fresh(x, i == recorded.hidden) for i, x in enumerate(recorded.inputs)]
        args, kwargs = tree_unflatten(leaves, recorded.spec)
        tap = _Tap()
        with torch.enable_grad(), observe_layer(layer, tap), _keep_outputs(layer, tap):
            output = layer.module(*args, **kwargs)
        outputs = tree_leaves((output, shared_state(kwargs)))
        pairs = [
            (new, self._gradients[old].read())
            for new, old in zip(outputs, recorded.outputs, strict=True)
            if old is not None and old in self._gradients and new.requires_grad
        ]
        inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        calls = [(n, y) for n, outputs in tap.outputs.items() for y in outputs]
        reached = [y for _, y in calls if y.requires_grad]
        at: list[list[Tensor]] = [[] for _ in calls]
        at_inputs = []
        n_totals = len(pairs[0][1])
        for d in range(n_totals):
            found = torch.autograd.grad(
                [new for new, _ in pairs],
                [*inputs, *reached] if d < self.n_traced else inputs,
                [gradient[d] for _, gradient in pairs],
                retain_graph=d + 1 < n_totals,
                allow_unused=True,
            )
            at_inputs.append(found[: len(inputs)])
            of_modules = iter(found[len(inputs) :])
            if d < self.n_traced:
                for kept, (_, y) in zip(at, calls, strict=True):
                    kept.append(_or_zeros(next(of_modules) if y.requires_grad else None, y))
        self._hand_back(recorded, leaves, at_inputs, shelf)
        named = [(n, _stacked(kept, y)) for (n, y), kept in zip(calls, at, strict=True)]
        return _by_window(tap, named, len(hidden_of(output)))

    def pop(self) -> LayerCall:
        """Take the last layer off the tape; its call, without graph."""
        recorded = self._layers.pop()
        for old in recorded.outputs:
            if old is not None:
                self._gradients.pop(old, None)
        args, kwargs = tree_unflatten([_plain(x) for x in recorded.inputs], recorded.spec)
        return LayerCall(args, kwargs)

    def _new_leaf(self, x: Tensor, shelf: Shelf) -> Tensor:
        content = shelf.put(x)
        leaf = content.read().requires_grad_(True)
        self._leaves[leaf] = _Leaf(content)
        return leaf

    def _leaf_of(self, x: Any) -> _Leaf | None:
        return self._leaves.get(x) if isinstance(x, Tensor) else None

    def _kept(self, x: Any, is_hidden: bool, shelf: Shelf) -> Any:
        """An input as the tape keeps it, see `_Recorded`."""
        if is_hidden and not x.requires_grad:
            return shelf.put(x)
        return self._leaf_of(x) or x

    def _hand_back(
        self,
        recorded: _Recorded,
        leaves: list[Any],
        at_inputs: Sequence[Sequence[Tensor | None]],
        shelf: Shelf,
    ) -> None:
        """Gradients at a layer's inputs become gradients at the leaves that these are made of."""
        pairs = zip(recorded.inputs, leaves, strict=True)
        kept = [old for old, x in pairs if isinstance(x, Tensor) and x.requires_grad]
        for old, gradients in zip(kept, zip(*at_inputs, strict=True), strict=True):
            if isinstance(old, _Leaf):
                self._add(old, gradients, shelf)
            elif isinstance(old, Tensor) and old.requires_grad:
                self._back(old, [_or_zeros(g, old) for g in gradients], shelf)

    def _back(self, made: Tensor, gradients: Sequence[Tensor], shelf: Shelf) -> None:
        """Gradients at what the model made of leaves become gradients at these."""
        leaves = list(self._leaves)
        if not leaves:
            return
        found = [
            torch.autograd.grad(made, leaves, gradient, retain_graph=True, allow_unused=True)
            for gradient in gradients
        ]
        for leaf, parts in zip(leaves, zip(*found, strict=True), strict=True):
            self._add(self._leaves[leaf], parts, shelf)

    def _add(self, leaf: _Leaf, gradients: Sequence[Tensor | None], shelf: Shelf) -> None:
        """Add to a leaf's gradients; all None is nothing."""
        known = [g for g in gradients if g is not None]
        if known:
            total = torch.stack([_or_zeros(g, known[0]) for g in gradients]).detach()
            if leaf in self._gradients:
                total += self._gradients[leaf].read()
            self._gradients[leaf] = shelf.put(total)


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


def _plain(kept: Any) -> Any:
    """What a layer was called with, without graph, of what the tape keeps."""
    if isinstance(kept, _Leaf):
        return kept.content.read()
    return kept.read() if isinstance(kept, Shelved) else _detached(kept)


def _fresh(kept: Any, is_hidden: bool) -> Any:
    """A leaf of a new graph for what depends on earlier layers or is hidden, else the thing."""
    needs = is_hidden or isinstance(kept, _Leaf)
    needs = needs or (isinstance(kept, Tensor) and kept.requires_grad)
    return _plain(kept).detach().requires_grad_(True) if needs else kept


def _by_window(tap: _Tap, gradients: list[tuple[str, Tensor]], n_windows: int) -> TracedBatch:
    """Give what was seen its windows B, and join the calls of a module along T."""
    joined: dict[str, list[Tensor]] = {}
    for name, found in gradients:  # [D, ..., N]
        n_seen = math.prod(found.shape[1:-1]) // n_windows
        by_window = found.detach().reshape(len(found), n_windows, n_seen, found.shape[-1])
        joined.setdefault(name, []).append(by_window)
    inputs = {
        name: _cat([x.reshape(n_windows, -1, x.shape[-1]) for x in parts], 1)
        for name, parts in tap.inputs.items()
    }
    return TracedBatch(inputs, tap.routing, {n: _cat(g, 2) for n, g in joined.items()})


def _stacked(gradients: Sequence[Tensor], like: Tensor) -> Tensor:
    """[D, ...] of D gradients, also of none."""
    return torch.stack(list(gradients)) if gradients else like.new_zeros(0, *like.shape)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
