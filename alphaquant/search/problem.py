"""The allocation problem: formats that units may take, what they store, what they may cost.

Pure data between the sensitivity pass and the solver; it holds no tensors and decides nothing.

Letters: U units, F formats (columns, in menu order).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from alphaquant.errors import BudgetError, ConfigError, ModelError
from alphaquant.search.arrays import BoolArray, FloatArray, IntArray
from alphaquant.spaces.units import ENDS, Unit

Array = TypeVar("Array", FloatArray, IntArray, BoolArray)

COSTS = ("fisher", "error")
"""The cost tables that every problem has, see `Problem.costs`."""

OPTIONAL_COSTS = ("token_fisher", "gemq")
"""Cost tables that some allocators need, see `Problem.costs`."""

FEATURES = ("alpha", "alpha_plain", "variance", "routing_weight", "active_share")
"""What may be known of a unit in no particular format, see `Problem.features`."""


_CALIBRATE = "calibrate again on text that the model can run"
_NO_SPECTRUM = "leave it out for models with matrices of one row or column"
_REMEDIES = {"alpha": _NO_SPECTRUM, "alpha_plain": _NO_SPECTRUM}


@dataclass(frozen=True, eq=False)
class Problem:
    """Units, formats and their cost tables; build it with `make_problem`, which checks it.

    Attributes:
        units: the U units of the active profile.
        formats: the F canonical format names.
        bits: int64 [U, F], bits on disk of a unit in a format.
        allowed: bool [U, F], what the profile lets a unit take.
        costs: float64 [U, F] by name, >= 0, zero where not allowed. `fisher`: second-order term
            S of the divergence, nats per token, noisy. `error`: route-weighted output error R,
            arbitrary scale per layer. Where measured also `token_fisher` (S with a gradient per
            token) and `gemq` (squared gradient times squared output error, GEMQ).
        n_tokens: float64 [U], calibration tokens that reached the unit.
        n_layers: decoder layers of the model, units in them or not; what is beside the layers is
            not one.
        features: float64 [U] by name, >= 0, where measured. `alpha`: exponent of the weights'
            spectrum over blocks of equal shape (FARMS); `alpha_plain`: over the whole matrix; both
            above 0. `variance`: of the weights. `routing_weight`: sum of the router's weights over
            the unit's tokens, any scale. `active_share`: share of all tokens that reach it.
    """

    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    bits: IntArray
    allowed: BoolArray
    costs: Mapping[str, FloatArray]
    n_tokens: FloatArray
    n_layers: int
    features: Mapping[str, FloatArray]

    @cached_property
    def n_weights(self) -> FloatArray:
        """float64 [U], weights of each unit."""
        return _frozen(np.array([u.n_weights for u in self.units], dtype=np.float64))

    @cached_property
    def families(self) -> tuple[str, ...]:
        """The family of each unit, [U]."""
        return tuple(u.family for u in self.units)

    @cached_property
    def layers(self) -> IntArray:
        """int64 [U], the layer of each unit."""
        return _frozen(np.array([u.layer for u in self.units], dtype=np.int64))

    @cached_property
    def groups(self) -> IntArray:
        """int64 [U], index of each unit's (layer, family) group, numbered by first appearance."""
        index: dict[tuple[int, str], int] = {}
        keys = ((u.layer, family) for u, family in zip(self.units, self.families, strict=True))
        return _frozen(np.array([index.setdefault(k, len(index)) for k in keys], dtype=np.int64))

    @cached_property
    def least_bits(self) -> IntArray:
        """int64 [U], what the smallest allowed format of each unit takes."""
        no_bits = np.iinfo(np.int64).max
        return _frozen(np.where(self.allowed, self.bits, no_bits).min(axis=1))

    def has(self, name: str) -> bool:
        """Whether a cost table or feature was measured."""
        return name in self.costs or name in self.features

    def cost(self, name: str) -> FloatArray:
        """A cost table, float64 [U, F].

        Raises:
            ConfigError: it was not measured.
        """
        return self._measured(name, self.costs)

    def feature(self, name: str) -> FloatArray:
        """A feature, float64 [U].

        Raises:
            ConfigError: it was not measured.
        """
        return self._measured(name, self.features)

    def check_limit(self, limit_bits: int) -> None:
        """Refuse a limit that no choice keeps.

        Raises:
            BudgetError: the limit is below the sum of `least_bits`.
        """
        least = int(self.least_bits.sum())
        if limit_bits < least:
            raise BudgetError(
                f"{limit_bits} bits were asked for, but the smallest formats take {least}; "
                "raise the budget or add smaller formats"
            )

    def limit_bits(self, bits_per_weight: float) -> int:
        """Bits that a mean of `bits_per_weight` over all weights of the units allows."""
        return floor(bits_per_weight * float(self.n_weights.sum()))

    def choice_names(self, choice: IntArray) -> dict[str, str]:
        """Spell a choice out.

        Args:
            choice: int64 [U], a column of `formats` per unit.

        Returns:
            Unit name -> format name, in unit order.
        """
        picked = zip(self.units, choice.tolist(), strict=True)
        return {unit.name: self.formats[f] for unit, f in picked}

    def _measured(self, name: str, known: Mapping[str, FloatArray]) -> FloatArray:
        if name not in known:
            measured = ", ".join([*self.costs, *self.features])
            raise ConfigError(
                f"{name} was not measured, only {measured}; measure it and give it to "
                "make_problem, or take an allocator of `available`"
            )
        return known[name]


