"""Integers, and floats under float16 scales, against the arithmetic of compressed-tensors.

Scales and zero points are ours: its symmetric rule divides amax by 2^(b-1) - 1/2, where ours lets
the largest magnitude have the code -2^(b-1), with a scale that may be negative; its asymmetric
zero points come from scales before they are rounded to float16. Given scales, codes and weights
must be the same: nearest with ties to even, the same ends, one zero point subtracted. Its
asymmetric codes run from -2^(b-1), so codes and zero points are 2^(b-1) less than ours.
"""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from torch import Tensor

from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.codecs import make_grid, rebuild, snap
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.activations import fake_quantize as round_activations
from alphaquant.spaces.formats import PER_ROW, Format, make_format, parse_format
from alphaquant.testing.formats import SEARCHES, draw_weights

BITS = (2, 3, 4, 5, 6, 8)
INTEGERS = tuple(f"int{b}-{g}{a}" for b in BITS for g in ("g32", "row") for a in ("", "-asym"))
FLOATS = ("fp4-e2m1-g32", "fp4-e2m1-row", "fp6-e2m3-g32", "fp8-e4m3-g32", "fp8-e4m3-row")
ROWS, COLS = 24, 192


def their_args(fmt: Format) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=fmt.bits,
        type="int" if fmt.family == "int" else "float",
        symmetric=fmt.symmetric,
        strategy="channel" if fmt.group_size == PER_ROW else "group",
        group_size=None if fmt.group_size == PER_ROW else fmt.group_size,
    )


def their_zeros(fmt: Format, zeros: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if zeros is None else zeros - 2.0 ** (fmt.bits - 1)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_given_the_scales_codes_and_weights_are_those_of_compressed_tensors(
    name: str, search: str
) -> None:
    fmt = parse_format(name)
    weight = draw_weights(ROWS, COLS, seed=8)
    weight[2] = 0.0
    weight[3, 64:96] = -0.0
    rounded = quantize_rtn(weight[None], fmt, search)
    packed = rounded.pack(0, slice(None))
    scales = packed.tensors["scales"].to(torch.float32)
    zeros = their_zeros(fmt, None if rounded.zeros is None else rounded.zeros[0], scales)
    theirs = quantize(weight, scales, zeros, their_args(fmt))
    # With a zero point the two add different numbers to the quotient, and float32 could round a
    # quotient within 2^-20 of a tie to different sides; none of these is.
    codes = unpack_codes(packed.tensors["codes"], fmt.bits, COLS)
    values = make_grid(fmt).to_values(codes)
    assert torch.equal(values if fmt.symmetric else values - 2.0 ** (fmt.bits - 1), theirs)
    made = dequantize(theirs, scales, zeros, their_args(fmt))
    assert torch.equal(packed.dequantize(), made)
    if fmt.family == "int" and fmt.symmetric:
        assert bool((scales < 0).any())


@pytest.mark.parametrize("scale", [0.25, -2.0])
@pytest.mark.parametrize("name", [f"int{b}-row{a}" for b in BITS for a in ("", "-asym")])
def test_ties_and_ends_are_those_of_compressed_tensors(name: str, scale: float) -> None:
    """Halves, exact in float32, to far outside the range."""
    fmt = parse_format(name)
    if scale < 0 and not fmt.symmetric:
        scale = -scale
    weight = (torch.arange(-1200, 1201) / 4 * scale).unsqueeze(0)
    stored = torch.tensor([[scale]])
    zero = None if fmt.symmetric else torch.tensor([[2.0 ** (fmt.bits - 1) - 1]])
    values = snap(make_grid(fmt), weight, stored, zero)
    zeros = their_zeros(fmt, zero, stored)
    theirs = quantize(weight, stored, zeros, their_args(fmt))
    assert torch.equal(values if fmt.symmetric else values - 2.0 ** (fmt.bits - 1), theirs)
    assert len(values.unique()) == 2**fmt.bits
    made = dequantize(theirs, stored, zeros, their_args(fmt))
    assert torch.equal(rebuild(values, stored, zero), made)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp4", "fp8"])
def test_activations_are_those_of_compressed_tensors_per_token(kind: str) -> None:
    fmt = make_format(kind, PER_ROW)
    generator = torch.Generator().manual_seed(4)
    tokens = 5 * torch.randn(2, 7, 96, generator=generator)
    scale = tokens.abs().amax(-1, keepdim=True) / make_grid(fmt).high
    args = QuantizationArgs(
        num_bits=fmt.bits,
        type="int" if fmt.family == "int" else "float",
        symmetric=True,
        strategy="token",
        dynamic=True,
    )
    theirs = fake_quantize(tokens, scale, torch.zeros_like(scale), args)
    assert torch.equal(round_activations(tokens, fmt), theirs)
