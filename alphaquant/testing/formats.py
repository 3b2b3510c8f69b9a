"""The contract of formats, to run over any of them.

    for name in FORMATS:
        check_format(name)

Checks raise AssertionError with what was broken. A new format adds its name to `FORMATS`. Weights
are drawn, not measured. Letters: B matrices, N rows, K columns, G groups per row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.grids import TABLES
from alphaquant.quant.codecs import check_finite, make_grid, nv_global_scale
from alphaquant.quant.columns.state import Rounding
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.matrix import RoundedBatch, check_packed, pack_bf16
from alphaquant.quant.refine import refine
from alphaquant.quant.rounding import Factor, hessian_error, quantize_gptq, quantize_rtn
from alphaquant.quant.rounding import factorize as plain_factorize
from alphaquant.spaces.formats import (
    ASYMMETRIC_KINDS,
    SUPER_GROUPS,
    SUPER_KINDS,
    Format,
    parse_format,
)
from alphaquant.spaces.menus import MENUS
from alphaquant.specs.scale_search import ScaleSearch

_GROUPS = ("g32", "g64", "g128", "g256", "row")
_INT_KINDS = ("int1", "int2", "int3", "int4", "int5", "int6", "int8")
_TABLE_KINDS = ("nl2", "nl3", "nl4")
_FP_KINDS = ("fp4-e2m1", "fp6-e3m2", "fp6-e2m3", "fp8-e4m3", "fp8-e5m2")

FORMATS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *MENUS["all"],
            *(f"{kind}-{group}" for kind in _INT_KINDS for group in _GROUPS),
            *(f"{kind}-{group}-asym" for kind in ASYMMETRIC_KINDS for group in _GROUPS),
            *(f"{kind}-{group}" for kind in _TABLE_KINDS for group in ("g32", "g64", "row")),
            *(f"{kind}-g{n}-s256" for kind in SUPER_KINDS for n in SUPER_GROUPS),
            *(f"{kind}-{group}" for kind in _FP_KINDS for group in _GROUPS),
            *("mxfp4", "mxfp6", "mxfp6-e2m3", "mxfp8", "mxfp8-e5m2", "nvfp4"),
        )
    )
)
"""Every format that the suite runs over: all of the menus, and every kind with every group."""

QUANTIZED = tuple(name for name in FORMATS if parse_format(name).is_quantized)

SEARCHES: tuple[ScaleSearch, ...] = ("minmax", "mse", "hessian")

SHAPES: tuple[tuple[int, int], ...] = (
    (5, 37),  # odd, less than the largest group
    (3, 1),  # one column
    (1, 64),  # one row, whole groups
    (4, 171),  # tail groups, as DeepSeek's 10944 = 64 * 171 has with groups of 128
    (2, 256),  # several whole groups
    (3, 523),  # two groups of 256 and a tail of 11
)


def check_format(name: str) -> None:
    """Run every check on a format.

    Args:
        name: canonical name.
    """
    fmt = parse_format(name)
    if not fmt.is_quantized:
        check_unquantized()
        return
    for search in SEARCHES:
        for check in CHECKS:
            check(fmt, search)


def draw_weights(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Weights like those of a model: normal, 0.02 wide, with a few outliers; float32 [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, cols, generator=generator)
    outliers = torch.rand(rows, cols, generator=generator) < 0.01
    return torch.where(outliers, 8 * weight, weight)


def check_storage(fmt: Format, search: ScaleSearch) -> None:
    """Packed bytes are those that `storage_bits` counts; what is packed comes back bit for bit."""
    for rows, cols in SHAPES:
        rounded = _nearest(rows, cols, fmt, search)
        packed = rounded.pack(0, slice(None))
        check_packed(packed, "matrix", fmt.name)
        assert 8 * packed.n_bytes == fmt.storage_bits(rows, cols), (fmt.name, rows, cols)
        assert rounded.scales.shape == (1, rows, fmt.n_groups(cols)), (fmt.name, rows, cols)
        _assert_same_bits(packed.dequantize(), rounded.weights()[0], fmt)


def check_dequantization(fmt: Format, search: ScaleSearch) -> None:
    """Codes that are looked up give the weights that they give one by one, whatever the codes."""
    generator = torch.Generator().manual_seed(3)
    for rows, cols in SHAPES:
        packed = _nearest(rows, cols, fmt, search).pack(0, slice(None))
        tensors = dict(packed.tensors)
        drawable = {"codes", "zeros"} | ({"scales"} if fmt.super_size else set())
        for name in sorted(drawable & tensors.keys()):
            shape = tensors[name].shape
            drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            tensors[name] = drawn
        packed = replace(packed, tensors=tensors)
        _assert_same_bits(packed.dequantize(), packed.plain_weights(), fmt)


def check_grid(fmt: Format, search: ScaleSearch) -> None:
    """Values are on the grid, weights are (value - zero) * scale, scales are valid and stored."""
    rounded = _nearest(4, 171, fmt, search)
    grid = make_grid(fmt)
    on_grid = grid.to_values(torch.arange(2**fmt.bits, dtype=torch.uint8))
    assert bool(torch.isin(rounded.values, on_grid).all()), fmt.name
    assert float(rounded.values.max()) <= grid.high and float(rounded.values.min()) >= grid.low
    size = rounded.values.shape[-1] if fmt.group_size < 0 else fmt.group_size
    weights = rounded.weights()[0]
    group = torch.arange(rounded.values.shape[-1]) // size  # of each column
    zeros = 0.0 if rounded.zeros is None else rounded.zeros[0][:, group]
    made = (rounded.values[0] - zeros) * rounded.scales[0][:, group]
    assert torch.equal(weights, made), fmt.name
    _assert_valid_scales(rounded)


def check_zeros(fmt: Format, search: ScaleSearch) -> None:
    """Zero matrices, rows and blocks stay zero, with a valid scale; columns if there is a zero."""
    weight = draw_weights(5, 171)
    weight[1] = 0.0
    weight[:, 7] = 0.0
    weight[3, :128] = 0.0
    batch = torch.stack([weight, torch.zeros_like(weight)])
    rounded = quantize_rtn(batch, fmt, search)
    _assert_valid_scales(rounded)
    made = rounded.weights()
    assert bool((made[1] == 0).all()) and bool((made[0, 1] == 0).all()), fmt.name
    if fmt.kind == "int1":  # no zero: a column has the sign and scale of its group
        assert torch.equal(made[0, :, 7], rounded.scales[0, :, 0]), fmt.name
    elif fmt.is_table:  # no zero either: the number nearest to zero, of either sign
        least = min(map(abs, TABLES[fmt.kind]))
        allowed = torch.tensor(least, dtype=torch.float32) * rounded.scales[0, :, 0].abs()
        assert bool((made[0, :, 7].abs() <= allowed).all()), fmt.name
    elif search == "minmax" or fmt.symmetric:
        assert bool((made[0, :, 7] == 0).all()), fmt.name
    if 0 < fmt.group_size <= 128:
        assert bool((made[0, 3, :128] == 0).all()), fmt.name
    for b in range(2):
        _assert_same_bits(rounded.pack(b, slice(None)).dequantize(), made[b], fmt)


def check_extremes(fmt: Format, search: ScaleSearch) -> None:
    """The largest and smallest bfloat16 numbers, and one beside the other, give finite weights."""
    largest = float(torch.finfo(torch.bfloat16).max)
    smallest = 2.0**-133
    for value in (largest, smallest, float(torch.finfo(torch.bfloat16).tiny)):
        weight = torch.full((4, 40), value)
        weight[1] = -value
        weight[2, ::2] = -value
        weight[3, 1:] = smallest
        for rounded in (
            quantize_rtn(weight[None], fmt, search),
            _identity_gptq(weight, fmt, search),
        ):
            assert bool(torch.isfinite(rounded.weights()).all()), (fmt.name, value)
            _assert_valid_scales(rounded)
            _assert_same_bits(rounded.pack(0, slice(None)).dequantize(), rounded.weights()[0], fmt)


def check_identity_hessian(fmt: Format, search: ScaleSearch) -> None:
    """With H = I, GPTQ is round-to-nearest exactly."""
    weight = draw_weights(6, 171, seed=1)
    expected = quantize_rtn(weight[None], fmt, search)
    found = _identity_gptq(weight, fmt, search)
    assert torch.equal(found.values, expected.values), fmt.name
    assert torch.equal(found.scales, expected.scales), fmt.name
    assert torch.equal(found.weights(), expected.weights()), fmt.name


def check_bad_numbers(fmt: Format, search: ScaleSearch) -> None:
    """NaN and infinity are refused, not stored as something else."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        weight = draw_weights(2, 40)
        check_finite(weight, "good")
        weight[1, 3] = bad
        try:
            check_finite(weight, "model.layers.0.bad")
        except FormatError as error:
            assert "model.layers.0.bad" in str(error) and "1 NaN or inf" in str(error)
        else:
            raise AssertionError(f"{bad} was not refused")


