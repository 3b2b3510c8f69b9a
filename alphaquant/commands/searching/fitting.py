"""From the memory of a GPU to the bytes that a checkpoint may have."""

from dataclasses import dataclass
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.models.loading import load_skeleton
from alphaquant.models.serving_memory import CachePart, activation_bytes, cache_parts
from alphaquant.progress import Progress
from alphaquant.reports.tables import aligned
from alphaquant.spaces.budget import parse_byte_budget
from alphaquant.specs.flat import replaced
from alphaquant.specs.limits import LimitSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import model_location

_ITEMSIZE = {"bf16": 2, "fp8": 1}
_FP8 = ("vllm", "sglang")
"""Profiles of engines that have caches in fp8."""

_UNFOLDED = ("gguf",)
"""Profiles of engines that keep whole keys and values of latent attention."""

_MIB = 2**20


@dataclass(frozen=True)
class Fit:
    """What is in a GPU's memory.

    Attributes:
        total: of the GPU, bytes.
        reserve: what the engine leaves alone or takes for itself.
        cache: of keys and values, by kind of layer.
        activations: of the largest step.
    """

    total: int
    reserve: int
    cache: tuple[CachePart, ...]
    activations: int

    @property
    def weights(self) -> int:
        """What is left for the checkpoint; may be below zero."""
        return self.total - self.reserve - self.activations - sum(p.n_bytes for p in self.cache)


def fit_to(limits: LimitSpec, config: Any) -> Fit:
    """Divide the memory that is asked for.

    Args:
        limits: with `fit`.
        config: of the model.

    Raises:
        BudgetError: the memory cannot be read.
        ConfigError: the cache cannot be counted, or cannot have the format that is asked for.
    """
    total = parse_byte_budget(limits.fit or "", "memory of --fit")
    if limits.kv == "fp8" and limits.profile not in _FP8:
        raise ConfigError(
            f"--kv fp8 with --profile {limits.profile}: caches in fp8 are counted for "
            f"{' and '.join(_FP8)}; use one of these, or --kv bf16"
        )
    context = limits.context or 0
    cache = cache_parts(
        *(config, context, limits.sequences, _ITEMSIZE[limits.kv]),
        is_folded=limits.profile not in _UNFOLDED,
    )
    activations = activation_bytes(config, context, limits.sequences)
    return Fit(total, round(limits.reserve * total), tuple(cache), activations)


def fitted(spec: SearchSpec, progress: Progress) -> tuple[SearchSpec, list[str]]:
    """A specification with a budget in bytes, and lines that say how it came about.

    Without `fit` the specification as it is and no lines.

    Args:
        spec: what was asked.
        progress: of decoding a GGUF file.

    Raises:
        AlphaQuantError: nothing is left for weights, a budget beside `fit`, or what `fit_to`
            raises.
    """
    if spec.limits.fit is None:
        return spec, []
    if spec.limits.budget:
        raise ConfigError(
            f"--budget {spec.limits.budget} and --fit {spec.limits.fit}: the second finds a "
            "budget; leave one of the two out"
        )
    location = model_location(spec.checkpoint.model, spec.run.cache, progress)
    model: Any = load_skeleton(location)
    found = fit_to(spec.limits, model.config)
    lines = fit_lines(found, spec.limits)
    if found.weights <= 0:
        taken = (f"{row[0]} {row[1]} MiB" for row in _rows(found, spec.limits)[:-1])
        raise ConfigError(
            f"--fit {spec.limits.fit} leaves nothing for weights ({'; '.join(taken)}); give more "
            "memory, a shorter --context, fewer --sequences, or --kv fp8"
        )
    return replaced(spec, budget=f"{found.weights}bytes"), lines


def fit_lines(found: Fit, limits: LimitSpec) -> list[str]:
    """The table of what is in memory, line by line."""
    head = [f"in {limits.fit}", "MiB", "of what"]
    return aligned(head, _rows(found, limits), left=(head[0], head[2])).splitlines()


def _rows(found: Fit, limits: LimitSpec) -> list[list[str]]:
    """What is in memory, how much it takes and what it is; weights last."""
    rows = [["engine and reserve", _mib(found.reserve), f"{limits.reserve:.0%} of the memory"]]
    rows += [
        [
            f"cache, {part.kind.replace('_', ' ')}",
            _mib(part.n_bytes),
            f"{part.n_layers} layers x {limits.sequences} x {part.n_tokens} tokens, {limits.kv}",
        ]
        for part in found.cache
    ]
    rows.append(["activations", _mib(found.activations), "estimate"])
    return [*rows, ["weights", _mib(found.weights), "the budget: the whole checkpoint"]]


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:.1f}"
