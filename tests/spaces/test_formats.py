"""Formats: names, bit counts by hand, and what is refused."""

import re
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import FormatError
from alphaquant.spaces.formats import (
    ACTIVATION_KINDS,
    ASYMMETRIC_KINDS,
    BF16,
    ELEMENTS,
    FORMAT_KINDS,
    GGML_TWINS,
    PER_ROW,
    SUPER_KINDS,
    SUPER_SIZE,
    Format,
    can_be_super,
    elements_of,
    make_format,
    parse_format,
)

KINDS = [
    *("int1", "int2", "int3", "int4", "int5", "int6", "int8"),
    *("nl2", "nl3", "nl4"),
    *("fp4", "fp6", "fp8"),
    *("mxfp4", "mxfp6", "mxfp8"),
    "nvfp4",
    *("iq2_xxs", "iq2_xs", "iq2_s", "q2_k", "iq3_xxs", "iq3_s", "q3_k"),
    *("iq4_xs", "q4_k", "iq4_nl", "q4_1", "q5_k", "q5_1", "q6_k"),
    "bf16",
]


@st.composite
def any_format(draw: st.DrawFn) -> Format:
    """A format of any kind, group size, symmetry and element."""
    kind = draw(st.sampled_from(FORMAT_KINDS))
    group_size = draw(st.sampled_from([None, PER_ROW, 8, 32, 48, 64, 128, 256, 4096]))
    symmetric = kind not in ASYMMETRIC_KINDS or draw(st.booleans())
    element = draw(st.sampled_from([None, *elements_of(kind)]))
    can = can_be_super(kind, group_size, symmetric=symmetric)
    super_size = draw(st.sampled_from([0, SUPER_SIZE])) if can else 0
    return make_format(
        kind, group_size, symmetric=symmetric, element=element, super_size=super_size
    )


def test_the_kinds_are_the_13_promised_ones_int1_int5_tables_and_llama_cpp_s() -> None:
    assert list(FORMAT_KINDS) == KINDS
    assert list(ACTIVATION_KINDS) == [*KINDS[1:7], *KINDS[10:17], "bf16"]
    assert set(SUPER_KINDS) == {"int2", "int3", "int4", "nl2", "nl3", "nl4"}
    assert list(ASYMMETRIC_KINDS) == KINDS[1:7]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_constructible_and_keeps_its_kind(kind: str) -> None:
    assert make_format(kind).kind == kind
    assert parse_format(kind) == make_format(kind)


@given(any_format())
def test_a_name_reads_back_as_its_format(fmt: Format) -> None:
    assert parse_format(fmt.name) == fmt


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("int1", "int1-g128"),
        ("int1-row", "int1-row"),
        ("int4", "int4-g128"),
        ("int4-asym", "int4-g128-asym"),
        ("int8-row", "int8-row"),
        ("int3-g64-asym", "int3-g64-asym"),
        ("nl4", "nl4-g128"),
        ("nl2-row", "nl2-row"),
        ("nl3-g32-s256", "nl3-g32-s256"),
        ("fp4", "fp4-e2m1-g128"),
        ("fp6", "fp6-e3m2-g128"),
        ("fp6-e2m3-g64", "fp6-e2m3-g64"),
        ("fp8", "fp8-e4m3-g128"),
        ("fp8-e5m2-row", "fp8-e5m2-row"),
        ("mxfp4-e2m1", "mxfp4"),
        ("mxfp6", "mxfp6"),
        ("mxfp6-e2m3", "mxfp6-e2m3"),
        ("mxfp8-e4m3", "mxfp8"),
        ("mxfp8-e5m2", "mxfp8-e5m2"),
        ("nvfp4-e2m1", "nvfp4"),
        ("bf16", "bf16"),
    ],
)
def test_absent_parts_of_a_name_have_defaults(short: str, name: str) -> None:
    assert parse_format(short).name == name


@pytest.mark.parametrize(
    ("name", "bits_per_weight"),
    [
        ("int1-g32", 1.5),
        ("int1-g64", 1.25),
        ("int1-g128", 1.125),
        ("int1-g256", 1.0625),
        ("int2-g256-asym", 2 + 18 / 256),
        ("int4-g128", 4.125),
        ("int4-g64", 4.25),
        ("int4-g32", 4.5),
        ("int4-g128-asym", 4.15625),
        ("int2-g64-asym", 2 + 18 / 64),
        ("int3-g128-asym", 3 + 19 / 128),
        ("int3-g64-asym", 3 + 19 / 64),
        ("int5-g128-asym", 5 + 21 / 128),
        ("int6-g128", 6.125),
        ("int8-g128", 8.125),
        ("nl4-g64", 4.25),
        ("int3-g32-s256", 3.25),
        ("int3-g16-s256", 3.4375),
        ("nl2-g64-s256", 2 + 6 / 64 + 16 / 256),
        ("fp4-g128", 4.125),
        ("fp6-g64", 6.25),
        ("fp8-g128", 8.125),
        ("mxfp4", 4.25),
        ("mxfp6", 6.25),
        ("mxfp8", 8.25),
        ("bf16", 16.0),
    ],
)
def test_bits_per_weight_are_those_of_the_capabilities_table(
    name: str, bits_per_weight: float
) -> None:
    rows, cols = 256, 1024  # every group divides the inputs, every stream ends on a byte
    assert parse_format(name).storage_bits(rows, cols) == bits_per_weight * rows * cols
    assert parse_format(name).nominal_bits == bits_per_weight


