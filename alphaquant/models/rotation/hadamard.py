"""Orthogonal matrices of Hadamard kind for many sizes, applied without being formed.

    Q = diag(s) H / sqrt(H's size),     s random signs,     H = H_K (x) H_2^m

H_2^m is Sylvester's, H_K a base of Paley's first or second kind for sizes that are no powers of
two: 12, 20, 28, 36, 44, ... The signs stand in front: behind H they would only turn the signs of
the rotated inputs, which changes nothing in a symmetric format. Where none of their bases
fits (184 = 23 x 8), H has equal blocks on its diagonal, each of the largest power of two that
divides the size.

Worked example: 256 is 2^8; 576 = 9 x 64 is a base of 36 times 16; 2880 = 45 x 64 is a base of 180
times 16; 184 is 23 blocks of 8.

Letters: n the size, K the base.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from alphaquant.errors import ModelError

_PART = 2**22
"""Numbers that are rotated together: 16 MiB in float32."""

_LARGEST_BASE = 1024
"""Bases beyond it take longer than they mix."""

_LARGEST_FACTOR = 64
"""Powers of two are applied as products of matrices of this size: dense ones are fast."""


@dataclass(frozen=True)
class Shape:
    """How the matrix of a size is built.

    Attributes:
        n_blocks: equal blocks on its diagonal.
        base: K, 1 for none.
        power: size of Sylvester's factor.
    """

    n_blocks: int
    base: int
    power: int

    @property
    def text(self) -> str:
        """For people: `Hadamard 36 x 16`, `23 blocks of Hadamard 32`."""
        factors = [str(n) for n in (self.base, self.power) if n > 1]
        name = f"Hadamard {' x '.join(factors)}"
        return name if self.n_blocks == 1 else f"{self.n_blocks} blocks of {name}"


def shape_of(size: int) -> Shape:
    """How the matrix of a size is built.

    Args:
        size: n.

    Raises:
        ModelError: the size is odd.
    """
    odd, power = size, 1
    while odd % 2 == 0:
        odd, power = odd // 2, power * 2
    if power == 1:
        raise ModelError(
            f"--rotate: no Hadamard matrix divides the odd hidden size {size}; sizes with a "
            "factor of two can be rotated: leave --rotate out"
        )
    if odd == 1:
        return Shape(1, 1, power)
    bases = (odd * 2**m for m in range(2, power.bit_length()))
    base = next((k for k in bases if k <= _LARGEST_BASE and _has_base(k)), None)
    return Shape(odd, 1, power) if base is None else Shape(1, base, size // base)


@dataclass(frozen=True)
class Rotation:
    """Q of a size and a seed.

    Attributes:
        size: n.
        seed: of the signs.
    """

    size: int
    seed: int

    @cached_property
    def shape(self) -> Shape:
        """How its matrix is built."""
        return shape_of(self.size)

    @cached_property
    def signs(self) -> Tensor:
        """float32 [n], 1 and -1."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (self.size,), generator=generator).float() * 2 - 1

    def rotated(self, rows: Tensor) -> Tensor:
        """Rows times Q.

        Args:
            rows: [..., n].

        Returns:
            float32 [..., n].
        """
        shape = self.shape
        found = (rows.float() * self.signs.to(rows.device)).reshape(-1, shape.n_blocks, 1)
        for factor in _factors(shape.base, shape.power):
            width = len(factor)
            # [..., n / width, width]: each factor takes the last index and puts it first.
            found = found.reshape(-1, self.size // shape.n_blocks // width, width)
            found = (found @ factor.to(found.device)).transpose(1, 2)
        return found.reshape(rows.shape)

    @torch.no_grad()
    def rotate_columns(self, weight: Tensor) -> None:
        """Replace W [..., n] by W Q: what reads the stream, and rows that are put into it."""
        flat = weight if weight.dim() > 1 else weight.unsqueeze(0)
        for part in torch.split(flat, max(1, _PART // self.size)):
            part.copy_(self.rotated(part))

    @torch.no_grad()
    def rotate_rows(self, weight: Tensor) -> None:
        """Replace W [n, K] by Q^T W: what writes the stream."""
        self.rotate_columns(weight.T)


@cache
def _factors(base: int, power: int) -> tuple[Tensor, ...]:
    """Orthogonal factors, the last index of what they are applied to first."""
    found = []
    while power > 1:
        width = min(power, _LARGEST_FACTOR)
        found.append(_sylvester(width) / math.sqrt(width))
        power //= width
    if base > 1:
        found.append(base_matrix(base) / math.sqrt(base))
    return tuple(found)


def _sylvester(size: int) -> Tensor:
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(found, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return found


def base_matrix(size: int) -> Tensor:
    """Paley's Hadamard matrix of a size K, float32 [K, K] of 1 and -1.

    With q = K - 1, a prime of 3 modulo 4: I + S, S skew of the quadratic characters of i - j.
    With q = K / 2 - 1, a prime of 1 modulo 4: a symmetric conference matrix, doubled.

    Args:
        size: K, one that `shape_of` gives.

    Source: R. E. A. C. Paley, On orthogonal matrices, 1933.
    """
    q = size - 1
    if _is_prime(q) and q % 4 == 3:
        return torch.eye(size) + _bordered(q, -1.0)
    q = size // 2 - 1
    conference = _bordered(q, 1.0)
    on = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(conference, on) + torch.kron(torch.eye(q + 1), off)


def _bordered(q: int, side: float) -> Tensor:
    """Quadratic characters of i - j modulo q, with a border of ones; its left side is `side`."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    numbers = torch.arange(q)
    found = torch.zeros(q + 1, q + 1)
    found[0, 1:], found[1:, 0] = 1.0, side
    found[1:, 1:] = character[(numbers[:, None] - numbers[None]) % q]
    return found


def _has_base(size: int) -> bool:
    half = size // 2 - 1
    return (_is_prime(size - 1) and (size - 1) % 4 == 3) or (_is_prime(half) and half % 4 == 1)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
