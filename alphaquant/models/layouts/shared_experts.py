"""Shared experts in 3-D parameters, called with a weight per token and expert: Inkling.

`gate_proj` and `up_proj [E, I, H]`, `down_proj [E, H, I]`. Every expert gets every token; the
router gives the weights. They are no routed experts: their matrices are of the kind `shared` and
every token reads them.

Letters: E experts, H hidden size, I expert width, n tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews, RoutedTokens

_PARTS = ("gate_proj", "up_proj", "down_proj")


class SharedExperts(ExpertsSite):
    """Shared experts in three 3-D parameters that are called with hidden states and weights."""

    is_routed: ClassVar[bool] = False

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from the three parameters, of a module that counts shared experts."""
        gate, up, down = (getattr(module, part, None) for part in _PARTS)
        if not isinstance(getattr(module, "n_shared_experts", None), int):
            return None
        if not all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (gate, up, down)):
            return None
        n_experts, width, hidden = gate.shape  # type: ignore[union-attr]
        return ExpertSizes(n_experts, hidden, width)

    def views(self, expert: int) -> ExpertViews:
        """Slices of the three parameters."""
        return ExpertViews(*(self.module.get_parameter(part).data[expert] for part in _PARTS))

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up."""
        gate, up = gate_up.chunk(2, -1)
        activation: Callable[[Tensor], Tensor] = self.module.act_fn  # type: ignore[assignment]
        return activation(gate) * up

    def state_names(self) -> set[str]:
        """The three parameters."""
        return {f"{self.name}.{part}" for part in _PARTS}

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Every expert for every token; hidden states come as [..., H], weights as [..., E]."""
        hidden, gammas = (*args, *kwargs.values())[:2]
        inputs = hidden.reshape(-1, hidden.shape[-1])
        numbers = torch.arange(self.n_experts, device=hidden.device)
        weights = gammas.reshape(-1, self.n_experts)
        return RoutedTokens(inputs, numbers.repeat(len(inputs), 1), weights)
