"""From a named text source to windows of tokens, the same ones for the same request.

Calibration, search and held-out gate each read a text; this file finds it, tokenizes it once, cuts
it into windows that do not overlap and draws some of them with a seed. It runs no model and keeps
no cache. Sources:

    demo, demo:search         the embedded text of the request's role, or of a named role
    wikitext2, c4             from the Hugging Face hub (library `datasets`), see `WIKITEXT_SPLITS`
    path.txt, .md, .raw       any UTF-8 text, as it is
    path.jsonl, .json         one object per line; documents are joined by the tokenizer's eos
    path.npy, .safetensors    token ids, flat or [n, T]; rows are concatenated (tensor `tokens`)
    a,b  or  a=0.7,b=0.3      several of them, in equal or in the stated shares of the windows

A known name wins over a file of the same name; write `./c4` for the file.

Letters: N windows, T tokens per window.
"""

import hashlib
import importlib
import io
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch
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

MIN_READ_TOKENS = 2_000_000
READ_FACTOR = 8
"""Only the first max(n_samples * seq_len * READ_FACTOR, MIN_READ_TOKENS) tokens are used."""

SHARED_RUN = 64
"""Two sets that have this many consecutive tokens in common are not disjoint."""

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


@dataclass(frozen=True)
class TextRequest:
    """What to read and how many windows to draw from it.

    Attributes:
        source: one of the sources in the header of this file.
        role: one of `ROLES`; selects the demo text or the split of a data set.
        n_samples: windows to draw, N >= 1.
        seq_len: tokens per window, T >= 1.
        seed: of the draw, 0 <= seed < 2**63.

    Raises:
        DataError: a value outside these ranges.
    """

    source: str
    role: str
    n_samples: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.role not in ROLES:
            raise DataError(f"role {self.role!r} is not known; use one of {', '.join(ROLES)}")
        for name, value in (("n_samples", self.n_samples), ("seq_len", self.seq_len)):
            if value < 1:
                raise DataError(f"{name}={value} asked; it starts at 1; give a positive integer")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed={self.seed} asked; 0 to 2**63 - 1 is possible; change the seed")


@dataclass(frozen=True)
class TokenSet:
    """Windows of tokens and where they come from. Two sets are compared by digest, not by tensor.

    Attributes:
        name: the source as it was asked for.
        role: one of `ROLES`.
        tokens: int64 [N, T] on the CPU.
        n_available: windows in what was read of the source, of which N were drawn.
        seed: of the draw.
        digest: `token_digest(tokens)`.
    """

    name: str
    role: str
    tokens: torch.Tensor = field(compare=False, repr=False)
    n_available: int
    seed: int
    digest: str

    def provenance(self) -> dict[str, str | int]:
        """What a report keeps about the data: everything but the tokens, ready for JSON."""
        n_samples, seq_len = self.tokens.shape
        return {
            "source": self.name,
            "role": self.role,
            "n_samples": n_samples,
            "seq_len": seq_len,
            "n_available": self.n_available,
            "seed": self.seed,
            "digest": self.digest,
        }


def token_digest(tokens: torch.Tensor) -> str:
    """Digest of windows, equal exactly if shape and tokens are equal.

    Args:
        tokens: int64 [N, T].

    Returns:
        SHA-256 in hex over the text "N,T:" and the tokens as little-endian int64.
    """
    n_samples, seq_len = tokens.shape
    values = tokens.numpy(force=True).astype("<i8")
    return hashlib.sha256(f"{n_samples},{seq_len}:".encode() + values.tobytes()).hexdigest()


def load_tokens(request: TextRequest, tokenizer: Tokenizer) -> TokenSet:
    """Read a source and draw windows from it.

    The text is tokenized without special tokens and cut into floor(tokens / T) windows; the
    N first of a seeded permutation are taken, in the order of the text. Several sources follow
    each other in the order in which they were named. Text is tokenized in pieces of about `CHUNK`
    characters cut at line breaks, so that memory stays bounded; at a cut a token or two can differ
    from tokenizing the whole. Of a long source only the beginning is used, see `READ_FACTOR`.

    Args:
        request: source, role, number and length of the windows, seed.
        tokenizer: a transformers tokenizer.

    Returns:
        The windows [N, T] with their digest; the same request and tokenizer give the same set.

    Raises:
        DataError: the source is unknown, unreadable, not to be had offline or too short.
    """
    shares = _parse_source(request.source)
    counts = _split_windows(request.n_samples, shares)
    drawn, n_available = [], 0
    for name, count in counts.items():
        windows = _read_windows(name, count, request, tokenizer)
        n_available += len(windows)
        generator = torch.Generator().manual_seed(request.seed)
        order = torch.randperm(len(windows), generator=generator)
        drawn.append(windows[order[:count].sort().values])
    tokens = torch.cat(drawn)  # [N, T]
    logger.info("%s: drew %d of %d windows", request, request.n_samples, n_available)
    return TokenSet(
        name=request.source,
        role=request.role,
        tokens=tokens,
        n_available=n_available,
        seed=request.seed,
        digest=token_digest(tokens),
    )


