"""Damped Hessians and their factors, as the column loops want them.

GPTQ spreads errors through U, the upper Cholesky factor of the inverse Hessian. Nothing here
inverts a Hessian: the Cholesky factor of H with rows and columns reversed, reversed back, is an
upper V with H = V V', so U = V^-1, and what a block of columns has to be compensated for is
(D V) U_bb, of which only the diagonal block U_bb needs an inverse (Golub and Van Loan, Matrix
Computations, 4.2.9, for block Cholesky). That is K^3 / 3 multiplications instead of 4 K^3 / 3.

Letters: K columns of a matrix; H Hessian, V and U as above; b a block of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.provenance import multiplies_bfloat16

MAX_DAMP_RETRIES = 5
_CHOLESKY_BLOCK = 128
_LAPACK_COLUMNS = 512
"""Below this, one call of LAPACK is faster than products of blocks (on the CPUs measured)."""

_HALF_COLUMNS = 2048
"""From here on products in bfloat16 are worth their casts."""

Block = tuple[int, int]
"""First column and the one after the last."""


@dataclass(frozen=True)
class Factor:
    """One Hessian's factor in one order of columns.

    Attributes:
        upper: float32 [K, K], V, upper triangular, in the order of processing.
        order: int64 [K], the column at each place; None for the natural order.
        half: V in bfloat16, where products in it are worth while.
    """

    upper: Tensor
    order: Tensor | None = None
    half: Tensor | None = None

    def diagonal_inverses(self, blocks: Sequence[Block]) -> list[Tensor]:
        """U_bb of every block, upper triangular, contiguous."""
        return [_invert_upper(self.upper[start:stop, start:stop]) for start, stop in blocks]


@dataclass(frozen=True)
class DampedHessian:
    """A Hessian with its factors.

    Attributes:
        matrix: float32 [K, K], H + damp * mean(diag H) * I, in the natural order.
        damp: fraction of the mean diagonal that was added, retries included.
        factors: one for each order that was asked for.
        half: `matrix` in bfloat16, where products in it are worth while.
    """

    matrix: Tensor
    damp: float
    factors: tuple[Factor, ...]
    half: Tensor | None = None


def dampen(hessian: Tensor, damp: float) -> Tensor:
    """H + damp * mean(diag H) * I, float32 [K, K].

    A column that no token ever used (zero diagonal) first gets the mean diagonal (1 where all are
    zero), so it is rounded without compensation.

    Args:
        hessian: [K, K], symmetric.
        damp: fraction of the mean diagonal.
    """
    H = hessian.to(torch.float32).clone()
    diagonal = H.diagonal()  # a view: writing it writes H
    mean = diagonal.mean()
    diagonal += torch.where(diagonal == 0, torch.where(mean > 0, mean, torch.ones_like(mean)), 0.0)
    diagonal += damp * diagonal.mean()
    return H


def factorize(
    hessian: Tensor, percdamp: float, orders: Sequence[bool], name: str = "a matrix"
) -> DampedHessian:
    """Dampen a Hessian and factorize it in some orders of its columns.

    A Hessian whose factorization fails in any order is tried again with ten times the damping, at
    most five times.

    Args:
        hessian: float32 [K, K], symmetric, sums over tokens (any positive scale).
        percdamp: fraction of mean(diag H) added to the diagonal.
        orders: False for the natural order, True for descending diag(H), the most used first.
        name: whose Hessian it is, for the error.

    Raises:
        ModelError: it is not positive definite even with 10^5 * percdamp.
    """
    damp = percdamp
    for _ in range(MAX_DAMP_RETRIES + 1):
        damped = dampen(hessian, damp)
        factors = [_factor(hessian, damped, most_used_first) for most_used_first in orders]
        found = tuple(factor for factor in factors if factor is not None)
        if len(found) == len(orders):
            return DampedHessian(damped, damp, found, _half(damped))
        damp *= 10
    raise ModelError(
        f"the Hessian of {name} ({len(hessian)} inputs) is not positive definite even with "
        f"damping {percdamp * 10**MAX_DAMP_RETRIES:g}; use more or "
        "other calibration text, a larger --percdamp, or --method rtn"
    )


def _factor(hessian: Tensor, damped: Tensor, most_used_first: bool) -> Factor | None:
    """V in one order; None where the damped Hessian is not positive definite."""
    order = None
    if most_used_first:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        damped = damped[order][:, order]
    lower = _cholesky(damped.flip(0, 1))
    if lower is None:
        return None
    upper = lower.flip(0, 1).contiguous()
    return Factor(upper, order, _half(upper))


def _half(matrix: Tensor) -> Tensor | None:
    """The matrix in bfloat16 where the processor multiplies that faster and it is large enough.

    Measured with AMX: four fifths of the time at 2048 columns, no gain at 1024.
    """
    if len(matrix) < _HALF_COLUMNS or not multiplies_bfloat16():
        return None
    return matrix.to(torch.bfloat16)


def _cholesky(matrix: Tensor) -> Tensor | None:
    """Lower Cholesky factor [K, K], blocked where that is faster; None where there is none."""
    n_cols = len(matrix)
    if n_cols < _LAPACK_COLUMNS:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower if not int(info) and bool(torch.isfinite(lower).all()) else None
    lower = torch.zeros_like(matrix)
    for start, stop in _even_blocks(n_cols, _CHOLESKY_BLOCK):
        left = lower[start:, :start]  # what is known of these rows
        column = torch.addmm(matrix[start:, start:stop], left, left[: stop - start].T, alpha=-1.0)
        inside, info = torch.linalg.cholesky_ex(column[: stop - start])
        if int(info) or not bool(torch.isfinite(inside).all()):
            return None
        lower[start:stop, start:stop] = inside
        lower[stop:, start:stop] = column[stop - start :] @ _invert_upper(inside.T.contiguous())
    return lower


def _invert_upper(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix."""
    eye = torch.eye(len(upper), device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse.contiguous()


def _even_blocks(n_cols: int, size: int) -> Iterator[Block]:
    for start in range(0, n_cols, size):
        yield start, min(n_cols, start + size)
