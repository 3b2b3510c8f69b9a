"""Activation ordering and static groups."""

import pytest
import torch
from torch import Tensor

from alphaquant.quant.rounding import factorize, hessian_error, quantize_gptq, quantize_rtn
from alphaquant.spaces.formats import parse_format

FORMATS = ["int3-g64-asym", "int4-g128", "int4-g32", "fp4-e2m1-g128", "mxfp4", "nvfp4"]


def layers(n_layers: int, n_cols: int = 136) -> tuple[Tensor, Tensor]:
    """Layers whose inputs are correlated and of very different size."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(n_layers, 24, n_cols, generator=generator)
    sizes = torch.exp(torch.randn(n_layers, 1, n_cols, generator=generator))
    mix = torch.eye(n_cols) + 0.15 * torch.randn(n_cols, n_cols, generator=generator)
    inputs = (torch.randn(n_layers, 400, n_cols, generator=generator) @ mix) * sizes
    return weight, inputs.mT @ inputs


@pytest.mark.parametrize("name", FORMATS)
def test_static_groups_have_the_scales_of_rtn(name: str) -> None:
    weight, hessian = layers(2)
    fmt = parse_format(name)
    gptq = quantize_gptq(weight, factorize(hessian, 0.01), fmt, "mse", static_groups=True)
    ordered = quantize_gptq(weight, factorize(hessian, 0.01, actorder=True), fmt, "mse")
    rtn = quantize_rtn(weight, fmt, "mse")
    assert torch.equal(gptq.scales, rtn.scales)
    assert torch.equal(ordered.scales, rtn.scales)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantization_needs_no_knowledge_of_the_order(name: str) -> None:
    weight, hessian = layers(2)
    factor = factorize(hessian, 0.01, actorder=True)
    assert factor.order is not None
    assert not torch.equal(factor.order[0], torch.arange(weight.shape[-1]))
    rounded = quantize_gptq(weight, factor, parse_format(name), "mse")
    packed = rounded.pack(0, slice(0, weight.shape[1]))
    assert torch.equal(packed.dequantize(), rounded.weights()[0])


@pytest.mark.parametrize("name", FORMATS)
def test_ordering_costs_at_most_five_percent_on_twenty_layers(name: str) -> None:
    weight, hessian = layers(20)
    fmt = parse_format(name)
    plain = quantize_gptq(weight, factorize(hessian, 0.01), fmt, "mse", static_groups=True)
    ordered = quantize_gptq(weight, factorize(hessian, 0.01, actorder=True), fmt, "mse")
    errors = [hessian_error(weight, r.weights(), hessian).sum(-1) for r in (plain, ordered)]
    assert float((errors[1] / errors[0]).mean()) <= 1.05


def test_columns_come_by_descending_diagonal_and_equal_ones_in_place() -> None:
    hessian = torch.diag(torch.tensor([1.0, 4.0, 2.0, 4.0])).unsqueeze(0)
    factor = factorize(hessian, 0.01, actorder=True)
    assert factor.order is not None
    assert factor.order.tolist() == [[1, 3, 2, 0]]
