"""What a terminal gets to see: text without control characters, as wide as it is.

Texts of ours quote names and contents of files, and those may hold sequences that move the cursor,
rename the window or hide what was written. So everything goes through `say` or `printable`.
"""

import re
import shutil
import sys
from typing import TextIO

# C0 but tab and newline, DEL, C1, and what turns the direction of text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Text with its control characters written out: ESC becomes the four characters `\x1b`.

    Newlines and tabs stay, all other text too.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a text for people.

    Args:
        text: one or more lines.
        file: where to; None is stdout.
    """
    print(printable(text), file=file)


def screen_width() -> int | None:
    """Characters in a line of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
