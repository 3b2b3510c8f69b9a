"""How sensitive each routed expert is to quantization, per saved bit and per token that it sees.

Computed from measured costs alone; runs no model. Of expert e in format f against format r:

    S(f)           Fisher cost of its matrices quantized together, nats per token of text
    A = S(f) - S(r)                    what going from r to f adds
    b = (bits in r - bits in f) / weights          bits per weight that this saves, > 0
    u              use: its share of the tokens routed in its block; the shares sum to 1
    A / b          cost per bit: what allocation trades between units
    A / b / u      fragility: the cost per bit if all tokens of the block went to it
    u * A / b      the cost per bit weighted by use once more

S is a mean over all tokens of the text, so it contains use already: cost per bit is use times
fragility. The last view counts use twice; it is here to be compared with the others.

Worked example: two experts save 6 bits per weight each, 300 tokens reach the first, 100 the
second; A is 0.006 and 0.004. Use is 0.75 and 0.25, cost per bit 0.001 and 0.000667, fragility
0.001333 and 0.002667: the second is twice as fragile and costs less, because it is used less.

A format that is not quantized stands for the original weights and costs nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np

from alphaquant.costs.fisher import CostTable, UnitCosts, unit_costs
from alphaquant.errors import ConfigError, ModelError
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Inventory, Matrix, Unit

VIEWS = ("fisher", "token_fisher", "error", "cost_per_bit", "fragility", "use_weighted", "use")
"""Attributes of `SensitiveExpert` that experts can be ranked by."""


@dataclass(frozen=True)
class SensitiveExpert:
    """One routed expert.

    Attributes:
        name: dotted start of its matrices' names: `model.layers.3.mlp.experts.7`.
        layer: index of its layer.
        expert: its index.
        n_tokens: calibration tokens that reached it.
        active_share: these per token of the layer.
        use: these per routed token of its block, u.
        routing_weight: sum of their routing weights per token of the layer.
        fisher: S(f), nats per token.
        token_fisher: the same without products of different tokens, nats per token.
        error: squared error of the block's output per token of the layer, its matrices' summed.
        added_fisher: A, nats per token.
        saved_bits: stored bits that f saves against r.
        cost_per_bit: A / b, nats per token for one bit per weight.
        fragility: A / b / u, the same unit; None where no token reached it.
        use_weighted: u * A / b, the same unit.
    """

    name: str
    layer: int
    expert: int
    n_tokens: int
    active_share: float
    use: float
    routing_weight: float
    fisher: float
    token_fisher: float
    error: float
    added_fisher: float
    saved_bits: int
    cost_per_bit: float
    fragility: float | None
    use_weighted: float


@dataclass(frozen=True)
class Total:
    """Sums over experts; those of numbers are exact sums, rounded once (`math.fsum`).

    Attributes:
        layer: index of the layer, None for the model.
        n_experts: experts that were summed.
        n_tokens: of all of them; a token counts once per expert that it reached.
        fisher: nats per token.
        token_fisher: nats per token.
        added_fisher: nats per token.
        saved_bits: stored bits.
    """

    layer: int | None
    n_experts: int
    n_tokens: int
    fisher: float
    token_fisher: float
    added_fisher: float
    saved_bits: int


@dataclass(frozen=True)
class ExpertSensitivity:
    """All routed experts of a model in one format.

    Attributes:
        format: f, canonical.
        against: r, canonical.
        experts: from the most to the least cost per bit; equal ones in model order.
        layers: totals of the layers that have routed experts, in order.
        total: of the model.
    """

    format: str
    against: str
    experts: tuple[SensitiveExpert, ...]
    layers: tuple[Total, ...]
    total: Total


def measured_formats(format_name: str, against: str) -> tuple[str, ...]:
    """Canonical names of those of the two formats whose costs have to be measured, by name.

    Raises:
        FormatError: a name that no format has.
        ConfigError: `format_name` is not quantized.
    """
    if not parse_format(format_name).is_quantized:
        raise ConfigError(
            f"format {format_name} keeps the weights as they are, so nothing is sensitive to it; "
            "give a quantized one such as int2-g64"
        )
    formats = [parse_format(name) for name in (format_name, against)]
    return tuple(sorted({fmt.name for fmt in formats if fmt.is_quantized}))


def expert_units(inventory: Inventory) -> tuple[Unit, ...]:
    """One unit of all matrices per routed expert, in model order.

    Raises:
        ModelError: the model has no routed experts.
    """
    groups: dict[str, list[Matrix]] = {}
    for matrix in inventory.matrices:
        if matrix.kind == "expert":
            groups.setdefault(matrix.name.rsplit(".", 1)[0], []).append(matrix)
    if not groups:
        raise ModelError(
            f"expert sensitivity of a {inventory.model_type} model, which has no routed experts; "
            "take a Mixture-of-Experts model"
        )
    return tuple(Unit(name, tuple(members)) for name, members in groups.items())


def saved_bits(units: Sequence[Unit], format_name: str, against: str) -> list[int]:
    """Stored bits that each unit saves in a format against another.

    Raises:
        ConfigError: a unit saves none.
    """
    low, high = parse_format(format_name), parse_format(against)
    saved = [unit.storage_bits(high) - unit.storage_bits(low) for unit in units]
    if min(saved) <= 0:
        name = units[saved.index(min(saved))].name
        raise ConfigError(
            f"{low.name} takes no fewer bits than {high.name} for {name}; compare with a larger "
            "format, such as bf16"
        )
    return saved


def expert_sensitivity(
    table: CostTable, inventory: Inventory, format_name: str, against: str = "bf16"
) -> ExpertSensitivity:
    """Sensitivities of all routed experts from measured costs.

    Args:
        table: costs of every matrix, with the columns that `measured_formats` names.
        inventory: the model's matrices.
        format_name: f.
        against: r, which takes more bits than f for every expert.

    Raises:
        ConfigError: `against` saves no bits, or a column is missing.
        ModelError: the model has no routed experts.
    """
    missing = sorted(set(measured_formats(format_name, against)) - set(table.formats))
    if missing:
        raise ConfigError(
            f"costs in {', '.join(missing)} are asked for and were measured in "
            f"{', '.join(table.formats)}; measure them too"
        )
    low, high = parse_format(format_name), parse_format(against)
    units, column = expert_units(inventory), table.formats.index(low.name)
    saved, uses = saved_bits(units, low.name, high.name), _uses(table, units)
    costs, rows = unit_costs(table, units), []
    for i, unit in enumerate(units):
        reference = costs.fisher[i, table.formats.index(high.name)] if high.is_quantized else 0.0
        added = float(costs.fisher[i, column] - reference)
        rows.append(_row(unit, costs, (i, column), uses[i], added, saved[i]))
    indices = sorted({row.layer for row in rows})
    totals = tuple(_total(layer, [r for r in rows if r.layer == layer]) for layer in indices)
    ranked = sorted(rows, key=lambda row: -row.cost_per_bit)  # stable: equal ones in model order
    return ExpertSensitivity(low.name, high.name, tuple(ranked), totals, _total(None, rows))


def _row(
    unit: Unit,
    costs: UnitCosts,
    at: tuple[int, int],
    use: float,
    added: float,
    saved: int,
) -> SensitiveExpert:
    """One expert; `at` is its row and column in the costs."""
    i, expert = at[0], unit.matrices[0].expert
    assert expert is not None, "units are of routed experts"
    cost_per_bit = added * unit.n_weights / saved
    return SensitiveExpert(
        name=unit.name,
        layer=unit.layer,
        expert=expert,
        n_tokens=int(costs.n_tokens[i]),
        active_share=float(costs.active_share[i]),
        use=use,
        routing_weight=float(costs.routing_weight[i]),
        fisher=float(costs.fisher[at]),
        token_fisher=float(costs.token_fisher[at]),
        error=float(costs.error[at]),
        added_fisher=added,
        saved_bits=saved,
        cost_per_bit=cost_per_bit,
        fragility=cost_per_bit / use if use else None,
        use_weighted=cost_per_bit * use,
    )


def _uses(table: CostTable, units: Sequence[Unit]) -> list[float]:
    """Share of each expert in the routed tokens of its block."""
    row = {name: i for i, name in enumerate(table.matrices)}
    blocks = [unit.name.rsplit(".", 1)[0] for unit in units]
    counts = [float(table.n_tokens[row[unit.matrices[0].name]]) for unit in units]
    totals = {
        block: np.sum([n for b, n in zip(blocks, counts, strict=True) if b == block])
        for block in set(blocks)
    }
    return [
        float(n / totals[block]) if totals[block] else 0.0
        for block, n in zip(blocks, counts, strict=True)
    ]


def _total(layer: int | None, rows: Iterable[SensitiveExpert]) -> Total:
    found = list(rows)
    return Total(
        layer=layer,
        n_experts=len(found),
        n_tokens=sum(row.n_tokens for row in found),
        fisher=fsum(row.fisher for row in found),
        token_fisher=fsum(row.token_fisher for row in found),
        added_fisher=fsum(row.added_fisher for row in found),
        saved_bits=sum(row.saved_bits for row in found),
    )
