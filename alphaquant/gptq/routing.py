"""What the routers of a model decide, recorded while it runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from alphaquant.errors import ModelError
from alphaquant.models.architectures import AUTO, check_architecture
from alphaquant.models.mapping import known_layouts, map_layer
from alphaquant.models.sites import ExpertsSite

_Routing = tuple[Tensor, Tensor]


class MoEGPTQContext:
    """Records routing weights and chosen experts of decoder layers, batch by batch.

    The weights are those that the block applies, renormalized or scaled where the model does so.
    Hooks only read; the model computes what it did before.
    """

    def __init__(self, model_type: str = AUTO) -> None:
        """Start without hooks.

        Args:
            model_type: an architecture, see `detect_moe_architecture`, or `auto`. Experts are
                found by structure; `standard` refuses layers that have any.

        Raises:
            ModelError: an unknown name, with a list of the known ones.
        """
        check_architecture(model_type)
        self.model_type = model_type
        self._handles: dict[int, RemovableHandle | None] = {}
        self._batches: dict[int, list[_Routing]] = {}

    def register_routing_hooks(self, layer: nn.Module, layer_idx: int) -> None:
        """Record the routing of a decoder layer from now on; dense layers have none.

        What an earlier registration of the same number recorded is forgotten.

        Args:
            layer: the decoder layer.
            layer_idx: its number, for `get_routing_info`.

        Raises:
            ModelError: the number is in use, or the layer's experts cannot be read.
        """
        if layer_idx in self._handles:
            raise ModelError(
                f"layer {layer_idx} is recorded already; call clear_hooks first, or give another "
                "number"
            )
        sites = map_layer(layer_idx, f"layers.{layer_idx}", layer, known_layouts()).experts
        if len(sites) > 1 or (sites and self.model_type == "standard"):
            raise ModelError(
                f"layer {layer_idx} ({type(layer).__name__}) has {len(sites)} modules of routed "
                f"experts; {self.model_type} layers have "
                f"{'none: use auto' if self.model_type == 'standard' else 'at most one'}"
            )
        batches: list[_Routing] = []
        self._batches[layer_idx] = batches
        self._handles[layer_idx] = _record(sites[0], batches) if sites else None

    def get_routing_info(self, layer_idx: int | None = None) -> dict[str, list[Tensor]]:
        """What was recorded of one layer.

        Args:
            layer_idx: its number; None where only one layer was registered.

        Returns:
            `routing_scores`, float [n, k], and `selected_experts`, int64 [n, k], each a list with
            one tensor per batch, in order of the batches; batches may differ in n. Both can be
            handed to `GPTQMoE.add_batch_with_routing` as they are. Empty lists for a dense layer
            and before the first batch.

        Raises:
            ModelError: no such layer, or several and none named.
        """
        if layer_idx is None and len(self._batches) == 1:
            layer_idx = next(iter(self._batches))
        if layer_idx is None or layer_idx not in self._batches:
            known = ", ".join(map(str, self._batches)) or "none"
            raise ModelError(
                f"routing of layer {layer_idx} asked; recorded are {known}: pass layer_idx, one "
                "that was given to register_routing_hooks"
            )
        batches = self._batches[layer_idx]
        return {
            "routing_scores": [scores for scores, _ in batches],
            "selected_experts": [experts for _, experts in batches],
        }

    def clear_hooks(self) -> None:
        """Remove the hooks of this context and no others; what was recorded stays readable."""
        for handle in self._handles.values():
            if handle is not None:
                handle.remove()
        self._handles.clear()


def _record(site: ExpertsSite, batches: list[_Routing]) -> RemovableHandle:
    @torch.no_grad()
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = site.route(args, kwargs)
        # Inputs are not kept: they are large, and whoever needs them can hook the same module.
        batches.append((tokens.weights.detach(), tokens.expert_ids.detach()))

    return site.hooked.register_forward_pre_hook(hook, with_kwargs=True)
