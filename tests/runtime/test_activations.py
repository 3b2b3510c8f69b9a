"""Activations: scales from each token alone, every format against brute force, odd inputs."""

import math

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.quant.codecs import make_grid
from alphaquant.runtime.activations import fake_quantize
from alphaquant.spaces.formats import ACTIVATION_KINDS, PER_ROW, Format, make_format, parse_format

VARIANTS = ("fp6-e2m3-row", "fp8-e5m2-row", "mxfp6-e2m3", "mxfp8-e5m2")
FORMATS = tuple(
    # As a configuration's `aq` gives them: one scale per row.
    [make_format(kind, PER_ROW) for kind in ACTIVATION_KINDS if kind != "bf16"]
    + [parse_format(name) for name in VARIANTS]
)
BLOCKS = {"mxfp": 32, "nvfp": 16}
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


def draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Tokens like a model's: sizes that differ from token to token, a few large channels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(shape, generator=generator)
    tokens *= torch.exp(2 * torch.randn((*shape[:-1], 1), generator=generator))
    tokens[..., ::29] *= 20.0
    return tokens


def grid_values(fmt: Format) -> list[float]:
    """Every finite value of a format, those with even codes first, so that they win ties."""
    grid = make_grid(fmt)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = grid.to_values(torch.cat([codes[::2], codes[1::2]]))
    return values[values.abs() <= max(grid.high, -grid.low)].tolist()


def closest(number: float, values: list[float]) -> float:
    """The closest value; min keeps the first of equally close ones."""
    return min(values, key=lambda value: abs(value - number))


def by_hand(token: Tensor, fmt: Format) -> Tensor:
    """One token [K], number by number; divisions and products are float32's."""
    values, size = grid_values(fmt), BLOCKS.get(fmt.family, len(token))
    largest = token.abs().max()
    made = []
    for block in token.split(size):
        amax = block.abs().max()
        if fmt.family == "mxfp":
            emax = math.floor(math.log2(max(values)))
            scale = torch.tensor(2.0 ** (math.floor(math.log2(float(amax))) - emax))
        elif fmt.family == "nvfp":
            shared = largest / (448 * 6)
            scale = (amax / 6 / shared).to(torch.float8_e4m3fn).to(torch.float32) * shared
        else:
            scale = amax / max(values)
        made += [closest(float(number / scale), values) * scale for number in block]
    return torch.stack(made)


@pytest.mark.parametrize("n_cols", [64, 37, 1], ids=["whole blocks", "a tail", "one number"])
def test_every_number_is_the_closest_value_under_its_tokens_scale(n_cols: int) -> None:
    for fmt in FORMATS:
        tokens = draw_tokens(3, n_cols)
        expected = torch.stack([by_hand(token, fmt) for token in tokens])
        assert torch.equal(fake_quantize(tokens, fmt), expected)


def test_the_worked_example_of_the_header_is_true() -> None:
    made = fake_quantize(torch.tensor([7.0, -3.2, 0.5, 1.5]), make_format("int4", PER_ROW))
    assert made.tolist() == [7.0, -3.0, 0.0, 2.0]


def test_integers_map_the_largest_magnitude_to_the_largest_code() -> None:
    tokens = torch.tensor([[-127.0, 2.4, 100.0], [-1.0, 0.3, 0.6]])
    assert fake_quantize(tokens, make_format("int8", PER_ROW))[0].tolist() == [-127.0, 2.0, 100.0]
    # int2 has -1 0 1 here; -2 would need the largest magnitude to be negative.
    assert fake_quantize(tokens, make_format("int2", PER_ROW))[1].tolist() == [-1.0, 0.0, 1.0]


def test_signs_alone_are_refused() -> None:
    with pytest.raises(FormatError, match="cannot be rounded to int1-row, which has no zero"):
        fake_quantize(torch.ones(1, 4), make_format("int1", PER_ROW))


def test_bf16_returns_the_inputs_themselves() -> None:
    for tokens in (draw_tokens(2, 5), torch.tensor([math.nan, math.inf]), torch.empty(0, 4)):
        assert fake_quantize(tokens, make_format("bf16")) is tokens


def test_a_token_changes_only_itself() -> None:
    for fmt in FORMATS:
        tokens = draw_tokens(2, 4, 37)
        before = fake_quantize(tokens, fmt)
        tokens[1, 2] *= -1000.0
        after = fake_quantize(tokens, fmt)
        changed = (before != after).any(-1)
        assert changed.nonzero().tolist() == [[1, 2]]
        # Each alone, without batch and sequence, gives the same bits too.
        alone = torch.stack([fake_quantize(token, fmt) for token in tokens.reshape(-1, 37)])
        assert torch.equal(alone.reshape(tokens.shape).view(torch.int32), after.view(torch.int32))


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FORMATS if fmt.family == "mxfp"], ids=lambda fmt: fmt.name
)
def test_a_large_number_costs_only_its_block_of_32(fmt: Format) -> None:
    tokens = draw_tokens(1, 96, seed=3)
    loud = tokens.clone()
    loud[0, 40] = 1e9
    same = (fake_quantize(tokens, fmt) == fake_quantize(loud, fmt))[0]
    assert bool(same[:32].all()) and bool(same[64:].all()) and not bool(same[32:64].all())


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_the_group_size_of_a_format_does_not_count(kind: str) -> None:
    tokens = draw_tokens(3, 256)
    per_token = fake_quantize(tokens, make_format(kind, PER_ROW))
    assert torch.equal(fake_quantize(tokens, make_format(kind, 32)), per_token)


