"""The kind of a model: which family of Mixture-of-Experts it is, or none.

Six names, from `config.model_type` and from structure, never from the name of a class:

    olmoe         OLMoE
    qwen          Qwen2-MoE (Qwen1.5-MoE-A2.7B)
    mixtral       Mixtral
    deepseek      DeepSeek-MoE v1, V2 and V3
    generic_moe   any other model with routed experts (Qwen3-MoE, gpt-oss, GLM-4-MoE, Phi-3.5-MoE)
    standard      no routed experts

The name is a label: what is quantized, and with which Hessian, follows from the structure alone
(`alphaquant.models.mapping`), so a model of an unknown family is treated like one of a known
family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import find_layers, known_layouts, map_layer
from alphaquant.models.promises import promises_experts

AUTO = "auto"
ARCHITECTURES = ("olmoe", "qwen", "mixtral", "deepseek", "generic_moe", "standard")
"""All names; `AUTO` stands for the one that is detected."""

_FAMILIES = {
    "olmoe": "olmoe",
    "qwen2_moe": "qwen",
    "mixtral": "mixtral",
    "deepseek": "deepseek",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
}
_LAYER_PATHS = ("model.layers", "layers", "model.decoder.layers", "transformer.h", "h", "blocks")


@dataclass(frozen=True)
class Architecture:
    """What a model is called.

    Attributes:
        name: as asked for, or as detected.
        detected: one of `ARCHITECTURES`.
        warnings: what the user should know.
    """

    name: str
    detected: str
    warnings: tuple[str, ...] = ()


def detect_moe_architecture(model: Any) -> str:
    """The architecture of a model, one of `ARCHITECTURES`.

    Args:
        model: a model, also on the meta device, or a configuration of transformers alone. A model
            has routed experts if they are found in it, a configuration if its fields say so.
    """
    config = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    has_experts = (
        _holds_experts(model) if isinstance(model, nn.Module) else promises_experts(config)
    )
    if not has_experts:
        return "standard"
    return _FAMILIES.get(str(getattr(config, "model_type", "")), "generic_moe")


def choose_architecture(model: Any, model_type: str = AUTO) -> Architecture:
    """The architecture that a model is to be treated as.

    A name that is given wins over the detected one, as long as both have routed experts or both
    have none: `standard` never makes experts disappear.

    Args:
        model: as `detect_moe_architecture` takes it.
        model_type: one of `ARCHITECTURES`, or `auto`.

    Raises:
        ModelError: an unknown name, or one that contradicts what the model holds.
    """
    check_architecture(model_type)
    found = detect_moe_architecture(model)
    if model_type in (AUTO, found):
        return Architecture(found, found)
    if "standard" in (model_type, found):
        holds = "no routed experts" if found == "standard" else "routed experts"
        raise ModelError(
            f"model type {model_type} asked, but this model has {holds} ({found}); "
            f"use auto or {found}"
        )
    if "generic_moe" in (model_type, found):
        return Architecture(model_type, found)
    text = (
        f"model type {model_type} asked, but this model looks like {found}; experts are found by "
        "structure, so only the name in the report changes: use auto if that is not meant"
    )
    return Architecture(model_type, found, (text,))


def check_architecture(model_type: str) -> None:
    """Refuse names that are neither `auto` nor an architecture.

    Raises:
        ModelError: listing them.
    """
    if model_type not in (AUTO, *ARCHITECTURES):
        raise ModelError(
            f"unknown model type {model_type!r}; known are {', '.join(ARCHITECTURES)}, or {AUTO}; "
            "name one of them"
        )


def get_layers_for_model(model: nn.Module, model_type: str = AUTO) -> nn.ModuleList:
    """The decoder layers of a model.

    Args:
        model: any model; with `auto` one whose configuration states its number of layers.
        model_type: one of `ARCHITECTURES` looks at the usual paths of decoder layers without
            asking the configuration.

    Raises:
        ModelError: an unknown name, or no decoder layers.
    """
    check_architecture(model_type)
    paths = _LAYER_PATHS if model_type != AUTO else _stated_path(model)
    modules = dict(model.named_modules())
    for path in paths:
        layers = modules.get(path)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    places = f"at {', '.join(_LAYER_PATHS)}"
    hint = (
        f"pass model_type, one of {', '.join(ARCHITECTURES)}, if its layers are {places}"
        if model_type == AUTO
        else "rename its list of layers, or see CONTRIBUTING.md, 'a model'"
    )
    where = "that its configuration speaks of" if model_type == AUTO else places
    raise ModelError(f"{type(model).__name__} has no decoder layers {where}; {hint}")


def _stated_path(model: nn.Module) -> Sequence[str]:
    if not hasattr(model, "config"):
        return ()
    try:
        first, _ = find_layers(model)[0]
    except ModelError:
        return ()
    return (first.rpartition(".")[0],)


def _holds_experts(model: nn.Module) -> bool:
    layouts = known_layouts()
    path = next(iter(_stated_path(model)), None)
    parts = [model] if path is None else list(model.get_submodule(path).children())
    try:
        layers = (map_layer(i, "layer", part, layouts) for i, part in enumerate(parts))
        return any(site.is_routed for layer in layers for site in layer.experts)
    except ModelError:
        # Experts in a layout that cannot be quantized are experts.
        return True
