"""docs/options.md: every option of every command, as the specifications declare them.

    python -m alphaquant.cli.reference > docs/options.md

A test compares the page with this text.
"""

import re

from alphaquant.cli.application import Command, application
from alphaquant.cli.cache import CACHE
from alphaquant.cli.compare import COMPARE
from alphaquant.cli.dashboard import DASHBOARD
from alphaquant.cli.evaluate import EVALUATE
from alphaquant.cli.inspect_config import INSPECT
from alphaquant.cli.quantize import QUANTIZE
from alphaquant.cli.search import SEARCH
from alphaquant.cli.sensitivity import SENSITIVITY

COMMANDS = (SEARCH, QUANTIZE, EVALUATE, INSPECT, COMPARE, SENSITIVITY, DASHBOARD, CACHE)
"""Every program, in the order of the page."""

_HEAD = """\
# Options

Made from the specifications in `alphaquant/specs` by
`python -m alphaquant.cli.reference > docs/options.md`; change them there. What the commands do and
print is in [commands](commands.md).

Every command takes `--help`, `--version` and `--debug` (tracebacks and debug logs). Those with a
specification (all but `aq-inspect`, `aq-compare`, `aq-dashboard` and `aq-cache`) also take
`--spec FILE`, a TOML file of options named as in Python, and `--print-spec`, which prints such a
file with all options as they are. What is given on the command line wins over the file, and the
file over the default. In Python the same names have `_` for `-`:
`alphaquant.search("4.25bits", calibration_samples=64)`.
"""


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *(section(command) for command in COMMANDS)])


def section(command: Command) -> str:
    """What one command takes, as Markdown: one line per option, by subject."""
    text = application(command).generate_docs(output_format="markdown", heading_level=2)
    own = text.partition("**General**:")[0]  # what all have is said once
    # Texts that are broken where they stand below a field are one line here.
    return re.sub(r"\n {2,}", " ", own).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
