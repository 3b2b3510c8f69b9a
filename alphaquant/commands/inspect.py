"""What a configuration means on a model, found without weights: bits, roles, layers, engines.

It is a configuration file, a packed checkpoint's directory, or a search's `--out`, of which
`best.json` is read. The model is built on the meta device, so its size does not matter. How the
findings look is in `alphaquant.commands.inspect_text`.

Letters: E routed experts of a layer, k of them per token.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.gguf.converted import origin_of
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.models.promises import zero_experts
from alphaquant.models.quantization_config import PackedFormats, is_packed, read_formats
from alphaquant.models.source_files import with_source
from alphaquant.progress import Progress, no_progress
from alphaquant.spaces.assignment import BitCount
from alphaquant.spaces.config import Config, Plan, ResolvedScheme, load_config, resolve
from alphaquant.spaces.foreign import Foreign, read_foreign, tool_of
from alphaquant.spaces.formats import BF16
from alphaquant.spaces.json_files import JsonError, read_json, read_object
from alphaquant.spaces.patterns import select_names
from alphaquant.spaces.profiles import DOWN, GATE, PROFILES, UP, Profile, is_loadable, units_of
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.studies.inputs import model_location

ENGINES = ("transformers", "vllm", "sglang")
"""Profiles that are asked whether they load a configuration."""

_BEST = "best.json"
_KIND_NAMES = {"attention": "attention", "shared": "shared experts", "dense": "dense MLPs"}
_TOP_K_FIELDS = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configurations of transformers call the experts per token."""


