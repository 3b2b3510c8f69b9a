"""Perplexity: exp of the mean negative log-likelihood of the next token, over windows that do not overlap.

Each window of T tokens gives T - 1 predictions; its first token is only context. Token perplexity, not word perplexity.
"""

import math
import time

import torch
from torch import Tensor, nn

from alphaquant.evaluators.base import Score, mean_and_stderr


def token_losses(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token given those before it, nats.

    Args:
        log_probs: [B, T, V].
        tokens: int64 [B, T].

    Returns:
        [B, T - 1].
    """
    following = tokens[:, 1:].to(log_probs.device).unsqueeze(-1)
    return -log_probs[:, :-1].gather(-1, following).squeeze(-1)


def perplexity_score(nll: Tensor, seq_len: int, seconds: float, data_digest: str) -> Score:
    """The score of per-window losses [N]; standard error by the delta method, perplexity x error of the mean loss."""
    mean, error = mean_and_stderr(nll)
    value, n = math.exp(mean), nll.numel()
    return Score(
        "perplexity", value, "per token", "minimize", value * error, n, n * (seq_len - 1), seconds, data_digest
    )


@torch.no_grad()
def measure_perplexity(model: nn.Module, tokens: Tensor, data_digest: str, *, batch_size: int = 8) -> Score:
    """Perplexity of a model.

    Args:
        model: a causal language model.
        tokens: int64 [N, T].
        data_digest: of the tokens.
        batch_size: windows per forward pass.
    """
    started = time.perf_counter()
    device = next(iter(model.state_dict().values())).device
    nll = []
    for batch in tokens.split(batch_size):
        logits = model(batch.to(device), use_cache=False).logits
        nll.append(token_losses(torch.log_softmax(logits.float(), -1), batch).mean(-1).cpu())
    return perplexity_score(torch.cat(nll), tokens.shape[1], time.perf_counter() - started, data_digest)
