"""Aligned plain text and Markdown from the same rows, as wide as a screen; no box characters."""

import textwrap
from collections.abc import Sequence


def narrowed(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, spare: Sequence[str]
) -> tuple[str, ...]:
    """The columns of an aligned table that fit a screen.

    Worked example: columns (a, bb) of 1 and 2 characters are 5 wide with the space between them;
    on 4 characters with the spare column bb only a is left.

    Args:
        head: names of the columns.
        rows: cells.
        width: characters of the screen; None for all columns.
        spare: columns that may go, the first of them first.
    """
    widths = {name: max(map(len, (name, *(r[i] for r in rows)))) for i, name in enumerate(head)}
    for name in spare:
        if width is None or sum(widths.values()) + 2 * (len(widths) - 1) <= width:
            break
        del widths[name]
    return tuple(widths)


def columns(
    head: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[str]
) -> list[list[str]]:
    """The cells of some columns, in their order."""
    places = [i for i, name in enumerate(head) if name in kept]
    return [[row[i] for i in places] for row in rows]


def fitted(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    spare: Sequence[str] = (),
    left: Sequence[str] = (),
) -> str:
    """An aligned table that fits a screen.

    Spare columns go first. What is still too wide is continued below, each part with the first
    column; a part of two columns is as wide as it is.

    Worked example: columns (a, bb, ccc) of these widths are 10 wide; on 7 characters (a, bb), then
    (a, ccc) below.

    Args:
        head: names of the columns.
        rows: cells.
        width: characters of the screen; None for one table of all columns.
        spare: columns that may go, the first of them first.
        left: columns that are aligned to the left.
    """
    first, *others = narrowed(head, rows, width, spare)

    def table(names: Sequence[str]) -> str:
        shown = [first, *names]
        return aligned(shown, columns(head, rows, shown), left=left)

    parts: list[list[str]] = [[]]
    for name in others:
        if parts[-1] and is_wider(table([*parts[-1], name]), width):
            parts.append([])
        parts[-1].append(name)
    return "\n".join(map(table, parts))


def is_wider(text: str, width: int | None) -> bool:
    """Whether a line of a text does not fit a screen; None is as wide as can be."""
    return width is not None and max(map(len, text.splitlines()), default=0) > width


def wrapped(text: str, width: int | None, indent: int = 0) -> str:
    """A line that fits a screen; what has several lines, or fits, stays as it is.

    Args:
        text: the line.
        width: characters of the screen; None for any.
        indent: spaces before all lines but the first.
    """
    if width is None or "\n" in text or len(text) <= width:
        return text
    space = " " * indent
    return textwrap.fill(
        text, width, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Columns padded to their widest cell, two spaces apart.

    Worked example: head (a, name), row (10, x), left (name): ` a  name` and `10  x`.

    Args:
        head: names of the columns.
        rows: cells.
        left: columns that are aligned to the left; numbers read better to the right.
    """
    table = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_error(value: float, stderr: float) -> str:
    """A mean and its standard error: `0.001649 +- 0.000335`."""
    return f"{value:.6f} +- {stderr:.6f}"
