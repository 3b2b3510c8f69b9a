"""Routed experts of which some compute nothing: LongCat-Flash.

The router chooses among E experts with weights and further ones that give their input back
("zero experts"), numbered from E on. Those have no weights: `gate_up_proj [E + zero, 2I, H]` has
rows for them that no code reads, `down_proj [E, H, I]` has none. What they add to the output is
`passed`; everything else treats their ids like padding.

Letters: E experts with weights, H hidden size, I expert width, n tokens, k experts per token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews


class ZeroExperts(ExpertsSite):
    """Experts in two 3-D parameters beside experts that give their input back."""

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from `down_proj`, which has no rows for zero experts; see the base class."""
        up, down = (getattr(module, n, None) for n in ("gate_up_proj", "down_proj"))
        if not isinstance(getattr(module, "identity_expert", None), nn.Identity):
            return None
        if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
            return None
        n_experts, hidden, width = down.shape
        return ExpertSizes(n_experts, hidden, width)

    @property
    def n_zero(self) -> int:
        """Experts that give their input back."""
        return int(self.module.zero_expert_num)  # type: ignore[arg-type]

    def views(self, expert: int) -> ExpertViews:
        """Slices of the two parameters."""
        both = self.module.get_parameter("gate_up_proj").data[expert]
        down = self.module.get_parameter("down_proj").data[expert]
        width = down.shape[-1]
        return ExpertViews(both[:width], both[width:], down)

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up."""
        gate, up = gate_up.chunk(2, -1)
        activation: Callable[[Tensor], Tensor] = self.module.act_fn  # type: ignore[assignment]
        return activation(gate) * up

    def state_names(self) -> set[str]:
        """The two parameters."""
        return {f"{self.name}.gate_up_proj", f"{self.name}.down_proj"}

    def passed(self, inputs: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor | None:
        """The inputs, scaled by the weights of the zero experts chosen for them.

        Worked example: E = 8, a token with the ids 3 and 9 and weights 0.5 and 0.25 keeps 0.25 of
        itself.
        """
        is_zero = (expert_ids >= self.n_experts) & (expert_ids < self.n_experts + self.n_zero)
        share = torch.where(is_zero, weights, 0).sum(-1, keepdim=True)  # [n, 1]
        return (inputs * share).to(inputs.dtype)