@dataclass(frozen=True)
class Statement:
    """What a path says, before it is applied to a model.

    Attributes:
        path: of the file that was read.
        content: a configuration, the formats of a packed checkpoint, or another tool's plan.
        summary: what the search or the quantization wrote beside it; may be empty.
        model: the model that it names, None where it names none.
    """

    path: Path
    content: Config | PackedFormats | Foreign
    summary: Mapping[str, Any]
    model: str | None

    def plan_on(self, model: "Skeleton") -> Plan:
        """The scheme of every matrix of a model.

        Raises:
            ConfigError: it belongs to another model, or its fields do not go together.
        """
        if isinstance(self.content, PackedFormats):
            return self._packed_plan(self.content, model)
        if isinstance(self.content, Foreign):
            return self._foreign_plan(self.content, model.inventory)
        plan = resolve(self.content, model.inventory)
        n_unmatched, n_patterns = len(plan.unmatched_patterns), len(self.content.overrides)
        stated = self.summary.get("assignment_digest")
        is_other = stated not in (None, plan.assignment.digest)
        if n_unmatched and (n_unmatched == n_patterns or is_other):
            raise ConfigError(
                f"{self.path} is of another model than {model.name}: {n_unmatched} of its "
                f"{n_patterns} patterns match nothing, e.g. {plan.unmatched_patterns[0]!r}, where "
                f"names look like {model.inventory.matrices[-1].name}; give its own --model"
            )
        return plan

    def _foreign_plan(self, foreign: Foreign, inventory: Inventory) -> Plan:
        schemes = {
            m.name: ResolvedScheme(foreign.format_of((m.name, *m.aliases)))
            for m in inventory.matrices
        }
        names = [name for m in inventory.matrices for name in (m.name, *m.aliases)]
        return Plan(schemes, warnings=foreign.warnings(names, str(self.path)))

    def _packed_plan(self, packed: PackedFormats, model: "Skeleton") -> Plan:
        if packed.weights.keys() != model.inventory.by_name.keys():
            odd = sorted(packed.weights.keys() ^ model.inventory.by_name.keys())
            raise ConfigError(
                f"{self.path} is of another model than {model.name}: {len(odd)} matrices are only "
                f"in one of them, e.g. {odd[0]}; leave --model out, or give the right one"
            )
        names = model.inventory.by_name
        return Plan(
            {
                name: ResolvedScheme(packed.weights[name], packed.activations.get(name, BF16))
                for name in names
            }
        )


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        name: as asked for.
        inventory: its matrices and kept tensors.
        experts_per_token: k; None where there are no routed experts or nothing states it.
        n_zero_experts: experts without weights, among which a token chooses too.
        notes: what a user should know of where it comes from.
    """

    name: str
    inventory: Inventory
    experts_per_token: int | None
    n_zero_experts: int = 0
    notes: tuple[str, ...] = ()


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

    The share of a routed expert is then k / E, of all else 1. `aq-search --active-budget` takes
    the shares that the calibration text has instead; the two are equal where an expert's format
    does not depend on how often it is used.

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
        """By role, in model order: attention, routed gate, ..."""
        return self.parts(role_of)

    @cached_property
    def layers(self) -> tuple[Part, ...]:
        """By layer."""
        return self.parts(lambda matrix: str(matrix.layer))

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
            share = Fraction(1) if m.expert is None else Fraction(k or 0, n_choices)
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
        return Counter((role_of(m), self.label(m)) for m in matrices if m.name not in named)

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


def read_statement(path: Path) -> Statement:
    """Read a configuration, a packed checkpoint, or a search's directory.

    Raises:
        ConfigError: there is none, or it is damaged.
        StoreError: a packed checkpoint is of another version, or damaged.
    """
    if is_packed(path):
        entry = read_object(path / "config.json")["quantization_config"]
        return Statement(path, read_formats(entry, str(path)), _packed_summary(path), str(path))
    file = path / _BEST if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise ConfigError(
            f"{path} is a directory without {_BEST}, and no packed checkpoint; give a "
            "configuration file, the --out of aq-quantize, or that of a finished aq-search"
        )
    foreign = _foreign(file)
    if foreign is not None:
        return Statement(file, foreign, {}, None)
    config = load_config(file)
    summary = config.summary or config.search_summary or {}
    model = summary.get("model")
    return Statement(file, config, summary, model if isinstance(model, str) else None)


def _foreign(file: Path) -> Foreign | None:
    """A configuration of another tool; None for any other file, which `load_config` judges."""
    try:
        data = read_json(file)
    except (OSError, JsonError):
        return None
    return None if tool_of(data) is None else read_foreign(data, file)


def read_skeleton(name: str, progress: Progress = no_progress) -> Skeleton:
    """A model's matrices, without its weights.

    Args:
        name: `demo`, a directory, a GGUF file or a hub id.
        progress: of decoding a GGUF file.

    Raises:
        ModelError: it cannot be found, or has nothing to quantize.
    """
    location = model_location(name, progress=progress)
    model: Any = load_skeleton(location)
    text_config = model.config.get_text_config()
    found = [getattr(text_config, field, None) for field in _TOP_K_FIELDS]
    numbers = [value for value in found if isinstance(value, int)]
    found_map = with_source(map_model(model), location)
    inventory, origin = found_map.inventory, origin_of(found_map.source)
    has_experts = any(m.expert is not None for m in inventory.matrices)
    top_k = numbers[0] if numbers and has_experts else None
    notes = () if origin is None else tuple(origin.notes)
    return Skeleton(name, inventory, top_k, zero_experts(text_config), notes)


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
    skeleton = read_skeleton(name, progress)
    return Inspection(statement, skeleton, statement.plan_on(skeleton))


def role_of(matrix: Matrix) -> str:
    """`attention`, `shared experts`, `dense MLPs`, `routed gate`, `routed up` or `routed down`."""
    if matrix.kind != "expert":
        return _KIND_NAMES[matrix.kind]
    for name, projections in (("gate", GATE), ("up", UP), ("down", DOWN)):
        if matrix.projection in projections:
            return f"routed {name}"
    return f"routed {matrix.projection}"


def scheme_label(scheme: ResolvedScheme) -> str:
    """`int4-g64`, or `int4-g64 of int8-row inputs` where the inputs are rounded."""
    if not scheme.activation.is_quantized:
        return scheme.weight_format.name
    return f"{scheme.weight_format.name} of {scheme.activation.name} inputs"


def _packed_summary(path: Path) -> Mapping[str, Any]:
    """What a packed checkpoint's report says of where it comes from; empty without one."""
    try:
        report = read_object(path / "quantize_report.json")
    except FileNotFoundError:
        return {}
    except JsonError as error:
        raise ConfigError(
            f"{path}/quantize_report.json is damaged ({error}); remove it or quantize again"
        ) from error
    names = ("model", "model_digest", "calibration", "assignment_digest", "settings")
    return {name: report[name] for name in names if report.get(name) is not None}
