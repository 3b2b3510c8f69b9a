"""Files as an engine would read them: what it would load wrong without a word is refused.

Engines take the scheme of a layer's first expert for all its experts, and that of a first shard
for a fused linear; where shapes agree they copy numbers of one kind into memory of another. So
modules that an engine puts together must have the same tensors: names, dtypes, widths, one scheme.

Only the headers of the files are read, the configuration, and the global scales of nvfp4. A file
may come from anywhere: nothing of how we write one is assumed.

    experts         all of a layer (vllm, sglang) or of the model (transformers), all projections
    fused linears   q/k/v, gate/up, the MLA pair (vllm, sglang)
    transformers    no zero points; experts neither nvfp4 nor left unquantized beside quantized
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from alphaquant.errors import StoreError
from alphaquant.runtime.checkpoint_files import StoredTensor, read_headers, tensor_files
from alphaquant.spaces.json_files import read_object
from alphaquant.spaces.units import DOWN, GATE, UP

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>[^.]+)")
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    (*GATE, *UP),
)
"""Linears of one parent that vLLM and SGLang compute as one."""

_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale"),
    *("weight_shape", "qweight", "qzeros", "scales", "g_idx"),
)
_GLOBAL = "weight_global_scale"
_FLOATS = ("BF16", "F16", "F32")

SchemeOf = Callable[[str, Mapping[str, StoredTensor]], Any]
"""What the configuration says of a module, by its name and tensors: anything that compares, None
for unquantized."""


@dataclass(frozen=True)
class StoredModule:
    """A linear as its tensors describe it.

    Attributes:
        name: without the last part of its tensors' names.
        tensors: last part -> shape and dtype.
        scheme: what the configuration says of it; None for unquantized.
        global_scale: that of nvfp4, None without.
    """

    name: str
    tensors: Mapping[str, StoredTensor]
    scheme: Any
    global_scale: float | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether its tensors are those of a quantized matrix."""
        return any(
            suffix != "weight" or tensor.dtype not in _FLOATS
            for suffix, tensor in self.tensors.items()
        )

    @property
    def kind(self) -> dict[str, str]:
        """Names and dtypes of its tensors."""
        return {suffix: tensor.dtype for suffix, tensor in sorted(self.tensors.items())}

    @property
    def text(self) -> str:
        """Names, dtypes and shapes of its tensors, for messages."""
        parts = (f"{n} {t.dtype} {list(t.shape)}" for n, t in sorted(self.tensors.items()))
        return ", ".join(parts)


def read_modules(directory: Path, scheme_of: SchemeOf) -> dict[str, StoredModule]:
    """Every linear in the files of a checkpoint, by name.

    Args:
        directory: safetensors with their index.
        scheme_of: what the configuration says of a module.

    Raises:
        StoreError: a file is missing or damaged.
    """
    files = tensor_files(directory)
    headers, scales = read_headers(files, str(directory)), _global_scales(files)
    grouped: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in headers.items():
        module, _, suffix = name.rpartition(".")
        if suffix in _SUFFIXES and (len(tensor.shape) == 2 or suffix != "weight"):
            grouped.setdefault(module, {})[suffix] = tensor
    return {
        name: StoredModule(name, tensors, scheme_of(name, tensors), scales.get(name))
        for name, tensors in grouped.items()
    }


def is_expert(name: str) -> bool:
    """Whether a module is a matrix of a routed expert."""
    return _EXPERT.fullmatch(name) is not None


def check_modules(modules: Mapping[str, StoredModule], engine: str, source: Path) -> None:
    """Refuse what an engine would not load, or load wrong.

    Args:
        modules: from `read_modules`.
        engine: name of a profile: `vllm`, `sglang` or `transformers`.
        source: the checkpoint, for messages.

    Raises:
        StoreError: naming two modules that do not fit together, and the profile to search with.
    """
    problem = module_problem(modules, engine)
    if problem is not None:
        raise StoreError(
            f"{source}: {problem}; {engine} would refuse it or compute wrong numbers: search "
            f"with --profile {engine} and export again"
        )


def module_problem(modules: Mapping[str, StoredModule], engine: str) -> str | None:
    """Why an engine would not load files, or would load them wrong; None for a good file."""
    experts = [module for name, module in modules.items() if is_expert(name)]
    problems = [_scheme_problem(module) for module in modules.values()]
    if engine == "transformers":
        problems += [_transformers_problem(modules.values(), experts)]
        problems += [_experts_problem(experts, "the model")]
    else:
        for name, members in _by(experts, lambda m: _match(m)["experts"]).items():
            problems.append(_experts_problem(members, name))
        problems += [_fused_problem(members) for members in _fused(modules.values())]
    return next((problem for problem in problems if problem is not None), None)


