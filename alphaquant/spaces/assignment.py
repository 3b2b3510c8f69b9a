"""An assignment: one format for every matrix of an inventory, and what it takes.

It is keyed by matrix and not by unit, so that its digest does not depend on the profile that
coupled the units.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from alphaquant.errors import ConfigError
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.spaces.units import Inventory, Unit, total_bits


@dataclass(frozen=True)
class BitCount:
    """The three numbers that every report prints.

    Attributes:
        routed_bits_per_weight: mean stored bits of routed-expert weights; None without routed
            experts.
        bits_per_weight: mean stored bits of all quantizable weights; what `--budget 4.25bits`
            limits.
        checkpoint_bits_per_weight: mean stored bits of all weights, kept ones included.
        quantized_bytes: bytes of all quantizable matrices.
        checkpoint_bytes: bytes of all tensors; what `--budget 13GiB` limits (file headers and
            tokenizer not counted).
    """

    routed_bits_per_weight: float | None
    bits_per_weight: float
    checkpoint_bits_per_weight: float
    quantized_bytes: int
    checkpoint_bytes: int


@dataclass(frozen=True)
class Assignment:
    """One format name for every matrix of an inventory.

    Attributes:
        formats: matrix name -> canonical format name, in inventory order.
    """

    formats: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """sha256 of the sorted JSON."""
        return hashlib.sha256(json.dumps(dict(self.formats), sort_keys=True).encode()).hexdigest()

    def format_of(self, matrix_name: str) -> Format:
        """The format of one matrix."""
        return parse_format(self.formats[matrix_name])

    def storage_bits(self, inventory: Inventory) -> int:
        """Bits on disk of all quantizable matrices."""
        return total_bits((m, self.format_of(m.name)) for m in inventory.matrices)

    def count_bits(self, inventory: Inventory) -> BitCount:
        """The three bit counts and two byte counts of this assignment on a model."""
        routed = [(m, self.format_of(m.name)) for m in inventory.matrices if m.kind == "expert"]
        quantized_bits = self.storage_bits(inventory)
        kept_weights = sum(k.n_weights for k in inventory.kept)
        n_bytes = -(-quantized_bits // 8)
        return BitCount(
            total_bits(routed) / sum(m.n_weights for m, _ in routed) if routed else None,
            quantized_bits / inventory.n_weights,
            (quantized_bits + 8 * inventory.kept_bytes) / (inventory.n_weights + kept_weights),
            n_bytes,
            n_bytes + inventory.kept_bytes,
        )


def uniform_assignment(inventory: Inventory, format_name: str) -> Assignment:
    """Every matrix in one format."""
    name = parse_format(format_name).name
    return Assignment({m.name: name for m in inventory.matrices})


def assignment_from_units(
    inventory: Inventory, units: Sequence[Unit], choice: Mapping[str, str]
) -> Assignment:
    """Spread a choice of one format per unit over the units' matrices.

    Args:
        inventory: the model's matrices; each must be in exactly one unit.
        units: the units of the active profile.
        choice: unit name -> format name.

    Raises:
        ConfigError: a matrix is in no unit, or a unit has no choice.
    """
    spread = {
        m.name: parse_format(choice[u.name]).name
        for u in units
        if u.name in choice
        for m in u.matrices
    }
    missing = [m.name for m in inventory.matrices if m.name not in spread]
    if missing:
        raise ConfigError(
            f"{len(missing)} matrices have no format, e.g. {missing[0]}; give every unit one"
        )
    return Assignment({m.name: spread[m.name] for m in inventory.matrices})
