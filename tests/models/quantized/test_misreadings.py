"""Every way to misread another tool's layout that was measured, with its error; ours is right.

Errors are squared errors relative to the squared weights, of a Gaussian 256 x 256 matrix of
standard deviation 0.05 with groups of 128. Each misreading differs from the right reading in the
one thing it is named for, so the numbers show that the encoders tell the two apart.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.models.quantized import word_forms
from alphaquant.models.quantized.byte_forms import ByteForm
from alphaquant.models.quantized.compressed import CompressedWeight, Form, GroupedCodes
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm
from alphaquant.testing.foreign.encoders import Encoded, Layout, awq, fp8, gptq, int8

WEIGHT = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.05
V1, V2 = GptqForm(4, 128, is_v1=True), GptqForm(4, 128, is_v1=False)


def read(encoded: Encoded, form: Form, weight: Tensor = WEIGHT) -> Tensor:
    return CompressedWeight(form, *weight.shape, encoded.tensors).dequantize()


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).double().square().sum() / right.double().square().sum())


def codes_of(encoded: Encoded, form: Form) -> GroupedCodes:
    found = form.codes(encoded.tensors, *WEIGHT.shape)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("layout", "right", "wrong", "number"),
    [
        (gptq(4, 128), V1, V2, 0.145),
        (gptq(4, 128, version=2), V2, V1, 0.145),
        (gptq(4, 128, symmetric=False), V1, V2, 0.121),
        (gptq(4, 128, symmetric=False, version=2), V2, V1, 0.121),
    ],
    ids=["v1 as v2", "v2 as v1", "v1 as v2, asymmetric", "v2 as v1, asymmetric"],
)
def test_gptq_versions_differ_by_one_zero_point(
    layout: Layout, right: Form, wrong: Form, number: float
) -> None:
    """Capability 80."""
    encoded = layout.encode(WEIGHT)
    assert torch.equal(read(encoded, right), encoded.weight)
    assert error(read(encoded, wrong), encoded.weight) == pytest.approx(number, rel=0.1)


def test_gptq_zero_point_of_zero_is_stored_as_fifteen_and_read_as_zero() -> None:
    """Capability 80: reading 15 + 1 = 16 is wrong by 9.3 times the weights."""
    positive = WEIGHT.abs()
    encoded = gptq(4, 128, symmetric=False).encode(positive)
    stored = word_forms.unpack_words(encoded.tensors["qzeros"], 4, 256)
    assert stored.eq(15).all()
    assert torch.equal(read(encoded, V1, positive), encoded.weight)
    sixteen = codes_of(encoded, V1)
    assert sixteen.zeros is not None
    misread = replace(sixteen, zeros=sixteen.zeros + 16).dequantize()
    assert error(misread, encoded.weight) == pytest.approx(9.3, rel=0.15)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_that_borrowed_from_their_neighbours_are_read_back(bits: int) -> None:
    """GPTQModel subtracts from whole words; read code by code its neighbours are off by one."""
    one_sided = WEIGHT.clone()
    one_sided[::3] = one_sided[::3].abs()  # zero points of 0 beside others
    encoded = gptq(bits, 128, symmetric=False, made_by="gptqmodel:5.0.0").encode(one_sided)
    form = GptqForm(bits, 128, is_v1=True, borrows=True)
    assert torch.equal(read(encoded, form, one_sided), encoded.weight)
    by_code = read(encoded, replace(form, borrows=False), one_sided)
    assert not torch.equal(by_code, encoded.weight)


def test_act_order_without_g_idx_is_wrong() -> None:
    """Capability 80."""
    encoded = gptq(4, 128, act_order=True).encode(WEIGHT)
    form = replace(V1, act_order=True)
    assert torch.equal(read(encoded, form), encoded.weight)
    ignored = replace(codes_of(encoded, form), group_of=torch.arange(256) // 128).dequantize()
    assert error(ignored, encoded.weight) == pytest.approx(0.018, rel=0.5)


@pytest.mark.parametrize(
    "order", [tuple(range(8)), (0, 4, 1, 5, 2, 6, 3, 7)], ids=["natural", "inverse"]
)
def test_awq_in_another_order_is_wrong(
    monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """Capability 81."""
    encoded = awq(128).encode(WEIGHT)
    assert torch.equal(read(encoded, AwqForm(128)), encoded.weight)
    monkeypatch.setattr(word_forms, "ORDER", order)
    assert error(read(encoded, AwqForm(128)), encoded.weight) == pytest.approx(1.53, rel=0.1)


def test_awq_zero_points_are_not_less_one() -> None:
    """Capability 81."""
    encoded = awq(128).encode(WEIGHT)
    right = codes_of(encoded, AwqForm(128))
    assert right.zeros is not None
    plus_one = replace(right, zeros=right.zeros + 1).dequantize()
    assert error(plus_one, encoded.weight) == pytest.approx(0.121, rel=0.1)


BLOCKS = ByteForm("e4m3", (128, 128))


def _divided(codes: GroupedCodes) -> GroupedCodes:
    return replace(codes, scales=1 / codes.scales)


def _unscaled(codes: GroupedCodes) -> GroupedCodes:
    return replace(codes, scales=torch.ones_like(codes.scales))


@pytest.mark.parametrize(
    ("misread", "number"), [(_divided, 1.8e13), (_unscaled, 4e6)], ids=["divided", "no scale"]
)
def test_fp8_scales_multiply(
    misread: Callable[[GroupedCodes], GroupedCodes], number: float
) -> None:
    """Capability 82."""
    encoded = fp8().encode(WEIGHT)
    assert torch.equal(read(encoded, BLOCKS), encoded.weight)
    wrong = misread(codes_of(encoded, BLOCKS)).dequantize()
    assert error(wrong, encoded.weight) == pytest.approx(number, rel=0.5)


def test_transposed_block_scales_are_barely_visible_and_not_what_is_read() -> None:
    """Capability 82: 6e-3 instead of 7e-4, against the weights before rounding."""
    encoded = fp8().encode(WEIGHT)
    assert error(read(encoded, BLOCKS), WEIGHT) == pytest.approx(7e-4, rel=0.1)
    turned = dict(encoded.tensors, weight_scale_inv=encoded.tensors["weight_scale_inv"].t())
    assert torch.equal(read(encoded, BLOCKS), encoded.weight)
    wrong = read(Encoded(turned, encoded.weight), BLOCKS)
    assert 2e-3 < error(wrong, WEIGHT) < 2e-2


@pytest.mark.parametrize("layout", [fp8(), int8()], ids=["fp8", "int8"])
def test_a_short_block_at_either_edge_has_its_own_scale(layout: Layout) -> None:
    """Capabilities 82 and 83: 200 x 150 weights are 2 x 2 blocks."""
    weight = WEIGHT[:200, :150].contiguous()
    encoded = layout.encode(weight)
    assert encoded.tensors["weight_scale_inv"].shape == (2, 2)
    form = ByteForm("e4m3" if "fp8" in layout.config["quant_method"] else "int", (128, 128))
    assert torch.equal(read(encoded, form, weight), encoded.weight)


def test_int8_blocks_are_exact() -> None:
    """Capability 83."""
    encoded = int8().encode(WEIGHT)
    assert torch.equal(read(encoded, ByteForm("int", (128, 128))), encoded.weight)


def test_torch_copies_fp8_into_int8_without_a_word() -> None:
    """Why dtypes are compared before anything is copied: this is what a quiet copy does."""
    encoded = fp8().encode(WEIGHT)
    codes: Any = encoded.tensors["weight"]
    quiet = torch.empty(256, 256, dtype=torch.int8)
    quiet.copy_(codes)
    scales = (
        encoded.tensors["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    )
    assert error(quiet.float() * scales, encoded.weight) == pytest.approx(1.28, rel=0.05)
