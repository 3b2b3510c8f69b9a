"""KL divergence of a quantized model to the original, and how often both predict the same next token.

The original's predictions are computed once and kept on disk (`Teacher`): per position the log-probabilities of its k most likely
tokens, and the log-probability of all others together. With k = vocabulary size, which is the case up to 4096 tokens, KL is
exact; above, the others form one bucket and the number is a lower bound (log-sum inequality), tight where the top k hold
nearly all mass. The stored mass is in `Teacher.facts`.

KL = sum_v p(v) (log p(v) - log q(v)), p the original, in nats per token, averaged over all T positions of a window.

Letters: N windows, T tokens, V vocabulary, k stored tokens per position.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaquant.errors import StoreError
from alphaquant.evaluators.base import Score, mean_and_stderr
from alphaquant.evaluators.perplexity import perplexity_score, token_losses
from alphaquant.quant.bank import Progress

TOP_K = 4096


@dataclass(frozen=True)
class Teacher:
    """The original model's predictions on a set of windows, memory-mapped.

    Attributes:
        path: safetensors file with `log_probs` float32 [N, T, k], `rest` float32 [N, T] (log-probability of all other tokens, -inf
            when k = V) and, when k < V, `tokens` int32 [N, T, k].
        facts: n_windows, seq_len, k, vocabulary, mean stored mass.
    """

    path: Path
    facts: Mapping[str, Any]

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The stored tensors, `batch_size` windows at a time."""
        with safe_open(self.path, "pt") as file:
            names = list(file.keys())
            for start in range(0, int(self.facts["n_windows"]), batch_size):
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
        n = self.kl.numel()
        kl, kl_error = mean_and_stderr(self.kl)
        top, top_error = mean_and_stderr(self.same_top)
        n_tokens = n * self.seq_len
        return [
            Score("kl", kl, "nats/token", "minimize", kl_error, n, n_tokens, self.seconds, data_digest),
            Score("same_top", top, "share of positions", "maximize", top_error, n, n_tokens, self.seconds, data_digest),
            perplexity_score(self.nll, self.seq_len, self.seconds, data_digest),
        ]


@torch.no_grad()
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
        StoreError: the file exists and cannot be read.
    """
    if path.exists():
        return open_teacher(path)
    parts: dict[str, list[Tensor]] = {}
    vocabulary = k = 0
    for start in range(0, len(tokens), batch_size):
        progress("teacher", start, len(tokens))
        log_probs = predict(model, tokens[start : start + batch_size])  # [B, T, V]
        vocabulary, k = log_probs.shape[-1], min(top_k, log_probs.shape[-1])
        for name, tensor in _top(log_probs, k).items():
            parts.setdefault(name, []).append(tensor.cpu())
    stored = {name: torch.cat(tensors) for name, tensors in parts.items()}
    mass = 1.0 - float(stored["rest"].exp().mean())
    facts = {"n_windows": len(tokens), "seq_len": tokens.shape[1], "k": k, "vocabulary": vocabulary, "mass": mass}
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, part, metadata={"facts": json.dumps(facts)})
    part.replace(path)
    progress("teacher", len(tokens), len(tokens))
    return open_teacher(path)


def open_teacher(path: Path) -> Teacher:
    """Open stored predictions.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return Teacher(path, json.loads(file.metadata()["facts"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run the same command again") from error


@torch.no_grad()
def measure_divergence(model: nn.Module, tokens: Tensor, teacher: Teacher, *, batch_size: int = 8) -> Divergence:
    """Compare a model with the stored predictions on the same windows.

    Args:
        model: the quantized model.
        tokens: int64 [N, T], those of the teacher.
        teacher: stored predictions.
        batch_size: windows per forward pass.

    Raises:
        StoreError: the teacher belongs to windows of another shape.
    """
    shape = (teacher.facts["n_windows"], teacher.facts["seq_len"])
    if tuple(tokens.shape) != shape:
        raise StoreError(
            f"{teacher.path} holds predictions for {shape[0]} windows of {shape[1]} tokens, asked for {tuple(tokens.shape)}; delete it"
        )
    started = time.perf_counter()
    kl, same, nll = [], [], []
    for start, stored in zip(range(0, len(tokens), batch_size), teacher.batches(batch_size), strict=True):
        batch = tokens[start : start + batch_size]
        log_probs = predict(model, batch)
        stored = {name: tensor.to(log_probs.device) for name, tensor in stored.items()}
        kl.append(_kl(log_probs, stored).mean(-1).cpu())
        same.append((log_probs.argmax(-1) == _first_token(stored)).float().mean(-1).cpu())
        nll.append(token_losses(log_probs, batch).mean(-1).cpu())
    seconds = time.perf_counter() - started
    return Divergence(torch.cat(kl), torch.cat(same), torch.cat(nll), tokens.shape[1], seconds)


def predict(model: nn.Module, batch: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position, float32 [B, T, V]."""
    device = next(iter(model.state_dict().values())).device
    logits = model(batch.to(device), use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)


def _top(log_probs: Tensor, k: int) -> dict[str, Tensor]:
    if k == log_probs.shape[-1]:
        return {"log_probs": log_probs, "rest": torch.full(log_probs.shape[:-1], -torch.inf)}
    top = log_probs.topk(k, -1)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1.0))
    return {"log_probs": top.values, "tokens": top.indices.to(torch.int32), "rest": rest}


def _kl(log_probs: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
    """KL per position, [B, T]."""
    p = stored["log_probs"]
    if "tokens" not in stored:
        return (p.exp() * (p - log_probs)).sum(-1)
    q = log_probs.gather(-1, stored["tokens"].to(torch.int64))
    tiny = torch.finfo(torch.float32).tiny
    rest_q = (1.0 - q.exp().sum(-1)).clamp(min=tiny).log()
    rest_p = stored["rest"]
    bucket = torch.where(torch.isneginf(rest_p), 0.0, rest_p.exp() * (rest_p - rest_q))
    return (p.exp() * (p - q)).sum(-1) + bucket


def _first_token(stored: Mapping[str, Tensor]) -> Tensor:
    first = stored["log_probs"].argmax(-1)
    return stored["tokens"].gather(-1, first.unsqueeze(-1)).squeeze(-1).to(torch.int64) if "tokens" in stored else first