def check_error(fmt: Format, search: ScaleSearch) -> None:
    """The error is below what the format's resolution allows: half a step per weight, roughly."""
    if fmt.is_table and search == "minmax":
        return  # no zero: beside outliers the rule's own scale makes small weights larger
    weight = draw_weights(32, 256, seed=2)
    made = quantize_rtn(weight[None], fmt, search).weights()[0]
    relative = float((made - weight).square().sum() / weight.square().sum())
    # Rows with 8-fold outliers have a step of about 2 * 8 * 3 sigma / 2^b; its uniform error is
    # step^2 / 12. Floats do better. 4 sigma^2 covers 2 bits, where nearly all weights become zero.
    assert relative <= min(1.0, 4 * (16.0 * 3 / 2**fmt.bits) ** 2 / 12), (fmt.name, relative)


def check_engine(fmt: Format, search: ScaleSearch) -> None:
    """Rounding by blocks of products gives what rounding column by column gives.

    Sums come in another order, so a tie may fall to the other side and move what comes after it:
    the objectives of all rows together are compared. A refined one may end in another minimum.
    """
    whole = search == "hessian"  # with tail groups; the other ways choose scales elsewhere
    n_most = (136 if fmt.group_size in (64, 128) else 72) if whole else 40
    for n_rows, n_cols, block_size in ((70, n_most, 32), (3, 37, 16))[: 1 + whole]:
        weight = draw_weights(n_rows, n_cols, seed=3)
        hessian = _correlated_hessian(n_cols)
        plan = ColumnPlan(n_cols, fmt.columns_per_scale(n_cols), block_size, fmt.super_size)
        shared = nv_global_scale(weight[None])[0].expand(n_rows).contiguous()
        rounder = Rounder(rule_of(fmt, search), plan, shared)
        transposed = weight.T.contiguous()
        damped = factorize(hessian, 0.01, (False, True))
        for factor, actorder in zip(damped.factors, (False, True), strict=True):
            inverses = factor.diagonal_inverses(plan.blocks)
            start = rounder.gptq(transposed, factor, inverses, static=False)
            reference = quantize_gptq(
                weight[None],
                _plain_factor(n_cols, actorder),
                fmt,
                search,
            )
            _assert_close(fmt, start, weight, reference, damped.matrix, 2e-3)
            end = rounder.refine(start, damped, 2)
            assert bool((end.objective <= start.objective).all()), fmt.name
            refined = refine(weight[None], damped.matrix[None], reference, 2)
            _assert_close(fmt, end, weight, refined, damped.matrix, 0.03)
        nearest = rounder.nearest(transposed)
        plain = quantize_rtn(weight[None], fmt, search)
        _assert_close(fmt, nearest, weight, plain, torch.eye(n_cols), 1e-5)


