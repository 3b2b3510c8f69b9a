"""`quantize`: from a configuration file to a packed checkpoint, with the calibration that the configuration names."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.evaluators.data import TokenSet
from alphaquant.quant.bank import Progress
from alphaquant.quant.engine import Method, QuantSettings
from alphaquant.quant.models import load_skeleton, map_model
from alphaquant.quant.pipeline import PipelineResult, quantize_to_checkpoint
from alphaquant.spaces.assignment import BitCount
from alphaquant.spaces.config import Config, Plan, load_config, resolve
from alphaquant.spaces.units import Inventory
from alphaquant.studies.sources import Source, find_device, load_source, model_location, read_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizeSpec:
    """A quantization.

    Attributes:
        model: `demo`, a local directory or a hub id.
        config: configuration file.
        out: directory to write.
        method: `gptq` or `rtn`; None for what the configuration's summary says, else `gptq`.
        calibration: text; None for what the summary says, else `demo`. Likewise the three that follow.
        n_calibration: windows.
        seq_len: tokens per window.
        seed: of the windows.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the computation.
        strict: patterns that match nothing are errors.
        overwrite: replace an existing `out`.
    """

    model: str
    config: Path
    out: Path
    method: Method | None = None
    calibration: str | None = None
    n_calibration: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    strict: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class DryRun:
    """What a configuration would do, found without weights."""

    plan: Plan
    inventory: Inventory
    counts: BitCount


def quantize(spec: QuantizeSpec, *, progress: Progress = lambda stage, done, total: None) -> PipelineResult:
    """Quantize a model as a configuration says and write a packed checkpoint.

    Args:
        spec: what to do.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    config = load_config(spec.config)
    summary = config.summary or {}
    progress("load", 0, 1)
    source = load_source(spec.model, find_device(spec.device), spec.dtype)
    plan = resolve(config, source.map.inventory, strict=spec.strict)
    warnings = [*plan.warnings, *_check(plan, summary, source)]
    for warning in warnings:
        logger.warning("%s", warning)
    settings = _settings(spec, summary)
    tokens = _calibration(spec, summary, source) if settings.method == "gptq" else None
    progress("load", 1, 1)
    facts: dict[str, Any] = {
        **source.facts(),
        "config": config.model_dump(exclude_none=True, exclude={"summary"}),
        "assignment_digest": plan.assignment.digest,
        "calibration": None if tokens is None else tokens.provenance(),
        "warnings": warnings,
    }
    return quantize_to_checkpoint(
        source.map,
        plan.assignment,
        spec.out,
        settings,
        None if tokens is None else tokens.tokens,
        facts=facts,
        tokenizer=source.tokenizer,
        overwrite=spec.overwrite,
        progress=progress,
    )


def dry_run(spec: QuantizeSpec) -> DryRun:
    """Resolve a configuration on a model without loading weights.

    Raises:
        AlphaQuantError: a bad configuration or model.
    """
    inventory = map_model(load_skeleton(model_location(spec.model))).inventory
    plan = resolve(load_config(spec.config), inventory, strict=spec.strict)
    return DryRun(plan, inventory, plan.assignment.count_bits(inventory))


def _settings(spec: QuantizeSpec, summary: Mapping[str, Any]) -> QuantSettings:
    """Flag over summary over default."""
    found = summary.get("quantization")
    try:
        settings = QuantSettings(**found) if found else QuantSettings()
    except TypeError as error:
        raise ConfigError(f"{spec.config}: summary.quantization has unknown fields ({error}); remove it") from error
    return settings if spec.method is None else replace(settings, method=spec.method)


def _calibration(spec: QuantizeSpec, summary: Mapping[str, Any], source: Source) -> TokenSet:
    """Flag over summary over default."""
    found = summary.get("calibration") or {}
    tokens = read_text(
        source,
        spec.calibration or found.get("source", "demo"),
        "calibration",
        spec.n_calibration or found.get("n_samples", 128),
        spec.seq_len or found.get("seq_len"),
        found.get("seed", 0) if spec.seed is None else spec.seed,
    )
    asked = (spec.calibration, spec.n_calibration, spec.seq_len, spec.seed)
    if found.get("digest") not in (None, tokens.digest) and asked == (None, None, None, None):
        raise ConfigError(
            f"{spec.config} was searched with other calibration text than {tokens.name} gives now; give --calibration to use this "
            "text, or restore the file"
        )
    return tokens


def _check(plan: Plan, summary: Mapping[str, Any], source: Source) -> list[str]:
    """What the user should know before the result is trusted."""
    warnings = []
    activations = [name for name, scheme in plan.schemes.items() if scheme.activation.is_quantized]
    if activations:
        raise ConfigError(
            f"activation formats are asked for {len(activations)} matrices, e.g. {activations[0]}, and are not applied by this version; "
            "set aq to bf16"
        )
    if summary.get("model_digest") not in (None, source.digest):
        warnings.append(f"the configuration was searched on other weights than those of {source.name}")
    return warnings


