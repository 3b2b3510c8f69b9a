"""`quantize`: from a configuration to a packed checkpoint, with the calibration that it names."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError, ModelError
from alphaquant.evaluators.data import TokenSet, check_sources
from alphaquant.quant.architectures import AUTO, check_architecture, choose_architecture
from alphaquant.quant.bank import Progress
from alphaquant.quant.engine import QuantSettings
from alphaquant.quant.loading import load_skeleton, named_dtype
from alphaquant.quant.models import map_model
from alphaquant.quant.parts import open_part
from alphaquant.quant.pipeline import PipelineResult, quantize_to_checkpoint
from alphaquant.quant.quantization_config import is_packed
from alphaquant.quant.source_files import with_source
from alphaquant.spaces.assignment import BitCount
from alphaquant.spaces.config import Config, Plan, load_config, resolve
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.studies.field_types import check_kind, check_least, check_types
from alphaquant.studies.progress import no_progress
from alphaquant.studies.sizes import bit_lines
from alphaquant.studies.sources import (
    Source,
    find_device,
    load_source,
    model_location,
    model_notes,
    read_text,
)
from alphaquant.studies.spec import DEMO_TEXT, quant_settings
from alphaquant.studies.tables import aligned

logger = logging.getLogger(__name__)

_CALIBRATION_TYPES = {"source": str, "n_samples": int, "seq_len": int, "seed": int, "digest": str}

_LEAST = {"n_samples": 1, "seq_len": 2, "seed": 0}
"""Of a summary's numbers; a specification calls the first `n_calibration`."""


@dataclass(frozen=True)
class QuantizeSpec:
    """A quantization.

    Attributes:
        model: `demo`, a local directory or a hub id.
        config: configuration file.
        out: directory to write.
        quant: fields of `QuantSettings` to change; absent ones, and None, are what the
            configuration's summary says, else their defaults.
        calibration: text; None for what the summary says, else the default of a search. Likewise
            the four that follow.
        n_calibration: windows.
        seq_len: tokens per window.
        seed: of the windows.
        bos: what they start with: `auto`, `always` or `never`.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the computation.
        model_type: what the model is to be called, see `alphaquant.quant.architectures`; `auto`
            for what it is.
        strict: patterns that match nothing are errors.
        overwrite: replace an existing packed checkpoint.
    """

    model: str
    config: Path
    out: Path
    quant: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    n_calibration: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    bos: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    model_type: str = AUTO
    strict: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse values of the wrong type and numbers that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check_types(self)
        check_least("n_calibration", self.n_calibration, 1)
        check_least("seq_len", self.seq_len, 2)
        check_least("seed", self.seed, 0)


@dataclass(frozen=True)
class DryRun:
    """What a configuration would do, found without weights."""

    plan: Plan
    inventory: Inventory
    counts: BitCount


@dataclass(frozen=True)
class _Summary:
    """What `aq-search` wrote into a configuration so that its trial can be made again.

    Attributes:
        settings: how its matrices were quantized.
        calibration: provenance of the calibration windows, see `TokenSet.provenance`.
        model_digest: of the weights, None if not stated.
    """

    settings: QuantSettings
    calibration: Mapping[str, Any]
    model_digest: str | None


def quantize(spec: QuantizeSpec, *, progress: Progress = no_progress) -> PipelineResult:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Args:
        spec: what to do.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    check_kind(spec, QuantizeSpec, "quantize")
    config = load_config(spec.config)
    summary = _read_summary(config.summary or {}, spec.config)
    settings = _settings(spec, summary)
    check_architecture(spec.model_type)
    if spec.dtype != "auto":
        named_dtype(spec.dtype)
    device = find_device(spec.device)
    if settings.method == "gptq":
        text, bos = _calibration_text(spec, summary), "auto" if spec.bos is None else spec.bos
        check_sources({"calibration": text}, bos)
    with open_part(spec.out, spec.overwrite, _asked(spec, config, summary, settings)) as part:
        progress("load", 0, 1)
        source = load_source(spec.model, device, spec.dtype)
        architecture = choose_architecture(source.map.model, spec.model_type)
        plan = resolve(config, source.map.inventory, strict=spec.strict)
        warnings = [*plan.warnings, *_check_source(summary, source), *architecture.warnings]
        warnings += model_notes(source.map)
        for warning in warnings:
            logger.warning("%s", warning)
        tokens = _calibration(spec, summary, source) if settings.method == "gptq" else None
        progress("load", 1, 1)
        facts = _facts(source, config, plan, tokens, warnings)
        return quantize_to_checkpoint(
            source.map,
            plan.assignment,
            part,
            settings,
            None if tokens is None else tokens.tokens,
            facts=facts | {"architecture": architecture.name},
            activations=_activations(plan),
            tokenizer=source.tokenizer,
            progress=progress,
        )


