"""KL divergence of a quantized model to the original, and how often both predict the same token.

The original's predictions are computed once and kept on disk (`Teacher`): per position the
log-probabilities of its k most likely tokens, and the log-probability of all others together. With
k = V, which is the case up to 4096 tokens, KL is exact; above, the others form one bucket and the
number is a lower bound (log-sum inequality), tight where the top k hold nearly all mass. The
stored mass is in `Teacher.facts`.

KL = sum_v p(v) (log p(v) - log q(v)), p the original, in nats per token, averaged over all T
positions of a window; at the first one the models predict from one token alone, which is the
beginning of text where windows begin with it (see `windows.py`). With p = (1/2, 1/4, 1/4) and
q = (1/4, 1/4, 1/2): 1/2 ln 2 - 1/4 ln 2 = 0.1733; with k = 1 the buckets are (1/2, 1/2) and
(1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 0.1438.

Letters: N windows, B of them in a batch, T tokens, V vocabulary, k stored tokens per position.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaquant.checksums import SUM, content_sum
from alphaquant.errors import StoreError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject, mean_and_stderr
from alphaquant.evaluators.perplexity import (
    PERPLEXITY,
    perplexity_of,
    perplexity_score,
    predict,
    token_losses,
)
from alphaquant.files import whole_file
from alphaquant.models.walk import batches_of
from alphaquant.progress import Progress, Stage
from alphaquant.spaces.json_files import JsonError, parse_json
from alphaquant.texts.windows import token_digest

TOP_K = 4096
_SUMMED_WINDOWS = 8
"""Windows of a file that are in memory at once while its checksum is formed."""


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

    def batches(self, batch_size: int, first: int = 0) -> Iterator[dict[str, Tensor]]:
        """The stored tensors, `batch_size` windows at a time, from window `first` on."""
        with safe_open(self.path, "pt") as file:
            names = list(file.keys())
            for start in range(first, int(self.facts["n_windows"]), batch_size):
                yield {n: file.get_slice(n)[start : start + batch_size] for n in names}


@dataclass(frozen=True)
class Divergence:
    """What one pass over the windows measured; one number per window in each tensor, [N].

    Attributes:
        kl: mean KL per token of each window, nats.
        same_top: share of positions where both models rank the same token first.
        nll: mean negative log-likelihood of the true next token, nats (T - 1 positions).
        seq_len: T.
        seconds: wall time.
    """

    kl: Tensor
    same_top: Tensor
    nll: Tensor
    seq_len: int
    seconds: float

    def scores(self, data_digest: str) -> list[Score]:
        """KL, same-top and perplexity with their standard errors."""
        n, seconds = self.kl.numel(), self.seconds
        kl, kl_error = mean_and_stderr(self.kl)
        top, top_error = mean_and_stderr(self.same_top)
        common = (n, n * self.seq_len, seconds, data_digest)
        return [
            Score("kl", kl, "nats/token", "minimize", kl_error, *common),
            Score("same_top", top, "share of positions", "maximize", top_error, *common),
            perplexity_score(self.nll, self.seq_len, seconds, data_digest),
        ]


@dataclass(frozen=True)
class DivergenceEvaluator:
    """Compares a model's predictions with those stored of the original.

    Attributes:
        tokens: int64 [N, T], T >= 2, those of the teacher.
        teacher: stored predictions.
        batch_size: windows per forward pass.
    """

    tokens: Tensor
    teacher: Teacher
    batch_size: int = 8

    name: ClassVar[str] = "divergence"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kl", "nats/token", "minimize"),
        Metric("same_top", "share of positions", "maximize"),
        PERPLEXITY,
    )

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure; no details.

        Raises:
            StoreError: the teacher belongs to other windows or another vocabulary.
            DataError: windows of one token.
        """
        found = measure_divergence(
            subject.model, self.tokens, self.teacher, batch_size=self.batch_size
        )
        return Evaluated(tuple(found.scores(self.teacher.facts["data_digest"])))


def store_teacher(
    path: Path,
    model: nn.Module,
    tokens: Tensor,
    *,
    batch_size: int = 8,
    top_k: int = TOP_K,
    progress: Progress = lambda stage, done, total: None,
) -> Teacher:
    """Compute and store the original's predictions, or open them if they are there.

    Args:
        path: the safetensors file; its name should carry digests of the model and the tokens.
        model: the original model.
        tokens: int64 [N, T].
        batch_size: windows per forward pass.
        top_k: tokens stored per position (at most V).
        progress: called with ("teacher", windows done, windows).

    Raises:
        StoreError: the file exists and cannot be read, or is of other windows.
    """
    if path.exists():
        teacher = open_teacher(path)
        check_windows(teacher, tokens)
        return teacher
    parts: dict[str, list[Tensor]] = {}
    losses, vocabulary = [], 0
    for start in range(0, len(tokens), batch_size):
        progress(Stage.TEACHER, start, len(tokens))
        log_probs = predict(model, tokens[start : start + batch_size])  # [B, T, V]
        vocabulary = log_probs.shape[-1]
        if tokens.shape[1] > 1:
            losses.append(token_losses(log_probs, tokens[start : start + batch_size]).mean(-1))
        for name, tensor in _top(log_probs, min(top_k, vocabulary)).items():
            parts.setdefault(name, []).append(tensor.cpu())
    stored = {name: torch.cat(tensors) for name, tensors in parts.items()}
    nll = float(torch.cat(losses).double().mean()) if losses else math.nan
    facts = _facts(stored, tokens, vocabulary) | {"nll": nll if math.isfinite(nll) else None}
    text = json.dumps(facts)
    with whole_file(path) as part:
        save_file(stored, part, metadata={"facts": text, SUM: _sum(stored, len(tokens), text)})
    progress(Stage.TEACHER, len(tokens), len(tokens))
    return Teacher(path, facts)


