"""Codecs: the rule of each family by hand, and the search around it."""

import math

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.grids import SignGrid
from alphaquant.quant.codecs import (
    Codec,
    GroupScales,
    ScaleSearch,
    check_finite,
    fit,
    make_codec,
    make_grid,
    nv_global_scale,
    rebuild,
    snap,
)
from alphaquant.spaces.formats import ELEMENTS, parse_format
from alphaquant.testing.formats import QUANTIZED, SEARCHES, draw_weights

EMAX = {"mxfp4": 2, "mxfp6": 4, "mxfp6-e2m3": 2, "mxfp8": 8, "mxfp8-e5m2": 15}


def codec_for(name: str, search: str, weight: Tensor) -> Codec:
    fmt = parse_format(name)
    shared = nv_global_scale(weight).expand(-1, weight.shape[-2]) if name == "nvfp4" else None
    return make_codec(fmt, search, shared)


def rounded(codec: Codec, group: Tensor, scales: GroupScales) -> Tensor:
    zero = None if scales.zero is None else scales.zero.unsqueeze(-1)
    scale = scales.scale.unsqueeze(-1)
    return rebuild(snap(codec.grid, group, scale, zero), scale, zero)


def squared_error(codec: Codec, group: Tensor, scales: GroupScales, weight: Tensor) -> Tensor:
    return ((rounded(codec, group, scales) - group).square() * weight.unsqueeze(-2)).sum(-1)


@pytest.mark.parametrize("name", EMAX)
@pytest.mark.parametrize(
    "amax",
    [
        1.0,
        0.999999,  # just below a power of two
        1.75,
        2.0**-100,
        3e38,  # exponent 127
        2.0**-130,  # a float32 subnormal
    ],
)
def test_mx_exponent_is_floor_log2_of_the_largest_minus_emax(name: str, amax: float) -> None:
    group = torch.zeros(1, 1, 32)
    group[0, 0, 5] = -amax
    codec = codec_for(name, "minmax", group)
    scale = float(fit(codec, group).scale)
    stated = float(torch.tensor(amax))  # as float32
    assert ELEMENTS[parse_format(name).element].emax == EMAX[name]
    assert math.log2(scale) == max(math.floor(math.log2(stated)) - EMAX[name], -127)


def test_mxfp4_saturates_between_six_and_eight_times_its_scale() -> None:
    group = torch.zeros(1, 1, 32)
    group[0, 0, 0], group[0, 0, 1] = 7.9, 5.1
    codec = codec_for("mxfp4", "minmax", group)
    assert rounded(codec, group, fit(codec, group))[0, 0, :2].tolist() == [6.0, 6.0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_symmetric_integers_use_their_full_range(bits: int, sign: float) -> None:
    name = f"int{bits}-row"
    group = sign * torch.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1)).reshape(1, 1, -1)
    codec = codec_for(name, "minmax", group)
    scales = fit(codec, group)
    values = snap(codec.grid, group, scales.scale.unsqueeze(-1), None)
    assert len(values.unique()) == 2**bits  # int2: four levels, -2 -1 0 1
    assert torch.equal(rounded(codec, group, scales), group)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_asymmetric_integers_span_low_to_high_and_hold_zero(bits: int, shift: float) -> None:
    name = f"int{bits}-row-asym"
    group = (torch.linspace(-1, 1, 33) + shift).reshape(1, 1, -1)
    codec = codec_for(name, "minmax", group)
    scales = fit(codec, group)
    assert scales.zero is not None
    low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    assert float(scales.scale) == pytest.approx((high - low) / (2**bits - 1), rel=2**-10)
    assert 0 <= float(scales.zero) <= 2**bits - 1 and float(scales.zero) % 1 == 0
    zero = torch.zeros(1, 1, 1)
    assert float(rounded(codec, zero, scales)) == 0.0


@pytest.mark.parametrize("search", SEARCHES)
def test_the_scale_of_signs_is_the_mean_magnitude(search: ScaleSearch) -> None:
    group = torch.tensor([[[1.0, -2.0, 0.5, -4.5], [-3.0, -3.0, -3.0, 0.0]]])
    codec = codec_for("int1-g32", search, group)
    scales = fit(codec, group)
    assert scales.scale.tolist() == [[2.0, 2.25]] and scales.zero is None
    expected = [[2.0, -2.0, 2.0, -2.0], [-2.25, -2.25, -2.25, 2.25]]
    assert rounded(codec, group, scales)[0].tolist() == expected


