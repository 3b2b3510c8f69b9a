"""A checksum inside a safetensors file: data and sum appear together when the file is renamed.

The sum covers names, dtypes, shapes and bytes of the arrays, and a text beside them; it is kept in
the file's metadata under `SUM`. Banks keep theirs in a file beside, where their records are too.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SUM = "sha256"
"""Key of the checksum in a file's metadata."""


def content_sum(parts: Iterable[tuple[str, npt.NDArray[np.generic]]], text: str = "") -> str:
    """sha256 of named arrays and a text, in hexadecimal digits.

    Large arrays may come in parts of the same name; the order of the parts counts.

    Args:
        parts: names and arrays of any shape and dtype.
        text: what else belongs to the content.
    """
    digest = hashlib.sha256(text.encode())
    for name, array in parts:
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
