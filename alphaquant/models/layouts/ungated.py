"""Routed experts without a gate: down(activation(up(x))), as in Nemotron-H.

`up_proj [E, I, H]` and `down_proj [E, H, I]` in one module of transformers' experts interface,
also transposed and with biases. H is the experts' own input size: where the block projects to a
latent space first (Nemotron 3 Super), the size of that.

Letters: E experts, H inputs of an expert, I expert width.
"""

from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews


class UngatedExperts(ExpertsSite):
    """Experts in two 3-D parameters, up and down."""

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from `up_proj`, of a module that says it has no gate; see the base class."""
        up, down = (getattr(module, part, None) for part in ("up_proj", "down_proj"))
        if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter):
            return None
        if up.dim() != 3 or getattr(module, "has_gate", True):
            return None
        if getattr(module, "has_post_expert_norm", False) or not hasattr(module, "act_fn"):
            raise ModelError(
                f"{name} ({type(module).__name__}) keeps experts without gate in an unsupported "
                "layout (a norm after every expert, or no act_fn); supported are up_proj "
                "[E, I, H] and down_proj [E, H, I] with act_fn between them, also transposed or "
                "with biases: see CONTRIBUTING.md, 'a model', for adding another"
            )
        n_experts, width, hidden = up.shape
        if getattr(module, "is_transposed", False):
            width, hidden = hidden, width
        return ExpertSizes(n_experts, hidden, width)

    @classmethod
    def projections(cls, module: nn.Module) -> tuple[str | None, str, str]:
        """No gate."""
        return (None, "up_proj", "down_proj")

    @classmethod
    def biases(cls, module: nn.Module) -> tuple[str, ...]:
        """Both biases, if the module has them."""
        return ("up_proj_bias", "down_proj_bias") if getattr(module, "has_bias", False) else ()

    def views(self, expert: int) -> ExpertViews:
        """Slices of the parameters, transposed where those are."""
        up, down = (
            self.module.get_parameter(part).data[expert] for part in ("up_proj", "down_proj")
        )
        if getattr(self.module, "is_transposed", False):
            up, down = up.T, down.T
        return ExpertViews(None, up, down)

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """The model's own activation of the up outputs."""
        return self.module.act_fn(gate_up)  # type: ignore[operator,no-any-return]

    def state_names(self) -> set[str]:
        """The two parameters."""
        return {f"{self.name}.up_proj", f"{self.name}.down_proj"}

    def gate_up_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """A row of `up_proj_bias`."""
        return module.get_parameter("up_proj_bias").data[expert] if self.bias_names else None

    def down_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """A row of `down_proj_bias`."""
        return module.get_parameter("down_proj_bias").data[expert] if self.bias_names else None
