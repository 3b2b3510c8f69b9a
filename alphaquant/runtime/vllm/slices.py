"""The part of a stored matrix that a rank holds, and cutting it out of what a file stores.

Tensor parallelism divides the rows of some matrices (outputs: q, k, v, gate, up) and the columns
of others (inputs: o, down). Packed tensors are divided like this, and never dequantized:

    codes    rows: as they are; columns: whole bytes of a row, where no such bytes exist repacked
    scales   rows; columns: those of the groups that the part touches
    zeros    one bit stream for the matrix, so unpacked, cut like scales, packed again
    global_scale, and scales where a row has one group: copied

A group that the boundary cuts, or that is longer than the part, becomes several shorter groups of
equal scales: the part has groups of gcd(group, first column, columns). Nothing is rounded, and the
part dequantizes to exactly that part of the matrix.

Worked example, `int8-g128` of 128 columns on two ranks: 64 columns each and one group, so each
rank keeps the scale. `int4-g64` of 704 columns on two ranks: 352 columns, gcd(64, 352) = 32, so 11
groups of 32; the second rank begins at column 352, in the middle of the stored group 5.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.kernels.packing import pack_codes, unpack_codes
from alphaquant.models.quantization_config import PackedFormats
from alphaquant.spaces.formats import Format


def check_formats(formats: PackedFormats) -> None:
    """Refuse a checkpoint that holds what is not served here, before anything is built.

    Raises:
        ModelError: inputs of matrices are to be rounded, for which vLLM has no place, or matrices
            are in llama.cpp's types, whose blocks are not cut.
    """
    rounded = sorted(formats.activations)
    if rounded:
        raise ModelError(
            f"inputs of {len(rounded)} matrices are rounded, e.g. of {rounded[0]} to "
            f"{formats.activations[rounded[0]].name}; vLLM serves packed weights alone: "
            "quantize without aq, or run it with alphaquant.load"
        )
    blocks = sorted(name for name, fmt in formats.weights.items() if fmt.is_ggml)
    if blocks:
        raise ModelError(
            f"{len(blocks)} matrices are in types of llama.cpp, e.g. {blocks[0]} in "
            f"{formats.weights[blocks[0]].name}, which vLLM's plug-in does not serve; write a "
            "file for llama.cpp with aq-quantize --export gguf, or search with --profile any"
        )


@dataclass(frozen=True)
class Slice:
    """Some rows and columns of a stored matrix.

    Attributes:
        stored: the format in the file.
        stored_rows: outputs of the whole matrix.
        stored_cols: inputs of the whole matrix.
        rows: those of the part, step 1.
        cols: likewise.
    """

    stored: Format
    stored_rows: int
    stored_cols: int
    rows: range
    cols: range

    @property
    def format(self) -> Format:
        """The format of the part: the stored one, or one with shorter groups."""
        if not self._has_cut_groups:
            return self.stored
        size = gcd(self.stored.group_size, self.cols.start, len(self.cols))
        return replace(self.stored, group_size=size)

    @property
    def _has_cut_groups(self) -> bool:
        """Whether a row has several groups, of which the part holds some."""
        return len(self.cols) < self.stored_cols and self.stored.n_groups(self.stored_cols) > 1

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The part of one tensor of the matrix, as `packed_shapes` of the part describes it.

        Args:
            name: `codes`, `scales`, `zeros`, `global_scale` or `weight`.
            tensor: of the whole matrix, as stored.
        """
        if name == "weight":
            return tensor[self.rows.start : self.rows.stop, self.cols.start : self.cols.stop]
        if name == "codes":
            return self._codes(tensor[self.rows.start : self.rows.stop])
        if name == "scales":
            return self._groups(tensor)
        return self._zeros(tensor) if name == "zeros" else tensor

    def _codes(self, codes: Tensor) -> Tensor:
        """Columns of codes, uint8 [rows, row bytes]."""
        bits, start, stop = self.stored.bits, self.cols.start, self.cols.stop
        if len(self.cols) == self.stored_cols:
            return codes
        if bits * start % 8 == 0 and bits * stop % 8 == 0:
            return codes[:, bits * start // 8 : bits * stop // 8]
        return pack_codes(unpack_codes(codes, bits, self.stored_cols)[:, start:stop], bits)

    def _groups(self, values: Tensor) -> Tensor:
        """Rows of what groups share, [rows, G], and the columns of the part's groups."""
        own = values[self.rows.start : self.rows.stop]
        if not self._has_cut_groups:
            return own
        starts = torch.arange(
            self.cols.start, self.cols.stop, self.format.group_size, device=values.device
        )
        # As bytes or pairs of them: torch does not index every small float.
        integers = own.view({1: torch.uint8, 2: torch.int16}[own.element_size()])
        return integers[:, starts // self.stored.group_size].view(own.dtype)

    def _zeros(self, zeros: Tensor) -> Tensor:
        """The stream of the part's zero points."""
        shape = (self.stored_rows, self.stored.n_groups(self.stored_cols))
        points = unpack_codes(zeros, self.stored.bits, shape[0] * shape[1]).reshape(shape)
        return pack_codes(self._groups(points).flatten(), self.stored.bits)


def part_of(size: int, rank: int, n_ranks: int) -> range:
    """The rows or columns of a rank, of equal parts: (12, 1, 3) gives 4 .. 7."""
    width = size // n_ranks
    return range(rank * width, (rank + 1) * width)
