"""Blocks of columns, products in bfloat16, and rows whose errors leave float32."""

import pytest
import torch
from torch import Tensor

from alphaquant.quant import factor as factors
from alphaquant.quant.columns.state import Rounding, better_rows, join_rows
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.rounding import hessian_error
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights


@pytest.mark.parametrize(
    ("plan", "blocks"),
    [
        (ColumnPlan(200, 96), ((0, 96), (96, 192), (192, 200))),
        (ColumnPlan(200, 150), ((0, 128), (128, 150), (150, 200))),
        (ColumnPlan(70, 32, 40), ((0, 32), (32, 64), (64, 70))),
        (ColumnPlan(3, 3), ((0, 3),)),
    ],
)
def test_blocks_hold_whole_groups_or_lie_inside_one(
    plan: ColumnPlan, blocks: tuple[tuple[int, int], ...]
) -> None:
    assert plan.blocks == blocks
    begun = [group for start, _ in plan.blocks if (group := plan.group_at(start))]
    assert all(stop - start == min(plan.group_size, plan.n_cols - start) for start, stop in begun)


def hessian_of(n_cols: int, n_tokens: int, *, is_hard: bool) -> Tensor:
    """Correlated inputs; hard ones share a direction and have a channel forty times the others."""
    generator = torch.Generator().manual_seed(6)
    mix = torch.randn(n_cols, n_cols, generator=generator) / n_cols**0.5
    inputs = torch.randn(n_tokens, n_cols, generator=generator) @ mix
    if is_hard:
        inputs[:, 5] *= 40
        common = torch.randn(1, n_cols, generator=generator)
        inputs += 3 * torch.randn(n_tokens, 1, generator=generator) * common
    return inputs.T @ inputs


def rounded(weight: Tensor, hessian: Tensor, name: str, n_sweeps: int = 3) -> Rounding:
    plan = ColumnPlan(weight.shape[1], parse_format(name).columns_per_scale(weight.shape[1]))
    rounder = Rounder(rule_of(parse_format(name), "hessian"), plan, torch.empty(0))
    damped = factorize(hessian, 0.01, (False,))
    inverses = damped.factors[0].diagonal_inverses(plan.blocks)
    start = rounder.gptq(weight.T.contiguous(), damped.factors[0], inverses, static=False)
    return rounder.refine(start, damped, n_sweeps)


@pytest.mark.parametrize("is_hard", [False, True])
@pytest.mark.parametrize("name", ["int4-g128", "int2-g64-asym", "mxfp4"])
def test_products_in_bfloat16_cost_at_most_one_percent(
    name: str, is_hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = draw_weights(96, 384, seed=7), hessian_of(384, 800, is_hard=is_hard)
    exact = rounded(weight, hessian, name)
    monkeypatch.setattr(factors, "_HALF_COLUMNS", 384)
    monkeypatch.setattr(factors, "multiplies_bfloat16", lambda: True)
    half = rounded(weight, hessian, name)
    assert not torch.equal(half.centred, exact.centred)
    assert float(half.objective.sum()) <= 1.01 * float(exact.objective.sum())
    # the objective is in float32 all the same
    damped = factorize(hessian, 0.01, (False,)).matrix
    measured = hessian_error(weight, weight - half.delta.T, damped)
    assert torch.allclose(half.objective, measured, rtol=1e-3)


def test_rows_at_the_end_of_bfloat16_are_rounded_and_leave_the_others_alone() -> None:
    weight, hessian = draw_weights(70, 96, seed=8), hessian_of(96, 200, is_hard=False)
    plain = rounded(weight, hessian, "int4-g32")
    weight[3] = torch.finfo(torch.bfloat16).max
    found = rounded(weight, hessian, "int4-g32")
    others = [row for row in range(70) if row != 3]
    assert torch.equal(found.centred[:, others], plain.centred[:, others])
    assert bool(torch.isfinite(found.centred).all()) and bool(torch.isfinite(found.scales).all())


def test_rows_are_taken_from_the_better_of_two_and_parts_are_joined() -> None:
    weight, hessian = draw_weights(40, 96, seed=9), hessian_of(96, 200, is_hard=False)
    first, second = (rounded(weight, hessian, "int3-g32", n) for n in (0, 2))
    worse = Rounding(*(x.clone() for x in vars(second).values()))
    worse.objective[7] = torch.nan
    chosen = better_rows(first, worse)
    assert torch.equal(chosen.centred[:, 7], first.centred[:, 7])
    rest = [row for row in range(40) if row != 7]
    lower = torch.minimum(first.objective, second.objective)
    assert torch.equal(chosen.objective[rest], lower[rest])
    halves = [chosen.rows(slice(0, 17)), chosen.rows(slice(17, None))]
    assert torch.equal(join_rows(halves).delta, chosen.delta)
