"""How far a quantized model's routing is from the original's on the same tokens.

    router_kl         sum_e p(e) (ln p(e) - ln q(e)), p the original's router, q the quantized
                      model's, both softmax over all E experts; nats per token, mean over layers
    expert_overlap    share of the experts that the original chose for a token which the quantized
                      model chose too, mean over layers

Both are means over tokens, so their standard errors are over windows. Errors of the layers before
are in them: what differs is also the router's input. p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2)
give 1/2 ln 2 - 1/4 ln 2 = 0.1733; the original's experts {0, 1} against {2, 0} give 1/2.

Log-probabilities of both are rounded to float16 and normalized again, so a model that computes the
same has exactly 0 and 1, as the original itself has in the same batches on a CPU. Where sums are
not repeatable (some GPU kernels), differences d of log-probabilities cost about d^2 / 2. What
float16 adds, on the demo model with 8 windows of 256 tokens rounded to nearest: 1.5e-7 nats at
int8-g64 (KL 8.1e-6), 1.0e-7 at int6-g64 (7.2e-5), 2.5e-7 at int2-g64 (0.0154).

Letters: N windows, B of them in a batch, T tokens, E experts, k chosen.
"""

import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from alphaquant.errors import ModelError, StoreError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject, mean_and_stderr
from alphaquant.evaluators.routes import (
    KeptRoutes,
    LayerRoutes,
    Routes,
    find_routed,
    known_log_probs,
    pack,
    route_batches,
    unpack,
)
from alphaquant.texts.windows import token_digest


class LayerDrift(NamedTuple):
    """Drift of one layer, a number per window: KL in nats per token, and overlap; float64 [B]."""

    kl: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class RoutingDriftEvaluator:
    """Compares a model's routing with the original's; see the head of the file.

    Attributes:
        tokens: int64 [N, T], those of the routes.
        original: routes of the original, from `keep_routes`.
    """

    tokens: Tensor
    original: Routes

    name: ClassVar[str] = "drift"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("router_kl", "nats/token", "minimize"),
        Metric("expert_overlap", "share of chosen experts", "maximize"),
    )

    def __post_init__(self) -> None:
        """Refuse other windows.

        Raises:
            StoreError: the routes are of other windows.
        """
        if token_digest(self.tokens) != self.original.data_digest:
            raise StoreError(
                f"routing drift asked on {self.tokens.shape[0]} windows of "
                f"{self.tokens.shape[1]} tokens, which are not those that the original's routes "
                "are of; keep the routes on the windows that are measured"
            )

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure; details are a row for each experts module with its own KL and overlap.

        Raises:
            ModelError: the model has other routed experts than the original, they were not
                called, or the router's logits are not known.
        """
        started = time.perf_counter()
        found = {site.name: site.n_experts for site in find_routed(subject.model)}
        if found != self.original.n_experts:
            raise ModelError(
                f"the model routes in {len(found)} modules to {sorted(set(found.values()))} "
                f"experts, the original in {len(self.original.n_experts)} to "
                f"{sorted(set(self.original.n_experts.values()))}, or under other names; give a "
                "quantized form of the original"
            )
        routed = route_batches(subject.model, self.tokens, self.original.batch_size)
        parts = [
            [compare_routes(*pair) for pair in zip(kept, live, strict=True)]
            for kept, live in zip(self.original.batches, routed, strict=True)
        ]
        kl, overlap = (
            torch.stack(
                [torch.cat([part[i] for part in layer]) for layer in zip(*parts, strict=True)]
            )
            for i in range(2)
        )  # float64 [layers, N] each
        seconds = time.perf_counter() - started
        common = (len(self.tokens), self.tokens.numel(), seconds, self.original.data_digest)
        scores = []
        for metric, values in zip(self.metrics, (kl, overlap), strict=True):
            mean, stderr = mean_and_stderr(values.mean(0))
            scores.append(Score(metric.name, mean, metric.unit, metric.direction, stderr, *common))
        rows = zip(found, kl.mean(1).tolist(), overlap.mean(1).tolist(), strict=True)
        names = ("experts", *(metric.name for metric in self.metrics))
        return Evaluated(
            tuple(scores), {"layers": [dict(zip(names, row, strict=True)) for row in rows]}
        )


def compare_routes(kept: KeptRoutes, live: LayerRoutes) -> LayerDrift:
    """Drift of one layer over the windows of a batch.

    Args:
        kept: the original's routes.
        live: the quantized model's, of the same tokens.

    Raises:
        ModelError: the router's logits are not known.
    """
    device = live.expert_ids.device
    p = unpack(kept.log_probs, device)  # [B, T, E]
    q = unpack(pack(known_log_probs(live)), device)
    kl = (p.exp() * (p - q)).sum(-1).double().mean(-1)
    chosen = kept.expert_ids.to(device, torch.int64)  # [B, T, k]
    is_slot = chosen < live.site.n_experts
    # [B, T, k, 1] == [B, T, 1, k'] -> [B, T, k]
    is_shared = (chosen.unsqueeze(-1) == live.expert_ids.unsqueeze(-2)).any(-1) & is_slot
    share = is_shared.sum(-1).double() / is_slot.sum(-1).clamp(min=1)
    return LayerDrift(kl.cpu(), share.mean(-1).cpu())
