"""`quantize`: from a configuration to a packed checkpoint, with the calibration that it names."""

import logging
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from alphaquant.commands.searched import Made, searched_scores
from alphaquant.commands.summary import Summary, read_summary
from alphaquant.errors import ConfigError, ModelError
from alphaquant.exports.writing import EXPORTERS, export_packed
from alphaquant.files import in_use
from alphaquant.models.architectures import check_architecture, choose_architecture
from alphaquant.models.dtypes import named_dtype
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.models.quantization_config import is_packed
from alphaquant.models.sites import ModelMap
from alphaquant.models.source_files import with_source
from alphaquant.progress import Progress, Stage, no_progress, of_total
from alphaquant.quant.bank import Bank, bank_key, find_bank
from alphaquant.quant.ggml.library import check_formats
from alphaquant.quant.tuning.learning import Tuning, check_memory
from alphaquant.reports.bits import bit_lines
from alphaquant.reports.tables import aligned
from alphaquant.runtime.parts import open_part
from alphaquant.runtime.pipeline import PackingJob, PipelineResult, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment, BitCount
from alphaquant.spaces.config import Config, Plan, load_config, resolve
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.check import check_kind
from alphaquant.specs.quantize import ConfiguredTextSpec, QuantizeSpec
from alphaquant.specs.quantizer import QuantSettings, changed
from alphaquant.specs.texts import DEMO_TEXT
from alphaquant.studies.costing import output_hessians
from alphaquant.studies.inputs import (
    SOURCE_STEPS,
    USERS,
    Source,
    cache_dir,
    find_device,
    load_source,
    model_location,
    model_notes,
    read_text,
)
from alphaquant.studies.shared.layer_work import check_shared, fill_by_workers
from alphaquant.texts.windows import TokenSet, check_sources

logger = logging.getLogger(__name__)

_LEAST_HELDBACK = 4
"""Windows that decide whether tuning is kept."""


@dataclass(frozen=True)
class DryRun:
    """What a configuration would do, found without weights."""

    plan: Plan
    inventory: Inventory
    counts: BitCount


@dataclass(frozen=True)
class _Resolved:
    """A configuration on a model without weights, and what the user should know of both."""

    model_map: ModelMap
    plan: Plan
    warnings: tuple[str, ...]


def quantize(spec: QuantizeSpec, *, progress: Progress = no_progress) -> PipelineResult:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Args:
        spec: what to do.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    check_kind(spec, QuantizeSpec, "quantize")
    config = _load_config(spec.config)
    summary = read_summary(config.summary or {}, spec.config)
    settings = _settings(spec, summary)
    check_architecture(spec.model_type)
    if spec.dtype != "auto":
        named_dtype(spec.dtype)
    device = find_device(spec.device)
    check_shared(spec, settings, device)
    if settings.method == "gptq":
        check_sources({"calibration": _calibration_text(spec, summary)}, spec.text.bos or "auto")
    if spec.out is None:
        raise ConfigError("quantize needs out; the directory of the packed checkpoint")
    job, users = _asked(spec, config, summary, settings), cache_dir(spec.cache) / USERS
    with open_part(spec.out, spec.overwrite, job) as part, in_use(users, "the cache"):
        progress(Stage.LOAD, 0, SOURCE_STEPS + 1)
        exporter = EXPORTERS.get(spec.export)
        if exporter is not None:
            _resolve_skeleton(spec, config, progress)
        source = load_source(
            *(spec.model, device, spec.dtype),
            include=config.include,
            cache=spec.cache,
            rotate=_rotation(spec, config),
            progress=of_total(progress, Stage.LOAD, SOURCE_STEPS + 1),
        )
        architecture = choose_architecture(source.map.model, spec.model_type)
        plan = resolve(config, source.map.inventory, strict=spec.strict)
        warnings = [*plan.warnings, *_check_source(summary, source), *architecture.warnings]
        warnings += model_notes(source.map)
        for warning in warnings:
            logger.warning("%s", warning)
        needs_text = settings.method == "gptq" or spec.tuning.settings is not None
        tokens = _calibration(spec, summary, source) if needs_text else None
        tuning = _tuning(spec, summary, source, tokens, _activations(plan))
        progress(Stage.LOAD, SOURCE_STEPS + 1, SOURCE_STEPS + 1)
        facts = _facts(source, config, plan, tokens, warnings)
        is_changed = settings != summary.settings or bool(_activations(plan))
        is_changed |= tuning is not None
        facts["searched"] = _searched(config, plan, source, tokens, is_changed)
        windows = None if tokens is None else tokens.tokens
        if tokens is not None and summary.candidates is None:
            own = (plan.assignment, settings, progress, _rotation(spec, config))
            fill_by_workers(spec, source, tokens, *own)
        return quantize_to_checkpoint(
            PackingJob(
                *(source.map, plan.assignment, settings, windows, _activations(plan)),
                bank=_bank(spec, summary, source, tokens, settings, plan.assignment),
                tuning=tuning,
                outputs=None
                if tokens is None
                else partial(output_hessians, source, tokens, spec.cache, progress),
            ),
            part,
            facts=facts | {"architecture": architecture.name},
            tokenizer=source.tokenizer,
            progress=progress,
            export=None if exporter is None else partial(export_packed, exporter),
        )


