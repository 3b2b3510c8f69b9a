"""The column loops in Triton against those compiled for the CPU.

Without a GPU the kernels run in Triton's interpreter; with one, `test_columns_gpu.py` runs the
same contract on it.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from alphaquant.quant.codecs import nv_global_scale
from alphaquant.quant.columns.column_loops import ColumnLoops, NumbaLoops
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import DampedHessian, factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.scale_search import ScaleSearch
from alphaquant.testing.columns import (
    CHECKS,
    FORMATS,
    Check,
    Limits,
    check_another_order,
    check_fitted_groups,
    check_sweep_rows,
)
from alphaquant.testing.formats import draw_weights
from alphaquant.testing.without_gpu.interpreter import import_interpreted, quick_interpreter

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted"
)


@pytest.fixture(scope="module")
def loops() -> Iterator[ColumnLoops]:
    module = import_interpreted("alphaquant.quant.columns.columns_triton")
    with quick_interpreter():
        yield module.TritonLoops()


FEWER = {
    check_another_order: FORMATS[::3],
    check_sweep_rows: ("int1-g8", "int2-g10-asym", "int8-row", "mxfp4", "nl4-g16-s256", "nvfp4"),
}
CASES = [
    pytest.param(name, check, id=f"{name} {check.__name__}")
    for check in CHECKS
    for name in FEWER.get(check, FORMATS)
]


@pytest.mark.parametrize(("name", "check"), CASES)
def test_loops_keep_their_contract(loops: ColumnLoops, name: str, check: Check) -> None:
    check(loops, name, "hessian", Limits())


@pytest.mark.parametrize("name", ["int4-g8", "int2-g10-asym", "fp8-e5m2-g20", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_scales_are_chosen_as_asked(loops: ColumnLoops, name: str, search: ScaleSearch) -> None:
    check_fitted_groups(loops, name, search, Limits())


def rounded(loops: ColumnLoops, name: str, weight: Tensor, damped: DampedHessian) -> list[Tensor]:
    """Codes, scales and objective of rounding to nearest, and of two starts after a sweep."""
    fmt, n_cols = parse_format(name), weight.shape[1]
    plan = ColumnPlan(n_cols, fmt.columns_per_scale(n_cols), 16)
    shared = nv_global_scale(weight).expand(len(weight), weight.shape[2]).contiguous()
    rounder = Rounder(rule_of(fmt, "hessian"), plan, shared, loops)
    found = [rounder.nearest(weight)]
    for factor in damped.factors:
        start = rounder.gptq(weight, factor, factor.diagonal_inverses(plan.blocks), static=False)
        found.append(rounder.refine(start, damped, 1))
    return [x for r in found for x in (r.centred, r.scales, r.zeros, r.objective)]


@pytest.mark.parametrize(
    ("name", "n_rows"),
    [
        pytest.param("int4-g16", 65, id="two programs of rows"),
        pytest.param("int3-g21-asym", 3, id="groups larger than a block"),
        pytest.param("nvfp4", 3, id="a scale per matrix"),
    ],
)
def test_matrices_are_rounded_as_on_the_cpu(loops: ColumnLoops, name: str, n_rows: int) -> None:
    n_cols = 17 if n_rows > 64 else 23
    weight = torch.stack([draw_weights(n_rows, n_cols, s).T for s in range(2)]).contiguous()
    inputs = torch.randn(2, 80, n_cols, generator=torch.Generator().manual_seed(1))
    damped = factorize(inputs.mT @ inputs, 0.01, (False, True))
    expected, found = (rounded(x, name, weight, damped) for x in (NumbaLoops(), loops))
    for wanted, made in zip(expected, found, strict=True):
        assert torch.allclose(wanted, made, rtol=1e-5, atol=1e-7)
