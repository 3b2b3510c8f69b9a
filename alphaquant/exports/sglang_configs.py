"""Arguments of SGLang's quantization configurations, for checkpoints of GPTQ, AWQ, fp8 and int8.

    sglang_config(Path("/models/fp8")).kwargs
    {'is_checkpoint_fp8_serialized': True, 'activation_scheme': 'dynamic', 'ignored_layers': None,
     'weight_block_size': [128, 128]}

What a class takes comes from one table (`SIGNATURES`), read from SGLang's sources, or from the
SGLang that is installed. Arguments that a class does not take are an error of ours that names
those it does; bits, groups and blocks are those of the checkpoint.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from alphaquant.errors import ConfigError
from alphaquant.models.quantized.byte_forms import ByteForm
from alphaquant.models.quantized.foreign_files import ForeignCheckpoint, open_foreign
from alphaquant.models.quantized.stated import Stated
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig


@dataclass(frozen=True)
class Signature:
    """What a class takes.

    Attributes:
        required: arguments without a default.
        optional: the others.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)


_FP8 = Signature(
    (),
    (
        "is_checkpoint_fp8_serialized",
        "activation_scheme",
        "ignored_layers",
        "weight_block_size",
    ),
)
_FP8_NEW = ("packed_modules_mapping", "use_mxfp8", "is_fp4_experts", "kv_cache_quant_algo")
_GPTQ = Signature(
    ("weight_bits", "group_size", "desc_act", "lm_head_quantized", "dynamic"),
)
_GPTQ_NEW = ("checkpoint_format", "true_sequential", "static_groups")
_AWQ = Signature(("weight_bits", "group_size", "zero_point"), ("modules_to_not_convert",))
_INT8 = Signature(
    (),
    (
        "is_checkpoint_int8_serialized",
        "activation_scheme",
        "ignored_layers",
        "weight_block_size",
    ),
)

SIGNATURES: Mapping[str, Mapping[str, Signature]] = MappingProxyType(
    {
        "0.4.7": {
            "Fp8Config": _FP8,
            "GPTQConfig": _GPTQ,
            "AWQConfig": _AWQ,
            "BlockInt8Config": _INT8,
        },
        "0.5.23": {
            "Fp8Config": Signature((), (*_FP8.optional, *_FP8_NEW, "scale_fmt")),
            "GPTQConfig": Signature(_GPTQ.required, _GPTQ_NEW),
            "AWQConfig": _AWQ,
            "BlockInt8Config": _INT8,
        },
    }
)
"""What the classes of a release take."""

LATEST = "0.5.23"

_MODULES = {
    "Fp8Config": "fp8",
    "GPTQConfig": "gptq",
    "AWQConfig": "awq",
    "BlockInt8Config": "blockwise_int8",
}
"""Where the classes are, in `sglang.srt.layers.quantization`."""


@dataclass(frozen=True)
class SglangConfig:
    """A configuration of SGLang, not made yet.

    Attributes:
        class_name: `Fp8Config`, `GPTQConfig`, `AWQConfig` or `BlockInt8Config`.
        kwargs: its arguments, checked.
        version: the release whose signature they fit.
    """

    class_name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    version: str = LATEST

    def __post_init__(self) -> None:
        """Refuse arguments that the class does not take.

        Raises:
            ConfigError: naming those it takes.
        """
        check_kwargs(self.class_name, self.kwargs, self.version)

    def make(self) -> Any:
        """The object of the SGLang that is installed.

        Raises:
            ConfigError: SGLang is not installed, or takes other arguments.
        """
        made_of = _installed_class(self.class_name)
        _compare(self.class_name, self.kwargs, _signature_of(made_of), "the installed SGLang")
        return made_of(**self.kwargs)


def check_kwargs(class_name: str, kwargs: Mapping[str, Any], version: str = LATEST) -> None:
    """Compare arguments with what a class takes.

    Args:
        class_name: of SGLang.
        kwargs: arguments.
        version: a release of `SIGNATURES`.

    Raises:
        ConfigError: an unknown class or release, or arguments that are unknown or missing.
    """
    if version not in SIGNATURES:
        raise ConfigError(
            f"SGLang {version}: its signatures are not stored; {', '.join(SIGNATURES)} are"
        )
    if class_name not in SIGNATURES[version]:
        raise ConfigError(
            f"{class_name} is no configuration of SGLang {version} that is known; "
            f"{', '.join(SIGNATURES[version])} are"
        )
    _compare(class_name, kwargs, SIGNATURES[version][class_name], f"SGLang {version}")


def _compare(class_name: str, kwargs: Mapping[str, Any], known: Signature, whose: str) -> None:
    unknown = [name for name in kwargs if name not in known.fields]
    missing = [name for name in known.required if name not in kwargs]
    if unknown or missing:
        wrong = [f"has no {name}" for name in unknown] + [f"needs {name}" for name in missing]
        raise ConfigError(
            f"{class_name} of {whose} {', '.join(wrong)}; its fields are "
            f"{', '.join(known.fields)}: give those"
        )


def installed_signatures() -> Mapping[str, Signature] | None:
    """What the classes of the installed SGLang take; None where there is none."""
    try:
        return {name: _signature_of(_installed_class(name)) for name in _MODULES}
    except ConfigError:
        return None