def dry_run(spec: QuantizeSpec, *, progress: Progress = no_progress) -> DryRun:
    """Resolve a configuration on a model without loading weights.

    Args:
        spec: what would be done.
        progress: called with a stage's name, steps done, steps; a GGUF file is converted first.

    Raises:
        AlphaQuantError: a bad configuration or model, or a plan that the export cannot hold.
    """
    check_kind(spec, QuantizeSpec, "dry_run")
    config = _load_config(spec.config)
    _settings(spec, read_summary(config.summary or {}, spec.config))
    found = _resolve_skeleton(spec, config, progress)
    for warning in found.warnings:
        logger.warning("%s", warning)
    inventory = found.model_map.inventory
    return DryRun(found.plan, inventory, found.plan.assignment.count_bits(inventory))


def _load_config(path: Path) -> Config:
    """A configuration whose formats can be made here.

    Raises:
        ConfigError: it has mistakes, or types of llama.cpp without llama.cpp's library.
    """
    config = load_config(path)
    check_formats(s.wq for s in (config.default, *config.overrides) if s.wq)
    return config


def _resolve_skeleton(spec: QuantizeSpec, config: Config, progress: Progress) -> _Resolved:
    """Apply a configuration to a model without weights, and check that the export can hold it.

    Raises:
        AlphaQuantError: a bad model, or a plan that does not fit it or the export.
    """
    location = model_location(spec.model, spec.cache, progress)
    if is_packed(location):  # whose skeleton could be had all the same
        raise ModelError(
            f"{spec.model} is quantized already, by aq-quantize; quantizing starts from the "
            "original weights: give those"
        )
    skeleton = load_skeleton(location)
    architecture = choose_architecture(skeleton, spec.model_type)
    model_map = with_source(map_model(skeleton, include=config.include), location)
    plan = resolve(config, model_map.inventory, strict=spec.strict)
    exporter = EXPORTERS.get(spec.export)
    if exporter is not None:
        _check_inputs(spec.export, plan)
        exporter.check(plan.assignment, model_map)
    warnings = (*plan.warnings, *architecture.warnings, *model_notes(model_map))
    return _Resolved(model_map, plan, warnings)


def plan_text(found: DryRun) -> str:
    """What a configuration would do, for people: matrices by role and format, and the bits."""
    formats, activations = found.plan.assignment.formats, _activations(found.plan)
    shown = ["role", "format", *(["inputs"] if activations else [])]

    def words(matrix: Matrix) -> tuple[str, ...]:
        inputs = activations.get(matrix.name, BF16).name
        return (matrix.role, formats[matrix.name], inputs)[: len(shown)]

    counts = Counter(words(m) for m in found.inventory.matrices)
    rows = [[*key, str(n)] for key, n in counts.items()]
    table = aligned([*shown, "matrices"], rows, left=shown)
    return "\n".join([table, *bit_lines(found.counts)])


