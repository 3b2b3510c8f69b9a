"""Hessians are drawn toward their diagonals where that rounds better for other tokens."""

import torch
from torch import Tensor

from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.hessian import HessianBatch, accumulate
from alphaquant.quant.place import place_of
from alphaquant.quant.shrinkage import STRENGTHS, Shrinkage, choose_shrinkage, shrink
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Matrix

N, K = 64, 192
CPU = place_of(torch.device("cpu"))


def batch_of(n_tokens: int, noise: float) -> tuple[HessianBatch, Tensor, Tensor]:
    """A Hessian of correlated inputs, the weights, and the Hessian of many other tokens."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) / K**0.5

    def draw(n: int) -> Tensor:
        own = torch.randn(n, K, generator=generator)
        return noise * own + (1 - noise) * own @ mix

    def summed(inputs: Tensor) -> Tensor:
        total = torch.zeros(K, K)
        accumulate(total, inputs)
        return total

    inputs = draw(n_tokens)
    held = inputs[n_tokens - n_tokens // 4 :]
    matrix = Matrix("m", N, K, "attention", 0)
    batch = HessianBatch(
        ((matrix,),), summed(inputs)[None], (n_tokens,), ("plain",), held={0: summed(held)}
    )
    return batch, torch.randn(N, K, generator=generator), summed(draw(20_000))


def test_shrinking_keeps_the_diagonal_and_scales_the_rest() -> None:
    hessian = torch.tensor([[4.0, 2.0], [2.0, 8.0]])
    assert torch.allclose(shrink(hessian, 0.25), torch.tensor([[4.0, 1.5], [1.5, 8.0]]))
    assert shrink(hessian, 0.0) is hessian


def test_the_amount_falls_with_the_tokens() -> None:
    found = Shrinkage(2.0)
    assert abs(found.amount(2.7) - 0.426) < 1e-3 and abs(found.amount(85.0) - 0.023) < 1e-3
    assert Shrinkage().amount(0.1) == 0.0


def test_few_tokens_are_shrunk_and_other_tokens_gain() -> None:
    batch, weight, other = batch_of(2 * K, noise=0.5)
    found = choose_shrinkage(batch, lambda index: weight, 0.01, CPU)
    assert found.strength in STRENGTHS[1:]
    assert found.heldout_gain is not None and found.heldout_gain < 0.95
    errors = []
    for hessian in (batch.hessian[0], shrink(batch.hessian[0], found.amount(2.0))):
        errors.append(rounding_error(weight, hessian, other))
    assert errors[1] < 0.97 * errors[0]


def test_many_tokens_are_left_alone() -> None:
    batch, weight, _ = batch_of(130 * K, noise=0.5)
    assert choose_shrinkage(batch, lambda index: weight, 0.01, CPU) == Shrinkage(0.0, None)


def test_without_held_back_tokens_nothing_is_tried() -> None:
    batch, weight, _ = batch_of(2 * K, noise=0.5)
    alone = HessianBatch(batch.stacks, batch.hessian, batch.n_tokens, batch.source)
    assert choose_shrinkage(alone, lambda index: weight, 0.01, CPU) == Shrinkage(0.0, None)


def rounding_error(weight: Tensor, hessian: Tensor, other: Tensor) -> float:
    """Error on other tokens of int3-g64 by GPTQ and one sweep with a Hessian."""
    plan = ColumnPlan(K, 64)
    rounder = Rounder(rule_of(parse_format("int3-g64"), "hessian"), plan, torch.empty(0))
    damped = factorize(hessian, 0.01, (False,))
    factor = damped.factors[0]
    transposed = weight.T.contiguous()
    start = rounder.gptq(transposed, factor, factor.diagonal_inverses(plan.blocks), static=False)
    D = rounder.refine(start, damped, 1).delta
    return float(((other @ D) * D).sum())
