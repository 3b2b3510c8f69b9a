"""The part of a stored matrix that a rank holds, and cutting it out of what a file stores.

Tensor parallelism divides the rows of some matrices (outputs: q, k, v, gate, up) and the columns
of others (inputs: o, down). Packed tensors are divided like this, and never dequantized:

    codes    rows: as they are; columns: whole bytes of a row, where no such bytes exist repacked
    scales   rows; columns: those of the groups that the part touches
    zeros    one bit stream for the matrix, so unpacked, cut like scales, packed again
    multiples, super-scales   unpacked, cut like scales, packed again; super-blocks like groups
    global_scale, and scales where a row has one group: copied

A group that the boundary cuts, or that is longer than the part, becomes several shorter groups of
equal scales: the part has groups of gcd(group, first column, columns). Nothing is rounded, and the
part dequantizes to exactly that part of the matrix.

Worked example, `int8-g128` of 128 columns on two ranks: 64 columns each and one group, so each
rank keeps the scale. `int4-g64` of 704 columns on two ranks: 352 columns, gcd(64, 352) = 32, so 11
groups of 32; the second rank begins at column 352, in the middle of the stored group 5. There
`int3-g32-s256` is in groups of 32 under super-blocks of gcd(256, 352) = 32, 11 of each.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from alphaquant.kernels.packing import pack_codes, unpack_codes
from alphaquant.spaces.formats import SUB_BITS, Format


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
        of_super = gcd(self.stored.super_size, self.cols.start, len(self.cols))
        super_size = of_super if self.stored.super_size else 0
        return replace(self.stored, group_size=size, super_size=super_size)

    @property
    def _has_cut_groups(self) -> bool:
        """Whether a row has several groups, of which the part holds some."""
        return len(self.cols) < self.stored_cols and self.stored.n_groups(self.stored_cols) > 1

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """The part of one tensor of the matrix, as `packed_shapes` of the part describes it.

        Args:
            name: `codes`, `scales`, `super_scales`, `zeros`, `global_scale` or `weight`.
            tensor: of the whole matrix, as stored.
        """
        if name == "weight":
            return tensor[self.rows.start : self.rows.stop, self.cols.start : self.cols.stop]
        if name == "codes":
            return self._codes(tensor[self.rows.start : self.rows.stop])
        if name == "scales" and self.stored.super_size:
            return self._multiples(tensor)
        if name == "scales":
            return self._groups(tensor, self.stored.group_size, self.format.group_size)
        if name == "super_scales":
            return self._groups(tensor, self.stored.super_size, self.format.super_size)
        return self._zeros(tensor) if name == "zeros" else tensor

    def _codes(self, codes: Tensor) -> Tensor:
        """Columns of codes, uint8 [rows, row bytes]."""
        bits, start, stop = self.stored.bits, self.cols.start, self.cols.stop
        if len(self.cols) == self.stored_cols:
            return codes
        if bits * start % 8 == 0 and bits * stop % 8 == 0:
            return codes[:, bits * start // 8 : bits * stop // 8]
        return pack_codes(unpack_codes(codes, bits, self.stored_cols)[:, start:stop], bits)

    def _groups(self, values: Tensor, stored_size: int, size: int) -> Tensor:
        """Rows of what groups share, [rows, G], and the columns of the part's groups.

        Args:
            values: of the whole matrix.
            stored_size: columns of its groups, or super-blocks.
            size: of the part's.
        """
        own = values[self.rows.start : self.rows.stop]
        if not self._has_cut_groups:
            return own
        starts = torch.arange(self.cols.start, self.cols.stop, size, device=values.device)
        # As bytes or pairs of them: torch does not index every small float.
        integers = own.view({1: torch.uint8, 2: torch.int16}[own.element_size()])
        return integers[:, starts // stored_size].view(own.dtype)

    def _multiples(self, scales: Tensor) -> Tensor:
        """The streams of the part's scales inside super-blocks."""
        n_groups = self.stored.n_groups(self.stored_cols)
        own = unpack_codes(scales, SUB_BITS, n_groups)
        cut = self._groups(own, self.stored.group_size, self.format.group_size)
        return pack_codes(cut, SUB_BITS)

    def _zeros(self, zeros: Tensor) -> Tensor:
        """The stream of the part's zero points."""
        shape = (self.stored_rows, self.stored.n_groups(self.stored_cols))
        points = unpack_codes(zeros, self.stored.bits, shape[0] * shape[1]).reshape(shape)
        cut = self._groups(points, self.stored.group_size, self.format.group_size)
        return pack_codes(cut.flatten(), self.stored.bits)


def part_of(size: int, rank: int, n_ranks: int) -> range:
    """The rows or columns of a rank, of equal parts: (12, 1, 3) gives 4 .. 7."""
    width = size // n_ranks
    return range(rank * width, (rank + 1) * width)
