"""Some tokens in place of all: drawn in proportion to a size, and counted so that sums are right.

Of m tokens with sizes z_t, the n points (i + shift) / n, i = 0 .. n - 1, fall into the tokens'
parts of [0, 1], which follow each other and are z_t / sum z long. A token that c_t points fall
into counts c_t sum z / (n z_t) times. With a shift drawn from [0, 1) sums over the drawn tokens
have those over all tokens as their mean; where what is summed is in proportion to the sizes they
are equal. Tokens in the order of the text are drawn from all over it.

Worked example: sizes 1, 3, 4, two points with shift 0.5: 0.25 falls into the second part
[1/8, 1/2), 0.75 into the third. They count 8 / (2 * 3) = 4/3 and 8 / (2 * 4) = 1 times, and the
sum of the sizes is 4/3 * 3 + 1 * 4 = 8.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_SHARE = 1e-6
"""Of the mean size; rounding may make a size zero, and every token must have a chance."""


@dataclass(frozen=True)
class Drawn:
    """Drawn tokens.

    Attributes:
        rows: int64 [n], ascending, on the CPU.
        counts: float64 [n], how often each counts.
    """

    rows: Tensor
    counts: Tensor


def draw_tokens(sizes: Tensor, n_points: int, shift: float = 0.5) -> Drawn:
    """Draw at most `n_points` tokens; all of them, once each, where there are no more.

    Args:
        sizes: [m], >= 0, on any device.
        n_points: n.
        shift: 0 to 1.
    """
    m = len(sizes)
    if m <= n_points:
        return Drawn(torch.arange(m), torch.ones(m, dtype=torch.float64))
    z = sizes.double().cpu()
    total = float(z.sum())
    z = z + _LEAST_SHARE * total / m if total > 0 else torch.ones_like(z)
    ends = z.cumsum(0)
    points = (torch.arange(n_points, dtype=torch.float64) + shift) / n_points * ends[-1]
    found = torch.searchsorted(ends, points, right=True).clamp_(max=m - 1)
    rows, counts = torch.unique(found, return_counts=True)
    return Drawn(rows, counts * ends[-1] / (n_points * z[rows]))


def shift_of(seed: int, name: str) -> float:
    """A shift for a matrix, from [0, 1): 48 bits of a hash."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def squared_norms(x: Tensor) -> Tensor:
    """float64 [..., m] of [..., m, K]; float32 sums."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norms.double().square()
