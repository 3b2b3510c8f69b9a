"""How evenly a model uses its experts.

The hard load of an expert is its share of the routed slots (tokens x k), the soft load its share
of the routing weight. With hard loads f of the E experts of a layer:

    load_imbalance    coefficient of variation, sqrt(mean((E f - 1)^2)): 0 is balanced, and
                      sqrt(E - 1) is one expert for all
    load_entropy      -sum f ln f / ln E: 1 is balanced, 0 is one expert for all
    starved_experts   share of experts with E f < 1/4

each the mean over layers. Four experts with 6, 2, 0, 0 slots: E f = 3, 1, 0, 0, so the imbalance
is sqrt((4 + 0 + 1 + 1) / 4) = 1.2247, the entropy (3/4 ln 4/3 + 1/4 ln 4) / ln 4 = 0.4056, and 1/2
is starved.

All three depend on the loads of all windows together and are no means over windows, so they have
no standard error. Few tokens look less balanced than they are: S slots that fall evenly at random
have an imbalance of about sqrt((E - 1) / S).

Letters: N windows, T tokens, E experts, k chosen.
"""

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject
from alphaquant.evaluators.routes import LayerRoutes, route_batches
from alphaquant.models.loads import Utilization
from alphaquant.texts.windows import token_digest


@dataclass(frozen=True)
class ExpertLoads:
    """What the experts of one layer were given.

    Attributes:
        counts: routed slots of each expert, int64 [E].
        weights: routing weight of each expert, summed, float64 [E].
    """

    counts: Tensor
    weights: Tensor

    @property
    def hard(self) -> Utilization:
        """Shares of the slots; the starved are under-utilized, whatever their number of tokens."""
        return Utilization(tuple(self.counts.tolist()), in_features=0)

    @property
    def soft(self) -> list[float]:
        """Share of the routing weight, [E]; zeros without any."""
        total = float(self.weights.sum())
        return (self.weights / (total or 1.0)).tolist()

    @property
    def imbalance(self) -> float:
        """Coefficient of variation of the hard load."""
        ratios = torch.tensor(self.hard.ratio_to_uniform, dtype=torch.float64)
        return float((ratios - 1).square().mean().sqrt())

    @property
    def entropy(self) -> float:
        """Entropy of the hard load over ln E; 1 for a single expert."""
        shares = torch.tensor(self.hard.fraction, dtype=torch.float64)
        if len(shares) == 1:
            return 1.0
        return float(torch.special.entr(shares).sum()) / math.log(len(shares))

    @property
    def starved(self) -> float:
        """Share of experts below a quarter of the uniform load."""
        return len(self.hard.under_utilized) / len(self.counts)

    def facts(self, name: str) -> dict[str, Any]:
        """For details: name of the experts, loads, balance, indices of the starved."""
        return {
            "experts": name,
            "hard_load": list(self.hard.fraction),
            "soft_load": self.soft,
            "load_imbalance": self.imbalance,
            "load_entropy": self.entropy,
            "starved": list(self.hard.under_utilized),
        }


@dataclass(frozen=True)
class UtilizationEvaluator:
    """Measures how evenly the experts of a model are used; see the head of the file.

    Attributes:
        tokens: int64 [N, T].
        batch_size: windows per forward pass.
    """

    tokens: Tensor
    batch_size: int = 8

    name: ClassVar[str] = "utilization"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("load_imbalance", "standard deviations per mean load", "minimize"),
        Metric("load_entropy", "share of ln experts", "maximize"),
        Metric("starved_experts", "share of experts", "minimize"),
    )

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure; details are a row for each experts module, see `ExpertLoads.facts`.

        Raises:
            ModelError: the model has no routed experts, or they were not called.
        """
        started = time.perf_counter()
        loads: dict[str, ExpertLoads] = {}
        for batch in route_batches(subject.model, self.tokens, self.batch_size):
            for routes in batch:
                loads[routes.site.name] = add_loads(loads.get(routes.site.name), routes)
        rows = loads.values()
        values = (
            [load.imbalance for load in rows],
            [load.entropy for load in rows],
            [load.starved for load in rows],
        )
        seconds = time.perf_counter() - started
        common = (len(self.tokens), self.tokens.numel(), seconds, token_digest(self.tokens))
        scores = tuple(
            Score(m.name, math.fsum(v) / len(v), m.unit, m.direction, None, *common)
            for m, v in zip(self.metrics, values, strict=True)
        )
        return Evaluated(scores, {"layers": [load.facts(name) for name, load in loads.items()]})


def add_loads(sums: ExpertLoads | None, routes: LayerRoutes) -> ExpertLoads:
    """Loads with those of a batch added.

    Args:
        sums: of the batches before, None before the first.
        routes: of one layer and batch.
    """
    n_experts = routes.site.n_experts
    ids = routes.expert_ids.flatten()  # [B, T, k] -> [B * T * k]
    weights = routes.weights.flatten().double()
    # Slots without an expert have the index E, which is cut off.
    counts = torch.bincount(ids, minlength=n_experts + 1)[:n_experts].cpu()
    summed = torch.bincount(ids, weights, n_experts + 1)[:n_experts].cpu()
    if sums is None:
        return ExpertLoads(counts, summed)
    return ExpertLoads(sums.counts + counts, sums.weights + summed)
