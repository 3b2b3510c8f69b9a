"""What GPTQ promises for each of the promised formats; details are in test_rounding.py."""

import pytest
import torch
from torch import Tensor

from alphaquant.quant.hessian import accumulate
from alphaquant.quant.matrix import RoundedBatch
from alphaquant.quant.rounding import (
    factorize,
    hessian_error,
    quantize_gptq,
    quantize_rtn,
)
from alphaquant.spaces.formats import FORMAT_KINDS, GGML_BLOCKS, make_format, parse_format
from alphaquant.testing.formats import draw_weights, round_in_blocks

PROMISED = tuple(
    make_format(kind).name
    for kind in FORMAT_KINDS
    if kind != "bf16" and kind not in GGML_BLOCKS  # whose rounding is llama.cpp's
)
FORMATS = (*PROMISED, "int1-g32", "int2-g64-asym", "int4-g32-asym", "mxfp6-e2m3", "mxfp8-e5m2")
ROWS, COLS = 12, 171  # groups of 128 and 43
every_format = pytest.mark.parametrize("name", FORMATS)


def draw_inputs(n_layers: int, n_tokens: int = 320, cols: int = COLS) -> Tensor:
    """Correlated inputs [L, n, K] whose channels differ in size, as in real layers."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.exp(torch.randn(n_layers, 1, cols, generator=generator))
    mix = torch.eye(cols) + 0.15 * torch.randn(cols, cols, generator=generator)
    return (torch.randn(n_layers, n_tokens, cols, generator=generator) @ mix) * sizes


@pytest.fixture(scope="module")
def layers() -> tuple[Tensor, Tensor]:
    """Weights [20, N, K] and Hessians [20, K, K] of 20 layers."""
    weight = torch.stack([draw_weights(ROWS, COLS, seed) for seed in range(20)])
    inputs = draw_inputs(20)
    return weight, inputs.mT @ inputs


def run(weight: Tensor, hessian: Tensor, name: str, n_sweeps: int) -> RoundedBatch:
    """GPTQ as the engine runs it, with sweeps of refinement after it."""
    return round_in_blocks(weight, hessian, parse_format(name), "mse", n_sweeps)


def assert_sound(rounded: RoundedBatch) -> None:
    made = rounded.weights()
    assert bool(torch.isfinite(made).all()) and bool(torch.isfinite(rounded.scales).all())
    # Signs and tables have no zero; a scale of zero stands for zeros.
    if rounded.format.kind != "int1" and rounded.format.family != "nl":
        assert bool((rounded.scales != 0).all())
    for b in range(len(made)):
        packed = rounded.pack(b, slice(None))
        assert torch.equal(packed.dequantize(), made[b])


@every_format
def test_the_same_tokens_in_1_4_or_16_batches_give_the_same_weights(name: str) -> None:
    tokens = draw_inputs(1)[0]
    made = []
    for n_batches in (1, 4, 16):
        total = torch.zeros(COLS, COLS)
        for part in tokens.chunk(n_batches):
            accumulate(total, part.reshape(2, -1, COLS))
        made.append(run(draw_weights(ROWS, COLS)[None], total[None], name, 0).weights())
    # Sums in another order differ by 1e-7 on some processors: a rounding that was as near to a
    # tie flips, and moves what follows in its row.
    for other in made[1:]:
        assert float((made[0] != other).float().mean()) < 0.02
        assert float((made[0] - other).abs().max()) < 0.05 * float(made[0].abs().max())


def test_gptq_of_int4_g128_is_a_fifth_better_than_rtn_with_either_search(
    layers: tuple[Tensor, Tensor],
) -> None:
    weight, hessian = layers
    fmt = parse_format("int4-g128")
    for search in ("minmax", "mse"):
        gptq = quantize_gptq(weight, factorize(hessian, 0.01), fmt, search).weights()
        rtn = quantize_rtn(weight, fmt, search).weights()
        errors = [hessian_error(weight, made, hessian).sum(-1) for made in (gptq, rtn)]
        assert bool((errors[0] < errors[1]).all())
        assert float((errors[0] / errors[1]).mean()) <= 0.8


@every_format
def test_static_groups_and_ordering_have_the_scales_of_rtn(
    name: str, layers: tuple[Tensor, Tensor]
) -> None:
    weight, hessian = layers[0][:2], layers[1][:2]
    fmt = parse_format(name)
    expected = quantize_rtn(weight, fmt, "mse")
    for factor, static in (
        (factorize(hessian, 0.01), True),
        (factorize(hessian, 0.01, actorder=True), False),
    ):
        made = quantize_gptq(weight, factor, fmt, "mse", static_groups=static)
        assert torch.equal(made.scales, expected.scales)
        if expected.zeros is not None:
            assert made.zeros is not None and torch.equal(made.zeros, expected.zeros)


@every_format
def test_ordering_does_not_cost_more_than_five_percent_against_plain_gptq(
    name: str, layers: tuple[Tensor, Tensor]
) -> None:
    """Against GPTQ whose groups are not static; nvfp4 pays for static blocks of 16."""
    weight, hessian = layers
    fmt = parse_format(name)
    plain = quantize_gptq(weight, factorize(hessian, 0.01), fmt, "mse").weights()
    ordered = quantize_gptq(weight, factorize(hessian, 0.01, actorder=True), fmt, "mse").weights()
    errors = [hessian_error(weight, made, hessian).sum() for made in (plain, ordered)]
    assert float(errors[1] / errors[0]) <= (1.2 if name == "nvfp4" else 1.05)


@every_format
@pytest.mark.parametrize("n_sweeps", [0, 2], ids=["gptq", "refined"])
def test_zero_columns_rows_and_hessians_and_dead_inputs_give_sound_weights(
    name: str, n_sweeps: int
) -> None:
    weight = torch.stack([draw_weights(ROWS, COLS, seed) for seed in range(6)])
    inputs = draw_inputs(6)
    weight[0, :, 5] = 0.0  # a zero column
    weight[1, 4] = 0.0  # a zero row
    inputs[2] = 0.0  # a zero Hessian
    inputs[3, :, 130] = 0.0  # a dead input, in the tail group
    weight[4] = 0.0  # a zero matrix
    inputs[5, 1:] = 0.0  # one token
    rounded = run(weight, inputs.mT @ inputs, name, n_sweeps)
    assert_sound(rounded)
    made = rounded.weights()
    assert bool((made[1, 4] == 0).all()) and bool((made[4] == 0).all())
    alone = run(weight[2:3], torch.zeros(1, COLS, COLS), name, 0)
    assert torch.equal(alone.weights(), quantize_rtn(weight[2:3], alone.format, "mse").weights())


def draw_extremes() -> tuple[Tensor, Tensor]:
    """Weights [4, N, K] at the ends of bfloat16's range, and Hessians [4, K, K]."""
    info = torch.finfo(torch.bfloat16)
    weight = torch.stack([draw_weights(4, COLS, seed) for seed in range(4)])
    weight[0, :, ::7] = info.max
    weight[1] = -info.max
    weight[2] = weight[2].sign() * info.smallest_normal
    weight[3, 1:] *= 2.0**-120
    inputs = draw_inputs(4)
    return weight, inputs.mT @ inputs


@every_format
def test_the_ends_of_bfloat16_give_finite_weights(name: str) -> None:
    assert_sound(run(*draw_extremes(), name, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_the_ends_of_bfloat16_give_finite_weights_after_refinement(name: str) -> None:
    assert_sound(run(*draw_extremes(), name, 2))