def test_nvfp4_takes_4_5_bits_and_one_global_scale() -> None:
    assert parse_format("nvfp4").storage_bits(256, 1024) == 4.5 * 256 * 1024 + 32
    assert parse_format("nvfp4").nominal_bits == 4.5


def test_the_worked_example_of_the_header_is_true() -> None:
    fmt = parse_format("int3-g64-asym")
    assert fmt.row_bytes(128) == 48
    assert fmt.n_groups(128) == 2
    assert fmt.zero_bytes(256, 128) == 192
    assert fmt.storage_bits(256, 128) == 108032 == 8 * (256 * 48 + 256 * 2 * 2 + 192)
    supers = parse_format("int3-g32-s256")
    counts = supers.row_bytes(128), supers.sub_bytes(128), supers.n_supers(128)
    assert counts == (48, 3, 1) and supers.storage_bits(256, 128) == 8 * 13568
    assert supers.nominal_bits == supers.storage_bits(1, 256) / 256 == 3.25
    signs = parse_format("int1-g64")
    assert (signs.row_bytes(128), signs.n_groups(128), signs.zero_bytes(256, 128)) == (16, 2, 0)
    assert signs.storage_bits(256, 128) == 40960 == 8 * 5120


@pytest.mark.parametrize(
    ("name", "rows", "cols", "n_bytes", "why"),
    [
        # codes + scales + zeros + global, in bytes
        ("int1-g128", 3, 1, 3 * 1 + 3 * 2, "one bit is padded to a byte"),
        ("int1-g256", 2, 523, 2 * 66 + 2 * 3 * 2, "two whole groups and one of 11"),
        ("int1-row", 7, 33, 7 * 5 + 7 * 2, "one scale per row"),
        ("int3-g128", 1, 1, 1 + 2, "3 bits are padded to a byte"),
        ("int3-g128", 5, 11, 5 * 5 + 5 * 2, "33 bits a row are padded to 5 bytes"),
        ("int4-g64", 3, 65, 3 * 33 + 3 * 2 * 2, "a tail group of one input has its own scale"),
        ("int4-g64-asym", 3, 65, 3 * 33 + 3 * 2 * 2 + 3, "6 zeros of 4 bits are 3 bytes"),
        ("int3-g64-asym", 3, 65, 3 * 25 + 3 * 2 * 2 + 3, "6 zeros of 3 bits, 18, are 3 bytes"),
        ("int8-row", 7, 10944, 7 * 10944 + 7 * 2, "one scale per row"),
        ("int8-row-asym", 7, 33, 7 * 33 + 7 * 2 + 7, "one zero per row"),
        ("int4-g128", 2, 10944, 2 * 5472 + 2 * 86 * 2, "85 whole groups and one of 64"),
        ("int4-g128", 2, 64, 2 * 32 + 2 * 2, "a group wider than the matrix"),
        ("nl3-g32", 2, 33, 2 * 13 + 2 * 2 * 2, "as integers of three bits"),
        ("nl4-g16-s256", 3, 300, 3 * 150 + 3 * 15 + 3 * 2 * 2, "19 scales of 6 bits are 15 bytes"),
        ("int2-g64-s256", 2, 1, 2 * 1 + 2 * 1 + 2 * 2, "a scale is padded to a byte"),
        ("fp6-e3m2-g32", 2, 33, 2 * 25 + 2 * 2 * 2, "198 bits a row are 25 bytes"),
        ("mxfp4", 2, 33, 2 * 17 + 2 * 2, "one byte per block"),
        ("nvfp4", 2, 17, 2 * 9 + 2 * 2 + 4, "blocks of 16 and a float32"),
        ("bf16", 3, 5, 30, "two bytes per weight"),
    ],
)
def test_storage_is_counted_to_the_byte(
    name: str, rows: int, cols: int, n_bytes: int, why: str
) -> None:
    assert parse_format(name).storage_bits(rows, cols) == 8 * n_bytes, why


@given(fmt=any_format(), rows=st.integers(1, 300), cols=st.integers(1, 300))
def test_storage_is_whole_bytes_and_never_below_the_codes(
    fmt: Format, rows: int, cols: int
) -> None:
    bits = fmt.storage_bits(rows, cols)
    assert bits % 8 == 0
    assert bits >= rows * cols * fmt.bits
    if not fmt.is_ggml:
        assert fmt.row_bytes(cols) == ceil(cols * fmt.bits / 8)


@pytest.mark.parametrize("name", ["int7", "int4_g128", "INT4", "int4-64", "", "mxfp4-asym-g32"])
def test_an_unknown_name_is_refused_with_the_valid_kinds(name: str) -> None:
    with pytest.raises(FormatError, match=re.escape(", ".join(KINDS))):
        parse_format(name)


