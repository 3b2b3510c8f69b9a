"""From a named text source to windows of tokens, the same ones for the same request.

Calibration, search and held-out gate each read a text; this file cuts the tokens of its sources
into windows that do not overlap and draws some of them with a seed. Sources are read and tokenized
by `sources.py`. It runs no model and keeps no cache. Sources:

    demo, demo:search         the embedded text of the request's role, or of a named role
    demo:code                 embedded Python sources of the request's role
    wikitext2, c4             from the Hugging Face hub (library `datasets`), the role's part
    path.txt, .md, .raw       any UTF-8 text, as it is
    path.jsonl, .json         one object per line, or one array of them: texts, conversations or
                              pairs, see `documents.py`; each text ends in the tokenizer's eos
    path.npy, .safetensors    token ids, flat or [n, T]; rows are concatenated (tensor `tokens`)
    ebss                      what the model itself writes, see `balanced.py`; calibration only
    a,b  or  a=0.7,b=0.3      several of them, in equal or in the stated shares of the windows

A known name wins over a file of the same name; write `./c4` for the file.

Windows start as the tokenizer starts a text: with its beginning-of-text token where it puts one
(Llama, Gemma, Mistral), with the text where it puts none (Qwen3, OLMoE). For T = 4 and the text
a b c d e f g h i that is [bos a b c] [bos d e f] [bos g h i], or [a b c d] [e f g h].

Letters: N windows, T tokens per window, P of them in front of every window (0 or 1, seldom 2).
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from alphaquant.errors import DataError
from alphaquant.texts.sources import ROLES, existing_path, find_source, open_source
from alphaquant.texts.tokens import Tokenizer, Tokens, check_bos, starting_tokens

logger = logging.getLogger(__name__)

MIN_READ_TOKENS = 2_000_000
EBSS = "ebss"
"""The text that a model writes itself."""

Write = Callable[[int, tuple[int, ...]], torch.Tensor]
"""Lets a model write windows: how many, and what they start with; int64 [N, T]."""

READ_FACTOR = 8
"""Only the first max(n_samples * seq_len * READ_FACTOR, MIN_READ_TOKENS) tokens are used."""

SHARED_RUN = 64
"""Two sets that have this many consecutive tokens in common are not disjoint."""


@dataclass(frozen=True)
class TextRequest:
    """What to read and how many windows to draw from it.

    Attributes:
        source: one of the sources in the header of this file.
        role: one of `ROLES`; selects the demo text or the split of a data set.
        n_samples: windows to draw, N >= 1.
        seq_len: tokens per window, T >= 1.
        seed: of the draw, 0 <= seed < 2**63.
        bos: what windows start with, one of `tokens.BOS_MODES`.

    Raises:
        DataError: a value outside these ranges.
    """

    source: str
    role: str
    n_samples: int
    seq_len: int
    seed: int
    bos: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.role not in ROLES:
            raise DataError(f"role {self.role!r} is not known; use one of {', '.join(ROLES)}")
        for name, value in (("n_samples", self.n_samples), ("seq_len", self.seq_len)):
            if value < 1:
                raise DataError(f"{name}={value} asked; it starts at 1; give a positive integer")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed={self.seed} asked; 0 to 2**63 - 1 is possible; change the seed")
        check_bos(self.bos)


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
        domains: the source of each window, N names: `a=0.7,b=0.3` has domains `a` and `b`.
        bos: token ids that every window starts with and that are not of the text, P of them.
    """

    name: str
    role: str
    tokens: torch.Tensor = field(compare=False, repr=False)
    n_available: int
    seed: int
    digest: str
    domains: tuple[str, ...]
    bos: tuple[int, ...] = ()

    def provenance(self) -> dict[str, str | int | list[int] | dict[str, int] | None]:
        """What a report keeps about the data: windows per domain, no tokens; ready for JSON."""
        n_samples, seq_len = self.tokens.shape
        return {
            "source": self.name,
            "role": self.role,
            "n_samples": n_samples,
            "seq_len": seq_len,
            "n_available": self.n_available,
            "seed": self.seed,
            "digest": self.digest,
            "bos": list(self.bos) or None,
            "domains": dict(Counter(self.domains)),
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


def load_tokens(
    request: TextRequest, tokenizer: Tokenizer, write: Write | None = None
) -> TokenSet:
    """Read a source and draw windows from it.

    The text is tokenized without special tokens and cut into windows: pieces of T - P tokens with
    the P tokens in front that `bos` asks for (a piece that has them already keeps its own). The N
    first of a seeded permutation are taken, in the order of the text. Several sources follow
    each other in the order in which they were named. Text is tokenized in pieces of about 2**20
    characters cut at line breaks, so that memory stays bounded; at a cut a token or two can differ
    from tokenizing the whole. Of a long source only the beginning is used, see `READ_FACTOR`.

    Args:
        request: source, role, number and length of the windows, seed.
        tokenizer: a transformers tokenizer.
        write: lets the model write the windows of the source `ebss`; None where there is none.

    Returns:
        The windows [N, T] with their digest; the same request and tokenizer give the same set.

    Raises:
        DataError: the source is unknown, unreadable, not to be had offline or too short.
    """
    shares = shares_of(request.source)
    counts = _split_windows(request.n_samples, shares)
    bos = starting_tokens(tokenizer, request.bos)
    if len(bos) >= request.seq_len:
        raise DataError(
            f"windows of {request.seq_len} tokens asked, and this tokenizer starts a text with "
            f"{len(bos)}; raise --seq-len, or give --bos never"
        )
    drawn, n_available = [], 0
    for name, count in counts.items():
        if name == EBSS:
            windows = _written(count, bos, request, write)
        else:
            windows = _read_windows(name, count, request, tokenizer, bos)
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
        domains=tuple(name for name, count in counts.items() for _ in range(count)),
        bos=bos,
    )


