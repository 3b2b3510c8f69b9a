"""Text sources as streams of token ids: embedded texts, hub data sets, local files.

Finds a source, reads it in pieces and tokenizes them, or checks the token ids that it holds. Cuts
no windows and draws nothing: that is `data.py`, whose header lists the sources.

Letters: n rows, T tokens per row of a token file.
"""

import importlib
import io
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from alphaquant import demo
from alphaquant.errors import DataError

logger = logging.getLogger(__name__)

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

Tokens = NDArray[np.int64]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document, None if there is none."""

    def __len__(self) -> int:
        """Count of token ids, added tokens included."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """Token ids of a text; `verbose=False` keeps quiet about its length."""


def open_source(name: str, role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of one source: a known name, or a file that exists.

    Args:
        name: one source of those in the header of `data.py`, without a share.
        role: one of `ROLES`.
        tokenizer: a transformers tokenizer.

    Returns:
        Flat int64 pieces, in the order of the text, read as they are asked for.

    Raises:
        DataError: here if the name is unknown; while reading if the source is unreadable, not to
            be had offline or of another form than its suffix says.
    """
    known = {"demo": role, "demo:code": f"code-{role}"}
    known |= {f"demo:{part}": part for part in (*demo.TEXT_PARTS, *demo.CODE_PARTS)}
    if name in known:
        return _read_path(Path(demo.text_path(known[name])), tokenizer)
    if name == "wikitext2":
        return _read_wikitext2(role, tokenizer)
    if name == "c4":
        return _read_c4(role, tokenizer)
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise DataError(
            f"source {name!r} is neither a known name nor an existing file; known names are "
            f"{', '.join([*known, 'wikitext2', 'c4'])}; a path must exist and end in "
            f"{', '.join(READERS)}"
        )
    return _read_path(path, tokenizer)


def _read_path(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of a local file, by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if path.is_dir() or reader is None:
        what = "a folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise DataError(f"source {str(path)!r} is {what}; give a file in {', '.join(READERS)}")
    try:
        yield from reader(path, tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}; texts are UTF-8; check the file and its rights"
        ) from error


def _read_text(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of a text file; a byte order mark is dropped, line ends become newlines."""
    with path.open(encoding="utf-8-sig") as handle:
        yield from _tokenize_stream(handle, tokenizer)


def _tokenize_stream(handle: TextIO, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of running text, cut at the first line break after `CHUNK` characters.

    A line longer than `CHUNK` is cut inside.
    """
    while text := handle.read(CHUNK) + handle.readline(CHUNK):
        yield _encode(text, tokenizer)


def _encode(text: str, tokenizer: Tokenizer) -> Tokens:
    return np.asarray(
        tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64
    )


def _tokenize_documents(texts: Iterator[str], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of each document that is not empty, followed by eos (by a blank line without one)."""
    eos = tokenizer.eos_token_id
    separator = _encode("\n\n", tokenizer) if eos is None else np.asarray([eos], dtype=np.int64)
    for text in texts:
        if text:
            yield np.concatenate([_encode(text, tokenizer), separator])


def _read_json_lines(path: Path, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of a file of JSON objects: field `text`, else token ids, else the first string.

    The first record decides the field; all others must have it. Token ids (`tokens`, `input_ids`)
    are concatenated as they are, texts are followed by eos.
    """
    records = _json_records(path)
    first = next(records, None)
    if first is None:
        return
    name = _choose_field(path, first[1])
    values = _field_values(path, itertools.chain([first], records), name)
    if name in ("tokens", "input_ids"):
        for number, ids in values:
            if ids:
                where = f"{path}, line {number}, field {name!r}"
                yield _check_ids(np.asarray(ids), tokenizer, where)
    else:
        yield from _tokenize_documents((text for _, text in values), tokenizer)


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and objects of a file; blank lines are skipped."""
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            yield number, _json_object(line, f"{path}, line {number}")


def _json_object(line: str, where: str) -> dict[str, Any]:
    advice = 'write one object per line, as in {"text": "..."}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg}; {advice}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is {line.strip()[:40]!r} and not a JSON object; {advice}")
    return record


def _choose_field(path: Path, record: dict[str, Any]) -> str:
    """The field that holds the documents, decided on the first record."""
    strings = [name for name, value in record.items() if isinstance(value, str)]
    for name in ("text", "tokens", "input_ids"):
        if name in record:
            return name
    if not strings:
        raise DataError(
            f"{path} has the fields {sorted(record)} and none of them is a text; possible are "
            "'text', 'tokens', 'input_ids' or any string; rename a field to 'text'"
        )
    if len(strings) > 1:
        logger.warning("%s: no field 'text', reading %r of %s", path, strings[0], strings)
    return strings[0]


def _field_values(
    path: Path, records: Iterator[tuple[int, dict[str, Any]]], name: str
) -> Iterator[tuple[int, Any]]:
    """Line number and value of one field in each record: a string, or a list of integers."""
    is_ids = name in ("tokens", "input_ids")
    wanted = "a list of integers" if is_ids else "a string"
    for number, record in records:
        value = record.get(name)
        if is_ids:
            is_fine = isinstance(value, list) and all(type(item) is int for item in value)
        else:
            is_fine = isinstance(value, str)
        if not is_fine:
            raise DataError(
                f"{path}, line {number}: field {name!r} is {str(value)[:40]!r}; it must be "
                f"{wanted}, as the first line chose that field; mend the line"
            )
        yield number, value


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
                raise DataError(_not_integers(str(path), dtype))
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
        yield _check_ids(flat[start : start + CHUNK], tokenizer, where)


def _check_ids(ids: NDArray[Any], tokenizer: Tokenizer, where: str) -> Tokens:
    """The ids as int64 if the tokenizer has them all; not empty."""
    if ids.dtype.kind not in "iu":
        raise DataError(_not_integers(where, str(ids.dtype)))
    low, high, n_ids = int(ids.min()), int(ids.max()), len(tokenizer)
    if low < 0 or high >= n_ids:
        raise DataError(
            f"{where} has token ids from {low} to {high}; the tokenizer has 0 to {n_ids - 1}; "
            "tokenize the text with this model's tokenizer, or give the text itself"
        )
    return ids.astype(np.int64)


def _not_integers(where: str, dtype: str) -> str:
    return f"{where} holds values of type {dtype}; token ids are integers up to 64 bits; cast them"


def _read_wikitext2(role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of one split of WikiText-2."""
    rows = _hub_texts(
        "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=WIKITEXT_SPLITS[role]
    )
    yield from _tokenize_stream(io.StringIO("\n\n".join(rows)), tokenizer)


def _read_c4(role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Tokens of the first documents of one English C4 file, streamed."""
    files = {"train": C4_FILES[role]}
    rows = _hub_texts("c4", "allenai/c4", data_files=files, split="train", streaming=True)
    yield from _tokenize_documents(itertools.islice(rows, C4_MAX_DOCUMENTS), tokenizer)


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
    ".jsonl": _read_json_lines,
    ".json": _read_json_lines,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}
"""Suffixes of local files and their readers: (path, tokenizer) -> pieces of flat tokens."""
