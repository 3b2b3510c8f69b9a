"""The routed experts of one layer, from plain weights, with a format per expert and matrix.

For whoever has a layer's weights in memory and wants experts in mixed precision without a
checkpoint; `aq-quantize` does whole models, with GPTQ. Weights are rounded to nearest. What holds
and runs them is `alphaquant.runtime.modules.PackedExperts`, or the kernels.

    experts = MixedPrecisionEPMoE(w13, w2, {0: ("int4-g64", "int3-g128"), 3: ("fp8", "mxfp4")})
    y = experts(hidden_states, expert_ids, weights)

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from alphaquant.errors import ConfigError
from alphaquant.models.layouts.standard import FusedExperts
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.kernel_use import use_kernels, use_kernels_where_possible
from alphaquant.runtime.modules import PackedExpert, PackedExperts, PackedLinear
from alphaquant.spaces.formats import BF16, Format, parse_format
from alphaquant.specs.scale_search import ScaleSearch


class MixedPrecisionEPMoE(nn.Module):
    """Experts [start, end] of a layer, each with a format of w13 (gate and up) and one of w2."""

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        expert_quant_configs: Mapping[int, tuple[str, str]],
        *,
        owned: tuple[int, int] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        search: ScaleSearch = "mse",
        kernels: bool | None = None,
    ) -> None:
        """Round and pack the weights.

        Args:
            w13: [E, 2 I, H], of every expert gate above up.
            w2: [E, H, I].
            expert_quant_configs: expert -> names of the formats of w13 and of w2; experts that it
                does not name stay in bf16.
            owned: first and last expert of this rank, both included; all by default.
            reduce: sums what each rank gives it, [n, H], over the ranks; none by default.
            search: how scales are chosen.
            kernels: as in `alphaquant.runtime.checkpoint.load`.

        Raises:
            ConfigError: shapes that do not fit, or experts that do not exist.
            FormatError: a format cannot be read.
            ModelError: kernels were asked for and cannot run here.
        """
        super().__init__()
        first, last = owned if owned is not None else (0, len(w13) - 1)
        formats = _formats(w13, w2, expert_quant_configs, range(first, last + 1))
        holder = _Weights(w13, w2)
        site = FusedExperts.make(0, "experts", holder, holder)
        names: dict[str, Format] = {}
        for number, (of_w13, of_w2) in enumerate(formats):
            names |= dict.fromkeys((site.gate[number].name, site.up[number].name), of_w13)
            names[site.down[number].name] = of_w2
        self.experts = PackedExperts(site, PackedFormats(names))
        self.experts.keep_experts(range(first, last + 1))
        self.experts.reduce = reduce
        for number in self.experts.owned:
            _fill(self.experts.expert(number), site.weights(number), search)
        holder.to("meta")
        if kernels:
            use_kernels(self)
        elif kernels is None:
            use_kernels_where_possible(self)

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs; of the owned ones, where none reduces.

        Args:
            hidden_states: [n, H].
            expert_ids: int64 [n, k]; those of E and above are padding.
            weights: [n, k].

        Returns:
            [n, H] in the dtype of the hidden states.
        """
        output: Tensor = self.experts(hidden_states, expert_ids, weights)
        return output


class _Weights(nn.Module):
    """Weights in the layout of transformers' experts, as `FusedExperts` reads them."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(w13, requires_grad=False)
        self.down_proj = nn.Parameter(w2, requires_grad=False)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return nn.functional.silu(gate) * up


def _formats(
    w13: Tensor, w2: Tensor, configs: Mapping[int, tuple[str, str]], owned: range
) -> list[tuple[Format, Format]]:
    """Formats of w13 and w2 of every expert.

    Raises:
        ConfigError: shapes that do not fit, or experts that do not exist.
        FormatError: a format cannot be read.
    """
    shapes = f"w13 is {list(w13.shape)} and w2 {list(w2.shape)}"
    if w13.dim() != 3 or w13.shape[1] % 2 or w2.shape != _down_shape(w13):
        raise ConfigError(f"{shapes}; they must be [E, 2 I, H] and [E, H, I]: reshape them")
    n_experts = len(w13)
    unknown = sorted(set(configs) - set(range(n_experts)))
    if unknown:
        raise ConfigError(
            f"expert_quant_configs names experts {unknown}, and {shapes}: there are "
            f"{n_experts} experts, 0 to {n_experts - 1}"
        )
    if not (0 <= owned.start < owned.stop <= n_experts):
        raise ConfigError(
            f"experts {owned.start} to {owned.stop - 1} of {n_experts} are owned; name the first "
            f"and the last one, both included, within 0 to {n_experts - 1}"
        )
    plain = (BF16.name, BF16.name)
    pairs = [configs.get(number, plain) for number in range(n_experts)]
    return [(parse_format(one), parse_format(other)) for one, other in pairs]


def _down_shape(w13: Tensor) -> torch.Size:
    n_experts, double, hidden = w13.shape
    return torch.Size((n_experts, hidden, double // 2))


def _fill(expert: PackedExpert, weights: Sequence[Tensor], search: ScaleSearch) -> None:
    """Give an empty expert its packed tensors."""
    for part, weight in zip(expert.linears(), weights, strict=True):
        for name, tensor in _pack(part, weight, search).tensors.items():
            setattr(part, name, tensor)


def _pack(part: PackedLinear, weight: Tensor, search: ScaleSearch) -> PackedMatrix:
    if not part.format.is_quantized:
        return pack_bf16(weight.clone())  # a view would keep all weights in memory
    rounded = quantize_rtn(weight[None].float(), part.format, search)
    return rounded.pack(0, slice(None))
