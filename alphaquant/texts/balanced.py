"""Expert-balanced self-sampling (EBSS): a model writes its own text, and uses its experts evenly.

Every text starts with a drawn token. Of it w beams are kept, and each step scores every
continuation v of every prefix S of l tokens as

    score(S v) = -(R_S + log P(v | S)) / (l + 1) + sigma(S) / tau,     R_S = sum of log P so far

of which the w lowest are kept. sigma is that of the prefix, so that balance compares prefixes and
not tokens:

    sigma(S) = mean over layers of sqrt(sum_e (u_e - mean u)^2 / (E - 1))

with u_e the share of the prefix's tokens that chose expert e in that layer, so the u of a layer
sum to k. At the end the prefix of the lowest score is the text.

Worked example: two layers of two experts with u = (3/4, 1/4) and (1/2, 1/2): the first has
sqrt(2 (1/4)^2 / 1) = 0.3536, the second 0, sigma = 0.1768.

The model is a `Writer`; that of transformers is in `alphaquant.studies.self_sampling`.

Letters: G texts, w beams, l tokens of a prefix, T at the end, V vocabulary, L layers, E experts.
Source: MoEQuant (arXiv 2505.03804). sigma is its equation 4; a picture in its repository has
E / (E - 1) instead. The text says to keep the largest scores, which would be the least likely and
least balanced ones: the lowest are meant.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TEMPERATURE = 1.2
WIDTH = 4
"""Of the paper: tau and w."""


@dataclass(frozen=True)
class Written:
    """What a model says of tokens that it just read, one row per prefix.

    Attributes:
        log_probs: of the next token, float32 [R, V]; -inf for what is no token.
        usage: how often these tokens chose each expert, one float [R, E] for every layer.
    """

    log_probs: Tensor
    usage: Sequence[Tensor]


class Writer(Protocol):
    """A model that remembers the prefixes that it read."""

    def begin(self, tokens: Tensor) -> Written:
        """Forget everything and read the beginnings of R prefixes, int64 [R, P]."""

    def go_on(self, prefixes: Tensor, tokens: Tensor) -> Written:
        """Take prefixes by number, int64 [R], with a token behind each, int64 [R]."""


@dataclass(frozen=True)
class Sampled:
    """Texts.

    Attributes:
        tokens: int64 [G, T].
        log_probs: sum of log P of what was written, float32 [G].
        scores: of the last step, float32 [G].
    """

    tokens: Tensor
    log_probs: Tensor
    scores: Tensor


def imbalance(usage: Sequence[Tensor], n_tokens: int) -> Tensor:
    """Sigma of prefixes.

    Args:
        usage: how often experts were chosen, [R, E] for every layer.
        n_tokens: of each prefix.

    Returns:
        float [R].
    """
    spreads = [(layer / n_tokens).std(-1) for layer in usage]  # E - 1 in the denominator
    return torch.stack(spreads).mean(0)


@torch.no_grad()
def write_balanced(
    writer: Writer,
    starts: Tensor,
    n_tokens: int,
    *,
    width: int = WIDTH,
    temperature: float = TEMPERATURE,
    tell: Callable[[int], None] = lambda n_tokens: None,
) -> Sampled:
    """Let a model write texts.

    Args:
        writer: the model.
        starts: what texts begin with, int64 [G, P].
        n_tokens: T, larger than P.
        width: w.
        temperature: tau.
        tell: called with the tokens that each text has.
    """
    n_texts, length = starts.shape
    tokens, found = starts, writer.begin(starts)  # [R, l], R = G, then G * w
    usage, sums = list(found.usage), torch.zeros(n_texts, device=found.log_probs.device)
    while True:
        sigma = imbalance(usage, length)
        totals = sums[:, None] + found.log_probs  # [R, V]
        scores = -totals / (length + 1) + sigma[:, None] / temperature
        together = scores.reshape(n_texts, -1)  # all prefixes of a text
        n_kept = 1 if length + 1 == n_tokens else min(width, together.shape[1])
        best = together.topk(n_kept, largest=False)  # [G, w]
        n_prefixes, vocabulary = len(tokens) // n_texts, scores.shape[-1]
        first = torch.arange(n_texts, device=best.indices.device)[:, None] * n_prefixes
        prefixes = (first + best.indices // vocabulary).flatten()  # [G * w]
        chosen = (best.indices % vocabulary).flatten()
        tokens = torch.cat([tokens[prefixes.cpu()], chosen.cpu()[:, None]], 1)
        sums = totals[prefixes, chosen]
        length += 1
        tell(length)
        if length == n_tokens:
            return Sampled(tokens, sums, best.values.flatten())
        found = writer.go_on(prefixes, chosen)
        usage = [old[prefixes] + new for old, new in zip(usage, found.usage, strict=True)]
