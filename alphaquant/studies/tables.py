"""Aligned plain text and Markdown from the same rows; no box characters, no wrapping."""

from collections.abc import Sequence


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
