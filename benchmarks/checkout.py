"""Which commit a benchmark ran on; imports nothing heavy."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that this file is of, with `+` if the tree differs; empty outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        found = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True)
        return found.stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
