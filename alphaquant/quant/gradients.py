"""Gradients at the quantizable modules, from the last layer to the first.

Memory holds the hidden states at every layer and one layer's graph, never the graph of the model.
`trace_layers` yields, for each layer, what went into its modules and the gradients at their
outputs; products with weight errors are the caller's business. What is differentiated is a
`Quantity`: the log-likelihood of labels that the model itself draws, that of the text, or
whatever else can be computed from the predictions.

Letters: B sequences of a batch, S of all, T tokens each, V vocabulary, K inputs and N outputs of
a linear, H hidden size, D totals that are differentiated.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from alphaquant.quant.sites import ExpertsSite, LayerSite, LinearSite, ModelMap
from alphaquant.quant.walk import LayerInputs, capture_inputs, observe_layer, run_layer


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
        hidden: inputs of the layer, batches of [B, T, H].
        arguments: its keyword arguments.
        at_output: gradients of the other quantities at the layer's output, batches of
            [D', B, T, H].
    """

    layer: LayerSite
    linears: dict[str, LinearTrace]
    experts: dict[str, ExpertsTrace]
    hidden: list[Tensor]
    arguments: dict[str, object]
    at_output: list[Tensor]


@dataclass
class _Tap:
    """Observer that keeps the inputs of a layer's modules; output hooks add the outputs."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    routing: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        self.inputs[site.matrix.name] = inputs.detach()

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        self.inputs[site.name] = inputs.detach()
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
    inputs = capture_inputs(model_map, batches)
    hidden = _forward_hidden(model_map, inputs)
    gradients, n_before = [], 0
    for batch, last in zip(batches, hidden[-1], strict=True):
        gradients.append(
            _output_gradients(model_map, batch, last, (quantities, at_output), n_before)
        )
        n_before += len(batch)
    for layer in reversed(model_map.layers):
        arguments = inputs.arguments[layer.index]
        traced = [
            _trace_batch(layer, h, arguments, g)
            for h, g in zip(hidden[layer.index], gradients, strict=True)
        ]
        yield _join(
            layer,
            [t for t, _ in traced],
            hidden[layer.index],
            arguments,
            [g[1] for g in gradients],
        )
        gradients = [g for _, g in traced]
        hidden.pop()


@torch.no_grad()
def _forward_hidden(model_map: ModelMap, inputs: LayerInputs) -> list[list[Tensor]]:
    """Inputs of every layer and, last, the output of the last one."""
    states = [inputs.hidden]
    for layer in model_map.layers:
        states.append([run_layer(layer, h, inputs.arguments[layer.index]) for h in states[-1]])
    return states


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


_Gradients = tuple[Tensor, Tensor]
"""Gradients at one tensor of both kinds of quantities, [D, B, T, H] and [D', B, T, H]."""


def _output_gradients(
    model_map: ModelMap,
    batch: Tensor,
    last: Tensor,
    quantities: tuple[Sequence[Quantity], Sequence[Quantity]],
    first: int,
) -> _Gradients:
    """Gradients at the last layer's output [B, T, H].

    The rest of the model (final norm, lm_head, whatever the architecture does there) runs as it
    is: a hook hands it a leaf.
    """
    leaf = last.detach().requires_grad_(True)
    batch = batch.to(last.device)

    def replace(_: nn.Module, args: object, output: object) -> object:
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    handle = model_map.layers[-1].module.register_forward_hook(replace)
    try:
        with torch.enable_grad():
            logits = model_map.model(batch, use_cache=False).logits.float()  # [B, T, V]
            log_probs = torch.log_softmax(logits, -1)
    finally:
        handle.remove()

    def differentiate(wanted: Sequence[Quantity]) -> Tensor:
        found = []
        for quantity in wanted:
            with torch.enable_grad():
                totals = quantity.totals(log_probs, batch, first)
            found += [torch.autograd.grad(t, leaf, retain_graph=True)[0] for t in totals]
        return torch.stack(found) if found else leaf.detach().new_zeros(0, *leaf.shape)

    return differentiate(quantities[0]), differentiate(quantities[1])


def _trace_batch(
    layer: LayerSite, hidden: Tensor, arguments: dict[str, object], gradients: _Gradients
) -> tuple["_TracedBatch", _Gradients]:
    """One batch through one layer: traces, and the gradients at the layer's input."""
    tap = _Tap()
    names = [site.matrix.name for site in layer.linears] + [site.name for site in layer.experts]
    modules: list[nn.Module] = [s.module for s in layer.linears] + [
        s.hooked for s in layer.experts
    ]

    def keep(name: str) -> object:
        def hook(_: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            tap.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    leaf = hidden.detach().requires_grad_(True)
    handles = [m.register_forward_hook(keep(n)) for n, m in zip(names, modules, strict=True)]  # type: ignore[arg-type]
    try:
        with torch.enable_grad(), observe_layer(layer, tap):
            output = run_layer(layer, leaf, dict(arguments))
    finally:
        for handle in handles:
            handle.remove()
    targets = [leaf, *(tap.outputs[n] for n in names)]
    found = [
        torch.autograd.grad(output, targets, g, retain_graph=True, allow_unused=True)
        for g in gradients[0]
    ]
    others = [torch.autograd.grad(output, leaf, g, retain_graph=True)[0] for g in gradients[1]]
    at = {
        n: torch.stack([_or_zeros(f[i + 1], tap.outputs[n]) for f in found]).detach()
        for i, n in enumerate(names)
    }
    at_input = (
        torch.stack([f[0] for f in found]),
        torch.stack(others) if others else gradients[1],
    )
    return _TracedBatch(tap.inputs, tap.routing, at, hidden.shape[0]), at_input


@dataclass(frozen=True)
class _TracedBatch:
    inputs: dict[str, Tensor]
    routing: dict[str, tuple[Tensor, Tensor]]
    gradients: dict[str, Tensor]
    n_sequences: int


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _join(
    layer: LayerSite,
    parts: list[_TracedBatch],
    hidden: list[Tensor],
    arguments: dict[str, object],
    at_output: list[Tensor],
) -> LayerTrace:
    """Concatenate batches along the sequences."""
    linears = {}
    for site in layer.linears:
        name = site.matrix.name
        x = torch.cat([p.inputs[name].reshape(p.n_sequences, -1, site.matrix.cols) for p in parts])
        g = torch.cat(
            [
                p.gradients[name].reshape(
                    len(p.gradients[name]), p.n_sequences, -1, site.matrix.rows
                )
                for p in parts
            ],
            1,
        )
        linears[name] = LinearTrace(x, g)
    experts = {}
    for experts_site in layer.experts:
        name = experts_site.name
        n_totals = len(parts[0].gradients[name])
        width = parts[0].inputs[name].shape[-1]
        experts[name] = ExpertsTrace(
            torch.cat([p.inputs[name] for p in parts]),
            torch.cat([p.routing[name][0] for p in parts]),
            torch.cat([p.routing[name][1] for p in parts]),
            torch.cat([p.gradients[name].reshape(n_totals, -1, width) for p in parts], 1),
        )
    return LayerTrace(layer, linears, experts, hidden, arguments, at_output)