def make_problem(
    units: Iterable[Unit],
    formats: Sequence[str],
    bits: npt.ArrayLike,
    allowed: npt.ArrayLike,
    costs: Mapping[str, npt.ArrayLike],
    n_tokens: npt.ArrayLike,
    n_layers: int,
    features: Mapping[str, npt.ArrayLike] = MappingProxyType({}),
) -> Problem:
    """Build a checked problem over read-only copies of the arrays.

    Args:
        units: U units with distinct names.
        formats: F distinct canonical format names.
        bits: [U, F], positive where allowed.
        allowed: [U, F], at least one per unit.
        costs: [U, F] for each name in `COSTS` and any of `OPTIONAL_COSTS`, finite and >= 0 where
            allowed; set to zero elsewhere.
        n_tokens: [U], >= 0.
        n_layers: more than the largest layer index.
        features: [U] for any of `FEATURES`, >= 0, exponents above 0.

    Raises:
        ConfigError: shapes or names disagree, or a unit has no allowed format.
        ModelError: a cost, token count or feature is not finite or is too small.
    """
    units, mask = tuple(units), np.array(allowed, dtype=np.bool_)
    shape = (len(units), len(formats))
    tables = {name: np.array(table, dtype=np.float64) for name, table in costs.items()}
    stored, tokens = np.array(bits, dtype=np.int64), np.array(n_tokens, dtype=np.float64)
    vectors = {name: np.array(vector, dtype=np.float64) for name, vector in features.items()}
    _check_names(units, formats, n_layers)
    _check_inputs(tables, vectors)
    for name, array in {"bits": stored, "allowed": mask, **tables}.items():
        _check_shape(name, array, shape)
    for name, vector in {"n_tokens": tokens, **vectors}.items():
        _check_shape(name, vector, shape[:1])
    _check_allowed(units, stored, mask)
    for name, table in tables.items():
        _check_values(name, np.where(mask, table, 0.0), units)
    for name, vector in {"n_tokens": tokens, **vectors}.items():
        _check_values(name, vector[:, None], units)
    clean = {name: _frozen(np.where(mask, table, 0.0)) for name, table in tables.items()}
    return Problem(
        units,
        tuple(formats),
        _frozen(stored),
        _frozen(mask),
        MappingProxyType(clean),
        _frozen(tokens),
        n_layers,
        MappingProxyType({name: _frozen(vector) for name, vector in vectors.items()}),
    )


def _frozen(array: Array) -> Array:
    array.setflags(write=False)
    return array


def _check_names(units: Sequence[Unit], formats: Sequence[str], n_layers: int) -> None:
    if not units or not formats:
        raise ConfigError(
            f"{len(units)} units and {len(formats)} formats leave nothing to allocate; "
            "give at least one of each"
        )
    names = [u.name for u in units]
    for what, given in (("unit", names), ("format", list(formats))):
        repeated = [name for name, count in Counter(given).items() if count > 1]
        if repeated:
            raise ConfigError(f"{what} {repeated[0]!r} is given twice; names must be distinct")
    deepest = max((u.layer for u in units if u.kind not in ENDS.values()), default=0)
    if deepest >= n_layers:
        raise ConfigError(
            f"a unit is in layer {deepest}, but n_layers is {n_layers}; give more than {deepest}"
        )


def _check_inputs(tables: Mapping[str, FloatArray], vectors: Mapping[str, FloatArray]) -> None:
    given = set(tables)
    if not set(COSTS) <= given <= {*COSTS, *OPTIONAL_COSTS}:
        raise ConfigError(
            f"cost tables {sorted(given)}; give {', '.join(COSTS)} and, where measured, "
            f"{', '.join(OPTIONAL_COSTS)}"
        )
    unknown = set(vectors) - set(FEATURES)
    if unknown:
        raise ConfigError(f"features {sorted(unknown)}; give any of {', '.join(FEATURES)}")


def _check_shape(name: str, array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ConfigError(
            f"{name} has shape {list(array.shape)}; units and formats give {list(shape)}, "
            "so build it from the same units and menu"
        )


def _check_allowed(units: Sequence[Unit], bits: IntArray, allowed: BoolArray) -> None:
    starved = np.flatnonzero(~allowed.any(axis=1))
    if starved.size:
        raise ConfigError(
            f"{starved.size} units may take no format, e.g. {units[starved[0]].name}; "
            "add formats that the profile can load"
        )
    if (bits[allowed] <= 0).any():
        raise ConfigError("an allowed format takes 0 bits or fewer; count with storage_bits")


def _check_values(name: str, table: FloatArray, units: Sequence[Unit]) -> None:
    is_exponent = name in ("alpha", "alpha_plain")
    is_possible = np.isfinite(table) & ((table > 0) if is_exponent else (table >= 0))
    bad = np.flatnonzero(~is_possible.all(axis=1))
    if bad.size:
        what, need = ("0, negative", "> 0") if is_exponent else ("negative", ">= 0")
        raise ModelError(
            f"{name} is {what} or not finite for {bad.size} units, e.g. {units[bad[0]].name}; "
            f"it must be {need}, so {_REMEDIES.get(name, _CALIBRATE)}"
        )
