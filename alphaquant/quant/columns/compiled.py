"""Compiling the column loops with numba, anew where any of their sources is another.

numba keeps machine code beside a source file and looks at the time of that file alone (0.68.1): a
loop that calls a function of another file goes on with what that was before an upgrade, without a
word, and an index that names a class which has moved cannot be read any more. So here the names of
the kept files have a digest of all sources in them: what other sources made is never opened.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache

from alphaquant.quant import codecs, format_rules

_ENTRY: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
_INNER: dict[str, Any] = {**_ENTRY, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def digest_of(sources: Iterable[Path]) -> str:
    """Twelve digits that change with the content of any of these files."""
    content = hashlib.sha256()
    for path in sources:
        content.update(hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()[:12]


SOURCES = (
    Path(__file__),
    *sorted(Path(__file__).parent.glob("*_numba.py")),
    *(Path(str(module.__file__)) for module in (codecs, format_rules)),
)
"""Files whose functions, classes and constants are in the machine code."""

DIGEST = digest_of(SOURCES)


class _Named(CompileResultCacheImpl):
    """Files with the digest in their names."""

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        """The beginning of the names."""
        first: str = super().get_filename_base(fullname, abiflags)  # type: ignore[no-untyped-call]
        return f"{first}.{DIGEST}"


class _OfSources(FunctionCache):
    """What was compiled of a function and of all that it calls."""

    _impl_class = _Named


def entry(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls; what was compiled is kept on disk."""
    compiled: Any = njit(**_ENTRY)(function)
    compiled._cache = _OfSources(function)  # type: ignore[no-untyped-call]
    return compiled


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled ones call.

    With wrappers for Python and files for each of them, compiling took 24 s instead of 16.
    """
    return njit(**_INNER)(function)
