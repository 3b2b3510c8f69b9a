"""HiGHS through scipy, without the lines that it writes to standard output.

Whatever `disp` says, HiGHS 1.12 prints a line of its own now and then (its issue 2783), and
standard output is where commands put results.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from scipy.optimize import OptimizeResult, linprog, milp


def quiet_milp(*args: Any, **kwargs: Any) -> OptimizeResult:
    """`scipy.optimize.milp`, silent."""
    with _no_stdout():
        found: OptimizeResult = milp(*args, **kwargs)
    return found


def quiet_linprog(*args: Any, **kwargs: Any) -> OptimizeResult:
    """`scipy.optimize.linprog`, silent."""
    with _no_stdout():
        found: OptimizeResult = linprog(*args, **kwargs)
    return found


@contextmanager
def _no_stdout() -> Iterator[None]:
    """Send what C code writes to file descriptor 1 nowhere; Python's own output is kept."""
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)  # what is still buffered belongs to HiGHS
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
