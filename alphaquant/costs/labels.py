"""Labels whose log-likelihood is differentiated, and its gradients at the predictions.

Letters: T tokens of a sequence, t of its positions, V vocabulary, S sequences, D labels per
position, each summed over positions to a total of its own.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from alphaquant.models.walk import row_chunks

NO_LABEL = -1
"""Stands where a position has none."""


class Labels(Protocol):
    """Labels whose log-likelihood is differentiated, D at every position."""

    @property
    def n_draws(self) -> int:
        """How many there are at a position: D."""

    def draw(self, probs: Tensor, tokens: Tensor, sequence: int, positions: slice) -> Tensor:
        """The labels of some positions of a sequence.

        Args:
            probs: predictions at these positions, float32 [t, V].
            tokens: of the whole sequence, int64 [T], on the same device.
            sequence: its index among all S.
            positions: which.

        Returns:
            int64 [D, t], `NO_LABEL` where there is none.
        """


@dataclass(frozen=True)
class SampledLabels:
    """Labels that are drawn from the model's own predictions.

    Squares of the gradients' products with a perturbation estimate the Fisher term of the
    divergence. Each draw of each sequence has a generator of its own, so the labels do not depend
    on how sequences are batched.

    Attributes:
        n_draws: labels drawn per position, each for a total of its own.
        seed: of the draws.
    """

    n_draws: int
    seed: int

    def draw(self, probs: Tensor, tokens: Tensor, sequence: int, positions: slice) -> Tensor:
        """See `Labels.draw`."""
        ends = probs.cumsum(-1)  # [256, 4096] takes 3 to 6 ms, torch.multinomial 50 (one core)
        drawn = []
        for number in range(self.n_draws):
            seed = _draw_seed(self.seed, number, sequence)
            generator = torch.Generator(device=probs.device).manual_seed(seed)
            points = torch.rand(len(tokens), 1, generator=generator, device=probs.device)
            at = points[positions] * ends[:, -1:]
            drawn.append(torch.searchsorted(ends, at, right=True).squeeze(-1))
        return torch.stack(drawn).clamp_(max=probs.shape[-1] - 1)


@dataclass(frozen=True)
class TextLabels:
    """The text's next tokens; the last position has none."""

    n_draws: ClassVar[int] = 1

    def draw(self, probs: Tensor, tokens: Tensor, sequence: int, positions: slice) -> Tensor:
        """See `Labels.draw`."""
        following = torch.cat([tokens[1:], tokens.new_full((1,), NO_LABEL)])
        return following[positions].unsqueeze(0)


def n_totals(labels: Sequence[Labels]) -> int:
    """D of all labels together."""
    return sum(one.n_draws for one in labels)


def label_gradients(
    logits: Tensor, tokens: Tensor, sequence: int, positions: slice, labels: Sequence[Labels]
) -> Tensor:
    """Gradients of the totals at the predictions of some positions.

    That of log p(v) is 1 at v less all probabilities.

    Args:
        logits: [t, V].
        tokens: of the whole sequence, int64 [T], on the same device.
        sequence: its index among all S.
        positions: which of the T, t of them.
        labels: D in all, at least one.

    Returns:
        [D, t, V] in the dtype of the logits.
    """
    found = logits.new_empty(n_totals(labels), *logits.shape)
    for rows in row_chunks(logits):
        probs = torch.softmax(logits[rows].detach().float(), -1)
        places = slice(positions.start + rows.start, positions.start + rows.stop)
        drawn = torch.cat([one.draw(probs, tokens, sequence, places) for one in labels])
        for gradients, label in zip(found[:, rows], drawn, strict=True):
            column = label.clamp_min(0).unsqueeze(-1)
            gradients.copy_(probs).neg_()
            gradients.scatter_(-1, column, (1 - probs.gather(-1, column)).to(gradients))
            gradients[label == NO_LABEL] = 0
    return found


def _draw_seed(seed: int, draw: int, sequence: int) -> int:
    """Seed of a sequence's draw: 63 bits of a hash, so that no two streams are related."""
    digest = hashlib.sha256(f"{seed}/{draw}/{sequence}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
