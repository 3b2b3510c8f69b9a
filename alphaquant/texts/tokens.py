"""Token ids: what is used of a tokenizer, what it puts before a text, and ids that it has.

Reads no files and cuts no windows: that is `sources.py` and `windows.py`.
"""

from collections.abc import Iterator
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from alphaquant.errors import DataError
from alphaquant.specs.texts import BosMode

Tokens = NDArray[np.int64]

BOS_MODES = get_args(BosMode)
"""`auto`: windows start as the tokenizer starts a text; `always`: with its beginning of text even
where it puts none by itself; `never`: with the text."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, None if there is none."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document, None if there is none."""

    def __len__(self) -> int:
        """Count of token ids, added tokens included."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of a text; `verbose=False` keeps quiet about its length."""


def starting_tokens(tokenizer: Tokenizer, bos: str) -> tuple[int, ...]:
    """What every window starts with: `(1,)` for Llama, `()` for Qwen3, two ids for GLM-4.

    Args:
        tokenizer: a transformers tokenizer.
        bos: one of `BOS_MODES`.

    Raises:
        DataError: another mode, or `always` for a tokenizer without a beginning of text.
    """
    check_bos(bos)
    own = () if bos == "never" else _own_start(tokenizer)
    if own or bos != "always":
        return own
    if tokenizer.bos_token_id is None:
        raise DataError(
            "--bos always asked, and the tokenizer has no beginning-of-text token (bos_token in "
            "tokenizer_config.json); give --bos auto, or name the token there"
        )
    return (tokenizer.bos_token_id,)


def check_bos(bos: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        DataError: it is none of `BOS_MODES`.
    """
    if bos not in BOS_MODES:
        raise DataError(f"--bos {bos!r} is not known; use one of {', '.join(BOS_MODES)}")


def _own_start(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text by itself; what it puts behind is left out."""
    plain = encode("a", tokenizer).tolist()
    whole = tokenizer.encode("a", add_special_tokens=True, verbose=False)
    for n_before in range(len(whole) - len(plain) + 1):
        if whole[n_before : n_before + len(plain)] == plain:
            return tuple(whole[:n_before])
    return ()


def encode(text: str, tokenizer: Tokenizer) -> Tokens:
    """Token ids of a text without special tokens around it."""
    return np.asarray(
        tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64
    )


def tokenize_documents(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of each document that is not empty, followed by eos (by a blank line without one)."""
    eos = tokenizer.eos_token_id
    separator = encode("\n\n", tokenizer) if eos is None else np.asarray([eos], dtype=np.int64)
    for text in texts:
        if text:
            yield np.concatenate([encode(text, tokenizer), separator])


def check_ids(ids: NDArray[Any], tokenizer: Tokenizer, where: str) -> Tokens:
    """The ids as int64 if the tokenizer has them all; not empty.

    Raises:
        DataError: values of another type, or ids that the tokenizer does not have.
    """
    if ids.dtype.kind not in "iu":
        raise DataError(not_integers(where, str(ids.dtype)))
    low, high, n_ids = int(ids.min()), int(ids.max()), len(tokenizer)
    if low < 0 or high >= n_ids:
        raise DataError(
            f"{where} has token ids from {low} to {high}; the tokenizer has 0 to {n_ids - 1}; "
            "tokenize the text with this model's tokenizer, or give the text itself"
        )
    return ids.astype(np.int64)


def not_integers(where: str, dtype: str) -> str:
    """What is said of token files of another type."""
    return f"{where} holds values of type {dtype}; token ids are integers up to 64 bits; cast them"
