"""The original model's predictions on a text, stored once and compared with by every trial.

Per position the log-probabilities of its k most likely tokens, and the log-probability of all
others together. They are written as they come, into a file of their final size, so that memory
holds a part of one batch (`alphaquant.evaluators.predictions`) however long the text is. The file
is a safetensors file whose header, padded to `_HEADER_BYTES`, is written last; one that was not
finished is never seen under its name, and is made anew.

Letters: N windows, B of them in a batch, T tokens, V vocabulary, k stored tokens per position.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alphaquant.checksums import SUM, content_sum
from alphaquant.errors import StoreError
from alphaquant.evaluators.perplexity import losses_of, perplexity_of
from alphaquant.evaluators.predictions import (
    Piece,
    largest,
    most_likely,
    predict_pieces,
    predict_walked,
)
from alphaquant.files import mark_used, whole_file, writing
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import batches_of, row_chunks
from alphaquant.progress import Progress, Stage
from alphaquant.spaces.json_files import JsonError, parse_json
from alphaquant.texts.windows import token_digest

TOP_K = 4096
_SUMMED_WINDOWS = 8
"""Windows of a file that are in memory at once while its checksum is formed."""

_HEADER_BYTES = 4096
"""Of a file's header; facts and shapes take some 700."""


@dataclass(frozen=True)
class Teacher:
    """The original model's predictions on a set of windows, memory-mapped.

    Attributes:
        path: safetensors file with `log_probs` float32 [N, T, k], `rest` float32 [N, T]
            (log-probability of all other tokens, -inf when k = V) and, when k < V, `tokens` int32
            [N, T, k].
        facts: n_windows, seq_len, k, vocabulary, mean stored mass, data_digest of the windows,
            mean nll of the next token (null where it is not finite, or a window is one token).
    """

    path: Path
    facts: Mapping[str, Any]

    @property
    def perplexity(self) -> float | None:
        """Of the original on these windows; None where it is not known."""
        nll = self.facts.get("nll")
        return None if nll is None else perplexity_of(nll)

    @contextmanager
    def opened(self) -> Iterator["Stored"]:
        """The file, opened once for many reads."""
        with safe_open(self.path, "pt") as file:
            yield Stored(_slices(file))


@dataclass(frozen=True)
class Expected:
    """What is stored where a piece of predictions lies, and what follows from it.

    Attributes:
        log_probs: float32 [b, t, k].
        probs: their exponentials.
        rest: log-probability of all other tokens, float32 [b, t].
        tokens: int32 [b, t, k]; None where all are stored, k = V.
        first: the most likely token, int64 [b, t].
    """

    log_probs: Tensor
    probs: Tensor
    rest: Tensor
    tokens: Tensor | None
    first: Tensor


class Stored:
    """A teacher's open file; what was read last is kept for the next model on the same windows."""

    def __init__(self, slices: Mapping[str, Any]) -> None:
        """Nothing is read yet.

        Args:
            slices: the file's tensors by name.
        """
        self._slices = slices
        self._last: tuple[Any, Expected] | None = None

    def read(self, first: int, piece: Piece) -> Expected:
        """What is stored where a piece of predictions lies.

        Args:
            first: window that the piece's batch begins with.
            piece: predictions; what is read goes to their device.
        """
        windows = slice(first + piece.windows.start, first + piece.windows.stop)
        device = piece.log_probs.device
        bounds = (windows.start, windows.stop, piece.positions.start, piece.positions.stop, device)
        if self._last is None or self._last[0] != bounds:
            self._last = None  # before the next is made
            parts = {n: p[windows, piece.positions].to(device) for n, p in self._slices.items()}
            self._last = (bounds, _expected(**parts))
        return self._last[1]


def _expected(log_probs: Tensor, rest: Tensor, tokens: Tensor | None = None) -> Expected:
    first = most_likely(log_probs)
    if tokens is not None:
        first = tokens.gather(-1, first.unsqueeze(-1)).squeeze(-1).to(torch.int64)
    return Expected(log_probs, log_probs.exp(), rest, tokens, first)


