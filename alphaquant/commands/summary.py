"""What a configuration says of the search that it is from, so that its trial can be made again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.specs.flat import make
from alphaquant.specs.quantizer import QuantSettings

_CALIBRATION_TYPES = {"source": str, "n_samples": int, "seq_len": int, "seed": int, "digest": str}

_LEAST = {"n_samples": 1, "seq_len": 2, "seed": 0}
"""Of a summary's numbers; a specification calls the first `calibration_samples`."""


@dataclass(frozen=True)
class Summary:
    """What `aq-search` wrote into a configuration so that its trial can be made again.

    Attributes:
        settings: how its matrices were quantized.
        calibration: provenance of the calibration windows, see `TokenSet.provenance`.
        model_digest: of the weights, None if not stated.
        candidates: name of the bank with the candidates that it was searched among; None where
            its formats are made here.
        is_stated: whether it states settings.
        evaluation: provenance of the windows that its trials were measured on.
    """

    settings: QuantSettings
    calibration: Mapping[str, Any]
    model_digest: str | None
    candidates: str | None = None
    is_stated: bool = False
    evaluation: Mapping[str, Any] = field(default_factory=dict)


def read_summary(summary: Mapping[str, Any], path: Path) -> Summary:
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
    candidates = _part(summary, "candidates", {"bank": str}, path).get("bank")
    stated = digest if isinstance(digest, str) else None
    evaluation = _part(summary, "evaluation", _CALIBRATION_TYPES, path)
    return Summary(settings, calibration, stated, candidates, bool(quantization), evaluation)


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
        return make(QuantSettings, quantization, "a quantization")
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
