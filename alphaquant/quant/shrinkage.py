"""Hessians that do not believe the calibration text more than it deserves.

A Hessian is a sum over tokens. With few tokens per input its correlations are partly those of the
text at hand, and GPTQ and descent fit them: the error on the calibration text falls while the
error on other text rises. So a Hessian is drawn toward its diagonal,

    H' = (1 - s) H + s diag(H),    s = a / (a + tokens per input)

(shrinkage as of Ledoit and Wolf 2004, J. Multivariate Analysis 88(2), whose weight also falls with
the number of samples; the target here is the diagonal, the part that one number per input
supports). The strength a is chosen per group of matrices of one kind in a layer: some of them are
rounded with what the Hessian of three quarters of the tokens says, and measured on the held-back
quarter. Where nothing gains, a is 0.

Worked example: strength 2 and 2.7 tokens per input give s = 0.43, 85 tokens per input 0.023.

Letters: N rows, K columns; H Hessian.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.place import Place
from alphaquant.spaces.formats import parse_format

STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""What is tried; the first is none at all."""

_PROBE_FORMAT = "int3-g64"
_PROBE_ROWS = 96
_PROBE_SWEEPS = 1
_ENOUGH = 128.0
"""Tokens per input from which on nothing is tried: even strength 4 would be s = 0.03."""
_GAIN = 0.99
"""Held-out error relative to none below which a strength is taken; less is noise."""


@dataclass(frozen=True)
class Shrinkage:
    """How strongly the Hessians of a batch are drawn toward their diagonals.

    Attributes:
        strength: a; 0 leaves them as they are.
        heldout_gain: error on held-back tokens relative to that without, in `int3-g64`, mean over
            the matrices tried; None where nothing was tried.
    """

    strength: float = 0.0
    heldout_gain: float | None = None

    def amount(self, tokens_per_input: float) -> float:
        """S for a matrix, 0 to 1."""
        if not self.strength:
            return 0.0
        return self.strength / (self.strength + tokens_per_input)


NO_SHRINKAGE = Shrinkage()


def shrink(hessian: Tensor, amount: float | Tensor) -> Tensor:
    """(1 - s) H + s diag(H) of Hessians.

    Args:
        hessian: float32 [.., K, K].
        amount: s, one for all, or float64 [..] on the CPU.
    """
    amounts = torch.as_tensor(amount, dtype=torch.float64)
    if not bool(amounts.any()):
        return hessian
    kept, drawn = ((x.to(hessian)).unsqueeze(-1) for x in (1 - amounts, amounts))
    found = hessian * kept.unsqueeze(-1)
    found.diagonal(dim1=-2, dim2=-1).add_(drawn * hessian.diagonal(dim1=-2, dim2=-1))
    return found


def choose_shrinkage(
    batch: HessianBatch, weight_of: Callable[[int], Tensor], percdamp: float, place: Place
) -> Shrinkage:
    """The strength that rounds best for held-back tokens.

    Args:
        batch: Hessians of matrices of one kind.
        weight_of: gives the weights of a group, float32 [N, K].
        percdamp: of the quantizer.
        place: where that is computed.
    """
    errors = [
        _errors(batch, index, weight_of(index), percdamp, place) for index in _worth_trying(batch)
    ]
    if not errors:
        return NO_SHRINKAGE
    relative = torch.stack([e / e[0].clamp(min=1e-30) for e in errors]).mean(0)  # [strengths]
    best = int(relative.argmin())
    if float(relative[best]) > _GAIN:
        return Shrinkage(0.0, 1.0)
    return Shrinkage(STRENGTHS[best], float(relative[best]))


def _worth_trying(batch: HessianBatch) -> Iterator[int]:
    """Groups that have tokens of both kinds, and not plenty of them."""
    for index, held in batch.held.items():
        fitted = batch.hessian[index].diagonal() - held.diagonal()
        has_both = bool(held.diagonal().sum() > 0) and bool(fitted.sum() > 0)
        if has_both and batch.tokens_per_input(index) < _ENOUGH:
            yield index


def _errors(
    batch: HessianBatch, index: int, weight: Tensor, percdamp: float, place: Place
) -> Tensor:
    """Errors on held-back tokens by strength, of some rows; float32 [strengths]."""
    held = batch.held[index].to(place.device)
    fitted = batch.hessian[index].to(place.device) - held
    rows = weight[:: max(1, len(weight) // _PROBE_ROWS)][:_PROBE_ROWS].T.contiguous()  # [K, n]
    n_tokens = 0.75 * batch.tokens_per_input(index)
    amounts = [Shrinkage(strength).amount(n_tokens) for strength in STRENGTHS]
    n_together = min(len(amounts), place.n_together(rows.shape[1], len(rows)))
    found = []
    for start in range(0, len(amounts), n_together):
        some = torch.tensor(amounts[start : start + n_together], dtype=torch.float64)
        shrunk = shrink(fitted.expand(len(some), -1, -1), some)
        D = _round_rows(rows.expand(len(some), -1, -1).contiguous(), shrunk, percdamp, place)
        found.append(((held @ D) * D).sum((-1, -2)))
    return torch.cat(found).cpu()


def _round_rows(weight: Tensor, hessian: Tensor, percdamp: float, place: Place) -> Tensor:
    """D of some rows, [S, K, n], rounded with each Hessian [S, K, K]."""
    fmt, n_cols = parse_format(_PROBE_FORMAT), weight.shape[-2]
    plan = ColumnPlan(n_cols, fmt.columns_per_scale(n_cols))
    nothing = torch.empty(0, device=place.device)
    rounder = Rounder(rule_of(fmt, "hessian"), plan, nothing, place.loops)
    damped = factorize(hessian, percdamp, (False,))
    factor = damped.factors[0]
    start = rounder.gptq(weight, factor, factor.diagonal_inverses(plan.blocks), static=False)
    return rounder.refine(start, damped, _PROBE_SWEEPS).delta
