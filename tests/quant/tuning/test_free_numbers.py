"""Free numbers: weights at a step, derivatives against autograd, and what is stored."""

import pytest
import torch

from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.quant.tuning.free_numbers import FreeParameter, FreeScales, free_tensor
from alphaquant.spaces.formats import parse_format

ROWS, COLS = 6, 296
FREE = (
    *("int3-g16-asym", "int4-g32", "int1-g32", "int8-row", "fp6-e2m3-g32", "nvfp4"),
    *("nl3-g16", "int3-g16-s256", "nl4-g32-s256"),
)
FIXED = ("mxfp4", "bf16", "q4_1")


def packed_in(name: str) -> PackedMatrix:
    torch.manual_seed(1)
    return quantize_rtn(torch.randn(1, ROWS, COLS), parse_format(name), "mse").pack_all()[0]


@pytest.mark.parametrize("name", FREE)
def test_the_derivative_is_autograd_s_and_weights_follow_their_scale(name: str) -> None:
    found = FreeScales.of(packed_in(name), torch.device("cpu"))
    assert found is not None
    base, target = found.base(), torch.randn(ROWS, COLS)
    steps = (0.1 * torch.randn(found.steps.shape)).requires_grad_(True)
    moved = FreeScales(found.packed, steps).weights(base)
    ((moved - target).square().sum()).backward()
    at_weights = 2 * (moved.detach() - target)
    assert torch.allclose(found.gradient(at_weights, base), steps.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FREE)
def test_stored_numbers_give_the_weights_up_to_their_rounding(name: str) -> None:
    found = FreeScales.of(packed_in(name), torch.device("cpu"))
    assert found is not None
    found.steps.uniform_(-0.1, 0.1)
    rounded = found.rounded()
    assert torch.allclose(rounded.dequantize(), found.weights(found.base()), rtol=2e-3, atol=1e-6)
    moved = {
        k
        for k, t in rounded.tensors.items()
        if not torch.equal(t.float(), found.packed.tensors[k].float())
    }
    assert moved == {free_tensor(found.packed.format)}
    assert rounded.n_bytes == found.packed.n_bytes


@pytest.mark.parametrize("name", FIXED)
def test_formats_without_free_scales_have_none(name: str) -> None:
    assert free_tensor(parse_format(name)) is None


def test_a_parameter_moves_by_its_own_size_and_is_stored_as_it_was() -> None:
    parameter = FreeParameter.of("norm", torch.tensor([3.0, 4.0, 0.0]), torch.bfloat16)
    parameter.steps.fill_(0.1)
    scale = (25 / 3) ** 0.5
    assert parameter.value().tolist() == pytest.approx(
        [3 + 0.1 * scale, 4 + 0.1 * scale, 0.1 * scale]
    )
    assert torch.equal(parameter.rounded(), parameter.value().bfloat16().float())
    assert parameter.gradient(torch.ones(3)).tolist() == pytest.approx([scale] * 3)
