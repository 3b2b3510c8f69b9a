"""A weight in the form that another tool's checkpoint keeps it in, and what it stands for.

A form says which tensors one matrix has, of which shapes and dtypes, and what they mean: codes
with a scale, and maybe a zero point, for each group of inputs. It is a fact about a layout, so
the same form serves every matrix of a checkpoint. Nothing here rounds: `dequantize` is what the
numbers say, in float32.

Letters: N outputs, K inputs, G groups of inputs per output.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from alphaquant.kernels.grids import FloatGrid

FLOATS = frozenset(("F16", "BF16", "F32"))
"""How safetensors calls the dtypes of plain weights and of most scales."""

_E2M1 = FloatGrid(2, 1, 6.0)


@dataclass(frozen=True)
class Part:
    """One tensor of a matrix.

    Attributes:
        shapes: those it may have.
        dtypes: those it may have, as safetensors calls them.
        is_required: whether it must be there.
        other_layouts: what a file is whose tensor has one of these shapes, and what to do.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: frozenset[str]
    is_required: bool = True
    other_layouts: Mapping[tuple[int, ...], str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupedCodes:
    """What the tensors of a matrix stand for: (value - zero) * scale.

    Attributes:
        element: `int`, `e4m3` or `e2m1`.
        bits: of one code.
        codes: uint8 [N, K]; integers without zero points are offset by 2^(bits - 1).
        scales: float32 [N, G].
        zeros: float32 [N, G], in the numbers of the codes; None where there are none.
        group_of: the group of every input, int64 [K].
        shared: float32 [1], a factor of all scales that is stored beside them; None for none.
    """

    element: str
    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor
    shared: Tensor | None = None

    def values(self) -> Tensor:
        """What codes stand for before zero points and scales, float32 [N, K]."""
        if self.element == "e4m3":
            return self.codes.view(torch.float8_e4m3fn).to(torch.float32)
        if self.element == "e2m1":
            return _E2M1.to_values(self.codes)
        values = self.codes.to(torch.float32)
        return values if self.zeros is not None else values - 2.0 ** (self.bits - 1)

    def dequantize(self) -> Tensor:
        """The weights, float32 [N, K]."""
        values = self.values()
        if self.zeros is not None:
            values = values - self.zeros[:, self.group_of]
        return values * self.scales[:, self.group_of]


class Form(ABC):
    """How a tool keeps one matrix."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people: `gptq 4 bits g128`."""

    @abstractmethod
    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """The tensors of a [rows, cols] matrix by the ends of their names."""

    @abstractmethod
    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes | None:
        """What they stand for; None for plain numbers."""

    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one code."""

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Tensor:
        """The weights, float32 [rows, cols], on the device of the tensors."""
        found = self.codes(tensors, rows, cols)
        assert found is not None, "a form without codes says itself what its numbers are"
        return found.dequantize()


@dataclass(frozen=True)
class PlainForm(Form):
    """Weights as they are."""

    @property
    def name(self) -> str:
        """For people."""
        return "plain"

    def code_bits(self) -> int:
        """Of the short ones: bfloat16 and float16."""
        return 16

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """One tensor."""
        return {"weight": Part(((rows, cols),), FLOATS)}

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> None:
        """There are none."""
        return None

    def dequantize(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> Tensor:
        """The tensor, float32 [rows, cols]."""
        return tensors["weight"].to(torch.float32)


@dataclass(frozen=True)
class CompressedWeight:
    """One matrix as its checkpoint keeps it.

    Attributes:
        form: how.
        rows: outputs.
        cols: inputs.
        tensors: by the ends of their names: `qweight`, `scales`, ...
    """

    form: Form
    rows: int
    cols: int
    tensors: Mapping[str, Tensor]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors: codes, scales, zero points, order of inputs."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> "CompressedWeight":
        """The same on a device, still compressed."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)

    def codes(self) -> GroupedCodes | None:
        """What its tensors stand for; None for plain numbers."""
        return self.form.codes(self.tensors, self.rows, self.cols)

    def dequantize(self) -> Tensor:
        """The weights, float32 [rows, cols], on the device of the tensors."""
        return self.form.dequantize(self.tensors, self.rows, self.cols)


def even_groups(cols: int, size: int, device: torch.device) -> Tensor:
    """The group of every input where groups are consecutive, int64 [K].

    Args:
        cols: K.
        size: inputs per group; -1 for one group.
        device: of the result.
    """
    return torch.arange(cols, device=device) // (cols if size == -1 else size)


def n_even_groups(cols: int, size: int) -> int:
    """G of K inputs."""
    return 1 if size == -1 else -(-cols // size)


def group_text(size: int) -> str:
    """For people: `g128`, or `row`."""
    return "row" if size == -1 else f"g{size}"