def round_in_blocks(
    weight: Tensor, hessian: Tensor, fmt: Format, search: ScaleSearch, n_sweeps: int
) -> RoundedBatch:
    """GPTQ and refinement of a batch as the engine runs them, in the natural order of columns.

    Args:
        weight: float32 [B, N, K].
        hessian: float32 [B, K, K], not damped.
        fmt: the format.
        search: how scales are chosen.
        n_sweeps: of refinement.
    """
    n_cols = weight.shape[-1]
    size, scale = fmt.columns_per_scale(n_cols), nv_global_scale(weight)  # [B, 1]
    plan, found = ColumnPlan(n_cols, size, super_size=fmt.super_size), []
    for w, H, shared in zip(weight, hessian, scale, strict=True):
        rounder = Rounder(rule_of(fmt, search), plan, shared.expand(len(w)).contiguous())
        damped = factorize(H, 0.01, (False,))
        factor = damped.factors[0]
        inverses = factor.diagonal_inverses(plan.blocks)
        start = rounder.gptq(w.T.contiguous(), factor, inverses, static=False)
        found.append(rounder.refine(start, damped, n_sweeps))
    values = [r.centred if fmt.symmetric else r.values(size) for r in found]
    return RoundedBatch(
        fmt,
        torch.stack([v.T for v in values]),
        torch.stack([r.scales.T for r in found]),
        None if fmt.symmetric else torch.stack([r.zeros.T for r in found]),
        scale.expand(-1, weight.shape[1]) if fmt.shared.global_bits else None,
        torch.stack([r.shared.T for r in found]) if fmt.super_size else None,
    )


