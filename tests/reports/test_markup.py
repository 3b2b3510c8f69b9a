"""Our reports' Markdown as HTML."""

import pytest

from alphaquant.reports.markup import to_html
from alphaquant.reports.tables import markdown


def test_tables_align_columns_of_numbers_to_the_right_and_scroll_in_their_own_box() -> None:
    text = to_html(markdown(["", "KL"], [["a", "0.1 +- 0.2"], ["b", ""]]))
    assert text.startswith('<div class="scroll" tabindex="0"')
    assert '<th scope="col"></th><th scope="col" class="number">KL</th>' in text
    assert '<tr><td>a</td><td class="number">0.1 \N{PLUS-MINUS SIGN} 0.2</td></tr>' in text
    assert '<tr><td>b</td><td class="number"></td></tr>' in text


@pytest.mark.parametrize(
    ("cells", "is_number"),
    [
        pytest.param(["12", "3.5"], True, id="plain"),
        pytest.param(["-0.001 to 0.002"], True, id="interval"),
        pytest.param(["2.1e-05", "98.50 %"], True, id="exponent and share"),
        pytest.param(["1", "none"], False, id="a word among numbers"),
        pytest.param(["", ""], False, id="nothing"),
        pytest.param(["int4-g64"], False, id="a format"),
    ],
)
def test_a_column_is_of_numbers_if_all_that_is_in_it_is(cells: list[str], is_number: bool) -> None:
    text = to_html(markdown(["head"], [[cell] for cell in cells]))
    assert ('class="number"' in text) is is_number


def test_a_table_without_rows_is_its_head() -> None:
    assert "<tbody></tbody>" in to_html(markdown(["a", "b"], []))


def test_headings_paragraphs_and_code_keep_their_kind() -> None:
    text = to_html("## Next\n\ntwo\nlines\n\n    a  b\n    c")
    assert text == "<h2>Next</h2>\n<p>two lines</p>\n<pre>a  b\nc</pre>"


@pytest.mark.parametrize("text", ["<b>", "# <b>", "    <b>", "| <b> |\n|---|\n| <b> |"])
def test_everything_is_escaped(text: str) -> None:
    made = to_html(text)
    assert "&lt;b&gt;" in made and "<b>" not in made