def dry_run(spec: QuantizeSpec) -> DryRun:
    """Resolve a configuration on a model without loading weights.

    Raises:
        AlphaQuantError: a bad configuration or model.
    """
    config = load_config(spec.config)
    _settings(spec, _read_summary(config.summary or {}, spec.config))
    if is_packed(model_location(spec.model)):  # whose skeleton could be had all the same
        raise ModelError(
            f"{spec.model} is quantized already, by aq-quantize; quantizing starts from the "
            "original weights: give those"
        )
    skeleton = load_skeleton(model_location(spec.model))
    architecture = choose_architecture(skeleton, spec.model_type)
    model_map = with_source(map_model(skeleton), model_location(spec.model))
    inventory = model_map.inventory
    plan = resolve(config, inventory, strict=spec.strict)
    for warning in (*plan.warnings, *architecture.warnings, *model_notes(model_map)):
        logger.warning("%s", warning)
    return DryRun(plan, inventory, plan.assignment.count_bits(inventory))


def plan_text(found: DryRun) -> str:
    """What a configuration would do, for people: matrices by kind and format, and the bits."""
    formats, activations = found.plan.assignment.formats, _activations(found.plan)
    shown = ["kind", "format", *(["inputs"] if activations else [])]

    def words(matrix: Matrix) -> tuple[str, ...]:
        inputs = activations.get(matrix.name, BF16).name
        return (matrix.kind, formats[matrix.name], inputs)[: len(shown)]

    counts = Counter(words(m) for m in found.inventory.matrices)
    rows = [[*key, str(n)] for key, n in sorted(counts.items())]
    table = aligned([*shown, "matrices"], rows, left=shown)
    return "\n".join([table, *bit_lines(found.counts)])


def result_json(result: PipelineResult) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "path": str(result.path),
        "quantized_bytes": result.quantized_bytes,
        "checkpoint_bytes": result.checkpoint_bytes,
        "fallbacks": dict(result.fallbacks),
        "seconds": round(result.seconds, 1),
    }


def _read_summary(summary: Mapping[str, Any], path: Path) -> _Summary:
    """Take from a configuration's summary what making its trial again needs.

    Raises:
        ConfigError: a part has another type, or a setting another value, than is possible.
    """
    quantization = _part(summary, "quantization", {}, path)
    calibration = _part(summary, "calibration", _CALIBRATION_TYPES, path)
    for name, least in _LEAST.items():
        if calibration.get(name, least) < least:
            raise ConfigError(
                f"{path}: summary.calibration.{name} is {calibration[name]}; use {least} or more"
            )
    digest = summary.get("model_digest")
    settings = _read_settings(quantization, path)
    return _Summary(settings, calibration, digest if isinstance(digest, str) else None)


def _read_settings(quantization: Mapping[str, Any], path: Path) -> QuantSettings:
    nulls = [name for name, value in quantization.items() if value is None]
    if nulls:
        raise ConfigError(
            f"{path}: summary.quantization.{nulls[0]} is null; leave the key out for its default"
        )
    # People write 1.0 as 1; reports and digests of both are to be the same.
    percdamp = quantization.get("percdamp")
    if type(percdamp) is int:
        quantization = {**quantization, "percdamp": float(percdamp)}
    try:
        return quant_settings(**quantization)
    except ConfigError as error:
        raise ConfigError(f"{path}: summary.quantization: {error}") from error


