"""Folded tiles and unquantized ones: the numbers that the kernels make of them.

Without a GPU the kernels run in Triton's interpreter, where they unpack without PTX; with one, the
same tests run on it. Tiles of all formats are tested through `packed_linear`.
"""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from alphaquant.kernels import reference
from alphaquant.kernels.order import KernelWeight
from alphaquant.quant.matrix import pack_bf16
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import CASES, Case, check_product, check_scale_limits, pack_drawn
from tests.interpreted import DEVICE, import_kernels

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Every kind of scale, every element, the powers of two of float16 from 2^0 to 2^14.
FOLDED = ("mxfp4", "mxfp6", "mxfp8", "nvfp4", "fp4-e2m1-g64", "fp6-e2m3-g32", "fp8-e5m2-g64")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_kernels("linear.product_triton")


def drawn(name: str, rows: int, cols: int) -> KernelWeight:
    return order_matrix(pack_drawn(name, rows, cols)).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_no_bit_of_a_product(
    kernels: ModuleType, name: str, dtype: torch.dtype
) -> None:
    weight = drawn(name, 5, 171)
    x = torch.randn(3, 171, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    assert weight.is_foldable
    found = kernels.packed_linear(x, weight)
    assert torch.equal(found, kernels.packed_linear(x, replace(weight, is_foldable=False)))


@pytest.mark.parametrize(
    ("name", "dtype", "power", "global_power"),
    [
        ("mxfp4", torch.bfloat16, 126, 0),
        ("mxfp4", torch.float32, 126, 0),  # the exponents of bfloat16
        ("mxfp4", torch.float16, 14, 0),
        ("nvfp4", torch.bfloat16, 119, 7),  # 448 * 2^119 is finite, 448 * 2^120 is not
        ("nvfp4", torch.float16, 7, 7),  # 448 * 2^7 is finite, 448 * 2^8 is not
        ("fp8-e5m2-g64", torch.float16, 0, 0),  # float16 has the exponents of e5m2
        ("fp4-e2m1-g128", torch.bfloat16, 0, 0),  # its scales multiply sums
        ("int4-g64", torch.bfloat16, 0, 0),
    ],
)
def test_scales_take_over_what_the_tiles_lack(
    kernels: ModuleType, name: str, dtype: torch.dtype, power: int, global_power: int
) -> None:
    decoding = kernels.decoding_of(drawn(name, 5, 171), dtype, use_asm=False)
    kind = decoding.scale_kind
    assert (kind.power, kind.global_power) == (power, global_power)
    assert decoding.unpacking.is_folded == (power > 0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("mxfp4", "nvfp4", "fp4-e2m1-g64") for dtype in DTYPES),
        ("mxfp6", torch.float16),
        ("mxfp8", torch.float32),  # twice its largest weight does not fit float16
    ],
)
def test_scales_at_the_limits_of_folding_give_right_products(
    kernels: ModuleType, name: str, dtype: torch.dtype
) -> None:
    check_scale_limits(kernels.packed_linear, name, dtype, DEVICE)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp4-e2m1-g64"])
def test_scales_at_the_limits_of_folding_give_dequantized_weights(
    kernels: ModuleType, name: str
) -> None:
    def dense(x: torch.Tensor, weight: KernelWeight) -> torch.Tensor:
        found = kernels.dequantize_packed(weight, x.dtype)
        assert torch.equal(found, reference.dequantize(weight).to(x.dtype))
        return torch.nn.functional.linear(x, found)

    for dtype in DTYPES:
        check_scale_limits(dense, name, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_unquantized_matrix_is_multiplied_as_it_is(
    kernels: ModuleType, dtype: torch.dtype
) -> None:
    case = Case("three tiles, a tail, more rows than a block", 130, 300, 3)
    check_product(kernels.packed_linear, "bf16", case, dtype, DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.purpose)
def test_an_unquantized_matrix_has_any_size(kernels: ModuleType, case: Case) -> None:
    check_product(kernels.packed_linear, "bf16", case, torch.float32, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unquantized_numbers_of_every_size_are_rounded_once(
    kernels: ModuleType, dtype: torch.dtype
) -> None:
    """All that do not overflow, among them zeros of both signs and subnormals of every type."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16).reshape(256, 256)
    numbers = torch.where(numbers.float().abs() <= torch.finfo(dtype).max, numbers, 1.0)
    weight = order_matrix(pack_bf16(numbers)).to(DEVICE)
    found = kernels.dequantize_packed(weight, dtype)
    assert torch.equal(found.cpu(), numbers.to(dtype))
