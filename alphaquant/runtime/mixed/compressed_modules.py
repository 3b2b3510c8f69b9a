"""Modules that hold weights as other tools' checkpoints do, and dequantize them when used.

They stand where packed modules stand: the same forward passes, caches and evaluators serve them.
Buffers have the names of the checkpoint: `qweight`, `qzeros`, `scales`, `g_idx`, `weight`,
`weight_scale_inv`, ...
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alphaquant.models.quantized.compressed import CompressedWeight, Form
from alphaquant.models.sites import ExpertsSite
from alphaquant.quant.foreign.exact_formats import exact_packed
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.modules import PackedExperts, PackedLinear
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.units import Matrix


class CompressedLinear(PackedLinear):
    """A linear whose weight is in another tool's form; empty until `fill`."""

    def __init__(
        self, form: Form, matrix: Matrix, place: Tensor, bias: nn.Parameter | None = None
    ) -> None:
        """Make an empty one.

        Args:
            form: how the weight is kept.
            matrix: its shape.
            place: a tensor on the device that the weight goes to, of the model's dtype.
            bias: kept as it is.
        """
        nn.Module.__init__(self)
        self.form, self.rows, self.cols = form, matrix.rows, matrix.cols
        self.activation, self.bias, self.cache = BF16, bias, None
        self.dtype, self.device = place.dtype, place.device

    @property
    def is_filled(self) -> bool:
        """Whether it has its weight."""
        return bool(self._buffers)

    @property
    def format(self) -> Format:  # type: ignore[override]
        """The format of ours that holds the weight exactly.

        Raises:
            FormatError: none does.
        """
        return self.packed().format

    @property
    def storage(self) -> str:
        """Its form."""
        return self.form.name

    def fill(self, weight: CompressedWeight) -> None:
        """Take a weight, on the device where the replaced one was."""
        self.form = weight.form
        self._buffers.clear()
        # Not by `register_buffer`, which refuses the name of the property `weight`.
        self._buffers.update(weight.to(self.device).tensors)
        if self.cache is not None:
            self.cache.drop(id(self))

    def stored(self) -> CompressedWeight:
        """The weight as its checkpoint has it."""
        tensors = {name: t for name, t in self._buffers.items() if t is not None}
        return CompressedWeight(self.form, self.rows, self.cols, tensors)

    def packed(self) -> PackedMatrix:
        """The weight in a format of ours.

        Raises:
            FormatError: none holds it exactly.
        """
        return exact_packed(self.stored())

    def _is_coded(self) -> bool:
        return self.form.code_bits() < 16

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedLinear":
        """As of `PackedLinear`; an empty one remembers where its weight goes."""
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, dtype=self.dtype, device=self.device)).device
        return self


class CompressedExperts(PackedExperts):
    """Experts of a layer, each matrix in a form of its own."""

    def __init__(self, site: ExpertsSite, linear_of: Callable[[Matrix], CompressedLinear]) -> None:
        """Make them.

        Args:
            site: the module they replace; its gating function is used.
            linear_of: makes the linear of a matrix.
        """
        nn.Module.__init__(self)
        self._take(site, linear_of)