def _scheme_problem(module: StoredModule) -> str | None:
    """Whether the configuration and the tensors disagree."""
    if module.is_quantized == (module.scheme is not None):
        return None
    said = "unquantized" if module.scheme is None else "quantized"
    return f"{module.name} is {said} in config.json and has {module.text}"


def _experts_problem(experts: list[StoredModule], what: str) -> str | None:
    """Whether experts that share one scheme differ in anything but the width of projections."""
    for projections in _by(experts, _place).values():
        first, *others = projections
        for other in others:
            if other.tensors != first.tensors:
                return _difference(first, other, f"the experts of {what}")
    for other in experts[1:]:
        if other.kind != experts[0].kind or other.scheme != experts[0].scheme:
            return _difference(experts[0], other, f"the experts of {what}")
    return None


def _fused(modules: Iterable[StoredModule]) -> list[list[StoredModule]]:
    """Linears that are computed as one."""
    parents = _by(modules, lambda module: module.name.rpartition(".")[0])
    found = []
    for members in parents.values():
        for names in _FUSED:
            shards = [m for m in members if m.name.rpartition(".")[2] in names]
            found += [shards] if len(shards) > 1 else []
    return found


def _fused_problem(shards: list[StoredModule]) -> str | None:
    """Whether linears that are computed as one differ in anything but their outputs."""
    first = shards[0]
    for other in shards[1:]:
        if (
            other.kind != first.kind
            or other.scheme != first.scheme
            or _widths(other) != _widths(first)
            or other.global_scale != first.global_scale
        ):
            return _difference(first, other, "matrices that are computed as one")
    return None


def _transformers_problem(
    modules: Iterable[StoredModule], experts: list[StoredModule]
) -> str | None:
    """What transformers refuses, or drops, of single modules."""
    everything = list(modules)
    asymmetric = next((m for m in everything if "weight_zero_point" in m.tensors), None)
    if asymmetric is not None:
        return f"{asymmetric.name} has zero points, {asymmetric.text}"
    scaled = next((m for m in experts if _GLOBAL in m.tensors), None)
    if scaled is not None:
        return f"{scaled.name} has a {_GLOBAL}, which is dropped of experts"
    plain = next((m for m in experts if not m.is_quantized), None)
    if plain is not None and any(m.is_quantized for m in everything):
        return f"{plain.name} is not quantized, and other matrices are"
    return None


def _difference(first: StoredModule, other: StoredModule, what: str) -> str:
    text = f"{what} differ: {first.name} has {first.text}, and {other.name} has {other.text}"
    if first.text == other.text:
        text += f" ({first.scheme} and {other.scheme} in config.json)"
        if first.global_scale != other.global_scale:
            text = f"{what} have global scales {first.global_scale} ({first.name}) and "
            text += f"{other.global_scale} ({other.name})"
    return text


def _widths(module: StoredModule) -> dict[str, tuple[int, ...]]:
    """Sizes of its tensors beside their outputs: GPTQ has those last, all else first."""
    return {
        suffix: tensor.shape[:1] if suffix in ("qweight", "qzeros", "scales") else tensor.shape[1:]
        for suffix, tensor in module.tensors.items()
    }


def _match(module: StoredModule) -> re.Match[str]:
    found = _EXPERT.fullmatch(module.name)
    assert found is not None
    return found


def _place(module: StoredModule) -> str:
    """The experts of a layer, and whether they go in or out: those have equal shapes."""
    found = _match(module)
    return f"{found['experts']} {found['projection'] in DOWN}"


def _by(
    modules: Iterable[StoredModule], key: Callable[[StoredModule], str]
) -> dict[str, list[StoredModule]]:
    found: dict[str, list[StoredModule]] = {}
    for module in modules:
        found.setdefault(key(module), []).append(module)
    return found


def _global_scales(files: Iterable[Path]) -> dict[str, float]:
    """The global scale of every module that has one."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                if name.endswith(f".{_GLOBAL}"):
                    scale: torch.Tensor = opened.get_tensor(name)
                    found[name.removesuffix(f".{_GLOBAL}")] = float(scale)
    return found


def quantization_of(directory: Path) -> dict[str, Any]:
    """`quantization_config` of a checkpoint.

    Raises:
        StoreError: there is none.
    """
    entry = read_object(directory / "config.json").get("quantization_config")
    if not isinstance(entry, dict):
        raise StoreError(f"{directory / 'config.json'} has no quantization_config; export again")
    return entry
