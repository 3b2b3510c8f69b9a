"""Check an installation without development tools: the package imports, every command has help.

Importing the package and printing help must load neither torch nor optuna. Run with the Python of
the installation.
"""

import subprocess
import sys
from importlib.metadata import entry_points

DISTRIBUTION = "aq-search"
N_COMMANDS = 7
HEAVY = ("torch", "optuna", "transformers", "datasets", "scipy", "pandas")

# Runs in a process of its own: argv is the entry point, or empty for the bare package.
PROBE = f"""
import sys
from importlib import import_module
module, _, function = sys.argv[1].partition(":")
found = import_module(module)
if function:
    sys.argv = ["command", "--help"]
    try:
        getattr(found, function)()
    except SystemExit as stop:
        assert not stop.code, f"--help exited with {{stop.code}}"
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, f"loaded {{', '.join(loaded)}}"
"""


def main() -> int:
    """Probe the package and each of its commands; the result is the exit status."""
    commands = [
        ep
        for ep in entry_points(group="console_scripts")
        if ep.dist and ep.dist.name == DISTRIBUTION
    ]
    failed = 0
    for label, target in [
        ("import alphaquant", "alphaquant"),
        *((f"{ep.name} --help", ep.value) for ep in commands),
    ]:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, target], capture_output=True, text=True
        )
        print(f"{'ok  ' if probe.returncode == 0 else 'FAIL'} {label}")
        if probe.returncode:
            failed += 1
            print(probe.stderr, file=sys.stderr)
    if len(commands) < N_COMMANDS:
        print(f"FAIL {DISTRIBUTION} has {len(commands)} commands, expected {N_COMMANDS} or more")
        failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
