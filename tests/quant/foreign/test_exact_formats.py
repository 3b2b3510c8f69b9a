"""Other tools' weights in our formats: byte for byte where a format holds them, else refused."""

import pytest
import torch

from alphaquant.errors import FormatError
from alphaquant.models.quantized.byte_forms import ByteForm
from alphaquant.models.quantized.compressed import CompressedWeight, Form, PlainForm
from alphaquant.models.quantized.ct_forms import Fp4Form, NaiveForm, PackedIntForm
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm
from alphaquant.quant.foreign.exact_formats import exact_packed
from alphaquant.quant.matrix import check_packed
from alphaquant.testing.foreign.encoders import Layout, awq, compressed, fp8, gptq, int8

WEIGHT = torch.randn(64, 160, generator=torch.Generator().manual_seed(3)) * 0.05


def encoded(layout: Layout, form: Form, weight: torch.Tensor = WEIGHT) -> CompressedWeight:
    return CompressedWeight(form, *weight.shape, layout.encode(weight).tensors)


@pytest.mark.parametrize(
    ("layout", "form", "name"),
    [
        (gptq(4, 32), GptqForm(4, 32, is_v1=True), "int4-g32"),
        (gptq(4, 32, symmetric=False), GptqForm(4, 32, is_v1=True), "int4-g32-asym"),
        (gptq(2, 32, version=2), GptqForm(2, 32, is_v1=False), "int2-g32"),
        (gptq(3, -1), GptqForm(3, -1, is_v1=True), "int3-row"),
        (gptq(8, 32, symmetric=False), GptqForm(8, 32, is_v1=True), "int8-g32-asym"),
        (awq(32), AwqForm(32), "int4-g32-asym"),
        (fp8("row", torch.bfloat16), ByteForm("e4m3"), "fp8-e4m3-row"),
        (compressed("int4-g32"), PackedIntForm(4, 32, symmetric=True), "int4-g32"),
        (compressed("int3-g32"), PackedIntForm(3, 32, symmetric=True), "int3-g32"),
        (compressed("int4-g32-asym"), PackedIntForm(4, 32, symmetric=False), "int4-g32-asym"),
        (compressed("int8-row"), NaiveForm("int"), "int8-row"),
        (compressed("mxfp4"), Fp4Form(is_mx=True), "mxfp4"),
    ],
)
def test_a_weight_keeps_every_number(layout: Layout, form: Form, name: str) -> None:
    weight = encoded(layout, form)
    packed = exact_packed(weight)
    check_packed(packed, "m", "here")
    assert packed.format.name == name
    assert torch.equal(packed.dequantize(), weight.dequantize())
    assert torch.equal(packed.plain_weights(), weight.dequantize())
    assert 8 * packed.n_bytes == packed.format.storage_bits(*WEIGHT.shape)


def test_codes_of_symmetric_gptq_are_our_bytes_turned() -> None:
    """The worked example of the layouts: words of a column are the bytes of our row."""
    weight = encoded(gptq(4, 32), GptqForm(4, 32, is_v1=True))
    words = weight.tensors["qweight"].t().contiguous().view(torch.uint8)
    assert torch.equal(exact_packed(weight).tensors["codes"], words)


def test_plain_bfloat16_numbers_stay() -> None:
    plain = CompressedWeight(PlainForm(), 64, 160, {"weight": WEIGHT.bfloat16()})
    assert exact_packed(plain).format.name == "bf16"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (
            encoded(gptq(4, 32, act_order=True), GptqForm(4, 32, True, act_order=True)),
            "act-order",
        ),
        (encoded(fp8(), ByteForm("e4m3", (128, 128))), "holds other numbers for its scales"),
        (encoded(int8(), ByteForm("int", (128, 128))), "holds other numbers for its scales"),
        (encoded(fp8("row"), ByteForm("e4m3")), "fp8-e4m3-row holds other numbers"),
        (CompressedWeight(PlainForm(), 64, 160, {"weight": WEIGHT}), "bf16 does not hold"),
        (encoded(gptq(4, 4), GptqForm(4, 4, is_v1=True)), "groups have 8 inputs at least, not 4"),
    ],
    ids=["act-order", "fp8 blocks", "int8 blocks", "fp8 float32 scales", "float32", "groups of 4"],
)
def test_what_no_format_holds_is_refused_with_the_reason(
    weight: CompressedWeight, said: str
) -> None:
    with pytest.raises(FormatError, match=said):
        exact_packed(weight)


def test_block_scales_that_are_powers_of_two_fit() -> None:
    """Scales of DeepSeek-V3.1 are powers of two, which float16 holds."""
    weight = encoded(fp8(), ByteForm("e4m3", (128, 128)))
    powers = torch.exp2(weight.tensors["weight_scale_inv"].log2().round())
    tensors = dict(weight.tensors, weight_scale_inv=powers)
    packed = exact_packed(CompressedWeight(weight.form, 64, 160, tensors))
    assert packed.format.name == "fp8-e4m3-g128"
