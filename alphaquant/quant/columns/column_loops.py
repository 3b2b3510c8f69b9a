"""What goes through the columns of a block, and which implementation does so on which device.

`descent.py` is one algorithm of products between blocks of columns; what is left are three loops
inside a block. On a CPU they are compiled with numba, on a CUDA device with Triton. Both are held
to the same contract (`alphaquant.testing.columns`).

Letters: S stacks, K columns, B columns of a block, N rows, G groups; U the diagonal block of the
inverse Hessian's upper factor, H the Hessian, D = W - Q. A first dimension of S is optional.
"""

import importlib
import importlib.util
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphaquant.quant.columns import columns_numba, coupled_numba
from alphaquant.quant.columns.state import Block, Groups, Rounding

Floats = npt.NDArray[np.float32]


class ColumnLoops(Protocol):
    """The loops inside a block, for all rows and stacks; what they change is a `Rounding`."""

    def fit_groups(
        self, rounding: Rounding, groups: Groups, first: int, weight: Tensor, importance: Tensor
    ) -> None:
        """Choose scales and zeros of neighbouring groups from all of their columns.

        Args:
            rounding: its scales and zeros are written.
            groups: all of them.
            first: the first of those whose scales are chosen.
            weight: float32 [.., C, N], the columns of these groups.
            importance: float32 [C] or [S, C], weight of each column's squared error.
        """

    def gptq_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        ahead: Tensor,
        weight: Tensor,
        upper: Tensor,
        importance: Tensor | None,
    ) -> None:
        """Round one block of columns with error compensation inside the block.

        Args:
            rounding: codes and delta of the block are written, the squared scaled errors added to
                the objective; scales are read, and written where they are chosen here.
            groups: in the order of processing.
            block: B columns.
            ahead: float32 [.., B, N], weights compensated for everything before the block;
                overwritten where scales are chosen here, so not to be `weight` itself then.
            weight: float32 [.., K, N], as they were.
            upper: float32 [.., B, B], U.
            importance: float32 [.., B], weight of each column's squared error: scales of the
                block's groups, which it holds whole, are chosen here; None to take them as known.
        """

    def sweep_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        residual: Tensor,
        hessian: Tensor,
        products: Tensor | None,
    ) -> None:
        """One pass of scales and codes over a block of columns.

        Args:
            rounding: codes and delta of the block, and its groups' scales, are read and written.
            groups: in the natural order.
            block: B columns.
            residual: float32 [.., B, N], H_b D with D as it is; overwritten.
            hessian: float32 [.., B, B], the block's part of H.
            products: float32 [.., B, N], H_gg c_g of each group g of the block, whose scales are
                fitted first; None where scales stay.
        """

    def sweep_rows(
        self,
        rounding: Rounding,
        groups: Groups,
        part: tuple[Block, Block],
        residual: Tensor,
        matrices: tuple[Tensor, Tensor],
        products: Tensor | None,
    ) -> Tensor:
        """One pass of scales and codes over a block of columns, coupled rows one after the other.

        Args:
            rounding: codes and delta of the block, and its groups' scales, are read and written,
                those of the rows of the tile.
            groups: in the natural order.
            part: B columns, and n rows of a tile.
            residual: float32 [.., n, B], P D' H_b of these rows, P their coupling with all rows;
                overwritten.
            matrices: the coupling between these rows, float32 [.., n, n], with ones on its
                diagonal, and the block's part of H, float32 [.., B, B].
            products: float32 [.., n, B], H_gg c_g of each group g of the block, whose scales are
                fitted first; None where scales stay.

        Returns:
            What became of D' H_b of these rows, float32 [.., n, B].
        """
        ...


def loops_on(device: torch.device) -> ColumnLoops:
    """The loops for tensors of a device that `can_round_on`."""
    return NumbaLoops() if device.type == "cpu" else triton_loops()


@cache
def can_round_on(device_type: str) -> bool:
    """Whether there are loops for a type of device: a CPU, and CUDA where triton is installed."""
    if device_type == "cpu":
        return True
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


def triton_loops() -> ColumnLoops:
    """The loops in Triton; needs triton."""
    module = importlib.import_module("alphaquant.quant.columns.columns_triton")
    found: ColumnLoops = module.TritonLoops()
    return found