def result_json(result: PipelineResult) -> dict[str, Any]:
    """What was written, for programs."""
    return {
        "path": str(result.path),
        "quantized_bytes": result.quantized_bytes,
        "checkpoint_bytes": result.checkpoint_bytes,
        "fallbacks": dict(result.fallbacks),
        **({} if result.tuning is None else {"tuning": dict(result.tuning)}),
        **({} if result.export is None else {"export": _exported(result)}),
        "seconds": round(result.seconds, 1),
    }


def _exported(result: PipelineResult) -> dict[str, Any]:
    """Facts of an export, the command that serves it with the directory."""
    facts = dict(result.export or {})
    if "run" in facts:
        facts["run"] = facts["run"].replace("{directory}", shlex.quote(str(result.path)))
    return facts


def _settings(spec: QuantizeSpec, summary: Summary) -> QuantSettings:
    """Flag over summary over default; where no search left settings, rounding is two-sided."""
    settings, asked = summary.settings, spec.quantizer
    if asked.method == "rtn" and not asked.two_sided:  # what a search says of GPTQ says nothing
        settings = replace(settings, two_sided=False)
    settings = changed(settings, asked)
    if asked.correction is not None and not settings.sequential:
        raise ConfigError(
            f"correction {asked.correction:g} asked, and layers are rounded for what the original "
            "model gives them, where there is nothing to correct; add --sequential"
        )
    if spec.quantizer.two_sided is None and not summary.is_stated and settings.method == "gptq":
        return replace(settings, two_sided=True)
    return settings


def _rotation(spec: QuantizeSpec, config: Config) -> int | None:
    """Seed of the rotation of the residual stream: flag over configuration."""
    return config.rotate if spec.rotate is None else spec.rotate


