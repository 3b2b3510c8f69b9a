"""What a configuration means on a model, found without weights: bits, roles, layers, engines.

How it is read is in `alphaquant.commands.statements`, how the findings look in
`alphaquant.commands.inspect_text`.

Letters: E routed experts of a layer, k of them per token.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from pathlib import Path

from alphaquant.commands.statements import Skeleton, Statement, read_skeleton, read_statement
from alphaquant.errors import ModelError
from alphaquant.progress import Progress, no_progress
from alphaquant.spaces.assignment import BitCount
from alphaquant.spaces.config import Config, Plan, ResolvedScheme
from alphaquant.spaces.patterns import select_names
from alphaquant.spaces.profiles import PROFILES, Profile, is_loadable, units_of
from alphaquant.spaces.units import Matrix

ENGINES = ("transformers", "vllm", "sglang")
"""Profiles that are asked whether they load a configuration."""


@dataclass(frozen=True)
class Part:
    """Some matrices of a model together: a role, a layer, an expert.

    Attributes:
        name: of the part.
        n_matrices: in it.
        n_weights: in them.
        n_bits: that they take on disk.
        weights_by_format: weights by label of the format, see `scheme_label`, the most first.
    """

    name: str
    n_matrices: int
    n_weights: int
    n_bits: int
    weights_by_format: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits."""
        return self.n_bits / self.n_weights

    @property
    def n_bytes(self) -> int:
        """Bytes on disk, rounded up."""
        return -(-self.n_bits // 8)


@dataclass(frozen=True)
class Active:
    """What a token reads of the quantizable weights, if the router uses all experts alike.

    The share of a routed expert is then k / E, of embeddings 0, of all else 1. `aq-search
    --active-budget` takes the shares that the calibration text has instead; the two are equal
    where an expert's format does not depend on how often it is used.

    Attributes:
        experts_per_token: k; 0 where there are no routed experts.
        n_weights: read per token, rounded up.
        n_bytes: read per token, rounded up.
    """

    experts_per_token: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class Loadable:
    """Whether an engine can load the formats in the shapes that they have.

    Attributes:
        engine: name of the profile.
        reasons: why not; empty where it can.
    """

    engine: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that is known without weights.

    Attributes:
        statement: what was read.
        model: what it was applied to.
        plan: the scheme of every matrix.
    """

    statement: Statement
    model: Skeleton
    plan: Plan

    @property
    def counts(self) -> BitCount:
        """The three bit counts and two byte counts."""
        return self.plan.assignment.count_bits(self.model.inventory)

    @cached_property
    def roles(self) -> tuple[Part, ...]:
        """By role, in model order: attention q, ..., routed gate, ..."""
        return self.parts(lambda matrix: matrix.role)

    @cached_property
    def layers(self) -> tuple[Part, ...]:
        """By layer."""
        return self.parts(lambda matrix: matrix.place)

    def parts(self, name_of: Callable[[Matrix], str]) -> tuple[Part, ...]:
        """The matrices by a name that is made of each, in order of first appearance."""
        groups: dict[str, list[Matrix]] = {}
        for matrix in self.model.inventory.matrices:
            groups.setdefault(name_of(matrix), []).append(matrix)
        return tuple(self._part(name, matrices) for name, matrices in groups.items())

    def label(self, matrix: Matrix) -> str:
        """Its format, and that of its inputs where they are rounded."""
        return scheme_label(self.plan.schemes[matrix.name])

    def n_bits(self, matrix: Matrix) -> int:
        """Bits that it takes on disk."""
        return matrix.storage_bits(self.plan.schemes[matrix.name].weight_format)

    @cached_property
    def active(self) -> Active | None:
        """What a token reads; None where the model does not state its experts per token."""
        matrices, k = self.model.inventory.matrices, self.model.experts_per_token
        experts = {(m.layer, m.expert) for m in matrices if m.expert is not None}
        n_experts = Counter(layer for layer, _ in experts)
        n_zero = self.model.n_zero_experts
        if k is None and experts:
            return None
        n_weights = n_bits = Fraction(0)
        for m in matrices:
            n_choices = n_experts[m.layer] + n_zero
            share = Fraction(not m.is_looked_up)
            if m.expert is not None:
                share = Fraction(k or 0, n_choices)
            n_weights += share * m.n_weights
            n_bits += share * self.n_bits(m)
        return Active(k or 0, ceil(n_weights), ceil(n_bits / 8))

    @cached_property
    def unnamed(self) -> Mapping[tuple[str, str], int]:
        """Matrices that no pattern names, which take the default: (role, format) -> how many.

        Empty for packed checkpoints, which name every matrix.
        """
        config, matrices = self.statement.content, self.model.inventory.matrices
        if not isinstance(config, Config):
            return {}
        owners = {name: m.name for m in matrices for name in (m.name, *m.aliases)}
        names = sorted(owners)
        named = {owners[name] for o in config.overrides for name in select_names(o.pattern, names)}
        return Counter((m.role, self.label(m)) for m in matrices if m.name not in named)

    @cached_property
    def engines(self) -> tuple[Loadable, ...]:
        """Which serving engines can load it."""
        return tuple(Loadable(name, self._reasons(PROFILES[name])) for name in ENGINES)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one line per cause."""
        found = [*self.model.notes, *self.plan.warnings]
        stated = self.statement.summary.get("model")
        if stated not in (None, self.model.name) and self.model.name != str(self.statement.path):
            found.append(
                f"{self.statement.path} was made for the model {stated}, and this is "
                f"{self.model.name}; weights are not loaded, so whether they are equal is unknown"
            )
        digest = self.statement.summary.get("assignment_digest")
        if digest not in (None, self.plan.assignment.digest):
            found.append(
                f"{self.statement.path} has other formats than its summary was written for: it "
                "was edited, or searched on another model"
            )
        return tuple(found)

    def _part(self, name: str, matrices: list[Matrix]) -> Part:
        weights: Counter[str] = Counter()
        for matrix in matrices:
            weights[self.label(matrix)] += matrix.n_weights
        n_bits = sum(self.n_bits(m) for m in matrices)
        by_format = dict(weights.most_common())
        return Part(name, len(matrices), weights.total(), n_bits, by_format)

    def _reasons(self, profile: Profile) -> tuple[str, ...]:
        """Why an engine cannot load it, one line per cause with a count and an example."""
        units = units_of(self.model.inventory, profile)
        mixed, refused = [], []
        for unit in units:
            formats = [self.plan.schemes[m.name].weight_format for m in unit.matrices]
            names, first = sorted({fmt.name for fmt in formats}), unit.matrices[0]
            if len(names) > 1:
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                mixed.append(f"{unit.name} has {len(names)} formats ({shown})")
            elif not is_loadable(unit, formats[0], profile):
                refused.append(f"{unit.name} is {names[0]}, {first.rows} x {first.cols}")
        rounded = [name for name, s in self.plan.schemes.items() if s.activation.is_quantized]
        found = [
            f"{len(examples)} of its {len(units)} units {what}, e.g. {examples[0]}"
            for examples, what in (
                (mixed, "must have one format each and have several"),
                (refused, "are in a format or shape that it does not load"),
            )
            if examples
        ]
        if rounded:
            found.append(
                f"{len(rounded)} matrices round their inputs, which only our own runtime does, "
                f"e.g. {rounded[0]}"
            )
        return tuple(found)


def inspect_config(
    path: Path, model: str | None = None, progress: Progress = no_progress
) -> Inspection:
    """Apply a configuration to a model without weights.

    Args:
        path: a configuration, a packed checkpoint or a search's directory.
        model: `demo`, a directory, a GGUF file or a hub id; None for what the configuration
            names.
        progress: of decoding a GGUF file.

    Raises:
        AlphaQuantError: one of the two cannot be read, or they do not belong together.
    """
    statement = read_statement(path)
    name = model or statement.model
    if name is None:
        raise ModelError(
            f"{statement.path} does not say which model it is for; give --model: demo, a "
            "directory with config.json, or a hub id"
        )
    skeleton = read_skeleton(name, (statement,), progress)
    return Inspection(statement, skeleton, statement.plan_on(skeleton))


def scheme_label(scheme: ResolvedScheme) -> str:
    """`int4-g64`, or `int4-g64 of int8-row inputs` where the inputs are rounded."""
    if not scheme.activation.is_quantized:
        return scheme.weight_format.name
    return f"{scheme.weight_format.name} of {scheme.activation.name} inputs"
