"""Modules that hold packed weights and dequantize them in their forward pass.

The torch reference of the packed runtime.

Letters: n tokens, k experts per token, H hidden size, I expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.quant.activations import fake_quantize
from alphaquant.quant.layouts import ListedExperts
from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.quant.quantization_config import PackedFormats
from alphaquant.quant.routing import tokens_by_expert
from alphaquant.quant.sites import ExpertsSite, ModelMap
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.units import Matrix


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; its buffers are the tensors of `PackedMatrix`."""

    def __init__(
        self,
        fmt: Format,
        rows: int,
        cols: int,
        bias: nn.Parameter | None = None,
        activation: Format = BF16,
    ) -> None:
        """Make an empty one; `load_state_dict` fills it.

        Args:
            fmt: the weight's format.
            rows: outputs.
            cols: inputs.
            bias: kept as it is.
            activation: what the inputs are rounded to, token by token; bf16 leaves them.
        """
        super().__init__()
        self.format, self.rows, self.cols, self.activation = fmt, rows, cols, activation
        for name, (shape, dtype) in packed_shapes(fmt, rows, cols).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = bias

    def packed(self) -> PackedMatrix:
        """The weight as stored."""
        names = packed_shapes(self.format, self.rows, self.cols)
        return PackedMatrix(
            self.format, self.rows, self.cols, {n: self.get_buffer(n) for n in names}
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., cols] -> [..., rows] in the inputs' dtype."""
        weight = self.packed().dequantize().to(inputs.dtype)
        return nn.functional.linear(fake_quantize(inputs, self.activation), weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Packed tensors go to other devices with the model, but never to another dtype.

        `model.to(torch.bfloat16)` would round the scales and so change the weights.
        """
        names = packed_shapes(self.format, self.rows, self.cols)
        packed = {name: self.get_buffer(name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in packed.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """Shape and format."""
        activation = f", inputs {self.activation.name}" if self.activation.is_quantized else ""
        return f"{self.cols} -> {self.rows}, {self.format.name}{activation}"


class PackedExpert(nn.Module):
    """Gate, up and down of one expert."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        """Take the three projections."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down


class PackedExperts(nn.Module):
    """An experts module with a format per matrix, called like the module that it replaces."""

    def __init__(self, site: ExpertsSite, formats: PackedFormats) -> None:
        """Make an empty one.

        Args:
            site: the module it replaces; its gating function is used.
            formats: of its matrices and their inputs.
        """
        super().__init__()
        self.num_experts = site.n_experts
        # A site is no module: the replaced module's (meta) weights stay out of the state.
        self.site = site
        for name in site.bias_names:
            self.register_parameter(name, site.module.get_parameter(name))
        for e in range(site.n_experts):
            parts = [_empty(formats, m) for m in (site.gate[e], site.up[e], site.down[e])]
            self.add_module(str(e), PackedExpert(*parts))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sum of the chosen experts' outputs, weighted, [n, H].

        Args:
            args: as the replaced module takes them; in transformers hidden states [n, H], expert
                ids int64 [n, k], weights [n, k].
            kwargs: likewise.
        """
        inputs, expert_ids, weights = self.site.route(args, kwargs)
        output = torch.zeros_like(inputs)
        for tokens in tokens_by_expert(expert_ids, weights, self.num_experts):
            y = self._run_expert(tokens.expert, inputs[tokens.rows])
            output.index_add_(0, tokens.rows, (y * tokens.weights.unsqueeze(-1)).to(output.dtype))
        return output

    def _run_expert(self, index: int, x: Tensor) -> Tensor:
        """One expert on its tokens, [m, H] -> [m, H]."""
        expert = self.get_submodule(str(index))
        gate_up = torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)  # type: ignore[operator]
        bias = self.site.gate_up_bias(self, index)
        if bias is not None:
            gate_up = gate_up + bias
        y: Tensor = expert.down_proj(self.site.apply_gate(gate_up))  # type: ignore[operator]
        bias = self.site.down_bias(self, index)
        return y if bias is None else y + bias


def install_packed_modules(model_map: ModelMap, formats: PackedFormats) -> None:
    """Replace every quantizable module of a model by an empty packed one.

    Args:
        model_map: the model, on the meta device.
        formats: of every matrix and its inputs.
    """
    for layer in model_map.layers:
        replaced: dict[str, nn.Module] = {
            site.matrix.name: _empty(formats, site.matrix, site.module.bias)
            for site in layer.linears
        }
        for experts in layer.experts:
            if isinstance(experts, ListedExperts):
                replaced |= _listed(experts, formats)
            else:
                replaced[experts.name] = PackedExperts(experts, formats)
        for name, module in replaced.items():
            model_map.model.set_submodule(name, module)


def _listed(site: ListedExperts, formats: PackedFormats) -> dict[str, nn.Module]:
    """A packed linear for every linear of every expert."""
    found: dict[str, nn.Module] = {}
    for e in range(site.n_experts):
        matrices = (site.gate[e], site.up[e], site.down[e])
        for matrix, linear in zip(matrices, site.linears(e), strict=True):
            found[matrix.name] = _empty(formats, matrix, linear.bias)
    return found


def _empty(
    formats: PackedFormats, matrix: Matrix, bias: nn.Parameter | None = None
) -> PackedLinear:
    activation = formats.activations.get(matrix.name, BF16)
    return PackedLinear(formats.weights[matrix.name], matrix.rows, matrix.cols, bias, activation)
