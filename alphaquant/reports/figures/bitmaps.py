"""Where an assignment spends its bits: mean bits of layers by role, and of layers by expert.

Numbers only: figures draw them, text tables print them. A weight's bits are all that is stored for
it, scales and zero points included, as everywhere.

Letters: L layers, C columns (roles or experts).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alphaquant.search.arrays import FloatArray
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import KINDS, Inventory, Matrix

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class BitMap:
    """A number for every layer and column.

    Attributes:
        layers: numbers of the layers as texts, L of them, in order; `beside` for what is in none.
        columns: names of the columns, C of them.
        values: float64 [L, C]; NaN where a layer has nothing in a column.
    """

    layers: tuple[str, ...]
    columns: tuple[str, ...]
    values: FloatArray


def bits_by_role(assignment: Assignment, inventory: Inventory) -> BitMap:
    """Mean stored bits per weight of each layer's matrices, by role.

    Worked example: the down matrices of two experts of one size in int4-g64 (4.25 bits) and
    int8-g64 (8.25) are 6.25 in the column `routed down`.

    Args:
        assignment: a format of every matrix.
        inventory: the matrices.
    """
    ordered = sorted(inventory.matrices, key=lambda m: KINDS.index(m.kind))
    columns = tuple(dict.fromkeys(m.role for m in ordered))
    return _mean_bits(assignment, inventory.matrices, columns, lambda m: m.role)


def bits_by_expert(assignment: Assignment, inventory: Inventory) -> BitMap | None:
    """Mean stored bits per weight of each layer's routed experts; None without such.

    Args:
        assignment: a format of every matrix.
        inventory: the matrices.
    """
    routed = [m for m in inventory.matrices if m.expert is not None]
    if not routed:
        return None
    columns = tuple(map(str, sorted({m.expert for m in routed if m.expert is not None})))
    return _mean_bits(assignment, routed, columns, lambda m: str(m.expert))


def tokens_by_expert(tokens: Mapping[str, Sequence[int]]) -> BitMap | None:
    """Calibration tokens of each layer's routed experts; None without such.

    Worked example: {`model.layers.1.mlp.experts`: [7, 0]} is the layer 1, the columns 0 and 1 and
    the row (7, 0). Where a layer has several modules of experts, their tokens add up.

    Args:
        tokens: tokens per expert by name of the experts' module, which says its layer.
    """
    counts = {name: values for name, values in tokens.items() if values}
    if not counts:
        return None
    layer_of = {name: _layer(name) for name in counts}
    layers = sorted(set(layer_of.values()))
    n_columns = max(map(len, counts.values()))
    values = np.full((len(layers), n_columns), np.nan)
    for name, found in counts.items():
        row = values[layers.index(layer_of[name]), : len(found)]  # a view
        row[:] = np.nan_to_num(row) + found
    return BitMap(tuple(map(str, layers)), tuple(map(str, range(n_columns))), values)


def _mean_bits(
    assignment: Assignment,
    matrices: Sequence[Matrix],
    columns: tuple[str, ...],
    column_of: Callable[[Matrix], str],
) -> BitMap:
    """Bits of matrices over their weights, by layer and column."""
    ordered = sorted(matrices, key=lambda m: m.layer)
    layers = tuple(dict.fromkeys(m.place for m in ordered))
    bits, weights = np.zeros((2, len(layers), len(columns)))
    row = {layer: i for i, layer in enumerate(layers)}
    column = {name: i for i, name in enumerate(columns)}
    for matrix in matrices:
        at = row[matrix.place], column[column_of(matrix)]
        bits[at] += matrix.storage_bits(assignment.format_of(matrix.name))
        weights[at] += matrix.n_weights
    return BitMap(
        layers, columns, np.divide(bits, weights, np.full_like(bits, np.nan), where=weights > 0)
    )


def _layer(name: str) -> int:
    """The layer in a module's name."""
    found = _LAYER.search(name)
    assert found is not None, f"experts are inside a layer, {name} is not"
    return int(found[1])
