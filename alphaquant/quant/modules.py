"""Modules that hold packed weights and dequantize them in their forward pass.

The torch reference of the packed runtime.

Letters: n tokens, k experts per token, H hidden size, I expert width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.quant.models import ExpertsSite, ModelMap
from alphaquant.quant.routing import tokens_by_expert
from alphaquant.spaces.formats import Format
from alphaquant.spaces.units import Matrix


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; its buffers are the tensors of `PackedMatrix`."""

    def __init__(
        self, fmt: Format, rows: int, cols: int, bias: nn.Parameter | None = None
    ) -> None:
        """Make an empty one; `load_state_dict` fills it.

        Args:
            fmt: the weight's format.
            rows: outputs.
            cols: inputs.
            bias: kept as it is.
        """
        super().__init__()
        self.format, self.rows, self.cols = fmt, rows, cols
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
        return nn.functional.linear(inputs, weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and format."""
        return f"{self.cols} -> {self.rows}, {self.format.name}"


class PackedExpert(nn.Module):
    """Gate, up and down of one expert."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> None:
        """Take the three projections."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down


class PackedExperts(nn.Module):
    """A fused experts module with a format per matrix, called like transformers' module."""

    def __init__(self, site: ExpertsSite, formats: Mapping[str, Format]) -> None:
        """Make an empty one.

        Args:
            site: the module it replaces; its gating function is used.
            formats: format of each of its matrices.
        """
        super().__init__()
        self.num_experts = site.n_experts
        # A bound method is no submodule: the replaced module's (meta) weights stay out of the
        # state.
        self._apply_gate = site.module._apply_gate
        for e in range(site.n_experts):
            parts = [_empty(m, formats) for m in (site.gate[e], site.up[e], site.down[e])]
            self.add_module(str(e), PackedExpert(*parts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            hidden_states: [n, H].
            top_k_index: int64 [n, k].
            top_k_weights: [n, k].

        Returns:
            [n, H].
        """
        output = torch.zeros_like(hidden_states)
        for tokens in tokens_by_expert(top_k_index, top_k_weights, self.num_experts):
            expert = self.get_submodule(str(tokens.expert))
            x = hidden_states[tokens.rows]
            gate_up = torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)  # type: ignore[operator]
            y = expert.down_proj(self._apply_gate(gate_up))  # type: ignore[operator]
            output.index_add_(0, tokens.rows, (y * tokens.weights.unsqueeze(-1)).to(output.dtype))
        return output


def install_packed_modules(model_map: ModelMap, formats: Mapping[str, Format]) -> None:
    """Replace every quantizable module of a model by an empty packed one.

    Args:
        model_map: the model, on the meta device.
        formats: format of every matrix.
    """
    for layer in model_map.layers:
        for site in layer.linears:
            matrix = site.matrix
            packed = PackedLinear(formats[matrix.name], matrix.rows, matrix.cols, site.module.bias)
            model_map.model.set_submodule(matrix.name, packed)
        for experts in layer.experts:
            model_map.model.set_submodule(experts.name, PackedExperts(experts, formats))


def _empty(matrix: Matrix, formats: Mapping[str, Format]) -> PackedLinear:
    return PackedLinear(formats[matrix.name], matrix.rows, matrix.cols)
