"""Text sources as streams of token ids: embedded texts, hub data sets, local files.

Finds a source, reads it in pieces and tokenizes them, or checks the token ids that it holds. JSON
files are read by `documents.py`. Cuts no windows and draws nothing: that is `windows.py`, whose
header lists the sources.

Letters: n rows, T tokens per row of a token file.
"""

import importlib
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from alphaquant import demo
from alphaquant.errors import DataError
from alphaquant.texts.documents import read_json
from alphaquant.texts.tokens import (
    Tokenizer,
    Tokens,
    check_ids,
    encode,
    not_integers,
    tokenize_documents,
)

ROLES = ("calibration", "search", "heldout")
"""What a text is for; the three texts of a study must not overlap, see `check_disjoint`."""

WIKITEXT_SPLITS = {"calibration": "train", "search": "validation", "heldout": "test"}
"""Splits of `wikitext-2-raw-v1` by role; rows are joined by a blank line, as in GPTQ's loader."""

C4_FILES = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "search": "en/c4-validation.00000-of-00008.json.gz",
    "heldout": "en/c4-validation.00001-of-00008.json.gz",
}
"""Files of `allenai/c4` by role: different ones, because C4 has only two splits."""

C4_MAX_DOCUMENTS = 50_000
"""At most this many documents are streamed from a C4 file (about 24 million tokens)."""

CHUNK = 1 << 20
"""Characters of text, or tokens of a token file, that are read and tokenized at once."""

OTHER_SUFFIXES = {
    **dict.fromkeys((".gz", ".zst", ".xz", ".bz2", ".zip", ".tar"), "unpack it first"),
    **dict.fromkeys(
        (".parquet", ".arrow", ".csv", ".tsv"),
        "write it as JSON lines, as datasets.Dataset.to_json or pandas.DataFrame.to_json(lines="
        "True, orient='records') do",
    ),
    **dict.fromkeys((".pt", ".npz", ".bin", ".pkl"), "save the token ids with numpy.save"),
}
"""Suffixes of files that people have and that are not read, and what to do with them."""


