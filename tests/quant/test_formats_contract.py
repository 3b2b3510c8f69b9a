"""The shipped contract of formats, over every format."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alphaquant.quant.rounding import quantize_rtn
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.scale_search import ScaleSearch
from alphaquant.testing.formats import (
    CHECKS,
    FORMATS,
    QUANTIZED,
    SEARCHES,
    check_dequantization,
    check_storage,
    check_unquantized,
    draw_weights,
)

FAMILIES = {
    "int-g128": [f"int{b}-g128" for b in (1, 2, 3, 4, 5, 6, 8)],
    "int-g32": [f"int{b}-g32" for b in (1, 2, 3, 4, 5, 6, 8)],
    "int-g256": [f"int{b}-g256" for b in (1, 2, 3, 4, 5, 6, 8)],
    "int-row": [f"int{b}-row" for b in (1, 2, 3, 4, 5, 6, 8)],
    "int-g64-asym": [f"int{b}-g64-asym" for b in (2, 3, 4, 5, 6, 8)],
    "fp-g128": ["fp4-e2m1-g128", "fp6-e3m2-g128", "fp8-e4m3-g128"],
    "mxfp": ["mxfp4", "mxfp6", "mxfp8"],
    "mxfp wide mantissa": ["mxfp4", "mxfp6-e2m3", "mxfp8"],
}

LONG = (
    *("int1-row", "int4-row", "int4-row-asym", "fp8-e4m3-row"),
    *("int4-g64", "int2-g64-asym", "fp4-e2m1-g64"),
)
"""Formats of long groups that stand for the others."""

NEW = ("nl2-g64", "nl4-row", "int2-g64-s256", "int3-g32-s256", "nl3-g32-s256")
"""Tables and super-blocks that run with the default search; the others are slow."""

STORAGE = (check_storage, check_dequantization)


def is_alike(name: str) -> bool:
    """Whether groups are long: to all but storage they are as those of 32 and of `LONG`."""
    return (parse_format(name).group_size >= 64 or "-row" in name) and name not in LONG


def is_dear(name: str, search: str) -> bool:
    """Whether a table or super-block is as another one, of which each search runs."""
    fmt = parse_format(name)
    is_new = fmt.super_size > 0 or fmt.is_table
    return is_new and (search != "hessian" or name not in NEW)


def in_parts() -> Iterator[Any]:
    """Every format with every search; slow are searches, the dear part, where groups are long."""
    for name in QUANTIZED:
        for search in SEARCHES:
            is_slow = search != "minmax" and is_alike(name) or is_dear(name, search)
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(name, search, id=f"{name}-{search}", marks=marks)


@pytest.mark.parametrize("name", [n for n in QUANTIZED if is_alike(n) or is_dear(n, "hessian")])
def test_a_format_that_is_as_others_stores_what_it_counts(name: str) -> None:
    for check in STORAGE:  # with the other searches in the slow part of the contract
        check(parse_format(name), "minmax")


@pytest.mark.parametrize(("name", "search"), [*in_parts()])
def test_a_format_keeps_its_contract(name: str, search: ScaleSearch) -> None:
    for check in CHECKS:
        check(parse_format(name), search)


def test_the_suite_has_every_kind_and_runs_checks_on_all_but_bf16() -> None:
    assert {parse_format(n).kind for n in FORMATS} >= {
        *("int1", "int2", "int3", "int4", "int5", "int6", "int8", "fp4", "fp6", "fp8"),
        *("mxfp4", "mxfp6", "mxfp8", "nvfp4", "bf16", "nl2", "nl3", "nl4"),
    }
    assert set(FORMATS) - set(QUANTIZED) == {"bf16"}
    assert len(CHECKS) == 9
    check_unquantized()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_falls_with_every_bit_of_a_family(family: str, search: str) -> None:
    weight = draw_weights(64, 256, seed=5)[None]
    errors = [
        float((quantize_rtn(weight, parse_format(n), search).weights() - weight).square().sum())
        for n in FAMILIES[family]
    ]
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)


def test_the_suite_has_every_integer_with_every_group() -> None:
    groups = ("g32", "g64", "g128", "g256", "row")
    wanted = {f"int{bits}-{g}" for bits in (1, 2, 3, 4, 5, 6, 8) for g in groups}
    wanted |= {f"int{bits}-{g}-asym" for bits in (2, 3, 4, 5, 6, 8) for g in groups}
    assert wanted <= set(FORMATS)
    assert "int1-g128-asym" not in FORMATS


def test_small_blocks_beat_one_scale_per_row() -> None:
    weight = draw_weights(64, 256, seed=5)[None]

    def error(name: str) -> float:
        made = quantize_rtn(weight, parse_format(name), "minmax").weights()
        return float((made - weight).square().sum())

    assert error("mxfp4") < error("fp4-row")
    assert error("int4-g32") < error("int4-g64") < error("int4-g128") < error("int4-row")
    assert error("int1-g32") < error("int1-g64") < error("int1-g128") < error("int1-row")


def test_a_check_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break a step of packing on purpose: one bit of one code."""
    from alphaquant.quant import matrix
    from alphaquant.testing import formats

    honest = matrix.pack_codes

    def flip(codes: torch.Tensor, bits: int) -> torch.Tensor:
        packed = honest(codes, bits).clone()
        packed.view(-1)[0] ^= 1
        return packed

    monkeypatch.setattr(matrix, "pack_codes", flip)
    with pytest.raises(AssertionError, match="packing changed 1 weights"):
        formats.check_storage(parse_format("int4-g32"), "minmax")