def test_an_unknown_kind_is_refused_with_the_valid_kinds() -> None:
    with pytest.raises(FormatError, match=re.escape(", ".join(KINDS))):
        make_format("int16")
    with pytest.raises(FormatError, match=re.escape(", ".join(KINDS))):
        elements_of("int16")


@pytest.mark.parametrize("name", ["mxfp4-g64", "mxfp6-row", "nvfp4-g32", "bf16-g128"])
def test_a_name_cannot_change_a_fixed_block(name: str) -> None:
    with pytest.raises(FormatError, match="has a fixed block size; drop the group"):
        parse_format(name)


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp6", "mxfp8"])
def test_a_configured_group_size_does_not_change_a_fixed_block(kind: str) -> None:
    assert make_format(kind, 128) == make_format(kind)
    assert make_format(kind, 128).group_size == 32
    assert make_format("nvfp4", 128).group_size == 16


@pytest.mark.parametrize("group_size", [0, 1, 7, -2, -128])
def test_a_group_size_below_8_is_refused(group_size: int) -> None:
    with pytest.raises(FormatError, match=f"int4: group size {group_size} is not possible; use"):
        make_format("int4", group_size)


@pytest.mark.parametrize("kind", ["int1", *(k for k in KINDS if not k.startswith("int"))])
def test_only_integers_of_two_bits_and_more_can_be_asymmetric(kind: str) -> None:
    message = f"{kind} has no zero point; only int formats of 2 bits and more .* or use int2, int3"
    with pytest.raises(FormatError, match=message):
        make_format(kind, symmetric=False)


@pytest.mark.parametrize(
    "name",
    [
        "int3-g128-s256",  # a group that has none
        *("int3-s256", "int3-row-s256", "int3-g32-s128", "int3-g32-s256-asym"),
        *("int5-g32-s256", "fp4-e2m1-g32-s256", "mxfp4-s256"),
    ],
)
def test_a_super_block_that_cannot_be_is_refused_with_those_that_can(name: str) -> None:
    with pytest.raises(FormatError, match="256 inputs, group sizes 16, 32, 64, and kinds int2"):
        parse_format(name)


def test_an_asymmetric_sign_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="int1 has no zero point"):
        parse_format("int1-g128-asym")


@pytest.mark.parametrize(
    ("kind", "element", "change"),
    [
        ("int4", "e2m1", "drop the element"),
        ("bf16", "e4m3", "drop the element"),
        ("nvfp4", "e2m3", "use e2m1"),
        ("fp6", "e4m3", "use e3m2 or e2m3"),
        ("mxfp8", "e2m1", "use e4m3 or e5m2"),
        ("fp4", "e9m9", "use e2m1"),
    ],
)
def test_an_element_that_does_not_fit_is_refused_with_those_that_do(
    kind: str, element: str, change: str
) -> None:
    with pytest.raises(FormatError, match=f"{kind} cannot store {element} elements; {change}"):
        make_format(kind, element=element)


@pytest.mark.parametrize(
    ("element", "bits", "bias", "emax", "max_value"),
    [
        ("e2m1", 4, 1, 2, 6.0),
        ("e2m3", 6, 1, 2, 7.5),
        ("e3m2", 6, 3, 4, 28.0),
        ("e4m3", 8, 7, 8, 448.0),
        ("e5m2", 8, 15, 15, 57344.0),
    ],
)
def test_elements_have_the_constants_of_the_ocp_tables(
    element: str, bits: int, bias: int, emax: int, max_value: float
) -> None:
    found = ELEMENTS[element]
    assert (found.bits, found.bias, found.emax, found.max_value) == (bits, bias, emax, max_value)


def test_bf16_is_the_only_format_that_does_not_quantize() -> None:
    assert [k for k in KINDS if not make_format(k).is_quantized] == ["bf16"]
    assert BF16.n_groups(128) == 0
    assert BF16.shared.scale_bits == 0


def test_a_type_of_llama_cpp_has_the_bits_of_its_blocks_where_they_fit() -> None:
    fmt = parse_format("q4_k")
    assert (fmt.nominal_bits, fmt.has_groups, fmt.is_ggml) == (4.5, False, True)
    assert fmt.storage_bits(256, 256) == 8 * 256 * 144  # the header's example
    assert [fmt.fits(cols) for cols in (256, 128, 1408)] == [True, False, False]
    assert parse_format("iq4_nl").fits(1408)
    assert parse_format("int4-g128").fits(1)


def test_a_type_that_is_ours_goes_by_our_name() -> None:
    for name, ours in GGML_TWINS.items():
        with pytest.raises(FormatError, match=f"'{name}' is {ours} here.*: use {ours}"):
            parse_format(name)


@pytest.mark.parametrize("change", [{"symmetric": False}, {"element": "e2m1"}])
def test_a_type_of_llama_cpp_has_no_variants(change: Any) -> None:
    with pytest.raises(FormatError, match="q4_k (has no zero point|cannot store e2m1)"):
        make_format("q4_k", **change)
