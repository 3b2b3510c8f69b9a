"""The `mixed_precision` file: which weight of a model comes from which checkpoint.

    mixed_precision:
      base_model_path: "/models/base"
      fp8_path: "/models/fp8"
      gptq_int4_path: "/models/gptq"
      weight_mapping:
        "model.layers.0.self_attn.q_proj.weight": "fp8"
        "model.layers.0.mlp.experts.0.w13_weight": "gptq_int4"
        "model.layers.0.mlp.experts.0.w2_weight": "fp8"

A key `<name>_path` makes a precision `<name>`. Of those that have a meaning (`PRECISIONS`) the
checkpoint must be of that kind; others hold any checkpoint that can be read, such as two of GPTQ.
Bits and groups are those of the checkpoint. `w13_weight` is gate above up of an expert,
`w2_weight` its down. Paths that are not absolute start at the file's folder.

The language is YAML (PyYAML's safe loader), without repeated keys, which YAML forbids and PyYAML
takes the last of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from alphaquant.errors import ConfigError

PRECISIONS = ("fp16", "fp8", "gptq_int4", "awq_int4", "int8", "int4")
"""Names that say of what kind a checkpoint is."""

_TOP, _BASE, _MAPPING, _PATH = "mixed_precision", "base_model_path", "weight_mapping", "_path"


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """Which weight comes from which checkpoint.

    Attributes:
        base_model_path: the model that all other weights are of.
        sources: directories by precision.
        weight_mapping: precisions by the full names of weights.
    """

    base_model_path: Path
    sources: Mapping[str, Path]
    weight_mapping: Mapping[str, str]

    def __post_init__(self) -> None:
        """Refuse what cannot be loaded, before any file of a model is looked at.

        Raises:
            ConfigError: no weights, a precision without a path, or a path that is no directory.
        """
        object.__setattr__(self, "base_model_path", Path(self.base_model_path))
        sources = {name: Path(path) for name, path in self.sources.items()}
        object.__setattr__(self, "sources", MappingProxyType(sources))
        object.__setattr__(self, "weight_mapping", MappingProxyType(dict(self.weight_mapping)))
        self._check()

    def _check(self) -> None:
        if not self.weight_mapping:
            raise ConfigError(f"{_MAPPING} names no weight; give weights and their precisions")
        for weight, precision in self.weight_mapping.items():
            if precision not in self.sources:
                known = ", ".join(self.sources) or "none"
                raise ConfigError(
                    f"{_MAPPING}: {weight} is {precision!r}, and there is no {precision}{_PATH}; "
                    f"precisions with a path: {known}; add the path, or use one of those"
                )
        used = {name: self.sources[name] for name in sorted(set(self.weight_mapping.values()))}
        for key, path in {_BASE: self.base_model_path, **used}.items():
            if not path.is_dir():
                shown = key if key == _BASE else f"{key}{_PATH}"
                raise ConfigError(f"{shown} is {path}, which is no directory; correct the path")

    @classmethod
    def of(cls, content: Any, folder: Path = Path()) -> "MixedPrecisionConfig":
        """The configuration of parsed YAML.

        Args:
            content: `{"mixed_precision": {...}}`.
            folder: where paths that are not absolute start.

        Raises:
            ConfigError: a key that does not exist or is missing, or what cannot be loaded.
        """
        inner = content.get(_TOP) if isinstance(content, dict) else None
        if not isinstance(inner, dict) or len(content) > 1:
            raise ConfigError(f"the file must be an object with the one key {_TOP}; see the docs")
        keys = set(map(str, inner))
        unknown = sorted(k for k in keys if k != _MAPPING and not k.endswith(_PATH))
        if unknown or not {_BASE, _MAPPING} <= keys:
            raise ConfigError(
                f"{_TOP} has {', '.join(sorted(keys)) or 'nothing'}; it must have {_BASE} and "
                f"{_MAPPING}, may have {', '.join(p + _PATH for p in PRECISIONS)} or another "
                f"<name>{_PATH}, and nothing else"
            )
        mapping = inner[_MAPPING]
        paths = {key: value for key, value in inner.items() if key != _MAPPING}
        texts = isinstance(mapping, dict) and [*mapping, *mapping.values(), *paths.values()]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"{_TOP}: paths are texts, and {_MAPPING} is an object of names of weights and "
                "precisions, at least one; correct the file"
            )
        located = {key.removesuffix(_PATH): folder / path for key, path in paths.items()}
        return cls(located.pop(_BASE.removesuffix(_PATH)), located, mapping)

    @classmethod
    def from_yaml(cls, path: Path | str) -> "MixedPrecisionConfig":
        """The configuration of a file.

        Raises:
            ConfigError: it cannot be read, or see `of`.
        """
        try:
            content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Strict)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(
                f"{path} cannot be read as YAML ({said}); give a {_TOP} file"
            ) from error
        try:
            return cls.of(content, Path(path).absolute().parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_yaml(self) -> str:
        """The file; `from_yaml` gives this configuration back."""
        paths = {f"{name}{_PATH}": str(path) for name, path in self.sources.items()}
        inner = {_BASE: str(self.base_model_path), **paths, _MAPPING: dict(self.weight_mapping)}
        text: str = yaml.safe_dump({_TOP: inner}, sort_keys=False)
        return text


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """PyYAML's safe loader, which takes the last of repeated keys, without them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class.

        Raises:
            ConstructorError: a key is there twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            text = str(key.value)
            if text in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {text!r} is there twice", key.start_mark
                )
            seen.add(text)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found
