"""The contract of kernels that multiply with packed weights, to run over any implementation.

    for name in FORMATS:
        for case in CASES:
            check_product(linear, name, case, torch.float16)

An implementation takes activations [M, K] and a `KernelWeight` [N, K] and returns [M, N] in the
activations' dtype. What it must equal is `alphaquant.kernels.reference`. Checks raise
AssertionError with what was broken. A new format adds its name to `FORMATS`.

Letters: M tokens, N outputs, K inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.order import KernelWeight
from alphaquant.quant.gptq import quantize_rtn
from alphaquant.quant.kernel_order import order_matrix
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import QUANTIZED, draw_weights

Linear = Callable[[Tensor, KernelWeight], Tensor]

FORMATS: tuple[str, ...] = (
    *QUANTIZED,
    "int4-g8",  # the shortest groups there are
    "int3-g96-asym",  # groups that cross tiles of 128 columns
    "fp8-e4m3-g200",
    "int2-g384",  # a step of three tiles
)
"""Every quantized format of the formats' suite, and group sizes that are hard for tiles."""


@dataclass(frozen=True)
class Case:
    """Sizes of one product.

    Attributes:
        purpose: what the case is for.
        rows: N.
        cols: K.
        n_tokens: M.
    """

    purpose: str
    rows: int
    cols: int
    n_tokens: int


CASES: tuple[Case, ...] = (
    Case("one token, odd sizes, less than a tile", 5, 37, 1),
    Case("tail groups, more rows than a block", 130, 171, 3),
    Case("whole tiles, a full block of tokens", 128, 256, 16),
    Case("more tokens than the smallest block, one row", 1, 130, 17),
    Case("two blocks of tokens, a tail of 11 columns", 3, 523, 65),
    Case("columns worth splitting", 2, 1153, 2),
    Case("one column", 3, 1, 2),
)
"""Odd sizes, one token, tails, and every size of block."""


@lru_cache(maxsize=64)
def pack_drawn(name: str, rows: int, cols: int) -> PackedMatrix:
    """Drawn weights, rounded to a format; the same for the same arguments."""
    weight = draw_weights(rows, cols, seed=rows + cols)
    return quantize_rtn(weight[None], parse_format(name), "minmax").pack(0, slice(None))


def check_order(name: str, case: Case) -> None:
    """The reference reads from kernel order the very weights that are stored."""
    matrix = pack_drawn(name, case.rows, case.cols)
    found = reference.dequantize(order_matrix(matrix))
    assert torch.equal(found.view(torch.int32), matrix.dequantize().view(torch.int32)), (
        name,
        case,
    )


def check_product(
    linear: Linear, name: str, case: Case, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """The product is the reference's up to rounding, in the dtype of x, twice the same."""
    weight = _drawn(name, case.rows, case.cols, device)
    generator = torch.Generator().manual_seed(case.n_tokens)
    x = torch.randn(case.n_tokens, case.cols, generator=generator).to(dtype).to(device)
    found = linear(x, weight)
    assert found.dtype == dtype and found.shape == (case.n_tokens, case.rows), (name, case)
    expected = reference.linear(x, weight)
    error = (found.to(torch.float32) - expected).abs()
    worst = float((error / _allowed_error(x, weight, expected)).max())
    assert worst <= 1.0, f"{name}, {dtype}, {case}: {worst:.3g} times the allowed error"
    assert torch.equal(linear(x, weight), found), f"{name}, {dtype}, {case}: differs when repeated"


def check_columns(
    linear: Linear, name: str, cols: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Every column is where it belongs: unit vectors return it, up to rounding of one weight."""
    weight = _drawn(name, 130, cols, device)
    found = linear(torch.eye(cols, dtype=dtype, device=device), weight).to(torch.float32)
    expected = reference.dequantize(weight).T
    unit = torch.finfo(dtype)
    # A scale, its product with a code, and the result may each be rounded: 3 half units.
    allowed = 1.5 * unit.eps * expected.abs() + unit.smallest_normal * unit.eps
    wrong = ((found - expected).abs() > allowed).any(1).nonzero().flatten().tolist()
    assert not wrong, f"{name}, {dtype}: columns {wrong[:8]} are not those of the matrix"


def check_zeros(linear: Linear, name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Tokens of zeros give zeros, without touching the tokens beside them; no tokens give none."""
    weight = _drawn(name, 5, 171, device)
    x = torch.ones(3, 171, dtype=dtype, device=device)
    x[1] = 0.0
    found = linear(x, weight)
    assert bool((found[1] == 0).all()), (name, dtype)
    assert torch.equal(found[0], found[2]), (name, dtype)
    alone = linear(x[:1], weight)
    assert torch.equal(alone[0], found[0]), (name, dtype)
    assert linear(x[:0], weight).shape == (0, 5), (name, dtype)


def check_refusals(linear: Linear, device: str = "cpu") -> None:
    """Activations of another width, rank or kind of number are errors with the sizes in them."""
    weight = _drawn("int4-g128", 5, 171, device)
    good = torch.ones(2, 171, dtype=torch.float16, device=device)
    linear(good, weight)
    for bad in (good[:, :170], good[0], good.to(torch.int32), good.double()):
        try:
            linear(bad, weight)
        except FormatError as error:
            assert "171" in str(error), str(error)
        else:
            raise AssertionError(f"{bad.dtype} {list(bad.shape)} was not refused")


def _drawn(name: str, rows: int, cols: int, device: str) -> KernelWeight:
    return order_matrix(pack_drawn(name, rows, cols)).to(device)


def _allowed_error(x: Tensor, weight: KernelWeight, expected: Tensor) -> Tensor:
    """A bound on the rounding errors of a sum of K products, [M, N].

    With S = |x| |W|^T and u half a unit of x's dtype: K float32 roundings in either order of
    adding, 2 K 2^-24 S; a scale and a weight rounded to the dtype, 2 u S, or to a subnormal of
    it; the result rounded, u |y|. Terms of second order fit into the factor 2 of the first.
    """
    info = torch.finfo(x.dtype)
    magnitudes = x.to(torch.float32).abs()
    total = magnitudes @ reference.dequantize(weight).abs().T
    lost = info.smallest_normal * info.eps * (1.0 + magnitudes.sum(-1, keepdim=True))
    unit = info.eps / 2
    sums = 2 * weight.cols * 2.0**-24 * total
    return sums + 2 * unit * total + unit * expected.abs() + lost
