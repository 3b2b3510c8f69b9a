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
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.bodies import FLOATS, is_foldable
from alphaquant.kernels.grids import to_e8m0
from alphaquant.kernels.order import KernelWeight
from alphaquant.quant.matrix import PackedMatrix, pack_bf16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import QUANTIZED, draw_weights

Linear = Callable[[Tensor, KernelWeight], Tensor]

FORMATS: tuple[str, ...] = (
    *QUANTIZED,
    "int4-g8",  # the shortest groups there are
    "int3-g96-asym",  # groups that cross tiles of 128 columns
    "fp8-e4m3-g200",
    "int2-g384",  # a step of three tiles
    "bf16",
)
"""Every format of the formats' suite, and group sizes that are hard for tiles."""


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


@dataclass(frozen=True)
class Limit:
    """A scale at a border of what may be folded; see `alphaquant.kernels.bodies`.

    Attributes:
        scale: as stored, over 2^bias of the element.
        folds: whether it may be folded.
        factor: the global scale, if there is one.
    """

    scale: float
    folds: bool
    factor: float = 1.0


_LIMITS: dict[torch.dtype, tuple[Limit, ...]] = {
    torch.uint8: (Limit(1.0, True), Limit(2.0, False), Limit(2.0**-134, True)),
    torch.float16: (Limit(1.0, True), Limit(1.0 + 2.0**-10, False), Limit(2.0**-25, True)),
    torch.float8_e4m3fn: (
        *(Limit(1.0, True), Limit(1.0, False, 1.0 + 2.0**-23), Limit(1.125, False)),
        *(Limit(224.0, True, 2.0**-8), Limit(2.0**-10, True, 2.0**-60)),
    ),
}
"""For each type of scales the largest that folds, the next ones, and the smallest there is."""


@lru_cache(maxsize=64)
def pack_drawn(name: str, rows: int, cols: int) -> PackedMatrix:
    """Drawn weights, rounded to a format; the same for the same arguments."""
    weight = draw_weights(rows, cols, seed=rows + cols)
    if name == "bf16":
        return pack_bf16(weight)
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
    linear: Linear,
    name: str,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    repeat: bool = True,
) -> None:
    """The product is the reference's up to rounding, in the dtype of x, twice the same.

    `repeat=False` leaves out the second time, which takes as long as the first one.
    """
    weight = _drawn(name, case.rows, case.cols, device)
    x = _draw_x(case.n_tokens, case.cols).to(dtype).to(device)
    found = linear(x, weight)
    assert found.dtype == dtype and found.shape == (case.n_tokens, case.rows), (name, case)
    _check_near(found, x, weight, f"{name}, {case}")
    is_same = not repeat or torch.equal(linear(x, weight), found)
    assert is_same, f"{name}, {dtype}, {case}: differs when repeated"


def check_scale_limits(linear: Linear, name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Products are right at both ends of the scales that may be folded, and just above them.

    Args:
        linear: the implementation.
        name: a format of small floats with several scales per 128 columns.
        dtype: of x; it must hold twice the largest weight that may be folded.
        device: of both.
    """
    drawn = _drawn(name, 5, 171, device)
    bias = 2 ** (FLOATS[drawn.element][0] - 1) - 1
    # Small, so that the largest weights leave room for a sum of 171 in float16.
    x = (2.0**-8 * _draw_x(3, 171)).to(dtype).to(device)
    for limit in _LIMITS[drawn.scales.dtype]:
        wide = torch.full(drawn.scales.shape, limit.scale * 2.0**bias, device=device)
        is_power = drawn.scales.dtype == torch.uint8
        scales = to_e8m0(torch.frexp(wide).exponent - 1) if is_power else wide
        shared = drawn.global_scale
        weight = replace(
            drawn,
            scales=scales.to(drawn.scales.dtype),
            global_scale=None if shared is None else torch.full_like(shared, limit.factor),
        )
        folds = is_foldable(weight.element, weight.scales, weight.global_scale)
        assert folds == limit.folds, (name, limit)
        for folded in {folds, False}:  # not to fold is always right
            found = linear(x, replace(weight, is_foldable=folded))
            _check_near(found, x, weight, f"{name}, {limit}, {folded}")


def _check_near(found: Tensor, x: Tensor, weight: KernelWeight, label: str) -> None:
    expected = reference.linear(x, weight)
    error = (found.to(torch.float32) - expected).abs()
    worst = float((error / _allowed_error(x, weight, expected)).max())
    assert worst <= 1.0, f"{label}, {x.dtype}: {worst:.3g} times the allowed error"


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


def _draw_x(n_tokens: int, cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, cols, generator=generator)


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
