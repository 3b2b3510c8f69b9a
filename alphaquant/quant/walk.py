"""Walking a model decoder layer by decoder layer over cached hidden states.

Memory holds one layer's work at a time.

`capture_inputs` runs the model once up to its first layer and records with which keyword arguments
each layer is called (masks, rotary embeddings); `run_layer` then calls a single layer. All windows
have one length, so the arguments of one batch serve all.

Letters: B windows in a batch, T tokens in a window, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.quant.sites import ExpertsSite, LayerSite, LinearSite, ModelMap


class _StopForward(Exception):
    """Ends a forward pass once the wanted layer was reached."""


@dataclass(frozen=True)
class LayerInputs:
    """What the layers are called with.

    Attributes:
        hidden: inputs of the first layer, one [B, T, H] tensor per batch.
        arguments: keyword arguments of each layer, without the hidden states.
    """

    hidden: list[Tensor]
    arguments: list[dict[str, Any]]


class LayerObserver(Protocol):
    """Receives the inputs of the quantizable modules while a layer runs."""

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """Inputs [B, T, K] or [n, K] of an nn.Linear."""

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """Inputs [n, H], chosen experts [n, k] and routing weights [n, k] of routed experts."""


def batches_of(tokens: Tensor, batch_size: int) -> list[Tensor]:
    """Split windows [N, T] into batches; all but the last have `batch_size` rows."""
    return list(torch.split(tokens, batch_size))


@torch.no_grad()
def capture_inputs(model_map: ModelMap, batches: list[Tensor]) -> LayerInputs:
    """Hidden states at the first layer for every batch, and the arguments of every layer.

    Args:
        model_map: the model.
        batches: token ids, int64 [B, T] each.

    Raises:
        ModelError: the model never called one of its decoder layers.
    """
    device = next(model_map.model.parameters()).device
    arguments: list[dict[str, Any]] = [{} for _ in model_map.layers]
    reached: set[int] = set()

    def remember(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments[index] = {
                k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values")
            }
            reached.add(index)

        return hook

    handles = [
        layer.module.register_forward_pre_hook(remember(layer.index), with_kwargs=True)
        for layer in model_map.layers
    ]
    try:
        # One window is enough: masks and positions do not depend on the content, and broadcast
        # over the batch.
        model_map.model(batches[0][:1].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer.name for layer in model_map.layers if layer.index not in reached]
    if missing:
        raise ModelError(
            f"the model's forward pass never called {missing[0]}; its layers cannot be walked one "
            "by one"
        )
    return LayerInputs(
        [_first_hidden(model_map, batch.to(device)) for batch in batches], arguments
    )


def run_layer(layer: LayerSite, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Output of one layer, [B, T, H]."""
    output: Tensor | tuple[Tensor, ...] = layer.module(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def observe_layer(layer: LayerSite, observer: LayerObserver) -> Iterator[None]:
    """Call an observer with the inputs of every quantizable module while the layer runs.

    What a site runs to find the routing of its tokens is not observed.

    Raises:
        ModelError: on leaving, a module that the layer holds was never called.
    """
    reached: set[str] = set()
    routing = False

    def linear_hook(site: LinearSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not routing:
                reached.add(site.matrix.name)
                observer.on_linear(site, args[0])

        return hook

    def experts_hook(site: ExpertsSite) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal routing
            routing = True
            try:
                tokens = site.route(args, kwargs)
            finally:
                routing = False
            reached.add(site.name)
            observer.on_experts(site, *tokens)

        return hook

    handles = [site.module.register_forward_pre_hook(linear_hook(site)) for site in layer.linears]
    handles += [
        site.hooked.register_forward_pre_hook(experts_hook(site), with_kwargs=True)
        for site in layer.experts
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    expected = {site.matrix.name for site in layer.linears} | {site.name for site in layer.experts}
    if expected - reached:
        names = sorted(expected - reached)
        raise ModelError(
            f"{len(names)} modules of {layer.name} were never called during calibration, e.g. "
            f"{names[0]}; their inputs are unknown, so they cannot be quantized with data: use "
            "--method rtn or report the architecture"
        )


def _first_hidden(model_map: ModelMap, batch: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForward

    handle = model_map.layers[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model_map.model(batch, use_cache=False)
    except _StopForward:
        pass
    finally:
        handle.remove()
    return found[0]