class NumbaLoops:
    """The loops on a CPU, one stack after the other; a `ColumnLoops`."""

    def fit_groups(
        self, rounding: Rounding, groups: Groups, first: int, weight: Tensor, importance: Tensor
    ) -> None:
        """Choose scales and zeros of neighbouring groups from all of their columns."""
        for s, x in enumerate(_stacked(weight)):
            weights = importance.expand(len(x)) if importance.dim() == 1 else importance[s]
            scales, zeros = _stacked(rounding.scales)[s], _stacked(rounding.zeros)[s]
            for index, start in enumerate(range(0, len(x), groups.size), first):
                own = slice(start, start + groups.size)
                columns_numba.fit_group(
                    _flat(x[own]),
                    weights[own].numpy(),
                    x.shape[1],
                    groups.rule,
                    _shared_of(rounding, groups, s, index),
                    scales[index].numpy(),
                    zeros[index].numpy(),
                )

    def gptq_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        ahead: Tensor,
        weight: Tensor,
        upper: Tensor,
        importance: Tensor | None,
    ) -> None:
        """Round one block of columns with error compensation inside the block."""
        columns, n_columns = slice(*block), block[1] - block[0]
        begins = np.zeros(n_columns, np.int64)
        if importance is not None:
            for start in range(0, n_columns, groups.size):
                begins[start] = min(groups.size, n_columns - start)
        for s, x in enumerate(_stacked(ahead)):
            weights = np.ones(n_columns, np.float32)
            if importance is not None:
                weights = _stacked(importance, 2)[s].numpy()
            columns_numba.gptq_block(
                _flat(x),
                _flat(_stacked(weight)[s, columns]),
                _flat(_stacked(upper)[s]),
                begins,
                _groups_of(groups, s, columns),
                weights,
                x.shape[1],
                groups.rule,
                _flat(_stacked(rounding.shared)[s]),
                groups.per_shared,
                _flat(_stacked(rounding.scales)[s]),
                _flat(_stacked(rounding.zeros)[s]),
                _flat(_stacked(rounding.centred)[s, columns]),
                _flat(_stacked(rounding.delta)[s, columns]),
                _stacked(rounding.objective, 2)[s].numpy(),
            )

    def sweep_block(
        self,
        rounding: Rounding,
        groups: Groups,
        block: Block,
        residual: Tensor,
        hessian: Tensor,
        products: Tensor | None,
    ) -> None:
        """One pass of scales and codes over a block of columns."""
        columns = slice(*block)
        ends = _run_ends(groups, block, fits=products is not None)
        for s, x in enumerate(_stacked(residual)):
            columns_numba.sweep_block(
                _flat(x),
                _flat(_stacked(hessian)[s].contiguous()),
                _flat(torch.empty(0) if products is None else _stacked(products)[s]),
                ends,
                _groups_of(groups, s, columns),
                x.shape[1],
                groups.rule,
                _flat(_stacked(rounding.shared)[s]),
                groups.per_shared,
                _flat(_stacked(rounding.scales)[s]),
                _flat(_stacked(rounding.zeros)[s]),
                _flat(_stacked(rounding.centred)[s, columns]),
                _flat(_stacked(rounding.delta)[s, columns]),
            )

    def sweep_rows(
        self,
        rounding: Rounding,
        groups: Groups,
        part: tuple[Block, Block],
        residual: Tensor,
        matrices: tuple[Tensor, Tensor],
        products: Tensor | None,
    ) -> Tensor:
        """One pass over a block of columns, coupled rows one after the other."""
        block, (start, _) = part
        columns = slice(*block)
        coupling, hessian = matrices
        changes = torch.empty_like(residual)
        for s, x in enumerate(_stacked(residual)):
            coupled_numba.sweep_rows(
                _flat(x),
                _flat(_stacked(coupling)[s]),
                _flat(_stacked(hessian)[s]),
                _flat(torch.empty(0) if products is None else _stacked(products)[s]),
                _run_ends(groups, block, fits=products is not None),
                _groups_of(groups, s, columns),
                start,
                rounding.delta.shape[-1],
                groups.rule,
                _flat(_stacked(rounding.shared)[s]),
                groups.per_shared,
                _flat(_stacked(rounding.scales)[s]),
                _flat(_stacked(rounding.zeros)[s]),
                _flat(_stacked(rounding.centred)[s, columns]),
                _flat(_stacked(rounding.delta)[s, columns]),
                _flat(_stacked(changes)[s]),
            )
        return changes


def _run_ends(groups: Groups, block: Block, *, fits: bool) -> npt.NDArray[np.int64]:
    """Where a run of columns of a block begins, its end: a group whose scale is fitted, or all."""
    n_columns = block[1] - block[0]
    run = groups.size if fits else n_columns
    ends = np.zeros(n_columns, np.int64)
    for start in range(0, n_columns, run):
        ends[start] = min(n_columns, start + run)
    return ends


def _stacked(x: Tensor, n_dims: int = 3) -> Tensor:
    """With a first dimension of stacks."""
    return x if x.dim() == n_dims else x.unsqueeze(0)


def _groups_of(groups: Groups, stack: int, columns: slice) -> npt.NDArray[np.int64]:
    found = groups.of_columns
    own = found if found.dim() == 1 else found[stack]
    numbers: npt.NDArray[np.int64] = own[columns].numpy()
    return numbers


def _shared_of(rounding: Rounding, groups: Groups, stack: int, group: int) -> Floats:
    """float32 [N], what a group's scales share with others; empty where they share nothing."""
    of_stack = _stacked(rounding.shared)[stack]
    return _flat(of_stack[group // groups.per_shared] if len(of_stack) else of_stack)


def _flat(x: Tensor) -> Floats:
    """The numbers of a contiguous tensor, which the loops may write; never a copy."""
    found: Floats = x.view(-1).numpy()
    return found
