"""KL divergence of a quantized model to the original, and how often both predict the same token.

The original's predictions are on disk (`alphaquant.evaluators.teacher`): per position the
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

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject, mean_and_stderr
from alphaquant.evaluators.perplexity import (
    PERPLEXITY,
    check_length,
    losses_of,
    perplexity_score,
)
from alphaquant.evaluators.predictions import Piece, most_likely, predict_pieces
from alphaquant.evaluators.teacher import (
    Expected,
    Stored,
    Teacher,
    check_vocabulary,
    check_windows,
    log_rest,
)
from alphaquant.models.walk import batches_of, row_chunks


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
    parts, first = [], 0
    with teacher.opened() as stored:
        for batch in batches_of(tokens, batch_size):
            started = time.perf_counter()
            part = compare_batch(predict_pieces(model, batch), batch, teacher, stored, first)
            parts.append(replace(part, seconds=time.perf_counter() - started))
            first += len(batch)
    return join(parts)


@torch.no_grad()
def compare_batch(
    pieces: Iterable[Piece], batch: Tensor, teacher: Teacher, stored: Stored, first: int
) -> Divergence:
    """Compare predictions of a batch with the stored ones, piece by piece.

    Args:
        pieces: all predictions of the batch.
        batch: int64 [B, T], T >= 2.
        teacher: stored predictions.
        stored: its open file.
        first: window of the text that the batch begins with.

    Returns:
        What was found, without its seconds.

    Raises:
        StoreError: the teacher belongs to another vocabulary.
        DataError: windows of one token.
    """
    check_length(batch)
    n_windows, seq_len = batch.shape
    kl, same = torch.empty(n_windows, seq_len), torch.empty(n_windows, seq_len)
    losses = torch.empty(n_windows, seq_len - 1)
    for piece in pieces:
        check_vocabulary(teacher, piece.log_probs.shape[-1])
        expected, cut = stored.read(first, piece), (piece.windows, piece.positions)
        kl[cut] = kl_per_position(piece.log_probs, expected).cpu()
        same[cut] = (most_likely(piece.log_probs) == expected.first).float().cpu()
        losses[cut] = losses_of(piece, batch).cpu()
    return Divergence(kl.mean(-1), same.mean(-1), losses.mean(-1), seq_len, 0.0)


def join(parts: Sequence[Divergence]) -> Divergence:
    """The comparison of successive batches as one; at least one."""
    return Divergence(
        torch.cat([p.kl for p in parts]),
        torch.cat([p.same_top for p in parts]),
        torch.cat([p.nll for p in parts]),
        parts[0].seq_len,
        sum(p.seconds for p in parts),
    )


def kl_per_position(log_probs: Tensor, expected: Expected) -> Tensor:
    """KL per position, [b, t, V] and what is stored of it -> [b, t]."""
    shape, rows = log_probs.shape[:-1], log_probs.flatten(0, -2)
    log_p, p = expected.log_probs.flatten(0, 1), expected.probs.flatten(0, 1)
    if expected.tokens is None:
        parts = [(p[c] * (log_p[c] - rows[c])).sum(-1) for c in row_chunks(rows)]
        return torch.cat(parts).reshape(shape)
    tokens = expected.tokens.flatten(0, 1)
    parts = [
        (p[c] * (log_p[c] - rows[c].gather(-1, tokens[c].to(torch.int64)))).sum(-1)
        for c in row_chunks(rows)
    ]
    rest_p, rest_q = expected.rest, log_rest(log_probs, expected.tokens)
    bucket = torch.where(torch.isneginf(rest_p), 0.0, rest_p.exp() * (rest_p - rest_q))
    return torch.cat(parts).reshape(shape) + bucket
