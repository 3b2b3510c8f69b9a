"""Experts in mixed precision from plain weights: values, independence, ranks, refusals."""

import importlib
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ConfigError, FormatError, ModelError
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.ep_moe import MixedPrecisionEPMoE
from alphaquant.runtime.kernel_modules import KernelExperts
from alphaquant.runtime.kernel_use import kernel_uses
from alphaquant.spaces.formats import parse_format

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, WIDTH = 40, 24
PRECISIONS = ("bf16", "fp8", "int8-row", "int4-g32", "mxfp4")
PAIRS = [(w13, w2) for w13 in PRECISIONS for w2 in PRECISIONS]
CONFIGS = dict(enumerate(PAIRS))


@pytest.fixture(scope="module")
def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(len(PAIRS), 2 * WIDTH, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(len(PAIRS), HIDDEN, WIDTH, generator=generator) / WIDTH**0.5
    return w13.bfloat16(), w2.bfloat16()


@pytest.fixture(scope="module")
def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens whose first choices are all experts in turn."""
    generator = torch.Generator().manual_seed(1)
    first = torch.arange(len(PAIRS))
    ids = torch.stack([first, (first + 7) % len(PAIRS)], 1)
    x = torch.randn(len(ids), HIDDEN, generator=generator)
    return x, ids, torch.rand(ids.shape, generator=generator)


def rounded(weight: Tensor, name: str) -> Tensor:
    fmt = parse_format(name)
    if not fmt.is_quantized:
        return weight.float()
    return quantize_rtn(weight.float()[None], fmt, "mse").weights()[0]


def expected(
    weights: tuple[Tensor, Tensor], routed: tuple[Tensor, Tensor, Tensor], owned: range
) -> Tensor:
    """(silu(x G^T) * x U^T) D^T from dequantized weights, token by token, float32."""
    (w13, w2), (x, ids, factors) = weights, routed
    out = torch.zeros_like(x)
    for token, chosen in enumerate(ids.tolist()):
        for j, e in enumerate(chosen):
            if e in owned:
                gate, up = (rounded(half, CONFIGS[e][0]) for half in w13[e].chunk(2))
                down = rounded(w2[e], CONFIGS[e][1])
                gated = nn.functional.silu(gate @ x[token]) * (up @ x[token])
                out[token] += factors[token, j] * (down @ gated)
    return out


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_every_pair_of_precisions_gives_what_its_dequantized_weights_give(
    dtype: torch.dtype, allowed: float, weights: Any, routed: Any
) -> None:
    experts = MixedPrecisionEPMoE(*weights, CONFIGS, kernels=False)
    x, ids, factors = routed
    found = experts(x.to(dtype), ids, factors.to(dtype))
    assert found.dtype == dtype
    want = expected(weights, (x.to(dtype).float(), ids, factors.to(dtype).float()), range(25))
    error = (found.float() - want).norm(dim=1) / want.norm(dim=1)
    assert float(error.max()) < allowed


def test_another_precision_of_w2_changes_only_tokens_of_that_expert(
    weights: Any, routed: Any
) -> None:
    x, ids, factors = routed
    one = MixedPrecisionEPMoE(*weights, CONFIGS, kernels=False)(x, ids, factors)
    other = {**CONFIGS, 3: (CONFIGS[3][0], "int2-g8")}
    changed = MixedPrecisionEPMoE(*weights, other, kernels=False)(x, ids, factors)
    assert torch.equal((one != changed).any(1), (ids == 3).any(1))


def test_experts_that_are_not_named_stay_in_bf16(weights: Any, routed: Any) -> None:
    some = MixedPrecisionEPMoE(*weights, {4: ("int4-g32", "int8-row")}, kernels=False)
    names = [tuple(part.format.name for part in some.experts.expert(e).children()) for e in (3, 4)]
    assert names == [("bf16",) * 3, ("int4-g32", "int4-g32", "int8-row")]


def test_ranks_that_include_their_last_expert_sum_to_the_whole(weights: Any, routed: Any) -> None:
    whole = MixedPrecisionEPMoE(*weights, CONFIGS, kernels=False)(*routed)
    sizes: list[int] = []

    def reduce(partial: Tensor) -> Tensor:
        sizes.append(len(partial))
        return partial

    parts = [
        MixedPrecisionEPMoE(*weights, CONFIGS, owned=owned, reduce=reduce, kernels=False)
        for owned in ((0, 7), (8, 8), (9, 24))
    ]
    summed = torch.stack([part(*routed) for part in parts]).sum(0)
    assert torch.allclose(summed, whole, rtol=0, atol=1e-5)
    assert [len(part.experts.owned) for part in parts] == [8, 1, 16] and sizes == [25] * 3
    alone = parts[1](*routed)
    assert torch.equal(alone.any(1), (routed[1] == 8).any(1))


def test_kernels_give_the_same_sums(weights: Any, routed: Any) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    interpreted = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        importlib.import_module("alphaquant.kernels.ops_triton")
        placed = [weight.to(DEVICE) for weight in weights]
        experts = MixedPrecisionEPMoE(*placed, CONFIGS, owned=(5, 20), kernels=True)
        found = experts(*(part.to(DEVICE) for part in routed)).cpu()
    assert [use.is_kernel for use in kernel_uses(experts)] == [True]
    assert isinstance(experts.experts, KernelExperts)
    want = expected(weights, routed, range(5, 21))
    assert torch.allclose(found, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_weights_given_are_neither_changed_nor_kept(weights: Any) -> None:
    w13, w2 = (weight.clone() for weight in weights)
    experts = MixedPrecisionEPMoE(w13, w2, CONFIGS, kernels=False)
    assert torch.equal(w13, weights[0]) and torch.equal(w2, weights[1])
    assert w13.device.type == "cpu"
    held = {t.untyped_storage().data_ptr() for t in experts.buffers()}
    assert w13.untyped_storage().data_ptr() not in held
    assert all(p.is_meta for p in experts.experts.site.module.parameters())


def test_what_does_not_fit_is_refused(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w13, w2 = weights
    with pytest.raises(ConfigError, match=r"names experts \[25, 99\].* 25 experts, 0 to 24"):
        MixedPrecisionEPMoE(w13, w2, {99: PAIRS[0], 25: PAIRS[0]})
    with pytest.raises(ConfigError, match=r"must be \[E, 2 I, H\] and \[E, H, I\]"):
        MixedPrecisionEPMoE(w13, w2.transpose(1, 2), {})
    for owned in ((0, 25), (-1, 3), (4, 3)):
        with pytest.raises(ConfigError, match="name the first and the last one"):
            MixedPrecisionEPMoE(w13, w2, {}, owned=owned)
    with pytest.raises(FormatError, match="int4-gx"):
        MixedPrecisionEPMoE(w13, w2, {0: ("int4-gx", "bf16")})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match="kernels were asked for"):
        MixedPrecisionEPMoE(w13, w2, {}, kernels=True)
