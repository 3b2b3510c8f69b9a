"""Matrices that share their inputs, what is known of these, and the record of how one was made.

Letters: S stacks, N rows, K columns.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alphaquant.quant.columns.state import Rounding
from alphaquant.quant.factor import DampedHessian, in_half
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.place import Place
from alphaquant.quant.two_sided.coupling import Couplings, is_coupled
from alphaquant.spaces.formats import Format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings

_MOSTLY_DIAGONAL = 0.5
"""Shrinkage beyond which the objective says too little of the Hessian itself; at 1 nothing."""


def some(x: Tensor, index: Tensor) -> Tensor:
    """Some stacks, int64 [n], of a tensor; all of them without a copy."""
    return x if len(index) == len(x) else x[index]


@dataclass(frozen=True)
class MatrixRecord:
    """How one matrix was quantized; a row of `quantize_report.json`.

    Attributes:
        matrix: its name.
        format: canonical format name.
        bits_per_weight: stored bits, scales included.
        method: `gptq`, `rtn`, `none` (bf16), `ggml` (llama.cpp's own code) or `descent`, ours from
            there on.
        fallback: why the method differs from the one asked for, None if it does not.
        hessian: how it was made, see `HessianBatch.source`; None without data.
        n_tokens: calibration tokens that reached it, None without data.
        damp: damping fraction used, retries included.
        weight_error: |W - Q|^2 / |W|^2; W is what was rounded, a corrected weight where layers are
            rounded one after the other (`alphaquant.quant.sequential.correction`).
        output_error: tr(D H D') / tr(W H W'), D = W - Q; None without data.
        shrinkage: how far the Hessian was drawn toward its diagonal, 0 to 1; None without data.
        heldout_gain: what that made of the error on held-back tokens, as a factor, measured on
            matrices of its kind; None where it was not tried.
        is_two_sided: whether the gradients at its outputs had a say, see
            `alphaquant.quant.two_sided.output_hessian`.
        output_damp: damping fraction of its output Hessians, the largest of their blocks, retries
            included; None where it is rounded one-sided.
    """

    matrix: str
    format: str
    bits_per_weight: float
    method: str
    fallback: str | None = None
    hessian: str | None = None
    n_tokens: int | None = None
    damp: float | None = None
    weight_error: float = 0.0
    output_error: float | None = None
    shrinkage: float | None = None
    heldout_gain: float | None = None
    is_two_sided: bool = False
    output_damp: float | None = None


@dataclass(frozen=True)
class QuantizedMatrix:
    """A packed matrix, which one it is, and how it was made."""

    matrix: Matrix
    packed: PackedMatrix
    record: MatrixRecord


@dataclass(frozen=True)
class Stacks:
    """Stacks of one shape with what is known of their inputs.

    Attributes:
        matrices: of each stack, in the order of their rows.
        weights: float32 [S, N, K].
        hessian: float32 [S, K, K], sums over tokens; None without data.
        damped: drawn toward their diagonals, damped, with their factors; None for rounding to
            nearest.
        shrinkage: how far each was drawn, 0 to 1.
        heldout_gain: what that made of the error on held-back tokens.
        source: how each Hessian was made.
        n_tokens: how many the matrices of each stack saw.
        place: where all of that is.
        couplings: what is known of their outputs; None where rows are rounded each for itself.
    """

    matrices: tuple[tuple[Matrix, ...], ...]
    weights: Tensor
    hessian: Tensor | None
    damped: DampedHessian | None
    shrinkage: tuple[float, ...]
    heldout_gain: float | None
    source: tuple[str, ...]
    n_tokens: tuple[int, ...]
    place: Place
    couplings: Couplings | None = None

    def record(
        self,
        s: int,
        matrix: Matrix,
        fmt: Format,
        method: str,
        errors: tuple[float, float | None],
        settings: QuantSettings,
    ) -> MatrixRecord:
        """How a matrix of a stack was made.

        Args:
            s: the stack.
            matrix: of it.
            fmt: what it was put into.
            method: how.
            errors: of weights and of outputs, see `MatrixRecord`.
            settings: what was asked for.
        """
        has_data, (of_weights, of_outputs) = self.hessian is not None, errors
        is_fallback = settings.method == "gptq" and self.damped is None
        known = self.couplings if method == "gptq" and is_coupled(fmt) else None
        position = self.matrices[s].index(matrix)
        return MatrixRecord(
            matrix=matrix.name,
            format=fmt.name,
            bits_per_weight=matrix.storage_bits(fmt) / matrix.n_weights,
            method=method,
            fallback="no_tokens" if is_fallback else None,
            hessian=self.source[s] if has_data else None,
            n_tokens=self.n_tokens[s] if has_data else None,
            damp=None if self.damped is None else float(self.damped.damp[s]),
            weight_error=of_weights,
            output_error=of_outputs,
            shrinkage=self.shrinkage[s] if has_data else None,
            heldout_gain=self.heldout_gain,
            is_two_sided=known is not None,
            output_damp=None if known is None else known.damp_of(s, position),
        )

    @cached_property
    def signals(self) -> Tensor:
        """tr(W H W') of every row, [S, N], with data; to three digits where H is large.

        Reports divide by it. Products in bfloat16 round every number of W H for itself, and the
        sum over a row evens that out.
        """
        assert self.hessian is not None
        half = in_half(self.hessian)
        if half is None:
            return ((self.weights @ self.hessian) * self.weights).sum(-1)
        return ((self.weights.to(half.dtype) @ half) * self.weights).sum(-1)

    def rows_of(self, position: int) -> slice:
        """Rows of the matrices at a position of every stack."""
        sizes = [m.rows for m in self.matrices[0]]
        start = sum(sizes[:position])
        return slice(start, start + sizes[position])

    def output_errors(self, index: Tensor, rounding: Rounding) -> Tensor:
        """tr(D H D') of every row of some stacks, [S, N], with data.

        Args:
            index: int64 [S], the stacks.
            rounding: of these.
        """
        assert self.hessian is not None
        D = rounding.delta  # [S, K, N]
        hessian = some(self.hessian, index)
        shrinkage = torch.tensor(self.shrinkage, dtype=torch.float32)[index.cpu()]
        is_diagonal = shrinkage > _MOSTLY_DIAGONAL
        measured = told = None
        if self.damped is None or bool(is_diagonal.any()):
            measured = ((hessian @ D) * D).sum(-2)
        if self.damped is not None and not bool(is_diagonal.all()):
            # The objective is of the matrix with a larger diagonal and smaller correlations.
            kept = (1 - shrinkage).to(D.device).unsqueeze(-1)
            damped = some(self.damped.matrix.diagonal(dim1=-2, dim2=-1), index)
            added = damped - kept * hessian.diagonal(dim1=-2, dim2=-1)  # [S, K]
            extra = (added.unsqueeze(-2) @ D.square()).squeeze(-2)
            told = (rounding.objective - extra).clamp(min=0) / kept
        if told is None or measured is None:
            found = measured if told is None else told
            assert found is not None
            return found
        return torch.where(is_diagonal.to(D.device).unsqueeze(-1), measured, told)
