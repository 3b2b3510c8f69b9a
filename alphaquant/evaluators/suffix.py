"""Predictions of a model over fixed windows, from any decoder layer on.

A search changes a few layers at a time. What goes into each layer under the current weights is
kept, so a change in layer l costs the layers from l on and the head, not the whole model: half of
it on average. Weights are written by others; this file runs what is there.

Letters: N windows, B of them in a batch, T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.quant.sites import ModelMap
from alphaquant.quant.walk import batches_of, replaced_forwards, shared_state, walk


class SuffixModel:
    """A model over fixed windows whose layers' outputs are remembered.

    The model's own forward pass runs; layers before the first that changed give what they gave
    before. Memory: one [N, T, H] tensor per layer, and what layers hand on beside it.
    """

    def __init__(self, model_map: ModelMap, tokens: Tensor, batch_size: int) -> None:
        """Run the model as it is and remember what its layers give.

        Args:
            model_map: the model.
            tokens: int64 [N, T].
            batch_size: windows per forward pass.

        Raises:
            ModelError: the model does not call its decoder layers in order.
        """
        self._map = model_map
        self._batches = batches_of(tokens, batch_size)
        self._outputs: list[list[Any]] = []
        with torch.no_grad():
            for step in walk(model_map, self._batches):
                if step.layer.index == self.n_layers - 1:
                    break
                step.run()
                pairs = zip(step.outputs, step.calls, strict=True)
                self._outputs.append([(output, shared_state(c.kwargs)) for output, c in pairs])

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self._map.layers)

    @torch.no_grad()
    def remember(self, first_layer: int) -> None:
        """Replace the remembered outputs from a layer on by those of the current weights.

        Args:
            first_layer: first layer whose weights changed since the last call; `n_layers` if none.
        """
        kept: list[list[Any]] = [list(outputs) for outputs in self._outputs]
        for b in range(len(self._batches)):
            self._forward(first_layer, b, kept)
        self._outputs = kept

    @torch.no_grad()
    def predict(self, first_layer: int, first_batch: int = 0) -> Iterator[Tensor]:
        """Log-probabilities of the current weights, float32 [B, T, V] per batch.

        Args:
            first_layer: first layer whose weights differ from the remembered ones; layers before
                it are not run.
            first_batch: batches before it are left out.
        """
        for b in range(first_batch, len(self._batches)):
            yield torch.log_softmax(self._forward(first_layer, b).float(), -1)

    def _forward(
        self, first_layer: int, batch: int, remembered: list[list[Any]] | None = None
    ) -> Tensor:
        """Logits of one batch, [B, T, V]; what layers give goes into `remembered`, if given."""
        device = next(self._map.model.parameters()).device
        given = [outputs[batch] for outputs in self._outputs[:first_layer]]

        def keep(index: int, output: Any) -> None:
            if remembered is not None and first_layer <= index < self.n_layers - 1:
                remembered[index][batch] = output

        with _replaying([layer.module for layer in self._map.layers], given, keep):
            tokens = self._batches[batch].to(device)
            logits: Tensor = self._map.model(tokens, use_cache=False).logits
        return logits


@contextmanager
def _replaying(
    modules: Sequence[nn.Module], given: Sequence[Any], keep: Callable[[int, Any], None]
) -> Iterator[None]:
    """The first layers give what is given, without running; the others tell what they give.

    Given and told are pairs: a layer's output, and the `shared_state` that it left.
    """
    places = {module: index for index, module in enumerate(modules)}

    def replaced(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        index = places[module]

        def run(*args: Any, **kwargs: Any) -> Any:
            if index < len(given):
                output, state = given[index]
                for name, content in state.items():
                    kwargs[name].update(content)
                return output
            output = forward(*args, **kwargs)
            keep(index, (output, shared_state(kwargs)))
            return output

        return run

    with replaced_forwards(modules, replaced):
        yield