def _asked(
    spec: QuantizeSpec, config: Config, summary: Summary, settings: QuantSettings
) -> dict[str, Any]:
    """What decides the checkpoint and is known before anything is loaded, see `Part.claim`."""
    found, text = summary.calibration, spec.text
    calibration = {
        "source": text.calibration or found.get("source"),
        "n_samples": text.calibration_samples or found.get("n_samples"),
        "seq_len": text.seq_len or found.get("seq_len"),
        "seed": found.get("seed") if text.seed is None else text.seed,
        "bos": text.bos or found.get("bos"),
    }
    return {
        "model": spec.model,
        "configuration": config.model_dump(exclude_none=True, exclude={"summary", "comment"}),
        "settings": asdict(settings),
        "tuning": asdict(spec.tuning),
        "rotate": _rotation(spec, config),
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


def _searched(
    config: Config, plan: Plan, source: Source, tokens: TokenSet | None, is_changed: bool
) -> dict[str, Any] | None:
    """What the configuration's search measured, where its trial is made again as it was."""
    calibration = None if tokens is None else tokens.digest
    made = Made(plan.assignment.digest, source.digest, calibration, is_changed)
    return searched_scores(config.summary or {}, made)


def _calibration(spec: QuantizeSpec, summary: Summary, source: Source) -> TokenSet:
    """Flag over summary over default."""
    found, text = summary.calibration, spec.text
    tokens = read_text(
        source,
        _calibration_text(spec, summary),
        "calibration",
        text.calibration_samples or found.get("n_samples", 128),
        text.seq_len or found.get("seq_len"),
        found.get("seed", 0) if text.seed is None else text.seed,
        _bos_of(found) if text.bos is None else text.bos,
    )
    if found.get("digest") not in (None, tokens.digest) and text == ConfiguredTextSpec():
        raise ConfigError(
            f"{spec.config} was searched with other calibration text than {tokens.name} gives "
            "now; give --calibration to use this text, or restore the file"
        )
    return tokens


def _tuning(
    spec: QuantizeSpec,
    summary: Summary,
    source: Source,
    tokens: TokenSet | None,
    activations: Mapping[str, Format],
) -> Tuning | None:
    """What free numbers learn from, and what decides whether they are kept.

    That is the evaluation text of the configuration's search, which its gate does not use, or else
    the last quarter of the calibration windows, which are not learned from then.

    Raises:
        AlphaQuantError: the text of the search is not there any more, or too few windows are.
    """
    settings = spec.tuning.settings
    if settings is None or tokens is None:
        return None
    if activations:
        raise ConfigError(
            f"--tune {spec.tuning.tune}: inputs of {len(activations)} matrices are rounded, and "
            "tuning does not see that; leave --tune out, or aq out of the configuration"
        )
    check_memory(source.map.model)
    windows, found = tokens.tokens, summary.evaluation
    if found.get("n_samples") and found.get("seq_len") == windows.shape[1]:
        given = (str(found.get("source")), "search", found["n_samples"], found["seq_len"])
        heldback = read_text(source, *given, found.get("seed", 0), _bos_of(found))
        return Tuning(settings, windows, heldback.tokens)
    n_heldback = len(windows) // 4
    if n_heldback < _LEAST_HELDBACK:
        raise ConfigError(
            f"--tune with {len(windows)} calibration windows: a quarter of them is held back, and "
            f"{_LEAST_HELDBACK} are needed; give {4 * _LEAST_HELDBACK} --calibration-samples"
        )
    return Tuning(settings, windows[:-n_heldback], windows[-n_heldback:])


def _bank(
    spec: QuantizeSpec,
    summary: Summary,
    source: Source,
    tokens: TokenSet | None,
    settings: QuantSettings,
    assignment: Assignment,
) -> Bank | None:
    """What a search of this model with these settings and windows left in the cache.

    Raises:
        ConfigError: the configuration is of candidates, and their matrices are not there.
    """
    root, inventory = cache_dir(spec.cache) / "banks", source.map.inventory
    if summary.candidates is None:
        if tokens is None:
            return None
        return find_bank(root, bank_key(source.digest, tokens.digest, settings), inventory)
    bank = find_bank(root, summary.candidates, inventory)
    if bank is None or bank.facts.get("model_digest") != source.digest:
        raise ConfigError(
            f"{spec.config} is a mix of candidates, and their matrices are not in {root} "
            f"({summary.candidates}); search again with this --cache, load the .yaml beside it, "
            "or remove summary.candidates: then its formats are quantized here"
        )
    lacking = [
        matrix.name
        for matrix in inventory.matrices
        if matrix.name not in bank.matrices(assignment.formats[matrix.name], matrix.layer)
    ]
    if lacking:
        raise ConfigError(
            f"{spec.config}: no candidate has {lacking[0]} in {assignment.formats[lacking[0]]} "
            f"({len(lacking)} such matrices); keep the formats of the search, or remove "
            "summary.candidates"
        )
    return bank


def _calibration_text(spec: QuantizeSpec, summary: Summary) -> str:
    stated = str(summary.calibration.get("source", DEMO_TEXT))
    return stated if spec.text.calibration is None else spec.text.calibration


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


def _check_inputs(export: str, plan: Plan) -> None:
    """Refuse rounded inputs, which no file of another engine can ask for.

    Raises:
        ConfigError: naming a matrix.
    """
    rounded = _activations(plan)
    if rounded:
        raise ConfigError(
            f"--export {export}: {len(rounded)} matrices round their inputs, e.g. "
            f"{next(iter(rounded))}, which only our own runtime does; drop aq from the "
            "configuration, or use --export alphaquant"
        )


def _check_source(summary: Summary, source: Source) -> list[str]:
    """What the user should know before the result is trusted."""
    if summary.model_digest not in (None, source.digest):
        return [f"the configuration was searched on other weights than those of {source.name}"]
    return []
