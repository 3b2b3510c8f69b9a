"""Aligned text and Markdown of the same rows."""

from alphaquant.reports.tables import (
    aligned,
    columns,
    fitted,
    is_wider,
    markdown,
    narrowed,
    with_error,
    wrapped,
)


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


def test_worked_example_of_a_table_that_is_continued_below() -> None:
    head, rows = ("a", "bb", "ccc"), [["1", "2", "3"]]
    assert fitted(head, rows, 7) == "a  bb\n1   2\na  ccc\n1    3"
    assert fitted(head, rows, 7, ("bb",)) == "a  ccc\n1    3"
    assert fitted(head, rows, 10) == fitted(head, rows, None) == aligned(head, rows)
    assert fitted(head, rows, 2).split() == [*"a", "bb", *"12a", "ccc", *"13"]
    assert is_wider("ab\nabc", 2) and not is_wider("ab", 2) and not is_wider("ab", None)


def test_only_lines_that_do_not_fit_are_wrapped() -> None:
    assert wrapped("size  8 bytes of 16", 12, 6) == "size  8\n      bytes\n      of 16"
    for width in (None, 19):
        assert wrapped("size  8 bytes of 16", width) == "size  8 bytes of 16"


def test_wide_cells_widen_their_column_and_no_line_ends_in_spaces() -> None:
    text = aligned(("a", "b"), [["long", "1"], ["x", ""]], left=("a", "b"))
    assert text == "a     b\nlong  1\nx"


def test_markdown_has_a_rule_under_its_head() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_error_has_the_decimals_of_its_value() -> None:
    assert with_error(0.0016494, 0.00033512) == "0.001649 +- 0.000335"
