"""Budgets: how they are written, what they allow, and how unreachable ones are refused."""

import re

import pytest

from alphaquant.errors import BudgetError
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.budget import (
    Budget,
    achievable_range,
    check_reachable,
    counting_rule,
    idle_text,
    parse_budget,
    parse_byte_budget,
)
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import PROFILES, units_of
from alphaquant.spaces.units import Inventory, Kept, Matrix

TOY = Inventory(
    "toy",
    (Matrix("m.q_proj", 1000, 1000, "attention", 0),),
    (Kept("embed.weight", 250_000, 500_000),),
)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4.25bits", "bits", 4.25),
        ("4.25", "bits", 4.25),
        ("4.25bpw", "bits", 4.25),
        ("4.25bpw-file", "file_bits", 4.25),
        (" 6 BPW-File", "file_bits", 6.0),
        ("4.25 BPW", "bits", 4.25),
        (" 3bits ", "bits", 3.0),
        ("1 bit", "bits", 1.0),
        (".5", "bits", 0.5),
        ("4.", "bits", 4.0),
        ("13GiB", "bytes", 13 * 2**30),
        ("13gib", "bytes", 13 * 2**30),
        ("13GB", "bytes", 13e9),
        ("3.9GB", "bytes", 3_900_000_000),
        ("700MiB", "bytes", 700 * 2**20),
        ("700MB", "bytes", 700e6),
        ("12KiB", "bytes", 12288),
        ("12kB", "bytes", 12000),
        ("1.5TiB", "bytes", 1.5 * 2**40),
        ("2TB", "bytes", 2e12),
        ("4096 bytes", "bytes", 4096),
        ("1096192B", "bytes", 1096192),
    ],
)
def test_a_budget_is_read(text: str, kind: str, value: float) -> None:
    assert parse_budget(text) == Budget(text.strip(), kind, value)


@pytest.mark.parametrize(
    "text",
    ["", "bits", "0", "0.0GB", "-4bits", "4,25", "4.25 bits per weight", "13G", "4b", "inf", "nan"]
    + ["1e3", "4.2.5", "4bit8", "9" * 400],
)
def test_other_texts_are_refused_with_what_is_possible(text: str) -> None:
    possible = (
        "write bits per weight (4.25bits, 4.25bpw, 4.25), bits per weight of the whole "
        "checkpoint (4.25bpw-file) or its size"
    )
    with pytest.raises(BudgetError, match=re.escape(f"{text!r}; {possible}")):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("4.25bits", 4_250_000),  # the worked example of the file header
        ("1MB", 4_000_000),
        ("6.4bpw-file", 4_000_000),
        ("500kB", 0),  # exactly the kept tensors
        ("4.3500001", 4_350_000),  # rounded down
        ("16", 16_000_000),
        ("100", 100_000_000),
    ],
)
def test_a_budget_limits_the_bits_of_quantizable_matrices(text: str, bits: int) -> None:
    assert parse_budget(text).limit_bits(TOY) == bits


@pytest.mark.parametrize(
    ("texts", "canonical"),
    [
        (("4.25bits", " 4.25 BIT", "4.25", "4.250bpw"), "4.25bits"),
        (("3", "3.0bits"), "3bits"),
        (("3bpw-file", "3.0BPW-FILE"), "3bpw-file"),
        (("13GiB", "13 gib", "13312MiB", "13958643712bytes"), "13GiB"),
        (("1.5GiB",), "1536MiB"),
        (("13GB", "13000MB"), "13GB"),
        (("1025bytes",), "1025bytes"),
        (("1000TB", "1000000gb"), "1000TB"),
        (("0.5kb",), "500bytes"),
        (("1.5bytes",), "1.5bytes"),
    ],
)
def test_equal_budgets_have_one_text(texts: tuple[str, ...], canonical: str) -> None:
    for text in texts:
        budget = parse_budget(text)
        assert budget.canonical == canonical, text
        again = parse_budget(canonical)
        assert (again.kind, again.value) == (budget.kind, budget.value)


