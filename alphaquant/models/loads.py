"""How often each expert is used, and which are used too little to trust their Hessians."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

UNDER_UTILIZED_RATIO = 0.25
CHOSEN_FIELDS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""How configurations call the number of experts that a token chooses."""


@dataclass(frozen=True)
class Utilization:
    """Tokens per expert of one experts module; they sum to tokens x top-k.

    Attributes:
        counts: tokens of each expert, [E].
        in_features: inputs of the experts' gate and up; with fewer tokens than that a Hessian has
            no full rank.
        ratio: experts below this share of the uniform load are listed too.
    """

    counts: tuple[int, ...]
    in_features: int
    ratio: float = UNDER_UTILIZED_RATIO

    @property
    def fraction(self) -> tuple[float, ...]:
        """Share of the routed tokens, [E]; zeros without tokens."""
        total = sum(self.counts)
        return tuple(n / total if total else 0.0 for n in self.counts)

    @property
    def ratio_to_uniform(self) -> tuple[float, ...]:
        """Load relative to 1 / E, [E]."""
        return tuple(f * len(self.counts) for f in self.fraction)

    @property
    def under_utilized(self) -> tuple[int, ...]:
        """Experts below the ratio or with fewer tokens than inputs."""
        return tuple(
            e
            for e, (n, r) in enumerate(zip(self.counts, self.ratio_to_uniform, strict=True))
            if r < self.ratio or n < self.in_features
        )

    def facts(self) -> dict[str, Any]:
        """For reports, ready for JSON."""
        return {
            "utilization_count": list(self.counts),
            "fraction": list(self.fraction),
            "ratio_to_uniform": list(self.ratio_to_uniform),
            "under_utilized": list(self.under_utilized),
        }


def experts_per_token(config: Any, n_experts: int) -> int:
    """Experts that a token chooses, as a configuration states it.

    Args:
        config: of transformers.
        n_experts: routed experts of a layer; also what is given where nothing is stated.
    """
    text = config.get_text_config()
    stated = [getattr(text, name, None) for name in CHOSEN_FIELDS]
    found = [k for k in stated if isinstance(k, int) and 1 <= k <= n_experts]
    return found[0] if found else n_experts


def utilization_facts(
    counts: Mapping[str, Sequence[int]], in_features: Mapping[str, int]
) -> dict[str, Any]:
    """Reports of several experts modules, by module name."""
    return {
        name: Utilization(tuple(found), in_features[name]).facts()
        for name, found in counts.items()
    }