@pytest.mark.parametrize(
    "fmt", [fmt for fmt in FORMATS if fmt.family in BLOCKS], ids=lambda fmt: fmt.name
)
def test_a_short_last_block_is_a_block_of_its_own(fmt: Format) -> None:
    tokens = draw_tokens(3, 69)  # 2 * 32 + 5 = 4 * 16 + 5
    tokens[:, 64:] *= 1e-3
    tail = fake_quantize(tokens, fmt)[:, 64:]
    assert tail.shape == (3, 5) and bool((tail != 0).any(-1).all())
    if fmt.family == "mxfp":
        assert torch.equal(tail, fake_quantize(tokens[:, 64:].contiguous(), fmt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_have_the_inputs_dtype_and_shape_and_inputs_stay(dtype: torch.dtype) -> None:
    for fmt in FORMATS:
        tokens = draw_tokens(2, 3, 40).to(dtype)
        before = tokens.clone()
        made = fake_quantize(tokens, fmt)
        assert made.dtype == dtype and made.shape == tokens.shape
        assert torch.equal(tokens, before)
        expected = fake_quantize(tokens.to(torch.float32), fmt)
        assert torch.equal(made, expected.to(dtype))


def test_strided_inputs_are_rounded_along_their_last_dimension() -> None:
    for fmt in FORMATS:
        by_last = draw_tokens(40, 6).T  # [6, 40]
        by_first = draw_tokens(4, 3, 40).transpose(0, 1)  # [3, 4, 40], no view as [12, 40]
        for tokens in (by_last, by_first):
            assert not tokens.is_contiguous()
            assert torch.equal(fake_quantize(tokens, fmt), fake_quantize(tokens.contiguous(), fmt))


def test_zero_tokens_stay_zero() -> None:
    for fmt in FORMATS:
        tokens = draw_tokens(3, 40)
        tokens[1] = 0.0
        tokens[2, :32] = 0.0
        made = fake_quantize(tokens, fmt)
        assert bool((made[1] == 0).all()) and bool((made[2, :32] == 0).all())
        assert bool((made[0] != 0).any()) and bool((made[2, 32:] != 0).any())


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_no_tokens_give_no_tokens(shape: tuple[int, ...]) -> None:
    for fmt in FORMATS:
        made = fake_quantize(torch.empty(shape, dtype=torch.bfloat16), fmt)
        assert made.shape == shape and made.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_and_smallest_numbers_give_finite_ones(dtype: torch.dtype) -> None:
    for fmt in FORMATS:
        info = torch.finfo(dtype)
        for size in (info.max, info.tiny, info.smallest_normal * info.eps):
            tokens = torch.full((3, 40), size).to(dtype)
            tokens[1, ::3] = -info.max
            tokens[2, 1:] = 0.0
            made = fake_quantize(tokens, fmt)
            assert bool(torch.isfinite(made).all())
            if size == info.max:
                # mxfp4 saturates the most: 7.99.. becomes 6.
                assert float(made[0].min()) >= 0.75 * info.max * (1 - 2**-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_are_seen_by_all_that_share_their_scale_and_nobody_else(bad: float) -> None:
    for fmt in FORMATS:
        tokens = draw_tokens(3, 70)
        good = fake_quantize(tokens, fmt)
        tokens[1, 33] = bad
        made = fake_quantize(tokens, fmt)
        is_nan = torch.zeros(3, 70, dtype=torch.bool)
        is_nan[1, 32:64] = True
        if fmt.family != "mxfp":
            is_nan[1] = True
        assert torch.equal(made.isnan(), is_nan)
        assert torch.equal(made[~is_nan], good[~is_nan])


def test_asymmetric_integers_are_refused() -> None:
    with pytest.raises(FormatError, match="to int4-row-asym: their integers are symmetric, with"):
        fake_quantize(draw_tokens(1, 8), make_format("int4", PER_ROW, symmetric=False))


@pytest.mark.parametrize("name", ["int4-g32-s256", "nl4-g64"])
def test_super_blocks_and_tables_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match=f"activations cannot be rounded to {name}"):
        fake_quantize(draw_tokens(1, 8), parse_format(name))


def test_results_do_not_hold_on_to_a_graph() -> None:
    tokens = draw_tokens(2, 40).requires_grad_()
    for fmt in FORMATS:
        assert not fake_quantize(tokens, fmt).requires_grad


@pytest.mark.parametrize("family", ["int", "fp", "mxfp"])
def test_more_bits_give_a_smaller_error(family: str) -> None:
    tokens = draw_tokens(64, 256, seed=7)
    errors = [
        float((fake_quantize(tokens, fmt) - tokens).square().mean())
        for fmt in sorted(FORMATS, key=lambda fmt: fmt.bits)
        if fmt.family == family and fmt.element not in ("e2m3", "e5m2")
    ]
    assert len(errors) >= 3 and errors == sorted(errors, reverse=True)
