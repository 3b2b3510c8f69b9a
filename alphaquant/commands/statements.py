"""What a path says of formats, and the model without weights that it is applied to.

It is a configuration file, a packed checkpoint's directory, or a search's `--out`, of which
`best.json` is read. The model is built on the meta device, so its size does not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alphaquant.errors import ConfigError
from alphaquant.models.ends import ends_named
from alphaquant.models.gguf.converted import origin_of
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.models.promises import zero_experts
from alphaquant.models.quantization_config import (
    PackedFormats,
    is_made_by_us,
    is_packed,
    read_formats,
)
from alphaquant.models.source_files import with_source
from alphaquant.progress import Progress, no_progress
from alphaquant.spaces.config import Config, Plan, ResolvedScheme, load_config, resolve
from alphaquant.spaces.foreign import Foreign, read_foreign, tool_of
from alphaquant.spaces.formats import BF16
from alphaquant.spaces.json_files import JsonError, read_json, read_object
from alphaquant.spaces.units import Inventory
from alphaquant.studies.inputs import model_location

_BEST = "best.json"

_TOP_K_FIELDS = ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""What configurations of transformers call the experts per token."""


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

    def include_on(self, model: nn.Module) -> tuple[str, ...]:
        """What it quantizes of a model beside its layers, see `alphaquant.spaces.units.ENDS`."""
        if isinstance(self.content, Config):
            return self.content.include
        if isinstance(self.content, PackedFormats):
            return ends_named(model, self.content.weights)
        return ()

    def plan_on(self, model: Skeleton) -> Plan:
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

    def _packed_plan(self, packed: PackedFormats, model: Skeleton) -> Plan:
        beside = {m.name for m in model.inventory.matrices if not m.is_included(())}
        if packed.weights.keys() | beside != model.inventory.by_name.keys():
            odd = sorted((packed.weights.keys() | beside) ^ model.inventory.by_name.keys())
            raise ConfigError(
                f"{self.path} is of another model than {model.name}: {len(odd)} matrices are only "
                f"in one of them, e.g. {odd[0]}; leave --model out, or give the right one"
            )
        names = model.inventory.by_name
        return Plan(
            {
                name: ResolvedScheme(
                    packed.weights.get(name, BF16), packed.activations.get(name, BF16)
                )
                for name in names
            }
        )


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
    config_file = path / "config.json"
    if is_made_by_us(path) and config_file.exists():  # an export: another tool's plan
        file = config_file
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


def read_skeleton(
    name: str, statements: Sequence[Statement] = (), progress: Progress = no_progress
) -> Skeleton:
    """A model's matrices, without its weights.

    Args:
        name: `demo`, a directory, a GGUF file or a hub id.
        statements: that will be applied to it; what any of them quantizes beside the layers is
            among the matrices.
        progress: of decoding a GGUF file.

    Raises:
        ModelError: it cannot be found, or has nothing to quantize.
    """
    location = model_location(name, progress=progress)
    model: Any = load_skeleton(location)
    text_config = model.config.get_text_config()
    found = [getattr(text_config, field, None) for field in _TOP_K_FIELDS]
    numbers = [value for value in found if isinstance(value, int)]
    include = {name for statement in statements for name in statement.include_on(model)}
    found_map = with_source(map_model(model, include=sorted(include)), location)
    inventory, origin = found_map.inventory, origin_of(found_map.source)
    has_experts = any(m.expert is not None for m in inventory.matrices)
    top_k = numbers[0] if numbers and has_experts else None
    notes = () if origin is None else tuple(origin.notes)
    return Skeleton(name, inventory, top_k, zero_experts(text_config), notes)


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
