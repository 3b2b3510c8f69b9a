"""Hessians of what is beside the decoder layers.

The head's inputs are the hidden states behind the last norm, so its Hessian is that of any linear.
A token's embedding is looked up by itself: its inputs are one-hot, and the error of what a row
gives is the row's own, so the Hessian over the columns is the identity, whatever tokens are read.
Tied weights do both, and get the sum of both, each with a mean diagonal of 1.

Letters: B windows in a batch, T tokens, K columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alphaquant.models.ends import head_of, watch_head
from alphaquant.models.mapping import device_of
from alphaquant.models.sites import LayerSite, LinearSite, ModelMap
from alphaquant.models.walk import layers_skipped
from alphaquant.quant.hessian import HessianBatch, observer_of
from alphaquant.specs.quantizer import QuantSettings

_LEAST_MEAN = 1e-30


@dataclass(frozen=True)
class EndStep:
    """A walk that has left the last layer.

    Attributes:
        model_map: the model, with `ends`.
        batches: token ids, int64 [B, T] each.
        outputs: what the last layer gave, by batch.
    """

    model_map: ModelMap
    batches: Sequence[Tensor]
    outputs: Sequence[Any]

    def run(self) -> None:
        """Nothing comes after it that needs to be run."""

    @torch.no_grad()
    def hessians(self, settings: QuantSettings) -> list[HessianBatch]:
        """Hessians of what is beside the layers, for a quantizer with these settings."""
        ends = self.model_map.ends
        assert ends is not None
        n_tokens = sum(batch.numel() for batch in self.batches)
        found = self._of_head(ends, settings)
        if not ends.embeddings:
            return found
        (site,) = ends.embeddings
        one = torch.eye(site.matrix.cols, device=device_of(self.model_map.model)).unsqueeze(0)
        if site.head is None:
            return [HessianBatch(((site.matrix,),), one, (n_tokens,), ("identity",)), *found]
        (inputs,) = found
        scale = 1 / inputs.hessian.diagonal(dim1=-2, dim2=-1).mean().clamp(min=_LEAST_MEAN)
        # Held-back tokens are a quarter of all, so they have a quarter of the identity too.
        held = {index: scale * part + one[0] / 4 for index, part in inputs.held.items()}
        summed = scale * inputs.hessian + one
        return [replace(inputs, hessian=summed, held=held, source=("plain+identity",))]

    def _of_head(self, ends: LayerSite, settings: QuantSettings) -> list[HessianBatch]:
        """Of what the head is given; nothing where it is not quantized."""
        head, model = head_of(ends), self.model_map.model
        if head is None:
            return []
        owner = ends.linears[0] if ends.linears else ends.embeddings[0]
        site, observer = LinearSite(owner.matrix, head), observer_of(settings)
        with watch_head(head, lambda inputs: observer.on_linear(site, inputs)):
            for batch, output in zip(self.batches, self.outputs, strict=True):
                with layers_skipped(self.model_map, output):
                    model(batch.to(device_of(model)), use_cache=False)
        return observer.batches(ends)