def _part(
    summary: Mapping[str, Any], name: str, types: Mapping[str, type], path: Path
) -> Mapping[str, Any]:
    """One part of a summary, empty where it is absent; what `types` names has these types."""
    found = summary.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: summary.{name} is {found!r}; it is an object; remove it")
    for key in sorted(types.keys() & found.keys()):
        if type(found[key]) is not types[key]:
            raise ConfigError(
                f"{path}: summary.{name}.{key} is {found[key]!r}; it is a "
                f"{types[key].__name__}; remove it"
            )
    return found


def _settings(spec: QuantizeSpec, summary: _Summary) -> QuantSettings:
    """Flag over summary over default."""
    return quant_settings(summary.settings, **spec.quant)


def _asked(
    spec: QuantizeSpec, config: Config, summary: _Summary, settings: QuantSettings
) -> dict[str, Any]:
    """What decides the checkpoint and is known before anything is loaded, see `Part.claim`."""
    found = summary.calibration
    calibration = {
        "source": spec.calibration or found.get("source"),
        "n_samples": spec.n_calibration or found.get("n_samples"),
        "seq_len": spec.seq_len or found.get("seq_len"),
        "seed": found.get("seed") if spec.seed is None else spec.seed,
        "bos": spec.bos or found.get("bos"),
    }
    return {
        "model": spec.model,
        "configuration": config.model_dump(exclude_none=True, exclude={"summary", "comment"}),
        "settings": asdict(settings),
        "calibration": calibration if settings.method == "gptq" else None,
        "dtype": spec.dtype,
        "device": spec.device,
    }


def _facts(
    source: Source, config: Config, plan: Plan, tokens: TokenSet | None, warnings: list[str]
) -> dict[str, Any]:
    """Provenance for `quantize_report.json`."""
    return {
        **source.facts(),
        "config": config.model_dump(exclude_none=True, exclude={"summary"}),
        "staying": [asdict(s) for s in source.map.staying],
        "carried": sorted(c.name for c in source.map.carried),
        "assignment_digest": plan.assignment.digest,
        "calibration": None if tokens is None else tokens.provenance(),
        "warnings": warnings,
    }


def _calibration(spec: QuantizeSpec, summary: _Summary, source: Source) -> TokenSet:
    """Flag over summary over default."""
    found = summary.calibration
    tokens = read_text(
        source,
        _calibration_text(spec, summary),
        "calibration",
        spec.n_calibration or found.get("n_samples", 128),
        spec.seq_len or found.get("seq_len"),
        found.get("seed", 0) if spec.seed is None else spec.seed,
        _bos_of(found) if spec.bos is None else spec.bos,
    )
    asked = (spec.calibration, spec.n_calibration, spec.seq_len, spec.seed, spec.bos)
    if found.get("digest") not in (None, tokens.digest) and set(asked) == {None}:
        raise ConfigError(
            f"{spec.config} was searched with other calibration text than {tokens.name} gives "
            "now; give --calibration to use this text, or restore the file"
        )
    return tokens


def _calibration_text(spec: QuantizeSpec, summary: _Summary) -> str:
    stated = str(summary.calibration.get("source", DEMO_TEXT))
    return stated if spec.calibration is None else spec.calibration


def _bos_of(calibration: Mapping[str, Any]) -> str:
    """What the windows of a summary start with; those of older versions did with the text."""
    if "bos" not in calibration:
        return "never" if "digest" in calibration else "auto"
    return "always" if calibration["bos"] else "never"


def _activations(plan: Plan) -> dict[str, Format]:
    """What inputs are rounded to, for the matrices whose inputs are."""
    return {
        name: scheme.activation
        for name, scheme in plan.schemes.items()
        if scheme.activation.is_quantized
    }


def _check_source(summary: _Summary, source: Source) -> list[str]:
    """What the user should know before the result is trusted."""
    if summary.model_digest not in (None, source.digest):
        return [f"the configuration was searched on other weights than those of {source.name}"]
    return []
