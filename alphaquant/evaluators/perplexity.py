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
from alphaquant.models.mapping import device_of
from alphaquant.models.walk import batches_of
from alphaquant.texts.windows import token_digest

_MAX_EXPONENT = 709.0
"""exp of more is beyond float64 (1.8e308)."""

PERPLEXITY = Metric("perplexity", "per token", "minimize")


@torch.no_grad()
def predict(model: nn.Module, batch: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position.

    Args:
        model: a causal language model.
        batch: int64 [B, T], on any device.

    Returns:
        float32 [B, T, V], on the model's device.
    """
    device = device_of(model)
    logits: Tensor = model(batch.to(device), use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)


def token_losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token given those before it, nats.

    Args:
        log_probs: [B, T, V].
        tokens: int64 [B, T], T >= 2.

    Returns:
        [B, T - 1].

    Raises:
        DataError: windows of one token.
    """
    if tokens.shape[1] < 2:
        raise DataError(
            "perplexity of windows of 1 token asked; the first token of a window is only context; "
            "use windows of 2 tokens or more"
        )
    following = tokens[:, 1:].to(log_probs.device).unsqueeze(-1)  # [B, T - 1, 1]
    return -log_probs[:, :-1].gather(-1, following).squeeze(-1)


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
    started = time.perf_counter()
    nll = [
        token_losses(predict(model, batch), batch).mean(-1).cpu()
        for batch in batches_of(tokens, batch_size)
    ]
    seconds = time.perf_counter() - started
    return perplexity_score(torch.cat(nll), tokens.shape[1], seconds, data_digest)


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
