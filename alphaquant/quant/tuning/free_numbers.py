"""What may move after the codes are chosen: scales, norms and biases, router weights.

A free number is its own value times 1 + u, or, in a tensor that may hold zeros, its value plus u
times the root mean square of its tensor. u begins at 0, so that one step size fits all.

A weight in a group is proportional to the group's scale, w(u) = w (1 + u), whatever the codes and
zero points are. So the derivative after u is the sum of gradient times w over the group, and
neither needs codes. Scales are float16 and stay so: of int, fp and nl formats per group, with
super-blocks those of these, whose multiples stay; of nvfp4 one float32 per matrix. mxfp scales are
powers of two, and llama.cpp's blocks and bf16 have none that are free: such matrices stay as they
are.

Letters: N rows, K columns, G groups of a row, or super-blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.formats import Format

_LARGEST = torch.finfo(torch.float16).max


def free_tensor(fmt: Format) -> str | None:
    """Name of the stored tensor whose numbers may move; None for formats without one."""
    if fmt.super_size:
        return "super_scales"
    if fmt.shared.scale == "float16":
        return "scales"
    return "global_scale" if fmt.shared.global_bits else None


@dataclass
class FreeScales:
    """The scales of one matrix.

    Attributes:
        packed: the matrix as it was quantized.
        steps: u, float32 [N, G], or [1, 1] for one number per matrix.
    """

    packed: PackedMatrix
    steps: Tensor

    @classmethod
    def of(cls, packed: PackedMatrix, device: torch.device) -> "FreeScales | None":
        """Those of a matrix; None where it has none that may move."""
        name = free_tensor(packed.format)
        if name is None:
            return None
        shape = packed.tensors[name].shape if name != "global_scale" else (1, 1)
        return cls(packed, torch.zeros(shape, device=device))

    def base(self) -> Tensor:
        """Weights at u = 0, float32 [N, K]."""
        return self.packed.to(self.steps.device).dequantize()

    def weights(self, base: Tensor) -> Tensor:
        """Weights at u, from those at 0, float32 [N, K]."""
        factors = 1 + self.steps
        if factors.numel() > 1:
            factors = factors.repeat_interleave(self._width(base), 1)[:, : base.shape[1]]
        return base * factors

    def gradient(self, at_weights: Tensor, base: Tensor) -> Tensor:
        """Derivative after u, of the shape of `steps`.

        Args:
            at_weights: gradient at the weights, [N, K].
            base: weights at u = 0, [N, K].
        """
        product = at_weights.float() * base
        if self.steps.numel() == 1:
            return product.sum().view(1, 1)
        parts = torch.split(product, self._width(base), 1)
        return torch.stack([part.sum(-1) for part in parts], 1)

    def rounded(self) -> PackedMatrix:
        """The matrix with its scales at u, as they are stored."""
        name = free_tensor(self.packed.format)
        assert name is not None
        stored = self.packed.tensors[name]
        factors = (1 + self.steps).to(stored.device).view(stored.shape)
        moved = (stored.float() * factors).clamp(-_LARGEST, _LARGEST).to(stored.dtype)
        return replace(self.packed, tensors={**self.packed.tensors, name: moved})

    def _width(self, base: Tensor) -> int:
        """Columns of a group, or a super-block; the last may be shorter."""
        fmt = self.packed.format
        return fmt.super_size or fmt.columns_per_scale(base.shape[1])


@dataclass
class FreeParameter:
    """A tensor that is stored as it is: a norm, a bias, a router's weight.

    Attributes:
        name: in the model's state.
        original: its value.
        stored: the dtype in which it is written.
        steps: u, of its shape, float32.
    """

    name: str
    original: Tensor
    stored: torch.dtype
    steps: Tensor

    @classmethod
    def of(cls, name: str, parameter: Tensor, stored: torch.dtype) -> "FreeParameter":
        """Those of a parameter."""
        steps = torch.zeros_like(parameter, dtype=torch.float32)
        return cls(name, parameter.detach().clone(), stored, steps)

    @property
    def scale(self) -> float:
        """What a step of 1 is."""
        return float(self.original.float().square().mean().sqrt())

    def value(self) -> Tensor:
        """Its value at u, in its dtype."""
        return (self.original.float() + self.scale * self.steps).to(self.original.dtype)

    def rounded(self) -> Tensor:
        """The same as it is stored, in its dtype."""
        return self.value().to(self.stored).to(self.original.dtype)

    def gradient(self, at_value: Tensor) -> Tensor:
        """Derivative after u."""
        return at_value.float() * self.scale
