"""From the Markdown that our own reports are written in to HTML; escapes everything.

It knows what those reports use: headings, paragraphs, tables of `alphaquant.reports.tables` and
code that is indented by four spaces. It is no Markdown library: no links, no emphasis, no HTML.
"""

import re
from html import escape

_NUMBER = re.compile(r"-?\d[\d.]*(e[-+]?\d+)?( (\+-|to) -?\d[\d.]*)?( %)?")
_RULE = re.compile(r"\|(---\|)+")


def to_html(markdown: str) -> str:
    """HTML of a text of our reports.

    Worked example: `| a |`, `|---|`, `| 1 |` is a table with the head `a` and a cell `1`, which is
    aligned to the right because it is a number.

    Args:
        markdown: blocks with an empty line between them.
    """
    return "\n".join(map(_block, filter(None, markdown.split("\n\n"))))


def _block(text: str) -> str:
    lines = text.strip("\n").split("\n")
    if len(lines) > 1 and _RULE.fullmatch(lines[1]):
        return _table(lines)
    if all(line.startswith("    ") for line in lines):
        return f"<pre>{escape(chr(10).join(line[4:] for line in lines))}</pre>"
    heading = re.match(r"(#{1,6}) (.*)", text)
    if heading is not None:
        level = len(heading[1])
        return f"<h{level}>{escape(heading[2])}</h{level}>"
    return f"<p>{_typeset(' '.join(lines))}</p>"


def _typeset(text: str) -> str:
    """Escaped, with the signs that a terminal may lack."""
    return escape(text).replace(" +- ", " \N{PLUS-MINUS SIGN} ")


def _table(lines: list[str]) -> str:
    """A table in a box of its own, which scrolls where the table is wider than the window."""
    head, *body = [_cells(line) for i, line in enumerate(lines) if i != 1]
    kinds = [_kind([row[i] for row in body]) for i in range(len(head))]
    rows = [
        "".join(f"<td{k}>{_typeset(c)}</td>" for c, k in zip(row, kinds, strict=True))
        for row in body
    ]
    titles = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>'
        for cell, kind in zip(head, kinds, strict=True)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>"
        f"{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def _kind(column: list[str]) -> str:
    """The class of a column: numbers are aligned to the right, empty cells count as such."""
    is_number = any(column) and all(_NUMBER.fullmatch(cell) for cell in column if cell)
    return ' class="number"' if is_number else ""


def _cells(line: str) -> list[str]:
    """The cells of a line that `tables.markdown` wrote."""
    return line.removeprefix("| ").removesuffix(" |").split(" | ")
