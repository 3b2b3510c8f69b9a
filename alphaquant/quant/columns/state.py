"""Matrices rounded to a format while they are worked on, and what the column loops know of them.

Everything is transposed, [K columns, N rows]. A first dimension of S stacks is optional: without
it a tensor is of one matrix, with it of S matrices of one shape (the experts of a layer), which
are rounded together and do not know of each other.

Letters: S stacks, K columns, N rows, G groups of columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from alphaquant.quant.format_rules import Rule

Block = tuple[int, int]
"""First column and the one after the last."""


@dataclass(frozen=True)
class Rounding:
    """Matrices rounded to a format.

    Attributes:
        centred: float32 [.., K, N], codes less their zero points.
        delta: float32 [.., K, N], D, what rounding took away from the weights.
        scales: float32 [.., G, N].
        zeros: float32 [.., G, N], 0 for symmetric formats.
        shared: float32 [.., P, N], what neighbouring scales have in common: nvfp4's scale per
            matrix, P = 1, or the super-scales; P = 0 for all other formats.
        objective: float32 [.., N], tr(D H D') of every row; squared errors of the weights without
            H, infinite for rows that GPTQ leaves out.
    """

    centred: Tensor
    delta: Tensor
    scales: Tensor
    zeros: Tensor
    shared: Tensor
    objective: Tensor

    def rows(self, rows: slice) -> "Rounding":
        """Some of its rows."""
        return Rounding(*(x[..., rows] for x in self.tensors))

    def values(self, group_size: int) -> Tensor:
        """Grid values, zero points included, [.., K, N]."""
        n_cols = self.centred.shape[-2]
        spread = self.zeros.repeat_interleave(group_size, -2)
        return self.centred + spread[..., :n_cols, :]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of its attributes."""
        return tuple(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Groups:
    """Groups of columns and how their scales are chosen.

    Attributes:
        rule: of the format.
        size: columns of a group; the last may be short.
        of_columns: int64 [K] or [S, K], each column's group, in the order of processing.
        per_shared: groups that have a number of `Rounding.shared` in common.
    """

    rule: Rule
    size: int
    of_columns: Tensor
    per_shared: int = 1


def better_rows(first: Rounding, second: Rounding) -> Rounding:
    """Each row from whichever of two roundings to one format has the lower objective.

    Args:
        first: kept where both are equal, or the second's objective is no number.
        second: with the same scale per matrix (nvfp4).
    """
    return choose_rows(second.objective < first.objective, second, first)


def choose_rows(condition: Tensor, yes: Rounding, no: Rounding) -> Rounding:
    """Rows of one rounding where a condition [.., N] holds, of the other elsewhere."""
    columns = condition.unsqueeze(-2)
    return Rounding(
        torch.where(columns, yes.centred, no.centred),
        torch.where(columns, yes.delta, no.delta),
        torch.where(columns, yes.scales, no.scales),
        torch.where(columns, yes.zeros, no.zeros),
        torch.where(columns, yes.shared, no.shared),
        torch.where(condition, yes.objective, no.objective),
    )


def join_rows(parts: Sequence[Rounding]) -> Rounding:
    """Parts of a matrix's rows as one."""
    if len(parts) == 1:
        return parts[0]
    columns = zip(*(part.tensors for part in parts), strict=True)
    return Rounding(*(torch.cat(tensors, -1) for tensors in columns))