def test_the_scale_of_signs_follows_the_columns_that_matter() -> None:
    group = torch.tensor([[[1.0, -2.0, 0.5, -4.5]]])
    weight = torch.tensor([[1.0, 0.0, 2.0, 1.0]])
    scales = fit(codec_for("int1-g32", "hessian", group), group, weight)
    assert scales.scale.tolist() == [[(1.0 + 2 * 0.5 + 4.5) / 4]]


def test_signs_of_zeros_and_of_what_float16_cannot_hold_have_a_scale_of_zero() -> None:
    group = torch.tensor([[[0.0, 0.0], [-0.0, 0.0], [2.0**-30, -(2.0**-30)], [2.0**-20, 0.0]]])
    codec = codec_for("int1-g32", "mse", group)
    scales = fit(codec, group, torch.ones(1, 2))
    assert scales.scale.tolist() == [[0.0, 0.0, 0.0, 2.0**-21]]
    made = rounded(codec, group, scales)
    assert bool((made[0, :3] == 0).all()) and not bool(torch.signbit(made[0, :2]).any())


def test_float_scales_map_the_largest_magnitude_to_the_largest_value() -> None:
    group = draw_weights(4, 32)[None]
    for name in ("fp4-e2m1-g32", "fp6-e2m3-g32", "fp6-e3m2-g32", "fp8-e4m3-g32"):
        codec = codec_for(name, "minmax", group)
        target = group.abs().amax(-1) / codec.grid.high
        # float16 keeps 11 bits, fewer below 2^-14, where it counts in steps of 2^-24.
        assert torch.allclose(fit(codec, group).scale, target, rtol=2**-11, atol=2**-25)


def test_nvfp4_block_scales_are_e4m3_times_one_number_per_matrix() -> None:
    weight = draw_weights(6, 16)[None]
    shared = nv_global_scale(weight)
    assert float(shared) == float(weight.abs().max() / (448 * 6))
    codec = codec_for("nvfp4", "mse", weight)
    blocks = fit(codec, weight).scale / shared
    assert torch.allclose(blocks.to(torch.float8_e4m3fn).float(), blocks, rtol=2**-22)


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 1e-38, 1e-30])
def test_nvfp4_keeps_valid_scales_for_the_tiniest_matrices(amax: float) -> None:
    weight = torch.full((1, 2, 16), amax)
    scales = fit(codec_for("nvfp4", "mse", weight), weight)
    assert bool((scales.scale > 0).all())


@pytest.mark.parametrize("weighted", [False, True], ids=["equal weights", "weighted"])
@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["usual", "scales among float16's subnormals"])
def test_mse_search_is_never_worse_than_the_rule_in_its_own_criterion(
    size: float, weighted: bool
) -> None:
    group = size * torch.stack([draw_weights(16, 32, seed) for seed in range(2)])  # [B, N, C]
    generator = torch.Generator().manual_seed(9)
    weight = 0.1 + torch.rand(2, 32, generator=generator) * 10 if weighted else torch.ones(2, 32)
    for name in QUANTIZED:
        rule, search = codec_for(name, "minmax", group), codec_for(name, "mse", group)
        by_rule = squared_error(rule, group, fit(rule, group), weight)
        by_search = squared_error(search, group, fit(search, group, weight), weight)
        assert bool((by_search <= by_rule * (1 + 1e-6)).all()), name
        if parse_format(name).kind == "int1" and not weighted:
            assert torch.equal(by_search, by_rule), name  # the rule is the best scale already
        elif parse_format(name).bits <= 6 and size == 1.0:
            assert float(by_search.sum()) < float(by_rule.sum()), name


def test_search_follows_the_columns_that_matter() -> None:
    group = draw_weights(16, 32, seed=3)[None]
    weight = torch.ones(1, 32)
    weight[0, :4] = 1000.0
    codec = codec_for("int3-g32", "mse", group)
    plain, focused = fit(codec, group), fit(codec, group, weight)
    error = [
        float(((rounded(codec, group, s) - group)[..., :4]).square().sum())
        for s in (plain, focused)
    ]
    assert error[1] < 0.5 * error[0]


def test_nan_and_infinity_are_refused_with_name_and_count() -> None:
    weight = torch.ones(2, 3)
    weight[0, 0], weight[1, 1] = float("nan"), float("-inf")
    with pytest.raises(FormatError, match=r"experts\.3\.up_proj has 2 NaN or infinite weights"):
        check_finite(weight, "experts.3.up_proj")


def test_grids_follow_the_format() -> None:
    assert (make_grid(parse_format("int4-g32")).low, make_grid(parse_format("int4-g32")).high) == (
        -8.0,
        7.0,
    )
    assert make_grid(parse_format("int4-g32-asym")).high == 15.0
    assert make_grid(parse_format("int1-g32")) == SignGrid()
    assert make_grid(parse_format("mxfp8-e5m2")).high == 57344.0
