"""llama.cpp as a shared library: the one that the package xllamacpp brings, opened by ctypes.

Its wheel needs no compiler, and its library exports all of ggml and llama.h. Nothing of it is
imported: the Python interface of that package is not used.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from alphaquant.errors import ModelError


def is_installed() -> bool:
    """Whether there is a library to open."""
    return find_spec("xllamacpp") is not None


@cache
def open_library() -> ctypes.CDLL:
    """The library, opened once.

    Raises:
        ModelError: it is not installed, or does not load on this machine.
    """
    found = find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ModelError(
            "quantizing to llama.cpp's types is done by its own code, in the package xllamacpp, "
            "which is not installed; pip install 'aq-search[llamacpp]', or use formats of ours"
        )
    files = sorted(Path(found.origin).parent.glob("xllamacpp*.so"))
    try:
        return ctypes.CDLL(str(files[0]))
    except (OSError, IndexError) as error:
        raise ModelError(
            f"llama.cpp's library in {Path(found.origin).parent} cannot be opened ({error}); "
            "install another release of xllamacpp, or use formats of ours"
        ) from error
