"""Ways of storing routed experts.

    FusedExperts    transformers 5: `gate_up_proj [E, 2I, H]` and `down_proj [E, H, I]` in one
                    module that is called with hidden states, expert ids and routing weights. Also
                    transposed (`[E, H, 2I]`), interleaved (gate and up rows alternate) and with
                    biases, as in gpt-oss.
    ListedExperts   a ModuleList of experts with three linears each, as in older and remote code.
    RowExperts      DBRX: three 2-D parameters with the experts' rows one after the other.
    UngatedExperts  Nemotron-H: up and down and no gate; in `alphaquant.models.layouts.ungated`.
    InputWeightedExperts  Llama 4: weights multiply inputs; in
                    `alphaquant.models.layouts.input_weighted`.
    ZeroExperts     LongCat-Flash: experts that give their input back beside fused ones.
    SharedExperts   Inkling: shared experts in three 3-D parameters.

Letters: E experts, H hidden size, I expert width, n tokens, k experts per token.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.layouts.input_weighted import InputWeightedExperts
from alphaquant.models.layouts.shared_experts import SharedExperts
from alphaquant.models.layouts.ungated import UngatedExperts
from alphaquant.models.layouts.zero_experts import ZeroExperts
from alphaquant.models.sites import ExpertSizes, ExpertsSite, ExpertViews, RoutedTokens

# Powers of two keep the division exact; large enough that what a shared expert adds to the block's
# output costs a bfloat16 routing weight no precision, small enough for float16.
_MARK = 1024.0


class FusedExperts(ExpertsSite):
    """Experts in two 3-D parameters; the flags are those of transformers' experts interface."""

    _refused: ClassVar[Mapping[str, bool]] = {"has_post_expert_norm": True, "has_gate": False}

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from `gate_up_proj`; see the base class."""
        up = getattr(module, "gate_up_proj", None)
        if not isinstance(up, nn.Parameter) or up.dim() != 3:
            return None
        odd = [
            f"{flag}={bad}"
            for flag, bad in cls._refused.items()
            if getattr(module, flag, not bad) == bad
        ]
        if odd or not hasattr(module, "_apply_gate"):
            raise ModelError(
                f"{name} ({type(module).__name__}) keeps its experts in an unsupported layout "
                f"({', '.join(odd) or 'no _apply_gate function'}); supported are gate_up_proj "
                "[E, 2I, H] and down_proj [E, H, I], also transposed, interleaved or with "
                "biases: see CONTRIBUTING.md, 'a model', for adding another"
            )
        n_experts, double, hidden = up.shape
        if _flag(module, "is_transposed"):
            double, hidden = hidden, double
        return ExpertSizes(n_experts, hidden, double // 2)

    @classmethod
    def biases(cls, module: nn.Module) -> tuple[str, ...]:
        """Both biases, if the module has them."""
        return ("gate_up_proj_bias", "down_proj_bias") if _flag(module, "has_bias") else ()

    @property
    def _is_interleaved(self) -> bool:
        return not _flag(self.module, "is_concatenated", default=True)

    def views(self, expert: int) -> ExpertViews:
        """Slices of the fused parameters, transposed where those are."""
        both = self.module.get_parameter("gate_up_proj").data[expert]
        down = self.module.get_parameter("down_proj").data[expert]
        if _flag(self.module, "is_transposed"):
            both, down = both.T, down.T
        if self._is_interleaved:
            return ExpertViews(both[0::2], both[1::2], down)
        width = both.shape[0] // 2
        return ExpertViews(both[:width], both[width:], down)

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """The model's own function, given its own order of gate and up."""
        if self._is_interleaved:
            gate, up = gate_up.chunk(2, -1)
            gate_up = torch.stack([gate, up], -1).flatten(-2)
        return self.module._apply_gate(gate_up)  # type: ignore[operator,no-any-return]

    def state_names(self) -> set[str]:
        """The two fused parameters."""
        return {f"{self.name}.gate_up_proj", f"{self.name}.down_proj"}

    def gate_up_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """A row of `gate_up_proj_bias`, gate first."""
        if not self.bias_names:
            return None
        bias = module.get_parameter("gate_up_proj_bias").data[expert]
        return torch.cat([bias[0::2], bias[1::2]]) if self._is_interleaved else bias

    def down_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """A row of `down_proj_bias`."""
        return module.get_parameter("down_proj_bias").data[expert] if self.bias_names else None


