"""Damped Hessians and their factors, as the column loops want them.

GPTQ spreads errors through U, the upper Cholesky factor of the inverse Hessian. Nothing here
inverts a Hessian: the Cholesky factor of H with rows and columns reversed, reversed back, is an
upper V with H = V V', so U = V^-1, and what a block of columns has to be compensated for is
(D V) U_bb, of which only the diagonal block U_bb needs an inverse (Golub and Van Loan, Matrix
Computations, 4.2.9, for block Cholesky). That is K^3 / 3 multiplications instead of 4 K^3 / 3.

A first dimension of S Hessians is optional: with it all are factorized at the same time, on the
device they are on, and each is what it would be alone.

Letters: S stacks, K columns of a matrix; H Hessian, V and U as above; b a block of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.provenance import multiplies_bfloat16
from alphaquant.quant.columns.state import Block

MAX_DAMP_RETRIES = 5
_CHOLESKY_BLOCK = 128
_LAPACK_COLUMNS = 512
"""Below this, one call of LAPACK is faster than products of blocks (on the CPUs measured)."""

_HALF_COLUMNS = 2048
"""From here on products in bfloat16 are worth their casts."""


@dataclass(frozen=True)
class Factor:
    """Hessians' factors in one order of columns each.

    Attributes:
        upper: float32 [.., K, K], V, upper triangular, in the order of processing.
        order: int64 [.., K], the column at each place; None for the natural order.
        half: V in bfloat16, where products in it are worth while.
    """

    upper: Tensor
    order: Tensor | None = None
    half: Tensor | None = None

    def diagonal_inverses(self, blocks: Sequence[Block]) -> list[Tensor]:
        """U_bb of every block, upper triangular, contiguous, [.., B, B].

        Neighbours of one size are inverted together.

        Example: blocks of 96, 96 and 8 columns are two inversions, of [2, .., 96, 96] and of
            [1, .., 8, 8].
        """
        found: list[Tensor] = []
        for _, same in groupby(blocks, lambda block: block[1] - block[0]):
            own = [self.upper[..., start:stop, start:stop] for start, stop in same]
            stacked = torch.stack(own)  # [n, .., B, B]
            found += _invert_upper(stacked, _eye(stacked)).contiguous().unbind()
        return found

    def stacks(self, index: Tensor) -> "Factor":
        """Those of some stacks, int64 [n]."""
        order = None if self.order is None else self.order[index]
        return Factor(self.upper[index], order, None if self.half is None else self.half[index])


@dataclass(frozen=True)
class DampedHessian:
    """Hessians with their factors.

    Attributes:
        matrix: float32 [.., K, K], H + damp * mean(diag H) * I, in the natural order.
        damp: fraction of each mean diagonal that was added, retries included; float64 [..], on the
            CPU.
        factors: one for each order that was asked for.
        half: `matrix` in bfloat16, where products in it are worth while.
    """

    matrix: Tensor
    damp: Tensor
    factors: tuple[Factor, ...]
    half: Tensor | None = None

    def stacks(self, index: Tensor) -> "DampedHessian":
        """Those of some stacks, int64 [n] on the device of the matrices; copies."""
        return replace(
            self,
            matrix=self.matrix[index],
            damp=self.damp[index.cpu()],
            factors=tuple(factor.stacks(index) for factor in self.factors),
            half=None if self.half is None else self.half[index],
        )


def dampen(hessian: Tensor, damp: float | Tensor) -> Tensor:
    """H + damp * mean(diag H) * I, float32 [.., K, K].

    A column that no token ever used (zero diagonal) first gets the mean diagonal (1 where all are
    zero), so it is rounded without compensation.

    Args:
        hessian: [.., K, K], symmetric.
        damp: fraction of the mean diagonal, one for all or [..].
    """
    H = hessian.to(torch.float32).clone()
    diagonal = H.diagonal(dim1=-2, dim2=-1)  # a view: writing it writes H
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += torch.where(diagonal == 0, mean, 0.0)
    fraction = torch.as_tensor(damp, dtype=torch.float32, device=H.device).unsqueeze(-1)
    diagonal += fraction * diagonal.mean(-1, keepdim=True)
    return H


def factorize(
    hessian: Tensor, percdamp: float, orders: Sequence[bool], *names: str
) -> DampedHessian:
    """Dampen Hessians and factorize them in some orders of their columns.

    A Hessian whose factorization fails in any order is tried again with ten times the damping, at
    most five times.

    Args:
        hessian: float32 [.., K, K], symmetric, sums over tokens (any positive scale).
        percdamp: fraction of mean(diag H) added to the diagonal.
        orders: False for the natural order, True for descending diag(H), the most used first.
        names: whose Hessian each is, for the error.

    Raises:
        ModelError: one is not positive definite even with 10^5 * percdamp.
    """
    damp = torch.full(hessian.shape[:-2], percdamp, dtype=torch.float64)
    for _ in range(MAX_DAMP_RETRIES + 1):
        damped = dampen(hessian, damp)
        found = [_factor(hessian, damped, most_used_first) for most_used_first in orders]
        is_sound = torch.stack([sound for _, sound in found]).all(0).cpu()  # [..]
        if bool(is_sound.all()):
            factors = tuple(factor for factor, _ in found)
            return DampedHessian(damped, damp, factors, in_half(damped))
        damp = torch.where(is_sound, damp, 10 * damp)
    first = int((~is_sound).flatten().nonzero()[0])
    name = names[first] if names else "a matrix"
    raise ModelError(
        f"the Hessian of {name} ({hessian.shape[-1]} inputs) is not positive definite even with "
        f"damping {percdamp * 10**MAX_DAMP_RETRIES:g}; use more or "
        "other calibration text, a larger --percdamp, or --method rtn"
    )


def _factor(hessian: Tensor, damped: Tensor, most_used_first: bool) -> tuple[Factor, Tensor]:
    """V in one order, and which of the damped Hessians are positive definite, bool [..]."""
    order = None
    if most_used_first:
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
        rows = order.unsqueeze(-1).expand_as(damped)
        damped = damped.gather(-2, rows).gather(-1, rows.mT)
    lower, is_sound = _cholesky(damped.flip(-2, -1))
    upper = lower.flip(-2, -1).contiguous()
    return Factor(upper, order, in_half(upper)), is_sound


def in_half(matrix: Tensor) -> Tensor | None:
    """The matrix in bfloat16 where the device multiplies that faster and it is large enough.

    Measured with AMX: four fifths of the time at 2048 columns, no gain at 1024. On CUDA devices
    nothing was measured.
    """
    is_faster = matrix.is_cuda or multiplies_bfloat16()
    if matrix.shape[-1] < _HALF_COLUMNS or not is_faster:
        return None
    return matrix.to(torch.bfloat16)


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors [.., K, K], blocked where that is faster, and which exist, [..]."""
    n_cols = matrix.shape[-1]
    if n_cols < _LAPACK_COLUMNS:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower, (info == 0) & torch.isfinite(lower).all(-1).all(-1)
    lower, failures = torch.zeros_like(matrix), []
    eye = _eye(matrix[..., :_CHOLESKY_BLOCK, :_CHOLESKY_BLOCK])
    for start, stop in _even_blocks(n_cols, _CHOLESKY_BLOCK):
        left = lower[..., start:, :start]  # what is known of these rows
        column = matrix[..., start:, start:stop] - left @ left[..., : stop - start, :].mT
        inside, info = torch.linalg.cholesky_ex(column[..., : stop - start, :])
        failures.append(info)
        lower[..., start:stop, start:stop] = inside
        if stop < n_cols:
            below = column[..., stop - start :, :]
            lower[..., stop:, start:stop] = below @ _invert_upper(inside.mT, eye)
    is_sound = (torch.stack(failures) == 0).all(0)
    return lower, is_sound & torch.isfinite(lower).all(-1).all(-1)


def _eye(like: Tensor) -> Tensor:
    """Identity matrices in the shape of others."""
    return torch.eye(like.shape[-1], device=like.device).expand_as(like)


def _invert_upper(upper: Tensor, eye: Tensor) -> Tensor:
    """Inverses of upper triangular matrices."""
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def _even_blocks(n_cols: int, size: int) -> Iterator[Block]:
    for start in range(0, n_cols, size):
        yield start, min(n_cols, start + size)