def _installed_class(name: str) -> Any:
    path = f"sglang.srt.layers.quantization.{_MODULES[name]}"
    try:
        return getattr(import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{name} of SGLang is not here ({error}); install sglang, or use the arguments as "
            "they are"
        ) from error


def _signature_of(made_of: Any) -> Signature:
    parameters = [p for p in signature(made_of).parameters.values() if p.kind != p.VAR_KEYWORD]
    required = tuple(p.name for p in parameters if p.default is Parameter.empty)
    return Signature(required, tuple(p.name for p in parameters if p.name not in required))


def sglang_config(directory: Path, version: str = LATEST) -> SglangConfig:
    """The configuration for a checkpoint.

    Args:
        directory: of the checkpoint.
        version: of SGLang, one of `SIGNATURES`.

    Raises:
        ConfigError: no configuration of SGLang's is for its kind, or not with its numbers.
        ModelError: it cannot be read.
    """
    checkpoint = open_foreign(directory)
    stated = checkpoint.stated
    maker = None if stated is None else _MAKERS.get(stated.method)
    if stated is None or maker is None:
        kind = "is not quantized" if stated is None else f"is of {stated.method}"
        raise ConfigError(
            f"{directory} {kind}; configurations are made for {', '.join(_MAKERS)}: "
            "SGLang reads others from config.json itself"
        )
    return maker(checkpoint, stated, version)


def sglang_configs(config: MixedPrecisionConfig, version: str = LATEST) -> dict[str, SglangConfig]:
    """The configuration of every quantized source of a `mixed_precision` file, by precision.

    Args:
        config: the file.
        version: of SGLang, one of `SIGNATURES`.

    Raises:
        ConfigError: see `sglang_config`.
        ModelError: likewise.
    """
    used = sorted(set(config.weight_mapping.values()) - {"fp16"})
    return {name: sglang_config(config.sources[name], version) for name in used}


def _of_bytes(class_name: str, flag: str) -> Callable[..., SglangConfig]:
    """For fp8 and int8 with scales of blocks, and fp8 with others."""

    def make(checkpoint: ForeignCheckpoint, stated: Stated, version: str) -> SglangConfig:
        form, scheme = stated.default, stated.entry.get("activation_scheme", "dynamic")
        assert isinstance(form, ByteForm)
        if form.block is not None and scheme != "dynamic":
            raise ConfigError(
                f"{checkpoint.directory}: activation_scheme is {scheme!r}; with scales of blocks "
                "SGLang rounds inputs as they come (dynamic): correct config.json"
            )
        kwargs = {
            flag: True,
            "activation_scheme": scheme,
            "ignored_layers": _left_out(stated),
            "weight_block_size": None if form.block is None else list(form.block),
        }
        return SglangConfig(class_name, kwargs, version)

    return make


def _of_gptq(checkpoint: ForeignCheckpoint, stated: Stated, version: str) -> SglangConfig:
    form, known = stated.default, SIGNATURES.get(version, {}).get("GPTQConfig", _GPTQ)
    assert isinstance(form, GptqForm)
    kwargs: dict[str, Any] = {
        "weight_bits": form.bits,
        "group_size": form.group_size,
        "desc_act": _is_ordered(checkpoint, form.group_size),
        "lm_head_quantized": stated.entry.get("lm_head") is True,
        "dynamic": dict(stated.entry.get("dynamic") or {}),
    }
    if "checkpoint_format" in known.fields:
        kwargs["checkpoint_format"] = "gptq" if form.is_v1 else "gptq_v2"
    elif not form.is_v1:
        raise ConfigError(
            f"{checkpoint.directory} is gptq_v2, and GPTQConfig of SGLang {version} cannot say "
            f"so: its zero points would be off by one; save it as gptq, or use SGLang {LATEST}"
        )
    return SglangConfig("GPTQConfig", kwargs, version)


def _of_awq(checkpoint: ForeignCheckpoint, stated: Stated, version: str) -> SglangConfig:
    form = stated.default
    assert isinstance(form, AwqForm)
    kwargs = {
        "weight_bits": 4,
        "group_size": form.group_size,
        "zero_point": True,
        "modules_to_not_convert": _left_out(stated),
    }
    return SglangConfig("AWQConfig", kwargs, version)


def _left_out(stated: Stated) -> list[str] | None:
    """Modules that a checkpoint says it did not quantize."""
    for key in ("modules_to_not_convert", "ignored_layers"):
        found = stated.entry.get(key)
        if found:
            return list(found)
    return None


def _is_ordered(checkpoint: ForeignCheckpoint, group_size: int) -> bool:
    """Whether some matrix has groups of inputs that do not stand together."""
    for name in (name for name in checkpoint.headers if name.endswith(".g_idx")):
        found = checkpoint.tensor(name)
        width = len(found) if group_size == -1 else group_size
        if not torch.equal(found.long(), torch.arange(len(found)) // width):
            return True
    return False


_MAKERS: Mapping[str, Callable[[ForeignCheckpoint, Stated, str], SglangConfig]] = {
    "fp8": _of_bytes("Fp8Config", "is_checkpoint_fp8_serialized"),
    "gptq": _of_gptq,
    "awq": _of_awq,
    "blockwise_int8": _of_bytes("BlockInt8Config", "is_checkpoint_int8_serialized"),
}
