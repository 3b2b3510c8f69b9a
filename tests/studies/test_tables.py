"""Aligned text and Markdown of the same rows."""

from alphaquant.studies.tables import aligned, columns, markdown, narrowed, with_error


def test_worked_example_is_aligned() -> None:
    assert aligned(("a", "name"), [["10", "x"]], left=("name",)) == " a  name\n10  x"


def test_worked_example_of_a_narrow_screen() -> None:
    head, rows = ("a", "bb"), [["1", "2"]]
    assert [narrowed(head, rows, width, ("bb",)) for width in (None, 5, 4)] == [
        ("a", "bb"),
        ("a", "bb"),
        ("a",),
    ]
    assert columns(head, rows, ("bb",)) == [["2"]]


def test_wide_cells_widen_their_column_and_no_line_ends_in_spaces() -> None:
    text = aligned(("a", "b"), [["long", "1"], ["x", ""]], left=("a", "b"))
    assert text == "a     b\nlong  1\nx"


def test_markdown_has_a_rule_under_its_head() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_error_has_the_decimals_of_its_value() -> None:
    assert with_error(0.0016494, 0.00033512) == "0.001649 +- 0.000335"