def check_disjoint(a: TokenSet, b: TokenSet) -> None:
    """Refuse two sets that have text in common.

    Compares every run of `SHARED_RUN` consecutive tokens inside a window of `a`, at any offset,
    with every one of `b`; where windows are shorter than that, whole windows of the shorter set.
    So shifted copies are found, and quotations shorter than 64 tokens are allowed. Both sets must
    come from the same tokenizer, else nothing can be found.

    Args:
        a: windows [N, T].
        b: windows, possibly of another number and length.

    Raises:
        DataError: they share an identical window or a run of tokens.
    """
    run = min(SHARED_RUN, a.tokens.shape[1], b.tokens.shape[1])
    hashes_a, hashes_b = _run_hashes(a.tokens, run), _run_hashes(b.tokens, run)
    shared = np.intersect1d(hashes_a, hashes_b)
    if not shared.size:
        return
    row_a, row_b = (int(np.argwhere(h == shared[0])[0, 0]) for h in (hashes_a, hashes_b))
    raise DataError(
        f"{a.role} text {a.name!r} and {b.role} text {b.name!r} overlap: {shared.size} runs of "
        f"{run} tokens are in both (windows {row_a} and {row_b} share one); calibration, search "
        "and held-out text must be disjoint; give another source, part or seed for one of them"
    )


def _run_hashes(tokens: torch.Tensor, run: int) -> NDArray[np.uint64]:
    """Hash of every run of consecutive tokens inside each window.

    Polynomial h = sum_j (t_j + 1) * M**(run-1-j) mod 2**64. Two different runs collide with a
    chance of about 2**-64: 2e-7 for a false alarm between two sets of two million tokens.

    Args:
        tokens: int64 [N, T].
        run: length of a run, 1 <= run <= T.

    Returns:
        uint64 [N, T - run + 1].
    """
    multiplier = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers never vanish mod 2**64
    values = tokens.numpy(force=True).astype(np.uint64) + np.uint64(1)
    n_runs = values.shape[1] - run + 1
    hashes = np.zeros((values.shape[0], n_runs), dtype=np.uint64)
    for j in range(run):
        hashes = hashes * multiplier + values[:, j : j + n_runs]
    return hashes


def _parse_source(source: str) -> dict[str, float]:
    """Names and shares of a source: `a=0.7,b=0.3` -> {a: 0.7, b: 0.3}; shares sum to 1.

    Without shares all are equal; shares are relative, so `a=7,b=3` means the same.
    """
    if source.strip() and Path(source).expanduser().exists():  # a path may contain , and =
        return {source: 1.0}
    parts = [_parse_share(part.strip()) for part in source.split(",")]
    names = [name for name, _ in parts]
    stated = [share for _, share in parts if share is not None]
    if len(set(names)) < len(names):
        raise DataError(f"source {source!r} names a text twice; name each once, with its share")
    if stated and len(stated) < len(parts):
        raise DataError(
            f"source {source!r} states {len(stated)} shares for {len(parts)} texts; state all or "
            "none, as in a=0.7,b=0.3"
        )
    shares = stated or [1.0] * len(parts)
    return {name: share / sum(shares) for name, share in zip(names, shares, strict=True)}


def _parse_share(part: str) -> tuple[str, float | None]:
    """`a=0.7` -> (a, 0.7); `a` and `a=b.txt` -> (the whole, None)."""
    name, _, number = part.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        return part, None
    if not name:
        return part, None
    if not (math.isfinite(share) and share > 0):
        raise DataError(f"share {number!r} of {name!r} asked; give a number above 0, as in a=0.7")
    return name, share


def _split_windows(n_samples: int, shares: dict[str, float]) -> dict[str, int]:
    """Windows per source by largest remainder: 10 in equal thirds are 4, 3, 3."""
    counts = {name: int(n_samples * share) for name, share in shares.items()}
    by_remainder = sorted(counts, key=lambda name: counts[name] - n_samples * shares[name])
    for name in by_remainder[: n_samples - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count == 0]
    if empty:
        raise DataError(
            f"{n_samples} windows in the shares {shares} leave none for {', '.join(empty)}; each "
            "text needs at least one; ask for more samples or leave that text out"
        )
    return counts


def _read_windows(
    name: str, count: int, request: TextRequest, tokenizer: Tokenizer
) -> torch.Tensor:
    """All windows in the beginning of one source, [n_available, T], at least `count`."""
    seq_len = request.seq_len
    max_tokens = max(count * seq_len * READ_FACTOR, MIN_READ_TOKENS)
    tokens = _first_tokens(_open_source(name, request.role, tokenizer), max_tokens)
    n_available = len(tokens) // seq_len
    if n_available < count:
        raise DataError(
            f"source {name!r} is too short: {count} windows of {seq_len} tokens asked, its "
            f"{len(tokens)} tokens make {n_available}; lower the number of samples or their "
            "length, or give a longer text"
        )
    return torch.from_numpy(tokens[: n_available * seq_len]).view(n_available, seq_len)


def _first_tokens(pieces: Iterator[Tokens], max_tokens: int) -> Tokens:
    """The first tokens of a stream, flat; reads no further than needed."""
    kept, n_tokens = [np.empty(0, dtype=np.int64)], 0
    for piece in pieces:
        kept.append(piece)
        n_tokens += len(piece)
        if n_tokens >= max_tokens:
            break
    return np.concatenate(kept)[:max_tokens]


def _open_source(name: str, role: str, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Token pieces of one source: a known name, or a file that exists."""
    known = {"demo": role, **{f"demo:{part}": part for part in ROLES}}
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
