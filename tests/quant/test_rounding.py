"""GPTQ against round-to-nearest, against itself in other blocks, and its Hessian's edge cases."""

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant import rounding
from alphaquant.quant.hessian import accumulate
from alphaquant.quant.refine import refine
from alphaquant.quant.rounding import (
    MAX_DAMP_RETRIES,
    Factor,
    _blocks,
    dampen,
    factorize,
    hessian_error,
    quantize_gptq,
    quantize_rtn,
)
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.scale_search import ScaleSearch
from alphaquant.testing.formats import QUANTIZED, SEARCHES, draw_weights

N_LAYERS, ROWS, COLS, TOKENS = 6, 12, 160, 320


def draw_inputs(seed: int, n_tokens: int = TOKENS, cols: int = COLS) -> Tensor:
    """Correlated inputs [n, K]: a few directions carry most of the energy, as in real layers."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(cols // 8, cols, generator=generator)
    strength = torch.randn(n_tokens, cols // 8, generator=generator)
    return strength @ directions + 0.3 * torch.randn(n_tokens, cols, generator=generator)


@pytest.fixture(scope="module")
def layers() -> tuple[Tensor, Tensor]:
    """Weights [L, N, K] and Hessians [L, K, K] of L layers with correlated inputs."""
    weight = torch.stack([draw_weights(ROWS, COLS, seed) for seed in range(N_LAYERS)])
    inputs = torch.stack([draw_inputs(seed) for seed in range(N_LAYERS)])
    return weight, inputs.transpose(-1, -2) @ inputs


@pytest.fixture(scope="module")
def factor(layers: tuple[Tensor, Tensor]) -> Factor:
    """Of the Hessians of `layers`."""
    return factorize(layers[1], 0.01)


@pytest.mark.parametrize("name", QUANTIZED)
def test_gptq_beats_rtn_on_every_correlated_layer(
    name: str, layers: tuple[Tensor, Tensor], factor: Factor
) -> None:
    weight, hessian = layers
    fmt = parse_format(name)
    for search in SEARCHES:
        rounded = quantize_gptq(weight, factor, fmt, search)
        if fmt.kind == "int1":  # a sign alone cannot take over its neighbours' errors
            rounded = refine(weight, dampen(hessian, factor.damp), rounded, 3)
        error = hessian_error(weight, rounded.weights(), hessian).sum(-1)  # [L]
        rtn = hessian_error(weight, quantize_rtn(weight, fmt, search).weights(), hessian).sum(-1)
        assert bool((error < rtn).all()), search
        if name == "int4-g128":
            assert float((error / rtn).mean()) <= 0.8, search


@pytest.mark.parametrize("n_batches", [4, 16])
def test_the_same_tokens_in_other_batches_give_the_same_codes(n_batches: int) -> None:
    inputs = draw_inputs(0)
    whole, parts = torch.zeros(COLS, COLS), torch.zeros(COLS, COLS)
    accumulate(whole, inputs.reshape(2, -1, COLS))  # [B, T, C] and [N, C] are the same tokens
    for part in inputs.chunk(n_batches):
        accumulate(parts, part)
    assert float((whole - parts).norm() / whole.norm()) <= 1e-5
    weight, fmt = draw_weights(ROWS, COLS)[None], parse_format("int4-g32")
    first = quantize_gptq(weight, factorize(whole[None], 0.01), fmt, "mse")
    second = quantize_gptq(weight, factorize(parts[None], 0.01), fmt, "mse")
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.weights(), second.weights())


def test_the_scale_of_the_hessian_does_not_matter(layers: tuple[Tensor, Tensor]) -> None:
    weight, hessian = layers[0][:2], layers[1][:2]
    fmt = parse_format("int3-g64-asym")
    # A power of four: its square root is exact, so not even rounding differs.
    first = quantize_gptq(weight, factorize(hessian, 0.01), fmt, "minmax")
    second = quantize_gptq(weight, factorize(hessian * 4.0**-6, 0.01), fmt, "minmax")
    assert torch.equal(first.weights(), second.weights())


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int3-g64-asym", "int4-row", "nvfp4"])
@pytest.mark.parametrize("blocksize", [1, 32, 100, 128, COLS])
def test_the_block_size_changes_nothing(
    name: str, blocksize: int, layers: tuple[Tensor, Tensor]
) -> None:
    weight, hessian = layers[0][:3], layers[1][:3]
    factor, fmt = factorize(hessian, 0.01), parse_format(name)
    expected = quantize_gptq(weight, factor, fmt, "minmax", blocksize=64)
    found = quantize_gptq(weight, factor, fmt, "minmax", blocksize=blocksize)
    # Sums in another order differ in the last bit; on these layers no rounding decision flips.
    assert float((found.weights() - expected.weights()).abs().max()) <= 1e-5 * float(
        weight.abs().max()
    )


def test_blocks_hold_whole_groups_or_lie_inside_one() -> None:
    assert list(_blocks(200, 96, 128)) == [(0, 96), (96, 192), (192, 200)]
    assert list(_blocks(200, 96, 32))[:4] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert list(_blocks(200, 96, 32))[-3:] == [(128, 160), (160, 192), (192, 200)]
    assert list(_blocks(256, 32, 100)) == [(0, 96), (96, 192), (192, 256)]
    assert list(_blocks(5, 5, 1)) == [(i, i + 1) for i in range(5)]


@pytest.mark.parametrize("n_cols", [1, 31, 128, 171])
@pytest.mark.parametrize("group_size", [8, 32, 48, 171])
@pytest.mark.parametrize("blocksize", [1, 7, 32, 128, 1000])
def test_blocks_cover_every_column_once_and_start_groups_up_to_date(
    n_cols: int, group_size: int, blocksize: int
) -> None:
    blocks = list(_blocks(n_cols, group_size, blocksize))
    assert [c for start, stop in blocks for c in range(start, stop)] == list(range(n_cols))
    for start, stop in blocks:
        assert stop - start <= max(blocksize, 1)
        inside = start // group_size == (stop - 1) // group_size
        assert inside or start % group_size == 0


@pytest.mark.parametrize("n_tokens", [1, 7, COLS - 1], ids=["one token", "few", "one too few"])
def test_a_rank_deficient_hessian_factorizes(n_tokens: int) -> None:
    inputs = draw_inputs(1, n_tokens)
    hessian = (inputs.T @ inputs)[None]
    factor = factorize(hessian, 0.01)
    damped = hessian[0] + factor.damp[0] * hessian[0].diagonal().mean() * torch.eye(COLS)
    product = factor.upper[0].T @ factor.upper[0] @ damped
    # float32 with a condition number of up to 1e4 = K / damp: 1e4 * 2^-24 * sqrt(K) is about 1e-2.
    assert torch.allclose(product, torch.eye(COLS), atol=2e-2)
    made = quantize_gptq(
        draw_weights(ROWS, COLS)[None], factor, parse_format("int4-g32"), "mse"
    ).weights()
    assert bool(torch.isfinite(made).all())


def test_damping_is_raised_only_where_needed_and_reported() -> None:
    good = torch.eye(8)
    bad = torch.eye(8)
    bad[0, 1] = bad[1, 0] = 1.05  # an eigenvalue of -0.05: damping 0.1 repairs it, 0.01 does not
    factor = factorize(torch.stack([good, bad, good]), 0.01)
    assert factor.damp == pytest.approx((0.01, 0.1, 0.01))
    alone = factorize(good[None], 0.01)
    assert torch.equal(factor.upper[0], alone.upper[0])
    assert torch.equal(factor.upper[2], alone.upper[0])
    expected = torch.linalg.inv(bad.double() + 0.1 * torch.eye(8))
    product = factor.upper[1].T.double() @ factor.upper[1].double()
    assert torch.allclose(product, expected, atol=1e-4)


def test_a_hopeless_hessian_is_an_error_that_states_the_last_damping() -> None:
    with pytest.raises(ModelError, match=r"1 Hessians of size 4 .* damping 1000;"):
        factorize(torch.stack([torch.eye(4), torch.full((4, 4), float("nan"))]), 0.01)
    assert MAX_DAMP_RETRIES == 5


@pytest.mark.parametrize("name", ["int4-g32", "int2-g64-asym", "fp4-e2m1-g32", "mxfp4", "nvfp4"])
def test_a_dead_column_is_rounded_without_compensation(name: str) -> None:
    inputs = draw_inputs(2)
    inputs[:, 17] = 0.0
    hessian = (inputs.T @ inputs)[None]
    weight = draw_weights(ROWS, COLS)[None]
    weight[..., 17] = 1e-3  # never a group's extreme, so scales do not depend on it
    made = quantize_gptq(weight, factorize(hessian, 0.01), parse_format(name), "minmax")
    assert bool(torch.isfinite(made.weights()).all())
    weight[..., 17] = -2e-3
    other = quantize_gptq(weight, factorize(hessian, 0.01), parse_format(name), "minmax")
    assert torch.equal(made.scales, other.scales)
    keep = torch.arange(COLS) != 17
    assert torch.equal(made.values[..., keep], other.values[..., keep])


def test_a_zero_hessian_gives_rtn() -> None:
    weight, fmt = draw_weights(ROWS, COLS)[None], parse_format("int4-g64")
    ours = quantize_gptq(weight, factorize(torch.zeros(1, COLS, COLS), 0.01), fmt, "mse")
    assert torch.equal(ours.weights(), quantize_rtn(weight, fmt, "mse").weights())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["int2-g32", "int3-g64-asym", "fp6-e3m2-g32"])
def test_an_identity_hessian_gives_rtn_exactly_on_many_rows(
    name: str, search: ScaleSearch
) -> None:
    """Enough groups for near ties between scales, which rounding in the criterion would flip."""
    weight, fmt = draw_weights(4000, COLS)[None], parse_format(name)
    ours = quantize_gptq(weight, factorize(torch.eye(COLS)[None], 0.01), fmt, search)
    assert torch.equal(ours.weights(), quantize_rtn(weight, fmt, search).weights())


@pytest.mark.parametrize("name", ["int4-g64", "int3-g128-asym", "mxfp6", "nvfp4", "fp8-e4m3-row"])
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_batch_equals_its_matrices_one_by_one(
    name: str, search: str, layers: tuple[Tensor, Tensor]
) -> None:
    weight, hessian = layers[0][:3], layers[1][:3]
    fmt = parse_format(name)
    batch = quantize_gptq(weight, factorize(hessian, 0.01), fmt, search)
    for b in range(3):
        part = slice(b, b + 1)
        alone = quantize_gptq(weight[part], factorize(hessian[part], 0.01), fmt, search)
        assert torch.equal(alone.weights(), batch.weights()[part])


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_stacked_nvfp4_matrices_equal_separate_ones(method: str) -> None:
    small, large = draw_weights(4, COLS, 0), 30 * draw_weights(6, COLS, 1)
    hessian = (draw_inputs(3).T @ draw_inputs(3))[None]
    factor, fmt = factorize(hessian, 0.01), parse_format("nvfp4")

    def run(weight: Tensor, row_counts: tuple[int, ...] = ()) -> rounding.RoundedBatch:
        if method == "rtn":
            return quantize_rtn(weight[None], fmt, "mse", row_counts)
        return quantize_gptq(weight[None], factor, fmt, "mse", row_counts=row_counts)

    stacked = run(torch.cat([small, large]), (4, 6))
    for rows, weight in ((slice(0, 4), small), (slice(4, 10), large)):
        packed, alone = stacked.pack(0, rows), run(weight).pack(0, slice(None))
        assert packed.tensors.keys() == alone.tensors.keys() == {"codes", "scales", "global_scale"}
        for key, tensor in packed.tensors.items():
            assert torch.equal(tensor.view(torch.uint8), alone.tensors[key].view(torch.uint8))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_run_along_the_inputs_and_differ(group_size: int) -> None:
    weight = draw_weights(ROWS, COLS)[None]
    made = quantize_rtn(weight, parse_format(f"int4-g{group_size}"), "minmax")
    assert made.scales.shape == (1, ROWS, -(-COLS // group_size))
    others = {32, 64, 128} - {group_size}
    for other in others:
        different = quantize_rtn(weight, parse_format(f"int4-g{other}"), "minmax")
        assert not torch.equal(made.weights(), different.weights())


def test_hessian_error_is_the_squared_output_error() -> None:
    weight, inputs = draw_weights(ROWS, COLS), draw_inputs(4)
    made = quantize_rtn(weight[None], parse_format("int3-g32"), "mse").weights()[0]
    direct = ((weight - made) @ inputs.T).square().sum(-1)
    found = hessian_error(weight, made, inputs.T @ inputs)
    # Sums of K * n products in float32: sqrt(160 * 320) * 2^-24 is about 1e-5.
    assert torch.allclose(found, direct, rtol=1e-4)