def open_teacher(path: Path) -> Teacher:
    """Open stored predictions and compare them with their checksum.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            stated: dict[str, str] = file.metadata() or {}
            facts = parse_json(stated["facts"])
            slices = {n: file.get_slice(n) for n in file.keys()}  # noqa: SIM118
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


@torch.no_grad()
def measure_divergence(
    model: nn.Module, tokens: Tensor, teacher: Teacher, *, batch_size: int = 8
) -> Divergence:
    """Compare a model with the stored predictions on the same windows.

    Args:
        model: the quantized model.
        tokens: int64 [N, T], T >= 2, those of the teacher.
        teacher: stored predictions.
        batch_size: windows per forward pass.

    Raises:
        StoreError: the teacher belongs to other windows or another vocabulary.
        DataError: windows of one token.
    """
    check_windows(teacher, tokens)
    predictions = (predict(model, batch) for batch in batches_of(tokens, batch_size))
    return join(list(compare_predictions(predictions, tokens, teacher, batch_size=batch_size)))


@torch.no_grad()
def compare_predictions(
    predictions: Iterable[Tensor],
    tokens: Tensor,
    teacher: Teacher,
    *,
    batch_size: int,
    first_batch: int = 0,
) -> Iterator[Divergence]:
    """Compare predictions with the stored ones as they come, batch by batch.

    Args:
        predictions: log-probabilities [B, T, V] of successive batches; the caller may stop early.
        tokens: int64 [N, T], T >= 2, those of the teacher.
        teacher: stored predictions.
        batch_size: windows per batch.
        first_batch: batch that the predictions begin with.

    Raises:
        StoreError: the teacher belongs to another vocabulary.
        DataError: windows of one token.
    """
    started = time.perf_counter()
    batches = batches_of(tokens, batch_size)[first_batch:]
    stored_batches = teacher.batches(batch_size, first_batch * batch_size)
    triples = zip(predictions, batches, stored_batches, strict=True)
    for log_probs, batch, stored in triples:
        check_vocabulary(teacher, log_probs.shape[-1])
        stored = {name: tensor.to(log_probs.device) for name, tensor in stored.items()}
        kl = kl_per_position(log_probs, stored).mean(-1).cpu()
        same = (log_probs.argmax(-1) == _first_token(stored)).float().mean(-1).cpu()
        nll = token_losses(log_probs, batch).mean(-1).cpu()
        seconds = time.perf_counter() - started
        yield Divergence(kl, same, nll, tokens.shape[1], seconds)
        started = time.perf_counter()


def join(parts: Sequence[Divergence]) -> Divergence:
    """The comparison of successive batches as one; at least one."""
    return Divergence(
        torch.cat([p.kl for p in parts]),
        torch.cat([p.same_top for p in parts]),
        torch.cat([p.nll for p in parts]),
        parts[0].seq_len,
        sum(p.seconds for p in parts),
    )


def _sum(stored: Mapping[str, Any], n_windows: int, text: str) -> str:
    """Checksum of tensors or slices of a file, a few windows at a time, and of the facts."""
    parts = (
        (name, stored[name][start : start + _SUMMED_WINDOWS].numpy())
        for name in sorted(stored)
        for start in range(0, n_windows, _SUMMED_WINDOWS)
    )
    return content_sum(parts, text)


def _facts(stored: Mapping[str, Tensor], tokens: Tensor, vocabulary: int) -> dict[str, Any]:
    return {
        "n_windows": tokens.shape[0],
        "seq_len": tokens.shape[1],
        "k": stored["log_probs"].shape[-1],
        "vocabulary": vocabulary,
        "mass": 1.0 - float(stored["rest"].double().exp().mean()),
        "data_digest": token_digest(tokens),
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
    """The tensors that are stored of predictions [B, T, V]."""
    if k == log_probs.shape[-1]:
        rest = torch.full(log_probs.shape[:-1], -torch.inf, device=log_probs.device)
        return {"log_probs": log_probs, "rest": rest}
    top = log_probs.topk(k, -1)
    rest = _log_rest(log_probs, top.indices)
    return {"log_probs": top.values, "tokens": top.indices.to(torch.int32), "rest": rest}


def _log_rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of all tokens but these, [B, T, V] and int64 [B, T, k] -> [B, T].

    Summed over the others: 1 - sum of the top would be rounding noise where the rest is below
    1e-6, and where it rounds to 0 for one model alone, an error of 1e-6 * ln(1e-6 / 1e-38).
    """
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)


def kl_per_position(log_probs: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """KL per position, [B, T]."""
    p = stored["log_probs"]
    if "tokens" not in stored:
        return (p.exp() * (p - log_probs)).sum(-1)
    tokens = stored["tokens"].to(torch.int64)
    rest_p, rest_q = stored["rest"], _log_rest(log_probs, tokens)
    bucket = torch.where(torch.isneginf(rest_p), 0.0, rest_p.exp() * (rest_p - rest_q))
    return (p.exp() * (p - log_probs.gather(-1, tokens))).sum(-1) + bucket


def _first_token(stored: Mapping[str, Tensor]) -> Tensor:
    """The token that the original ranks first, int64 [B, T]."""
    first = stored["log_probs"].argmax(-1)
    if "tokens" not in stored:
        return first
    return stored["tokens"].gather(-1, first.unsqueeze(-1)).squeeze(-1).to(torch.int64)