def test_a_decimal_budget_is_exact() -> None:
    inventory = Inventory("toy", (Matrix("m.q_proj", 10, 10, "attention", 0),))
    assert int(4.35 * 100) == 434  # what doubles would give
    assert parse_budget("4.35").limit_bits(inventory) == 435


def test_kept_tensors_above_the_budget_are_an_error() -> None:
    with pytest.raises(BudgetError, match=r"1 tensors .* take 500000 bytes; give a larger budget"):
        parse_budget("499999 bytes").limit_bits(TOY)


@pytest.mark.parametrize("name", ["int3-g64-asym", "mxfp4", "int5-g128-asym"])
def test_a_budget_in_bytes_admits_exactly_the_checkpoint_of_its_size(
    deepseek: Inventory, name: str
) -> None:
    assignment = uniform_assignment(deepseek, name)
    n_bytes = assignment.count_bits(deepseek).checkpoint_bytes
    bits = assignment.storage_bits(deepseek)
    assert bits <= parse_budget(f"{n_bytes}bytes").limit_bits(deepseek)
    assert bits > parse_budget(f"{n_bytes - 1}bytes").limit_bits(deepseek)


def test_the_range_is_that_of_the_smallest_and_largest_formats(olmoe: Inventory) -> None:
    units = units_of(olmoe, PROFILES["vllm"])
    low, high = achievable_range(units, ["int8-g128", "int4-g128", "mxfp4"])
    assert low == olmoe.storage_bits(parse_format("int4-g128"))
    assert high == olmoe.storage_bits(parse_format("int8-g128"))


def test_the_range_takes_the_smallest_format_of_each_unit() -> None:
    narrow = Matrix("narrow", 64, 8, "dense", 0)  # one scale of 16 bits for 8 weights
    wide = Matrix("wide", 64, 512, "dense", 0)
    units = units_of(Inventory("toy", (narrow, wide)), PROFILES["any"])
    low, high = achievable_range(units, ["int4-g128", "mxfp4"])
    assert low == 64 * (32 + 8) + 64 * (4 * 512 + 4 * 16)
    assert high == 64 * (32 + 16) + 64 * (4 * 512 + 16 * 8)


def test_a_budget_below_the_range_is_refused_with_the_range() -> None:
    text = (
        "budget 2bits cannot be reached; the formats at hand reach from 2.251 bits per weight "
        "(781251 bytes of checkpoint) to 8 bits per weight (1500000 bytes = 1.44 MiB of "
        "checkpoint); give a larger budget, or smaller formats with --formats"
    )
    with pytest.raises(BudgetError, match=re.escape(text)):
        check_reachable(parse_budget("2bits"), TOY, 2_250_001, 8_000_000)


def test_the_smallest_budget_of_the_message_can_be_reached() -> None:
    check_reachable(parse_budget("2.251bits"), TOY, 2_250_001)
    check_reachable(parse_budget("781251bytes"), TOY, 2_250_001)
    with pytest.raises(BudgetError, match="reach from 2.251 bits per weight .* checkpoint.; give"):
        check_reachable(parse_budget("781250bytes"), TOY, 2_250_001)


def test_a_budget_above_the_range_is_fine() -> None:
    check_reachable(parse_budget("40bits"), TOY, 1, 2)


def test_the_counting_rule_is_one_sentence() -> None:
    rule = counting_rule()
    assert rule.count(". ") == 0
    assert rule.endswith(".")
    for word in ("scales", "zero points", "padding", "routers", "lm_head", "checkpoint"):
        assert word in rule


def test_a_budget_of_bytes_alone_has_its_own_words() -> None:
    assert parse_byte_budget("1.5KiB", "active budget") == 1536
    for text in ("foo", "4.25bits", "0.5bytes"):
        with pytest.raises(BudgetError, match=f"the active budget '{text}'; write bytes, such as"):
            parse_byte_budget(text, "active budget")


def test_a_budget_above_the_largest_formats_binds_nothing() -> None:
    assert idle_text(parse_budget("8bits"), TOY, 8_000_000) is None
    said = idle_text(parse_budget("8.1"), TOY, 8_000_000)
    assert said is not None
    assert said.startswith("budget 8.1 binds nothing: the largest formats at hand take 8 bits per")
