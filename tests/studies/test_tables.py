"""Aligned text and Markdown of the same rows."""

from alphaquant.studies.tables import aligned, markdown, with_error


def test_worked_example_is_aligned() -> None:
    assert aligned(("a", "name"), [["10", "x"]], left=("name",)) == " a  name\n10  x"


def test_wide_cells_widen_their_column_and_no_line_ends_in_spaces() -> None:
    text = aligned(("a", "b"), [["long", "1"], ["x", ""]], left=("a", "b"))
    assert text == "a     b\nlong  1\nx"


def test_markdown_has_a_rule_under_its_head() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_error_has_the_decimals_of_its_value() -> None:
    assert with_error(0.0016494, 0.00033512) == "0.001649 +- 0.000335"