@lru_cache(16)
def _nearest(rows: int, cols: int, fmt: Format, search: ScaleSearch) -> RoundedBatch:
    return quantize_rtn(draw_weights(rows, cols)[None], fmt, search)


@cache
def _plain_factor(n_cols: int, actorder: bool) -> Factor:
    return plain_factorize(_correlated_hessian(n_cols)[None], 0.01, actorder=actorder)


@cache
def _correlated_hessian(n_cols: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(n_cols, n_cols, generator=generator) / n_cols**0.5
    inputs = torch.randn(3 * n_cols, n_cols, generator=generator) @ mix
    hessian: Tensor = inputs.T @ inputs
    return hessian


def _assert_close(
    fmt: Format,
    found: Rounding,
    weight: Tensor,
    reference: RoundedBatch,
    hessian: Tensor,
    tolerance: float,
) -> None:
    """The sum of the objective is that of the reference, and it is told as it is."""
    expected = hessian_error(weight, reference.weights()[0], hessian).sum()
    made = weight - found.delta.T
    measured = hessian_error(weight, made, hessian)
    scale = max(float(expected), 1e-30)
    assert abs(float(measured.sum()) - scale) <= tolerance * scale, fmt.name
    assert torch.allclose(found.objective, measured, rtol=1e-3, atol=1e-5 * scale), fmt.name
    scales = found.scales.repeat_interleave(fmt.columns_per_scale(weight.shape[1]), 0)
    rebuilt = found.centred * scales[: weight.shape[1]]
    assert torch.allclose(rebuilt.T, made, atol=1e-6), fmt.name


def check_unquantized() -> None:
    """bf16 stores the weights themselves, rounded to bfloat16."""
    fmt = parse_format("bf16")
    for rows, cols in SHAPES:
        weight = draw_weights(rows, cols)
        packed = pack_bf16(weight)
        check_packed(packed, "matrix", "bf16")
        assert 8 * packed.n_bytes == fmt.storage_bits(rows, cols)
        assert torch.equal(packed.dequantize(), weight.to(torch.bfloat16).to(torch.float32))


CHECKS: tuple[Callable[[Format, ScaleSearch], None], ...] = (
    check_storage,
    check_dequantization,
    check_grid,
    check_zeros,
    check_extremes,
    check_identity_hessian,
    check_bad_numbers,
    check_error,
    check_engine,
)
"""What every quantized format promises, with either way to choose scales."""


def _identity_gptq(weight: Tensor, fmt: Format, search: ScaleSearch) -> RoundedBatch:
    return quantize_gptq(weight[None], _identity_factor(weight.shape[-1]), fmt, search)


@cache
def _identity_factor(n_cols: int) -> Factor:
    return plain_factorize(torch.eye(n_cols)[None], 0.01)


def _assert_same_bits(found: Tensor, expected: Tensor, fmt: Format) -> None:
    same = torch.equal(found.view(torch.int32), expected.contiguous().view(torch.int32))
    assert same, f"{fmt.name}: packing changed {int((found != expected).sum())} weights"


def _assert_valid_scales(rounded: RoundedBatch) -> None:
    assert bool(torch.isfinite(rounded.scales).all()), rounded.format.name
    fmt, scales = rounded.format, rounded.scales
    # Groups of zeros have a scale of zero where codes have no zero of their own.
    if fmt.kind == "int1":
        assert bool((scales >= 0).all()), fmt.name
    elif not fmt.is_table:
        assert bool((scales != 0).all()), fmt.name
    if rounded.super_scales is not None:
        supers = rounded.super_scales
        assert torch.equal(supers.to(torch.float16).to(torch.float32), supers), fmt.name
        assert bool((supers != 0).all()), fmt.name
        per_super = fmt.super_size // fmt.group_size
        ratios = scales / supers.repeat_interleave(per_super, -1)[..., : scales.shape[-1]]
        assert torch.equal(ratios, ratios.round()), fmt.name
        assert float(ratios.min()) >= -32 and float(ratios.max()) <= 31, fmt.name
    elif fmt.has_groups:
        stored = scales.to(torch.float16).to(torch.float32)
        assert torch.equal(stored, scales), fmt.name