class ListedExperts(ExpertsSite):
    """A ModuleList of experts, each with gate, up and down linears and an activation.

    One called `experts` must be of this kind; one of another name is, if its members are and a
    router is beside it.

    Their block calls them one by one and keeps the routing to itself. It is measured: the block
    runs once with every expert's output replaced by a mark of that expert's own (a multiple of the
    e-th unit vector for expert e) and once with zeros; the difference holds the weight of expert e
    at feature e of every token, whatever the router does.
    """

    _names: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("gate_proj", "up_proj", "down_proj"),
        ("w1", "w3", "w2"),
    )
    _activations: ClassVar[tuple[str, ...]] = ("act_fn", "activation_fn", "activation", "act")

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from the first expert's linears; see the base class."""
        if not isinstance(module, nn.ModuleList) or not len(module):
            return None
        is_named = name.rpartition(".")[2] == "experts"
        if not is_named and (len(module) == 1 or cls._find_linears(module[0]) is None):
            return None
        wanted = cls._linears(module[0], f"{name}.0")
        for e, expert in enumerate(module):
            found = cls._linears(expert, f"{name}.{e}")
            if [f.weight.shape for f in found] != [w.weight.shape for w in wanted]:
                raise ModelError(
                    f"{name}.{e} has other shapes than {name}.0; supported are experts of one "
                    "shape: see CONTRIBUTING.md, 'a model', for adding another layout"
                )
        width, hidden = wanted[0].weight.shape
        if len(module) > hidden:
            raise ModelError(
                f"{name} lists {len(module)} experts of {hidden} features; their routing can be "
                "measured only where experts are no more than features"
            )
        return ExpertSizes(len(module), hidden, width)

    @classmethod
    def is_called_by(cls, block: nn.Module, module: nn.Module) -> bool:
        """Whether it is called `experts`, or something beside it may be a router.

        LongCat-Flash lists the two dense MLPs of a layer. A router has an output per expert, or
        more where some experts have no weights.
        """
        n_experts = len(module)  # type: ignore[arg-type]
        inside = {id(p) for p in module.parameters()}
        beside = [p for p in block.parameters() if p.dim() == 2 and id(p) not in inside]
        has_router = any(n_experts <= len(p) <= 2 * n_experts for p in beside)
        return has_router or getattr(block, "experts", None) is module

    @classmethod
    def projections(cls, module: nn.Module) -> tuple[str, str, str]:
        """The names that the experts use: those of Llama, or Mixtral's w1, w3, w2."""
        expert = module[0]  # type: ignore[index]
        return next(names for names in cls._names if hasattr(expert, names[0]))

    @classmethod
    def _find_linears(cls, expert: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
        for names in cls._names:
            gate, up, down = (getattr(expert, n, None) for n in names)
            if (
                isinstance(gate, nn.Linear)
                and isinstance(up, nn.Linear)
                and isinstance(down, nn.Linear)
            ):
                return gate, up, down
        return None

    @classmethod
    def _linears(cls, expert: nn.Module, name: str) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        found = cls._find_linears(expert)
        if found is not None:
            return found
        options = " or ".join(", ".join(names) for names in cls._names)
        raise ModelError(
            f"{name} ({type(expert).__name__}) is no expert of a supported layout: it has no "
            f"nn.Linear called {options}; see CONTRIBUTING.md, 'a model', for adding another"
        )

    @classmethod
    def make(cls, layer: int, name: str, module: nn.Module, block: nn.Module) -> "ListedExperts":
        """As the base class; checks that the experts compute what their linears say.

        Raises:
            ModelError: they do not.
        """
        site = super().make(layer, name, module, block)
        assert isinstance(site, ListedExperts)
        if not site.linears(0)[0].weight.is_meta:
            site._check_forward()
        return site

    @torch.no_grad()
    def _check_forward(self) -> None:
        down = self.linears(0)[2]
        n_inputs = self.gate[0].cols
        # Any inputs do; sines differ from feature to feature and need no generator.
        inputs = torch.sin(torch.arange(2.0 * n_inputs, device=down.weight.device))
        inputs = inputs.reshape(2, n_inputs).to(down.weight.dtype)
        found = down(self.apply_gate(self.gate_up(0, inputs)))
        expected = self._expert(0)(inputs)
        if not torch.allclose(found.float(), expected.float(), rtol=0.05, atol=1e-3):
            raise ModelError(
                f"{self.name}.0 ({type(self._expert(0)).__name__}) does not compute "
                "down(activation(gate(x)) * up(x)); see CONTRIBUTING.md, 'a model', for adding a "
                "layout"
            )

    @property
    def hooked(self) -> nn.Module:
        """The block: the list itself is never called."""
        return self.block

    def linears(self, expert: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Gate, up and down of one expert."""
        return self._linears(self._expert(expert), f"{self.name}.{expert}")

    def views(self, expert: int) -> ExpertViews:
        """The linears' weights."""
        return ExpertViews(*(linear.weight.data for linear in self.linears(expert)))

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up, with the experts' own activation.

        Raises:
            ModelError: the experts have no activation under a known name.
        """
        expert = self._expert(0)
        for name in self._activations:
            activation = getattr(expert, name, None)
            if callable(activation):
                gate, up = gate_up.chunk(2, -1)
                features: Tensor = activation(gate) * up
                return features
        raise ModelError(
            f"{self.name}.0 ({type(expert).__name__}) has no activation called "
            f"{', '.join(self._activations)}; see CONTRIBUTING.md, 'a model', for adding a layout"
        )

    def state_names(self) -> set[str]:
        """The weight of every linear."""
        return {f"{m.name}.weight" for part in (self.gate, self.up, self.down) for m in part}

    def gate_up_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """Biases of the gate and up linears, which stay in them."""
        pair = self.linears(expert)[:2]
        if all(linear.bias is None for linear in pair):
            return None
        zeros = torch.zeros_like(pair[0].weight[:, 0])
        return torch.cat([zeros if p.bias is None else p.bias.data for p in pair])

    def down_bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """Bias of the down linear."""
        bias = self.linears(expert)[2].bias
        return None if bias is None else bias.data

    @torch.no_grad()
    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """Measure the routing with two more runs of the block; see the class.

        Raises:
            ModelError: the experts' outputs do not reach the block's output.
        """
        inputs = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        flat = inputs.reshape(-1, inputs.shape[-1])
        marked = self._run_marked(_MARK, args, kwargs) - self._run_marked(0.0, args, kwargs)
        seen = marked.reshape(flat.shape)[:, : self.n_experts].to(torch.float32) / _MARK  # [n, E]
        top_k = int((seen != 0).sum(-1).max()) if len(flat) else 0
        if not top_k:
            raise ModelError(
                f"{self.name}: its outputs do not reach the output of {type(self.block).__name__} "
                "as a weighted sum; see CONTRIBUTING.md, 'a model', for adding a layout"
            )
        expert_ids = seen.abs().topk(top_k, -1).indices
        weights = seen.gather(-1, expert_ids)
        return RoutedTokens(flat, expert_ids.masked_fill(weights == 0, self.n_experts), weights)

    def _run_marked(self, mark: float, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Output of the block while expert e gives `mark` at feature e and zeros elsewhere."""

        def hook(expert: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                marked = torch.zeros_like(output)
                marked[..., expert] = mark
                return marked

            return replace

        handles = [self._expert(e).register_forward_hook(hook(e)) for e in range(self.n_experts)]
        try:
            output: Tensor | tuple[Tensor, ...] = self.block.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return output[0] if isinstance(output, tuple) else output

    def _expert(self, expert: int) -> nn.Module:
        return self.module[expert]  # type: ignore[index,no-any-return]


class RowExperts(ExpertsSite):
    """Experts in three 2-D parameters [E * I, H], one after the other: DBRX.

    `w1` is gate, `v1` is up, `w2` is down, transposed.
    """

    @classmethod
    def sizes(cls, module: nn.Module, name: str) -> ExpertSizes | None:
        """Sizes from `mlp.w1` and the module's number of experts; see the base class."""
        parts = [getattr(getattr(module, "mlp", None), n, None) for n in ("w1", "v1", "w2")]
        n_experts = getattr(module, "num_experts", None)
        if not isinstance(n_experts, int) or not all(isinstance(p, nn.Parameter) for p in parts):
            return None
        rows, hidden = parts[0].shape  # type: ignore[union-attr]
        return ExpertSizes(n_experts, hidden, rows // n_experts)

    def views(self, expert: int) -> ExpertViews:
        """Rows of the parameters; those of `w2` transposed."""
        gate, up, down = (
            parameter.data.view(self.n_experts, -1, parameter.shape[-1])[expert]
            for parameter in (self.module.get_parameter(f"mlp.{n}") for n in ("w1", "v1", "w2"))
        )
        return ExpertViews(gate, up, down.T)

    def apply_gate(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up."""
        gate, up = gate_up.chunk(2, -1)
        features: Tensor = self.module.get_submodule("mlp").activation_fn(gate) * up  # type: ignore[operator]
        return features

    def state_names(self) -> set[str]:
        """The three parameters."""
        return {f"{self.name}.mlp.{n}" for n in ("w1", "v1", "w2")}

    def route(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedTokens:
        """As the base class; hidden states come as [B, T, H]."""
        hidden, expert_ids, weights = super().route(args, kwargs)
        return RoutedTokens(hidden.reshape(-1, hidden.shape[-1]), expert_ids, weights)


LAYOUTS: tuple[type[ExpertsSite], ...] = (
    UngatedExperts,
    InputWeightedExperts,
    ZeroExperts,
    SharedExperts,
    FusedExperts,
    ListedExperts,
    RowExperts,
)
"""All of them; the first that knows a module takes it."""


def _flag(module: nn.Module, name: str, *, default: bool = False) -> bool:
    return bool(getattr(module, name, default))
