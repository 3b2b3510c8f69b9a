"""Perplexity: exp of the mean negative log-likelihood of the next token, over separate windows.

Each window of T tokens gives T - 1 predictions; its first token is only context, and windows do
not overlap. Where windows begin with the tokenizer's beginning of text (see `windows.py`), that is
the context: it is never predicted, and the first token of the text is, given it. Token
perplexity, not word perplexity.

Letters: N windows, B of them in a batch, T tokens, V vocabulary.
"""

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from alphaquant.errors import DataError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject, mean_and_stderr
from alphaquant.evaluators.predictions import Piece, predict_pieces
from alphaquant.models.walk import batches_of
from alphaquant.texts.windows import token_digest

_MAX_EXPONENT = 709.0
"""exp of more is beyond float64 (1.8e308)."""

PERPLEXITY = Metric("perplexity", "per token", "minimize")


def losses_of(piece: Piece, batch: Tensor) -> Tensor:
    """Negative log-likelihood of each token after a piece's positions given those before it, nats.

    Args:
        piece: predictions of a part of the batch.
        batch: int64 [B, T].

    Returns:
        [windows, positions] of the piece; without the last position of the batch, after which
        there is no token.
    """
    start, stop = piece.positions.start, min(piece.positions.stop, batch.shape[1] - 1)
    log_probs = piece.log_probs[:, : stop - start]
    following = batch[piece.windows, start + 1 : stop + 1].to(log_probs.device)
    return -log_probs.gather(-1, following.unsqueeze(-1)).squeeze(-1)


def check_length(tokens: Tensor) -> None:
    """Refuse windows [N, T] that predict nothing.

    Raises:
        DataError: windows of one token.
    """
    if tokens.shape[1] < 2:
        raise DataError(
            "perplexity of windows of 1 token asked; the first token of a window is only context; "
            "use windows of 2 tokens or more"
        )


def perplexity_score(nll: Tensor, seq_len: int, seconds: float, data_digest: str) -> Score:
    """The score of per-window losses.

    Its standard error is that of the delta method: perplexity x error of the mean loss.

    Args:
        nll: mean loss of each window, nats, [N].
        seq_len: T.
        seconds: wall time of the measurement.
        data_digest: of the tokens.
    """
    mean, error = mean_and_stderr(nll)
    value = perplexity_of(mean)
    return Score(
        metric="perplexity",
        value=value,
        unit="per token",
        direction="minimize",
        stderr=value * error,
        n_samples=nll.numel(),
        n_tokens=nll.numel() * (seq_len - 1),
        seconds=seconds,
        data_digest=data_digest,
    )


def perplexity_of(nll: float) -> float:
    """Perplexity of a mean loss in nats; infinite beyond float64."""
    return math.inf if nll > _MAX_EXPONENT else math.exp(nll)


def measure_perplexity(
    model: nn.Module, tokens: Tensor, data_digest: str, *, batch_size: int = 8
) -> Score:
    """Perplexity of a model.

    Args:
        model: a causal language model.
        tokens: int64 [N, T], T >= 2.
        data_digest: of the tokens.
        batch_size: windows per forward pass.

    Raises:
        DataError: windows of one token.
    """
    check_length(tokens)
    started = time.perf_counter()
    losses, first = torch.empty(tokens.shape[0], tokens.shape[1] - 1), 0
    for batch in batches_of(tokens, batch_size):
        for piece in predict_pieces(model, batch):
            windows = slice(first + piece.windows.start, first + piece.windows.stop)
            losses[windows, piece.positions] = losses_of(piece, batch).cpu()
        first += len(batch)
    seconds = time.perf_counter() - started
    return perplexity_score(losses.mean(-1), tokens.shape[1], seconds, data_digest)


@dataclass(frozen=True)
class PerplexityEvaluator:
    """Measures the perplexity of a model.

    Attributes:
        tokens: int64 [N, T], T >= 2.
        batch_size: windows per forward pass.
    """

    tokens: Tensor
    batch_size: int = 8

    name: ClassVar[str] = "perplexity"
    metrics: ClassVar[tuple[Metric, ...]] = (PERPLEXITY,)

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure; no details.

        Raises:
            DataError: windows of one token.
        """
        digest = token_digest(self.tokens)
        score = measure_perplexity(subject.model, self.tokens, digest, batch_size=self.batch_size)
        return Evaluated((score,))
