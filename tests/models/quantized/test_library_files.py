"""Tensors that another tool's own library packed, read back number by number.

AutoRound is in the extra `peers`, whose versions do not fit beside the tests' own: install it
without its dependencies (`pip install --no-deps auto-round==0.16.1 py-cpuinfo`) to run these.
"""

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.models.quantized.compressed import CompressedWeight
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm

pytestmark = pytest.mark.slow
ROWS, COLS, GROUP = 96, 128, 32
WEIGHT = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """AutoRound copies tensors in a way that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("auto_round", reason="auto-round is not installed (extra peers)")
        return importlib.import_module(name)


def linear() -> nn.Linear:
    made = nn.Linear(COLS, ROWS, bias=False)
    made.weight.data = WEIGHT.clone()
    return made


def grid(bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, [N, G].

    No zero point is 0: AutoRound stores the lowest as that of 1 in version 1.
    """
    grouped = WEIGHT.reshape(ROWS, -1, GROUP)
    high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    top = 2**bits - 1
    width = 2 * grouped.abs().amax(-1) if symmetric else high - low
    scales = (width / top).half().float()
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round()
    return scales, zeros.clamp(1, top)


def expected(bits: int, scales: Tensor, zeros: Tensor) -> Tensor:
    grouped = WEIGHT.reshape(ROWS, -1, GROUP)
    scale, zero = scales.unsqueeze(-1), zeros.unsqueeze(-1)
    codes = (grouped / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(WEIGHT.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_that_autoround_packed_is_read(bits: int, version: int, symmetric: bool) -> None:
    """Capability 80."""
    name = "qlinear_torch_zp" if version == 1 else "qlinear_torch"
    packed = library(f"auto_round_extension.torch.{name}").QuantLinear(
        bits, GROUP, COLS, ROWS, False
    )
    packed.device = "cpu"  # which its packing asks for
    scales, zeros = grid(bits, symmetric)
    packed.pack(linear(), scales, zeros, None, "cpu")
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    form = GptqForm(bits, GROUP, is_v1=version == 1)
    found = CompressedWeight(form, ROWS, COLS, tensors).dequantize()
    assert torch.equal(found, expected(bits, scales, zeros))


def test_awq_that_autoround_packed_is_read() -> None:
    """Capability 81."""
    scales, zeros = grid(4, symmetric=False)
    packed = library("auto_round.export.export_to_awq.utils").WQLinear_GEMM.from_linear(
        linear(), 4, GROUP, scales=scales.t(), zeros=zeros.t(), device="cpu"
    )
    tensors = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    found = CompressedWeight(AwqForm(GROUP), ROWS, COLS, tensors).dequantize()
    assert torch.equal(found, expected(4, scales, zeros))