def shuffled(windows: TokenSet) -> TokenSet:
    """The same windows in a drawn order, so that the first few are a sample of all sources."""
    generator = torch.Generator().manual_seed(windows.seed)
    order = torch.randperm(len(windows.tokens), generator=generator)
    tokens, domains = windows.tokens[order], tuple(windows.domains[i] for i in order.tolist())
    return replace(windows, tokens=tokens, digest=token_digest(tokens), domains=domains)


def sample_of(windows: TokenSet, step: int) -> TokenSet:
    """One of so many windows, so that every source keeps its share.

    Args:
        windows: N of them.
        step: 1 takes all; the first is taken always.
    """
    tokens, domains = windows.tokens[::step].contiguous(), windows.domains[::step]
    return replace(windows, tokens=tokens, digest=token_digest(tokens), domains=domains)


def check_disjoint(a: TokenSet, b: TokenSet) -> None:
    """Refuse two sets that have text in common.

    Compares every run of `SHARED_RUN` consecutive tokens inside a window of `a`, at any offset,
    with every one of `b`; where windows are shorter than that, whole windows of the shorter set.
    So shifted copies are found, and quotations shorter than 64 tokens are allowed. What windows
    start with beside the text does not count. Both sets must
    come from the same tokenizer, else nothing can be found.

    Args:
        a: windows [N, T].
        b: windows, possibly of another number and length.

    Raises:
        DataError: they share an identical window or a run of tokens.
    """
    of_a, of_b = a.tokens[:, len(a.bos) :], b.tokens[:, len(b.bos) :]
    run = min(SHARED_RUN, of_a.shape[1], of_b.shape[1])
    hashes_a, hashes_b = _run_hashes(of_a, run), _run_hashes(of_b, run)
    shared = np.intersect1d(hashes_a, hashes_b)
    if not shared.size:
        return
    row_a, row_b = (int(np.argwhere(h == shared[0])[0, 0]) for h in (hashes_a, hashes_b))
    raise DataError(
        f"{a.role} text {a.name!r} and {b.role} text {b.name!r} overlap: {shared.size} runs of "
        f"{run} tokens are in both (windows {row_a} and {row_b} share one); calibration, search "
        "and held-out text must be disjoint; give another source, part or seed for one of them"
    )