def open_source(name: str, role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of one source: a known name, or a file that exists.

    Args:
        name: one source of those in the header of `windows.py`, without a share.
        role: one of `ROLES`.
        tokenizer: a transformers tokenizer.

    Returns:
        Flat int64 pieces, in the order of the text, read as they are asked for.

    Raises:
        DataError: here if the name is unknown; while reading if the source is unreadable, not to
            be had offline or of another form than its suffix says.
    """
    path = find_source(name, role)
    if path is not None:
        return _read_path(path, tokenizer)
    return (_read_wikitext2 if name == "wikitext2" else _read_c4)(role, tokenizer)


def find_source(name: str, role: str) -> Path | None:
    """The file of one source, None for those of the hub; nothing is read.

    Args:
        name: one source of those in the header of `windows.py`, without a share.
        role: one of `ROLES`.

    Raises:
        DataError: the name is unknown, or no file that can be read.
    """
    known = {"demo": role, "demo:code": f"code-{role}"}
    known |= {f"demo:{part}": part for part in (*demo.TEXT_PARTS, *demo.CODE_PARTS)}
    if name in known:
        return Path(demo.text_path(known[name]))
    if name == "ebss" and role != "calibration":
        raise DataError(
            f"{role} text 'ebss': what a model writes itself is for calibration, and nothing is "
            f"compared on it; give a text, such as {', '.join(known)}"
        )
    if name in ("wikitext2", "c4"):
        return None
    path = existing_path(name)
    if path is None:
        raise DataError(
            f"source {name!r} is neither a known name nor an existing file; known names are "
            f"{', '.join([*known, 'wikitext2', 'c4'])}; a path must exist and end in "
            f"{', '.join(READERS)}"
        )
    suffix = path.suffix.lower()
    if path.is_file() and suffix in READERS:
        return path
    if path.is_file():
        what, advice = f"a {suffix or 'suffixless'} file", OTHER_SUFFIXES.get(suffix, "convert it")
    else:
        what, advice = "a folder" if path.is_dir() else "no regular file", "name one file"
    raise DataError(
        f"source {str(path)!r} is {what}; give a file in {', '.join(READERS)}: {advice}"
    )


def existing_path(name: str) -> Path | None:
    """The file or folder of a name, None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if name.strip() and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # name too long; unknown ~user; zero character
        return None


def _read_path(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of a local file, by its suffix."""
    try:
        yield from READERS[path.suffix.lower()](path, tokenizer)
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; texts are UTF-8; convert it, as iconv -f "
            "UTF-16 -t UTF-8 does, or unpack it if it is packed"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; check the file and its rights"
        ) from error


def _read_text(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of a text file; a byte order mark is dropped, line ends become newlines."""
    with path.open(encoding="utf-8-sig") as handle:
        yield from _tokenize_stream(handle, tokenizer, str(path))


def _tokenize_stream(handle: TextIO, tokenizer: Tokenizer, where: str) -> Iterator[Tokens]:
    """Token pieces of running text, cut at the first line break after `CHUNK` characters.

    A line longer than `CHUNK` is cut inside.
    """
    while text := handle.read(CHUNK) + handle.readline(CHUNK):
        if "\0" in text:
            raise DataError(
                f"{where} holds zero bytes, so it is no UTF-8 text; convert it, as iconv -f "
                "UTF-16 -t UTF-8 does, or give the text that it was made from"
            )
        yield encode(text, tokenizer)


def _read_npy(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of a NumPy file of integers, read through a memory map."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; write it with numpy.save from integers"
        ) from error
    yield from _cut_ids(values, tokenizer, str(path))


def _read_safetensors(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of the integer tensor `tokens` of a safetensors file."""
    try:
        with safe_open(path, framework="numpy") as handle:
            names = sorted(handle.keys())
            if "tokens" not in names:
                raise DataError(
                    f"{path} has the tensors {names[:8]}; the token ids must be called 'tokens'; "
                    "rename that tensor"
                )
            dtype = handle.get_slice("tokens").get_dtype()
            if not dtype.startswith(("I", "U")):
                raise DataError(not_integers(str(path), dtype))
            values = handle.get_tensor("tokens")
    except SafetensorError as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; write it with safetensors.torch.save_file"
        ) from error
    yield from _cut_ids(values, tokenizer, str(path))


def _cut_ids(values: NDArray[Any], tokenizer: Tokenizer, where: str) -> Iterator[Tokens]:
    """Flat pieces of an array of token ids in row order."""
    flat = values.reshape(-1)  # [n, T] -> [n * T]
    for start in range(0, flat.size, CHUNK):
        yield check_ids(flat[start : start + CHUNK], tokenizer, where)


def _read_wikitext2(role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of one split of WikiText-2."""
    rows = _hub_texts(
        "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=WIKITEXT_SPLITS[role]
    )
    yield from _tokenize_stream(io.StringIO("\n\n".join(rows)), tokenizer, "wikitext2")


def _read_c4(role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of the first documents of one English C4 file, streamed."""
    files = {"train": C4_FILES[role]}
    rows = _hub_texts("c4", "allenai/c4", data_files=files, split="train", streaming=True)
    yield from tokenize_documents(itertools.islice(rows, C4_MAX_DOCUMENTS), tokenizer)


def _hub_texts(name: str, *args: str, **options: Any) -> Iterator[str]:
    """Field `text` of a data set's rows; arguments as `datasets.load_dataset` takes them."""
    advice = "give a local .txt or .jsonl file, or use the embedded text 'demo'"
    try:
        datasets = importlib.import_module("datasets")  # optional, and slow to import
    except ImportError as error:
        raise DataError(
            f"source {name!r} needs the library datasets, which is not installed; install it with "
            f"pip install datasets, or {advice}"
        ) from error
    try:
        for row in datasets.load_dataset(*args, **options):
            yield row["text"]
    except Exception as error:  # httpx, aiohttp, fsspec, hub and datasets each raise their own
        raise DataError(
            f"source {name!r} cannot be read from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error)[:200]}); it needs a network or a filled cache; {advice}"
        ) from error


READERS: dict[str, Callable[[Path, Tokenizer], Iterator[Tokens]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".raw": _read_text,
    ".jsonl": read_json,
    ".json": read_json,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}
"""Suffixes of local files and their readers: (path, tokenizer) -> pieces of flat tokens."""
