"""llama.cpp as a shared library: the one that the package xllamacpp brings, opened by ctypes.

Its wheel needs no compiler, and its library exports all of ggml and llama.h. Nothing of it is
imported: the Python interface of that package is not used.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from alphaquant.errors import ModelError
from alphaquant.models.gguf.header import check_package
from alphaquant.spaces.formats import GGML_REPLACED, parse_format


def is_installed() -> bool:
    """Whether there is a library to open."""
    return find_spec("xllamacpp") is not None


def check_formats(names: Iterable[str]) -> None:
    """Refuse types of llama.cpp where what they need is not installed.

    Args:
        names: of formats or their kinds.

    Raises:
        ModelError: naming the package.
    """
    own = [name for name in names if parse_format(name).is_ggml]
    if not own:
        return
    if not is_installed():
        raise _missing(own)
    check_package()


def _missing(names: Sequence[str]) -> ModelError:
    ours = ", ".join(f"{GGML_REPLACED[n]} is {n}" for n in names if n in GGML_REPLACED)
    return ModelError(
        f"{', '.join(names)}: weights become llama.cpp's types by its own code, in the package "
        "xllamacpp, which is not installed; pip install 'aq-search[llamacpp]', or name formats of "
        f"ours{f' ({ours}, number for number)' if ours else ''}"
    )


@cache
def open_library() -> ctypes.CDLL:
    """The library, opened once.

    Raises:
        ModelError: it is not installed, or does not load on this machine.
    """
    found = find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise _missing(["llama.cpp's types"])
    files = sorted(Path(found.origin).parent.glob("xllamacpp*.so"))
    try:
        return ctypes.CDLL(str(files[0]))
    except (OSError, IndexError) as error:
        raise ModelError(
            f"llama.cpp's library in {Path(found.origin).parent} cannot be opened ({error}); "
            "install another release of xllamacpp, or use formats of ours"
        ) from error