def check_sources(sources: Mapping[str, str], bos: str = "auto") -> None:
    """Refuse what can be told of texts before a model is loaded and they are read.

    Two roles that read one file would draw the same windows of it; copies are found later, by
    `check_disjoint`.

    Args:
        sources: role -> source, both as in `TextRequest`.
        bos: as in `TextRequest`.

    Raises:
        DataError: a source that does not exist or cannot be read, or a file of two roles.
    """
    check_bos(bos)
    roles: dict[Path, str] = {}
    for role, source in sources.items():
        for name in shares_of(source):
            if name == EBSS and role == "calibration":
                continue
            path = find_source(name, role)
            if path is not None and roles.setdefault(path.resolve(), role) != role:
                raise DataError(
                    f"{roles[path.resolve()]} text and {role} text overlap: both read "
                    f"{str(path)!r}; calibration, search (--evaluation) and held-out text must be "
                    "disjoint; give another file for one of them"
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


def shares_of(source: str) -> dict[str, float]:
    """Names and shares of a source: `a=0.7,b=0.3` -> {a: 0.7, b: 0.3}; shares sum to 1.

    Without shares all are equal; shares are relative, so `a=7,b=3` means the same.
    """
    if existing_path(source) is not None:  # a path may contain , and =
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


def mixed(source: str, other: str) -> str:
    """A source with half of its windows from another; itself where its names are in no mixture.

    Worked example: `a=0.7,b=0.3` and `c` are `a=0.35,b=0.15,c=0.5`.
    """
    shares = shares_of(source)
    if any("," in name or "=" in name for name in shares):
        return source
    halves = [f"{name}={share / 2:g}" for name, share in shares.items()]
    return ",".join([*halves, f"{other}=0.5"])


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


def _written(
    count: int, bos: tuple[int, ...], request: TextRequest, write: Write | None
) -> torch.Tensor:
    """Windows that a model writes, [count, T].

    Raises:
        DataError: there is no model that could.
    """
    if write is None:
        raise DataError(
            f"{request.role} text {request.source!r}: {EBSS} is written by the model that is "
            "quantized, for calibration; give a text"
        )
    return write(count, bos)


def _read_windows(
    name: str, count: int, request: TextRequest, tokenizer: Tokenizer, bos: tuple[int, ...]
) -> torch.Tensor:
    """All windows in the beginning of one source, [n_available, T], at least `count`."""
    seq_len = request.seq_len
    max_tokens = max(count * seq_len * READ_FACTOR, MIN_READ_TOKENS)
    tokens = _first_tokens(open_source(name, request.role, tokenizer), max_tokens)
    windows = _cut(tokens, seq_len, bos)
    if len(windows) < count:
        raise DataError(
            f"source {name!r} is too short: {count} windows of {seq_len} tokens asked, its "
            f"{len(tokens)} tokens make {len(windows)}; lower the number of samples or their "
            "length, or give a longer text"
        )
    return windows


def _cut(tokens: Tokens, seq_len: int, bos: tuple[int, ...]) -> torch.Tensor:
    """Windows of consecutive tokens with `bos` in front, [n_available, T]; the rest is left.

    A piece that begins with these tokens, as rows of a token file may, does not get them twice.
    """
    if not bos:
        n_windows = len(tokens) // seq_len
        return torch.from_numpy(tokens[: n_windows * seq_len]).view(n_windows, seq_len)
    front = np.asarray(bos, dtype=np.int64)  # [P]
    n_front, n_body = len(bos), seq_len - len(bos)
    starts, position = [], 0
    while True:
        if np.array_equal(tokens[position : position + n_front], front):
            position += n_front
        if position + n_body > len(tokens):
            break
        starts.append(position)
        position += n_body
    columns = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(n_body)  # [n, T - P]
    fronts = np.tile(front, (len(starts), 1))  # [n, P]
    return torch.from_numpy(np.concatenate([fronts, tokens[columns]], axis=1))


def _first_tokens(pieces: Iterator[Tokens], max_tokens: int) -> Tokens:
    """The first tokens of a stream, flat; reads no further than needed."""
    kept, n_tokens = [np.empty(0, dtype=np.int64)], 0
    for piece in pieces:
        kept.append(piece)
        n_tokens += len(piece)
        if n_tokens >= max_tokens:
            break
    return np.concatenate(kept)[:max_tokens]
