"""Where matrices are rounded, and how many of them at the same time.

On a CPU one stack after the other, its rows cut into parts, one per thread. On a CUDA device as
many stacks as its free memory holds, because there every product and every loop is one launch for
all of them.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch

from alphaquant.quant.columns.column_loops import ColumnLoops, can_round_on, loops_on

logger = logging.getLogger(__name__)

_COLUMN_TENSORS = 14
"""Tensors [K, N] of a stack at the same time, float32: weights, two roundings, their copies."""
_SQUARE_TENSORS = 10
"""Tensors [K, K] of a stack at the same time, float32: Hessian, two factors, what they take."""
_FREE_SHARE = 0.8
"""Part of the free memory that is used."""


@dataclass(frozen=True)
class Place:
    """A device and its column loops.

    Attributes:
        device: of all tensors.
        loops: of this device.
        is_batched: whether stacks are rounded together, not their rows in parts.
    """

    device: torch.device
    loops: ColumnLoops
    is_batched: bool

    def n_together(self, n_rows: int, n_cols: int) -> int:
        """Stacks that are rounded together, as many as the free memory holds; at least one.

        Args:
            n_rows: N of a stack.
            n_cols: K.
        """
        if not self.is_batched:
            return 1
        n_bytes = 4 * n_cols * (_COLUMN_TENSORS * n_rows + _SQUARE_TENSORS * n_cols)
        return max(1, int(_FREE_SHARE * self._free_bytes()) // n_bytes)

    def _free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + kept)


@cache  # told once, not once per batch of every layer
def _tell(device_type: str) -> None:
    logger.warning(
        "weights on %s are rounded on the CPU: only CUDA devices with triton have loops",
        device_type,
    )


def place_of(device: torch.device) -> Place:
    """Where to round matrices of a model on a device: there, or on the CPU if it has no loops."""
    if not can_round_on(device.type):
        _tell(device.type)
        device = torch.device("cpu")
    return Place(device, loops_on(device), is_batched=device.type != "cpu")
