"""Putting an assignment's weights into a model, from the bank; only what changed is written."""

from collections.abc import Callable

import torch
from torch import nn

from alphaquant.models.sites import ModelMap
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix

Read = Callable[[Matrix, str], PackedMatrix]


class Swapper:
    """A model whose weights follow assignments.

    The model's own weights are overwritten; everything that needs the original (Hessians, costs,
    teacher) comes before the first swap.
    """

    def __init__(self, model_map: ModelMap, read: Read) -> None:
        """Start from the original weights.

        Args:
            model_map: the model; `apply` writes its weights.
            read: gives a packed matrix in a format (`Bank.read`).
        """
        self._map = model_map
        self._read = read
        self._current: dict[str, str] = {}

    @property
    def model(self) -> nn.Module:
        """The model, with the weights of the last assignment."""
        return self._map.model

    @torch.no_grad()
    def apply(self, assignment: Assignment) -> int:
        """Write the matrices whose format differs from the current one.

        Returns:
            How many were written.
        """
        changed = [
            m
            for m in self._map.inventory.matrices
            if self._current.get(m.name) != assignment.formats[m.name]
        ]
        for matrix in changed:
            packed = self._read(matrix, assignment.formats[matrix.name])
            view = self._map.view(matrix.name)
            view.copy_(packed.dequantize())
            self._current[matrix.name] = assignment.formats[matrix.name]
        return len(changed)
