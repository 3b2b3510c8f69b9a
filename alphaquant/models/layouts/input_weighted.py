"""Routed experts whose inputs are multiplied by the routing weights, not their outputs: Llama 4.

`gate_up_proj [E, H, 2I]` and `down_proj [E, I, H]` in one module, which is called with the tokens
repeated for every expert, [E * n, H], expert by expert. Row e * n + t is token t times its score
for expert e; for experts that the router did not choose the score is 0, and so are the row and its
output. So only rows that are not zero are tokens of an expert: n * k of E * n.

The routing is read where it is made: from the block's inputs by its router, which gives scores
[n, E] first.

Letters: E experts, H hidden size, I expert width, n tokens, k experts per token.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.routing import ExpertTokens
from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews, RoutedTokens, Weighted


class InputWeightedExperts(ExpertsSite):
    """Experts in two 3-D parameters that get every token, times its score."""

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from `down_proj` of a module that takes hidden states only."""
        both, down = (getattr(module, part, None) for part in ("gate_up_proj", "down_proj"))
        if not isinstance(both, nn.Parameter) or not isinstance(down, nn.Parameter):
            return None
        takes_more = len(inspect.signature(type(module).forward).parameters) != 2  # with self
        if both.dim() != 3 or takes_more or not hasattr(module, "act_fn"):
            return None
        n_experts, width, hidden = down.shape
        return ExpertSizes(n_experts, hidden, width) if both.shape[1] == hidden else None

    @classmethod
    def make(
        cls, layer: int, name: str, module: nn.Module, block: nn.Module
    ) -> "InputWeightedExperts":
        """As the base class.

        Raises:
            ModelError: the block has no router.
        """
        if not isinstance(getattr(block, "router", None), nn.Module):
            raise ModelError(
                f"{name} ({type(module).__name__}) is called with weighted tokens, and its block "
                f"{type(block).__name__} has no module called router that gives their scores; see "
                "CONTRIBUTING.md, 'a model', for adding another layout"
            )
        site = super().make(layer, name, module, block)
        assert isinstance(site, InputWeightedExperts)
        return site

    @property
    def hooked(self) -> nn.Module:
        """The block, whose inputs have no weights yet."""
        return self.block

    def views(self, expert: int) -> ExpertViews:
        """Slices of the parameters, transposed."""
        both, down = (
            self.module.get_parameter(part).data[expert].T
            for part in ("gate_up_proj", "down_proj")
        )
        gate, up = both.chunk(2)
        return ExpertViews(gate, up, down)

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up."""
        gate, up = gate_up.chunk(2, -1)
        features: Tensor = up * self.module.act_fn(gate)  # type: ignore[operator]
        return features

    def state_names(self) -> set[str]:
        """The two parameters."""
        return {f"{self.name}.gate_up_proj", f"{self.name}.down_proj"}

    @torch.no_grad()
    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Tokens without weights, and what the router chooses for them."""
        hidden: Tensor = next(iter((*args, *kwargs.values())))
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores: Tensor = self.block.get_submodule("router")(flat)[0]  # [n, E]
        top_k = max(1, int(scores.count_nonzero(-1).max()))
        weights, expert_ids = scores.topk(top_k, -1)
        return RoutedTokens(flat, expert_ids.masked_fill(weights == 0, self.n_experts), weights)

    def route_packed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Every row that is not zero belongs to the expert of its place, with the weight 1."""
        rows: Tensor = next(iter((*args, *kwargs.values())))  # [E * n, H]
        numbers = torch.arange(self.n_experts, device=rows.device)
        ids = numbers.repeat_interleave(len(rows) // self.n_experts)
        ids = ids.masked_fill(~rows.any(-1), self.n_experts).unsqueeze(-1)  # [E * n, 1]
        return RoutedTokens(rows, ids, torch.ones_like(ids, dtype=rows.dtype))

    def given(self, inputs: Tensor, tokens: ExpertTokens) -> Weighted:
        """Tokens times their routing weights; outputs are added up as they are."""
        weights = tokens.weights.unsqueeze(-1)
        return Weighted(inputs[tokens.rows] * weights, torch.ones_like(tokens.weights))
