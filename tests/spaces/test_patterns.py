"""Globs: what they match, exactly, and how malformed ones are refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaquant.errors import ConfigError
from alphaquant.spaces.patterns import (
    compile_pattern,
    escape_pattern,
    literal_start,
    matches,
    select_names,
)

PREFIX = "model.layers.3"


def test_a_character_class_takes_one_digit() -> None:
    for expert in range(64):
        name = f"{PREFIX}.mlp.experts.{expert}.up_proj"
        assert matches("*.mlp.experts.[1-7].*", name) == (1 <= expert <= 7), name


@pytest.mark.parametrize("expert", [0, 7, 8, 9, 10, 59, 60, 63, 64, 99, 108, 163, 800])
def test_a_numeric_range_takes_whole_numbers(expert: int) -> None:
    name = f"{PREFIX}.mlp.experts.{expert}.up_proj"
    assert matches("*.mlp.experts.{8..63}.*", name) == (8 <= expert <= 63)


GATES = {
    # name below model.layers.3: matched by *.mlp.gate, *.mlp.*gate, *.mlp.gate*
    ".mlp.gate": (True, True, True),
    ".mlp.shared_expert_gate": (False, True, False),
    ".mlp.gate_proj": (False, False, True),
    ".mlp.experts.3.gate_proj": (False, False, False),
}


@pytest.mark.parametrize("name", GATES)
def test_the_three_spellings_of_gate_differ_as_documented(name: str) -> None:
    patterns = ("*.mlp.gate", "*.mlp.*gate", "*.mlp.gate*")
    assert tuple(matches(pattern, PREFIX + name) for pattern in patterns) == GATES[name]


@pytest.mark.parametrize(
    ("layer", "is_match"), [(1, True), (10, False), (11, False), (0, False), (21, False)]
)
def test_layer_1_is_not_layer_10(layer: int, is_match: bool) -> None:
    assert matches("model.layers.1.*", f"model.layers.{layer}.self_attn.q_proj") == is_match


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("q_proj", "model.q_proj", False),  # anchored at the start
        ("model", "model.q_proj", False),  # anchored at the end
        ("model.q_proj", "modelXq_proj", False),  # a dot is a dot
        ("*.Q_proj", "model.q_proj", False),  # case-sensitive
        ("*", "", True),  # a star takes nothing too
        ("a*c", "a.b.c", True),  # a star crosses dots
        ("a**c", "abc", True),  # two stars are one
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("[!q]_proj", "k_proj", True),
        ("[!q]_proj", "q_proj", False),
        ("[!q-v]_proj", "r_proj", False),
        ("[]]", "]", True),  # first in a set, ] is a member
        ("[!]]", "]", False),
        ("[^a]", "^", True),  # only ! negates
        ("[^a]", "b", False),
        ("[a-]", "-", True),
        ("[--/]", ".", True),  # a range that starts at -
        ("[*]", "*", True),
        ("[*]", "x", False),
        ("[\\]", "\\", True),  # a backslash is a character
        ("a|b", "a", False),  # no regular expression comes through
        ("(a)+", "(a)+", True),
        ("a\n*", "a\nb", True),
        ("{0..0}", "0", True),
        ("{0..12}", "012", False),  # no leading zeros
        ("{0..12}", "08", False),
        ("{8..63}", "108", False),  # a whole run of digits, not its end
        ("*{8..63}*", "108", False),
        ("*{8..63}*", "layer8", True),
    ],
)
def test_a_pattern_matches(pattern: str, name: str, is_match: bool) -> None:
    assert matches(pattern, name) is is_match


@given(low=st.integers(0, 3000), size=st.integers(0, 3000), number=st.integers(0, 7000))
def test_a_numeric_range_holds_exactly_its_numbers(low: int, size: int, number: int) -> None:
    pattern = f"{{{low}..{low + size}}}"
    assert matches(pattern, str(number)) == (low <= number <= low + size)
    assert matches(pattern, str(low))
    assert matches(pattern, str(low + size))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 127), (8, 63), (9, 10), (95, 1203)])
def test_a_numeric_range_has_no_number_too_many(low: int, high: int) -> None:
    found = [n for n in range(2000) if matches(f"{{{low}..{high}}}", str(n))]
    assert found == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("", "the pattern is empty"),
        ("experts.[1-7", "'experts.[1-7', character 9: this [ is not closed; close it with ]"),
        ("[", "this [ is not closed"),
        ("[]", "this [ is not closed"),
        ("[!]", "this [ is not closed"),
        ("[7-1]", "the range 7-1 runs backwards; write 1-7"),
        ("{9..3}", "the range {9..3} runs backwards; write {3..9}"),
        ("{8..63", "write two whole numbers without leading zeros, like {8..63}"),
        ("{08..63}", "without leading zeros"),
        ("{a..b}", "this { opens no numeric range"),
        ("{8-63}", "this { opens no numeric range"),
        ("{8,9}", "this { opens no numeric range"),
        ("{}", "this { opens no numeric range"),
        ("a}", "nothing opens this }; write [}]"),
        ("a]", "nothing opens this ]; write []]"),
    ],
)
def test_a_malformed_pattern_is_refused_with_what_to_write(pattern: str, text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        compile_pattern(pattern)


@given(st.text(min_size=1))
def test_an_escaped_name_matches_itself_alone(name: str) -> None:
    pattern = escape_pattern(name)
    assert matches(pattern, name)
    assert not matches(pattern, name + "x")
    assert not matches(pattern, "x" + name)


@pytest.mark.parametrize(
    ("pattern", "start"),
    [("*.gate", ""), ("model.layers.{1..3}.x", "model.layers."), ("a.b", "a.b"), ("a[b]", "a")],
)
def test_the_literal_start_ends_at_the_first_special_character(pattern: str, start: str) -> None:
    assert literal_start(pattern) == start


def test_selecting_by_literal_start_finds_what_trying_every_name_finds() -> None:
    names = sorted(f"m.{i}.{p}" for i in range(25) for p in ("q", "gate", "gate_proj"))
    for pattern in ("*", "m.*", "m.1.*", "m.1?.*", "m.2.gate", "m.{3..21}.gate*", "x*", "*.q"):
        expected = [name for name in names if matches(pattern, name)]
        assert select_names(pattern, names) == expected, pattern