def store_teacher(
    path: Path,
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_size: int = 8,
    top_k: int = TOP_K,
    model_map: ModelMap | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Teacher:
    """Compute and store the original's predictions, or open them if they are there.

    Args:
        path: the safetensors file; its name should carry digests of the model and the tokens.
        model: the original model.
        tokens: int64 [N, T].
        batch_size: windows per forward pass.
        top_k: tokens stored per position (at most V).
        model_map: the same model, to go through it layer by layer with all windows; None for
            ordinary forward passes, which read its weights for every batch.
        progress: called with ("teacher", windows done, windows); a walk counts as all but one.

    Raises:
        StoreError: the file exists and cannot be read, is of other windows, or cannot be written.
    """
    if path.exists():
        teacher = open_teacher(path)
        mark_used(path)
        check_windows(teacher, tokens)
        return teacher
    with whole_file(path) as part:
        batches = batches_of(tokens, batch_size)
        predicted = _predicted(model if model_map is None else model_map, batches, progress)
        starts = range(0, len(tokens), batch_size)
        kept = (
            kept
            for batch, pieces, first in zip(batches, predicted, starts, strict=True)
            for kept in kept_of(batch, pieces, first, top_k)
        )
        facts = write_kept(part, kept, tokens)
    progress(Stage.TEACHER, len(tokens), len(tokens))
    return Teacher(path, facts)


def _predicted(
    model: nn.Module | ModelMap, batches: Sequence[Tensor], progress: Progress
) -> Iterator[Iterator[Piece]]:
    """Predictions of successive batches, by ordinary passes or by one walk."""
    n_windows = sum(len(batch) for batch in batches)
    if isinstance(model, ModelMap):

        def tell(done: int, total: int) -> None:
            progress(Stage.TEACHER, (n_windows - 1) * done // total, n_windows)

        yield from predict_walked(model, batches, tell)
        return
    for number, batch in enumerate(batches):
        progress(Stage.TEACHER, number * len(batches[0]), n_windows)
        yield predict_pieces(model, batch)


@dataclass(frozen=True)
class Kept:
    """What is kept of the predictions of a part of a text.

    Attributes:
        windows: which of the text.
        positions: which in these windows.
        top: `log_probs`, `rest` and, where not all are kept, `tokens`.
        losses: of the next tokens, float32 [windows, positions].
        vocabulary: V.
    """

    windows: slice
    positions: slice
    top: Mapping[str, Tensor]
    losses: Tensor
    vocabulary: int


def kept_of(batch: Tensor, pieces: Iterable[Piece], first: int, top_k: int) -> Iterator[Kept]:
    """What is kept of the predictions of a batch, which begins with window `first` of the text."""
    for piece in pieces:
        vocabulary = piece.log_probs.shape[-1]
        windows = slice(first + piece.windows.start, first + piece.windows.stop)
        top = _top(piece.log_probs, min(top_k, vocabulary))
        losses = losses_of(piece, batch)
        yield Kept(windows, piece.positions, top, losses, vocabulary)


def write_kept(path: Path, parts: Iterable[Kept], tokens: Tensor) -> dict[str, Any]:
    """Fill a file with what is kept of a text [N, T], in any order of the parts; its facts.

    Raises:
        StoreError: the disk is full, or the like.
    """
    n_windows, seq_len = tokens.shape
    rest, losses = torch.empty(n_windows, seq_len), torch.empty(n_windows, seq_len - 1)
    sheet: _Sheet | None = None
    vocabulary = 0
    with path.open("w+b") as file:
        for part in parts:
            if sheet is None:
                vocabulary, k = part.vocabulary, part.top["log_probs"].shape[-1]
                sheet = _Sheet(path, file, _shapes(tokens, k, vocabulary))
            sheet.write(part)
            rest[part.windows, part.positions] = part.top["rest"].cpu()
            losses[part.windows, part.positions] = part.losses.cpu()
        assert sheet is not None, "a text has windows"
        facts = _facts(rest, losses, tokens, (sheet.k, vocabulary))
        sheet.finish(facts)
    return facts


@dataclass(frozen=True)
class _Sheet:
    """A safetensors file whose tensors are written bit by bit, in any order.

    Attributes:
        path: of the file.
        file: open for reading and writing.
        shapes: of its tensors, [N, T, ...] of 4 bytes each, by name in the order of the file.
    """

    path: Path
    file: BinaryIO
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def k(self) -> int:
        """Tokens that are stored of a position."""
        return self.shapes["log_probs"][-1]

    @property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        """First byte and end of each tensor, counted from the end of the header."""
        ends = list(accumulate(4 * math.prod(shape) for shape in self.shapes.values()))
        return dict(zip(self.shapes, pairwise((0, *ends)), strict=True))

    def write(self, part: Kept) -> None:
        """Write what is kept of a part of the text.

        Raises:
            StoreError: the disk is full, or the like.
        """
        seq_len = self.shapes["rest"][1]
        n_bytes = _HEADER_BYTES + self._offsets[list(self.shapes)[-1]][1]
        with writing(self.path, n_bytes):
            for name, tensor in part.top.items():
                # Whole windows or positions of one window: they lie side by side either way.
                position = part.windows.start * seq_len + part.positions.start
                width = 4 * math.prod(self.shapes[name][2:])
                self.file.seek(_HEADER_BYTES + self._offsets[name][0] + position * width)
                self.file.write(tensor.cpu().contiguous().numpy().tobytes())

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the header; the checksum in it is of what can be read back."""
        text, checksum = json.dumps(facts), "0" * 64
        for _ in range(2):
            with writing(self.path):
                self.file.seek(0)
                self.file.write(self._header({"facts": text, SUM: checksum}))
                self.file.flush()
            with safe_open(self.path, "pt") as written:
                checksum = _sum(_slices(written), facts["n_windows"], text)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and JSON as safetensors has them, padded with spaces."""
        tensors = {
            name: {
                "dtype": "I32" if name == "tokens" else "F32",
                "shape": shape,
                "data_offsets": self._offsets[name],
            }
            for name, shape in self.shapes.items()
        }
        text = json.dumps({"__metadata__": metadata, **tensors}).encode()
        n_text = _HEADER_BYTES - 8
        assert len(text) <= n_text, "facts are short"
        return n_text.to_bytes(8, "little") + text.ljust(n_text)


def _shapes(tokens: Tensor, k: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what is stored of windows [N, T]."""
    n_windows, seq_len = tokens.shape
    shapes: dict[str, tuple[int, ...]] = {
        "log_probs": (n_windows, seq_len, k),
        "rest": (n_windows, seq_len),
    }
    return shapes if k == vocabulary else shapes | {"tokens": (n_windows, seq_len, k)}


def _slices(file: Any) -> dict[str, Any]:
    """Tensors of an open file, not read yet."""
    return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


def open_teacher(path: Path) -> Teacher:
    """Open stored predictions and compare them with their checksum.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            stated: dict[str, str] = file.metadata() or {}
            facts = parse_json(stated["facts"])
            slices = _slices(file)
            shapes = {n: tuple(part.get_shape()) for n, part in slices.items()}
            found = _sum(slices, facts["n_windows"], stated["facts"])
        n_windows, seq_len, k = facts["n_windows"], facts["seq_len"], facts["k"]
        expected = {"log_probs": (n_windows, seq_len, k), "rest": (n_windows, seq_len)}
        if k < facts["vocabulary"]:
            expected["tokens"] = (n_windows, seq_len, k)
        if shapes != expected or "data_digest" not in facts:
            raise ValueError(f"it holds {shapes}, not {expected}")
        if found != stated.get(SUM):
            raise ValueError(
                "its sha256 differs from the one written with it"
                if SUM in stated
                else "it has no checksum: an earlier version wrote it"
            )
    except (OSError, SafetensorError, JsonError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}); delete it and run the same command again"
        ) from error
    return Teacher(path, facts)


def _sum(stored: Mapping[str, Any], n_windows: int, text: str) -> str:
    """Checksum of tensors or slices of a file, a few windows at a time, and of the facts."""
    parts = (
        (name, stored[name][start : start + _SUMMED_WINDOWS].numpy())
        for name in sorted(stored)
        for start in range(0, n_windows, _SUMMED_WINDOWS)
    )
    return content_sum(parts, text)


def _facts(rest: Tensor, losses: Tensor, tokens: Tensor, sizes: tuple[int, int]) -> dict[str, Any]:
    """What `Teacher.facts` lists, from numbers of each position; `sizes` are k and V."""
    nll = float(losses.mean(-1).double().mean()) if losses.numel() else math.nan
    return {
        "n_windows": tokens.shape[0],
        "seq_len": tokens.shape[1],
        "k": sizes[0],
        "vocabulary": sizes[1],
        "mass": 1.0 - float(rest.double().exp().mean()),
        "data_digest": token_digest(tokens),
        "nll": nll if math.isfinite(nll) else None,
    }


def check_windows(teacher: Teacher, tokens: Tensor) -> None:
    """Refuse windows that the predictions are not of.

    Raises:
        StoreError: they are of other windows.
    """
    facts = teacher.facts
    if facts["data_digest"] != token_digest(tokens):
        raise StoreError(
            f"{teacher.path} holds predictions for {facts['n_windows']} windows of "
            f"{facts['seq_len']} tokens, which are not the {tokens.shape[0]} windows of "
            f"{tokens.shape[1]} asked for; give the text that it was made from, or delete it and "
            "run the same command again"
        )


def check_vocabulary(teacher: Teacher, vocabulary: int) -> None:
    """Refuse a model whose vocabulary is not that of the predictions.

    Raises:
        StoreError: the sizes differ.
    """
    if teacher.facts["vocabulary"] != vocabulary:
        raise StoreError(
            f"{teacher.path} holds predictions over {teacher.facts['vocabulary']} tokens, the "
            f"model predicts {vocabulary}; only models of one vocabulary can be compared; give "
            "the model that this one was quantized from as the reference"
        )


def _top(log_probs: Tensor, k: int) -> dict[str, Tensor]:
    """The tensors that are stored of predictions [b, t, V]."""
    if k == log_probs.shape[-1]:
        rest = torch.full(log_probs.shape[:-1], -torch.inf, device=log_probs.device)
        return {"log_probs": log_probs, "rest": rest}
    shape, rows = log_probs.shape[:-1], log_probs.flatten(0, -2)
    found = [largest(rows[chunk], k) for chunk in row_chunks(rows)]
    tokens = torch.cat(found).reshape(*shape, k)
    values = log_probs.gather(-1, tokens.to(torch.int64))
    return {"log_probs": values, "tokens": tokens, "rest": log_rest(log_probs, tokens)}


def log_rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of all tokens but these, [b, t, V] and integers [b, t, k] -> [b, t].

    Summed over the others: 1 - sum of the top would be rounding noise where the rest is below
    1e-6, and where it rounds to 0 for one model alone, an error of 1e-6 * ln(1e-6 / 1e-38).
    Predictions are written meanwhile; afterwards they are as they were.
    """
    rows, left_out = log_probs.flatten(0, -2), tokens.flatten(0, -2)
    parts = []
    for chunk in row_chunks(rows):
        own, places = rows[chunk], left_out[chunk].to(torch.int64)
        kept = own.gather(-1, places)  # put back: a copy of all rows takes longer
        parts.append(own.scatter_(-1, places, -torch.inf).logsumexp(-1))
        own.scatter_(-1, places, kept)
    return torch.cat(parts).reshape(log_probs.shape[:-1])
