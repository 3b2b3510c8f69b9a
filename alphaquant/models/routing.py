"""Tokens sorted by the expert that they are routed to.

Letters: n tokens, k experts per token, E experts. Slot j of token t carries its j-th chosen expert
and that choice's weight, so weights stay with their token whatever the order of execution.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert.

    Attributes:
        expert: its index.
        rows: int64 [m], indices of its tokens in the layer's input.
        weights: float [m], routing weight of each.
    """

    expert: int
    rows: Tensor
    weights: Tensor


def tokens_by_expert(
    expert_ids: Tensor, weights: Tensor, n_experts: int
) -> Iterator[ExpertTokens]:
    """The experts that received tokens, in order, each with its tokens in token order.

    Args:
        expert_ids: int64 [n, k].
        weights: float [n, k].
        n_experts: E; ids at or above it (padding of expert-parallel runs) are skipped.
    """
    flat_ids = expert_ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    counts = torch.bincount(flat_ids, minlength=n_experts)[:n_experts].tolist()
    flat_weights = weights.reshape(-1)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            slots = order[start : start + count]
            yield ExpertTokens(expert, slots // expert_ids.shape[-1], flat_weights[slots])
        start += count
