"""Predictions of a model over fixed windows, from any decoder layer on.

A search changes a few layers at a time. What goes into each layer under the current weights is
kept, so a change in layer l costs the layers from l on and the head, not the whole model: half of
it on average. Weights are written by others; this file runs what is there.

Letters: N windows, B of them in a batch, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alphaquant.quant.sites import LayerSite, ModelMap
from alphaquant.quant.walk import LayerInputs, batches_of, capture_inputs


class SuffixModel:
    """A model over fixed windows whose hidden states are remembered layer by layer.

    Memory: one [N, T, H] tensor per layer.
    """

    def __init__(self, model_map: ModelMap, tokens: Tensor, batch_size: int) -> None:
        """Run the model as it is and remember its hidden states.

        Args:
            model_map: the model.
            tokens: int64 [N, T].
            batch_size: windows per forward pass.

        Raises:
            ModelError: the model never called one of its decoder layers.
        """
        self._map = model_map
        self._batches = batches_of(tokens, batch_size)
        inputs: LayerInputs = capture_inputs(model_map, self._batches)
        self._arguments = inputs.arguments
        self._hidden: list[list[Tensor]] = [inputs.hidden]
        self._tuple_sizes = [0] * len(model_map.layers)
        self.remember(0)

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self._map.layers)

    @torch.no_grad()
    def remember(self, first_layer: int) -> None:
        """Replace the remembered hidden states behind a layer by those of the current weights.

        Args:
            first_layer: first layer whose weights changed since the last call; `n_layers` if none.
        """
        kept = self._hidden[: first_layer + 1]
        for layer in self._map.layers[first_layer : self.n_layers - 1]:
            kept.append([self._run(layer, h) for h in kept[-1]])
        self._hidden = kept

    @torch.no_grad()
    def predict(self, first_layer: int, first_batch: int = 0) -> Iterator[Tensor]:
        """Log-probabilities of the current weights, float32 [B, T, V] per batch.

        Args:
            first_layer: first layer whose weights differ from the remembered ones; layers before
                it are not run.
            first_batch: batches before it are left out.
        """
        first_layer = min(first_layer, self.n_layers - 1)
        inputs = self._hidden[first_layer][first_batch:]
        for batch, hidden in zip(self._batches[first_batch:], inputs, strict=True):
            for layer in self._map.layers[first_layer:]:
                hidden = self._run(layer, hidden)
            with self._layers_skipped(hidden):
                tokens = batch.to(hidden.device)
                logits: Tensor = self._map.model(tokens, use_cache=False).logits
            yield torch.log_softmax(logits.float(), -1)

    def _run(self, layer: LayerSite, hidden: Tensor) -> Tensor:
        output: Any = layer.module(hidden, **self._arguments[layer.index])
        if isinstance(output, tuple):
            self._tuple_sizes[layer.index] = len(output)
            return output[0]  # type: ignore[no-any-return]
        return output  # type: ignore[no-any-return]

    @contextmanager
    def _layers_skipped(self, hidden: Tensor) -> Iterator[None]:
        """Every layer gives `hidden`, so that a call of the model runs what comes behind them."""

        def give(size: int) -> Any:
            output = (hidden, *[None] * (size - 1)) if size else hidden
            return lambda *args, **kwargs: output

        modules = [layer.module for layer in self._map.layers]
        own = [m.__dict__.get("forward") for m in modules]  # None: the class's
        try:
            for module, size in zip(modules, self._tuple_sizes, strict=True):
                module.forward = give(size)
            yield
        finally:
            for module, forward in zip(modules, own, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward
