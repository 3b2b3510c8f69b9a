"""fp8 and int8: a byte per weight, and scales that multiply.

    weight            float8_e4m3 or int8 [N, K]
    weight_scale_inv  float [ceil(N / r), ceil(K / c)]   of blocks of r x c weights, or
    weight_scale      float [], [1], [N] or [N, 1]       of the matrix, or of each output

Both multiply, whatever the name says: dividing by `weight_scale_inv` is wrong by 13 orders of
magnitude. Blocks at the lower and right edge may be short. A scale of blocks that is transposed
makes an error that is barely seen (6e-3 of the squares, 7e-4 is right), so the order is tested.

Sources: DeepSeek-V3's `weight_dequant`, transformers' finegrained fp8, SGLang's blockwise int8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.models.quantized.compressed import (
    FLOATS,
    Form,
    GroupedCodes,
    Part,
    even_groups,
)

_DTYPES = {"e4m3": frozenset(("F8_E4M3",)), "int": frozenset(("I8",))}
_NAMES = {"e4m3": "fp8", "int": "int8"}


@dataclass(frozen=True)
class ByteForm(Form):
    """A byte per weight; see the file header.

    Attributes:
        element: `e4m3` or `int`.
        block: outputs and inputs of a block; None for scales of outputs or of the matrix.
    """

    element: str
    block: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For people."""
        shared = "of rows or whole" if self.block is None else "x".join(map(str, self.block))
        return f"{_NAMES[self.element]} {shared}"

    def code_bits(self) -> int:
        """Bits of one code."""
        return 8

    def parts(self, rows: int, cols: int) -> dict[str, Part]:
        """The weight and its scales."""
        weight = Part(((rows, cols),), _DTYPES[self.element])
        if self.block is None:
            shapes: tuple[tuple[int, ...], ...] = ((), (1,), (rows,), (rows, 1))
            return {"weight": weight, "weight_scale": Part(shapes, FLOATS)}
        scale = Part((block_shape(self.block, rows, cols),), FLOATS | {"F8_E8M0"})
        return {"weight": weight, "weight_scale_inv": scale}

    def codes(self, tensors: Mapping[str, Tensor], rows: int, cols: int) -> GroupedCodes:
        """Bytes with the scales of their blocks for every output."""
        codes = byte_codes(tensors["weight"])
        if self.block is None:
            scales, width = tensors["weight_scale"].to(torch.float32), -1
        else:
            scales, width = tensors["weight_scale_inv"].to(torch.float32), self.block[1]
        spread = spread_scales(scales, rows, self.block)
        group_of = even_groups(cols, width, codes.device)
        return GroupedCodes(self.element, 8, codes, spread, None, group_of)


def byte_codes(weight: Tensor) -> Tensor:
    """The bytes of a weight as codes, uint8: integers are offset by 128."""
    codes = weight.view(torch.uint8)
    return codes ^ 0x80 if weight.dtype == torch.int8 else codes


def block_shape(block: tuple[int, int], rows: int, cols: int) -> tuple[int, int]:
    """How many blocks there are: down and across."""
    return -(-rows // block[0]), -(-cols // block[1])


def spread_scales(scales: Tensor, rows: int, block: tuple[int, int] | None) -> Tensor:
    """Scales of every output, [N, G].

    Args:
        scales: of blocks, [N / r, G], of outputs, or one.
        rows: N.
        block: None where there are no blocks.
    """
    if block is not None:
        return scales.repeat_interleave(block[0], 0)[:rows].contiguous()
    return scales.reshape(-1, 1).expand(rows, 1).contiguous()
