"""What an assignment takes: bits per weight, bytes of the checkpoint, bytes that a token reads.

Exact, from the inventory and the assignment; no weights are looked at. Bytes that a token reads
are those of quantizable weights, in the mean: all of what is always on, and of each routed expert
the share of tokens that reach it,

    active bytes = sum over matrices of share * storage bits / 8

the number that `--active-budget` limits. Shares are measured (`CostTable.active_share`), or k / E
where k of E experts are used per token and nothing was measured; the mean over a layer is the
same, so both agree where all experts of a layer have one format. Caches, norms and
routers are not counted, embeddings and lm_head only where they are searched: embeddings with no
share, a row of them is looked up.

Worked example: a dense matrix and four experts of 16 x 32 weights in bf16, 1024 bytes each, two
experts per token: 1024 + 4 * 2/4 * 1024 = 3072 bytes per token. If three quarters of the tokens
reach the first expert, which is stored as int8-g32 in 16 * 32 + 16 * 2 = 544 bytes, the others 5/4
together: 1024 + 0.75 * 544 + 1.25 * 1024 = 2712.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum
from typing import Any, ClassVar

from torch import nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject
from alphaquant.models.promises import zero_experts
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import KINDS, Inventory, Matrix


@dataclass(frozen=True)
class Placed:
    """What an assignment says of a model, both complete.

    Attributes:
        inventory: the matrices.
        assignment: a format for each of them.
    """

    inventory: Inventory
    assignment: Assignment


@dataclass(frozen=True)
class FootprintEvaluator:
    """Bits and bytes of a subject.

    Nothing is a mean over text: scores name one sequence of one token, and their digest is that of
    what was counted.

    Attributes:
        active_share: matrix name -> share of tokens that reach it, for routed experts; None for
            k / E by the model's configuration.
    """

    active_share: Mapping[str, float] | None = None

    name: ClassVar[str] = "footprint"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("bits_per_weight", "bits/weight", "minimize"),
        Metric("checkpoint_bytes", "bytes", "minimize"),
        Metric("active_bytes", "bytes/token", "minimize"),
    )

    def evaluate(self, subject: Subject) -> Evaluated:
        """Count.

        Raises:
            ConfigError: no inventory or assignment, a matrix without format, or shares that are
                none.
            ModelError: no shares are given and the configuration does not say how many experts a
                token uses.
        """
        started = time.perf_counter()
        placed = place(subject, self.name)
        shares = active_shares(placed.inventory, subject.model, self.active_share)
        counts = placed.assignment.count_bits(placed.inventory)
        rows = _by_kind(placed, shares)
        values = (
            counts.bits_per_weight,
            float(counts.checkpoint_bytes),
            _active_bytes(placed, shares, placed.inventory.matrices),
        )
        digest = _digest(placed, shares)
        seconds = time.perf_counter() - started
        scores = tuple(
            Score(m.name, value, m.unit, m.direction, None, 1, 1, seconds, digest)
            for m, value in zip(self.metrics, values, strict=True)
        )
        source = "uniform" if self.active_share is None else "measured"
        kept = {"kept_bytes": placed.inventory.kept_bytes}
        return Evaluated(scores, {"shares": source, "kinds": rows, **kept})


def place(subject: Subject, asked: str) -> Placed:
    """The inventory and assignment of a subject.

    Args:
        subject: what is measured.
        asked: name of the evaluator, for messages.

    Raises:
        ConfigError: one of them is not known, or a matrix has no format.
    """
    inventory, assignment = subject.inventory, subject.assignment
    if inventory is None or assignment is None:
        raise ConfigError(
            f"{asked} of a model whose matrices or formats are not known; give the subject an "
            "inventory and an assignment"
        )
    missing = [m.name for m in inventory.matrices if m.name not in assignment.formats]
    if missing:
        raise ConfigError(
            f"{asked}: {len(missing)} matrices have no format, e.g. {missing[0]}; give an "
            "assignment of this model"
        )
    return Placed(inventory, assignment)


def active_shares(
    inventory: Inventory, model: nn.Module, measured: Mapping[str, float] | None
) -> dict[str, float]:
    """Share of tokens that read each matrix, 0 to 1.

    1 for all but routed experts, and embeddings: of these a token reads one row, which is as good
    as nothing.

    Args:
        inventory: the matrices.
        model: its configuration says how many experts a token uses.
        measured: shares of at least the routed experts' matrices; None for k / E.

    Raises:
        ConfigError: a measured share is missing or not from 0 to 1.
        ModelError: nothing is measured and the configuration has no `num_experts_per_tok`.
    """
    routed = [m for m in inventory.matrices if m.kind == "expert"]
    found = {m.name: float(not m.is_looked_up) for m in inventory.matrices}
    if measured is None:
        return found | (_uniform_shares(routed, model) if routed else {})
    bad = [m.name for m in routed if not 0 <= measured.get(m.name, -1.0) <= 1]
    if bad:
        raise ConfigError(
            f"active shares: {len(bad)} of {len(routed)} matrices of routed experts have none "
            f"from 0 to 1, e.g. {bad[0]}; give those of a cost table of this model, or None"
        )
    return found | {m.name: float(measured[m.name]) for m in routed}


def _uniform_shares(routed: list[Matrix], model: nn.Module) -> dict[str, float]:
    """Share k / E for the experts of each block; E counts those without weights too."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    top_k = getattr(text, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        raise ModelError(
            "the configuration does not say how many experts a token uses (num_experts_per_tok); "
            "give measured active shares"
        )
    experts: dict[str, set[int | None]] = {}
    for m in routed:
        experts.setdefault(_block(m), set()).add(m.expert)
    n_zero = zero_experts(config)
    return {m.name: top_k / (len(experts[_block(m)]) + n_zero) for m in routed}


def _block(matrix: Matrix) -> str:
    """Name of the experts module that holds a routed expert's matrix."""
    return matrix.name.rsplit(".", 2)[0]


def _digest(placed: Placed, shares: Mapping[str, float]) -> str:
    """A sha256 over everything that the numbers depend on."""
    facts = [placed.inventory.digest, placed.assignment.digest, dict(shares)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _active_bytes(
    placed: Placed, shares: Mapping[str, float], matrices: tuple[Matrix, ...]
) -> float:
    formats = placed.assignment
    return fsum(shares[m.name] * m.storage_bits(formats.format_of(m.name)) for m in matrices) / 8


def _by_kind(placed: Placed, shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Matrices, bytes and active bytes of each kind that the model has."""
    rows = []
    for kind in KINDS:
        matrices = tuple(m for m in placed.inventory.matrices if m.kind == kind)
        if matrices:
            n_bits = sum(m.storage_bits(placed.assignment.format_of(m.name)) for m in matrices)
            active = _active_bytes(placed, shares, matrices)
            row = {"kind": kind, "n_matrices": len(matrices), "bytes": n_bits / 8}
            rows.append({**row, "active_bytes": active})
    return rows
