"""`--export compressed-tensors`: what vLLM, SGLang and transformers load.

The codes, scales and zero points are those of our packed checkpoint, under the names of the
model's original checkpoint; nothing is rounded again. What is not exact is the global scale of
nvfp4, which divides there and multiplies here: its inverse is off by at most one rounding of
float32. Engines that compute in bfloat16 round the float16 scales of integers when they load
them; both are measured while writing.

    quantization_config:
        format          the one of all groups, or mixed-precision
        config_groups   a group per format; targets are `re:` expressions of full names
        ignore          every linear that is not quantized, routers, and always lm_head: a tied
                        head is a linear in transformers, and is missing in the file
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import StoreError
from alphaquant.exports.checker import Served, check_quantized, served_by, served_facts
from alphaquant.exports.compressed_layout import (
    MIXED,
    compressed_tensors,
    scheme_of,
)
from alphaquant.exports.file_checker import (
    StoredModule,
    check_modules,
    module_problem,
    quantization_of,
    read_modules,
)
from alphaquant.exports.names import matrix_names, original_names
from alphaquant.exports.packed import PackedSource
from alphaquant.exports.shards import copy_beside, write_config, write_layers
from alphaquant.exports.targets import name_patterns
from alphaquant.models.sites import ModelMap
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.checkpoint_files import StoredTensor
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import BF16, Format
from alphaquant.spaces.profiles import find_profile

_HEAD = "lm_head"


@dataclass(frozen=True)
class CompressedTensorsExport:
    """The exporter; see `alphaquant.exports.contract.Exporter`."""

    name: str = "compressed-tensors"
    profiles: tuple[str, ...] = ("vllm", "sglang", "transformers")

    def check(self, assignment: Assignment, model_map: ModelMap) -> None:
        """Refuse a plan that no engine loads, and models whose experts have no names.

        Raises:
            ConfigError: naming a unit and the profile to search with, or the model.
        """
        check_quantized(assignment, self.name)
        self._served(assignment, model_map)
        matrix_names(model_map, self.name)

    def write(self, source: PackedSource, out: Path) -> dict[str, Any]:
        """Write the checkpoint, a file per layer.

        Raises:
            StoreError: the disk is full, the packed checkpoint is damaged, or what was written is
                not what was planned.
        """
        names = matrix_names(source.model_map, self.name)
        measured = _Measured()

        def tensors_of(matrix: PackedMatrix) -> dict[str, Tensor]:
            measured.look_at(matrix)
            return compressed_tensors(matrix)

        n_bytes = write_layers(source, names, tensors_of, out)
        formats = _named(source, names)
        groups = _config_groups(formats)
        containers = {group["format"] for group in groups.values()}
        entry = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": containers.pop() if len(containers) == 1 else MIXED,
            "config_groups": groups,
            "ignore": _ignored(source.model_map, formats),
        }
        write_config(source, entry, out)
        copy_beside(source, out)
        served = self._served(source.assignment, source.model_map)
        for engine, found in served.items():
            if found.loads:
                check_files(out, engine)
        return {
            **served_facts(served),
            "tensor_bytes": n_bytes,
            "packing": "integers are dense bit streams, as compressed-tensors 0.18 and later, and "
            "vLLM 0.32.0, read them",
            **asdict(measured),
        }

    def verify(self, out: Path) -> None:
        """Check that an engine is left that would load the files right.

        Raises:
            StoreError: there is none; the message has the reason of the first.
        """
        if _HEAD not in quantization_of(out).get("ignore", ()):
            raise StoreError(
                f"{out}: {_HEAD} is not in ignore of quantization_config, so a tied one fails in "
                "transformers; export again"
            )
        modules = _modules(out)
        if all(module_problem(modules, engine) for engine in self.profiles):
            check_modules(modules, self.profiles[0], out)

    def _served(self, assignment: Assignment, model_map: ModelMap) -> dict[str, Served]:
        profiles = [find_profile(name) for name in self.profiles]
        return served_by(assignment, model_map.inventory, profiles, self.name)


@dataclass
class _Measured:
    """What other programs will make of the numbers, at most, relative.

    Attributes:
        scale_rounding_in_bfloat16: of the float16 scales of integers, where an engine stores them
            in bfloat16.
        global_scale_rounding: of the inverse of nvfp4's global scales, in float32.
    """

    scale_rounding_in_bfloat16: float = 0.0
    global_scale_rounding: float = 0.0

    def look_at(self, matrix: PackedMatrix) -> None:
        """Take a matrix into account."""
        parts = matrix.tensors
        if matrix.format.family == "int":
            scales = parts["scales"].double()
            rounded = parts["scales"].bfloat16().double()
            worst = ((rounded - scales).abs() / scales.abs().clamp(min=1e-30)).max()
            self.scale_rounding_in_bfloat16 = max(self.scale_rounding_in_bfloat16, float(worst))
        if "global_scale" in parts:
            stored = parts["global_scale"]
            back = stored.reciprocal().double().reciprocal()
            worst = (back / stored.double() - 1.0).abs().max()
            self.global_scale_rounding = max(self.global_scale_rounding, float(worst))


def _named(source: PackedSource, names: Mapping[str, str]) -> dict[str, Format]:
    """Formats by every name that an engine may look for.

    vLLM and SGLang know the original checkpoint's names, transformers those of its own modules;
    it has none for experts, which it finds by the original names.
    """
    weights = source.formats.weights
    linears = (m.name for m in source.model_map.inventory.matrices if m.kind != "expert")
    return {names[n]: fmt for n, fmt in weights.items()} | {n: weights[n] for n in linears}


def _config_groups(formats: Mapping[str, Format]) -> dict[str, Any]:
    """A group per format, the one of most matrices first."""
    members: dict[Format, list[str]] = {}
    for name, fmt in formats.items():
        members.setdefault(fmt, []).append(name)
    members.pop(BF16, None)
    groups = {}
    for index, (fmt, names) in enumerate(sorted(members.items(), key=lambda item: -len(item[1]))):
        targets = [f"re:{pattern}" for pattern in name_patterns(names, formats)]
        groups[f"group_{index}"] = {"targets": targets, **scheme_of(fmt)}
    return groups


def _ignored(model_map: ModelMap, formats: Mapping[str, Format]) -> list[str]:
    """Every linear that is not quantized: by expressions where there are many, and by name."""
    plain = [name for name, fmt in formats.items() if not fmt.is_quantized]
    original, quantized = original_names(model_map), {f"{name}.weight" for name in formats}
    kept = {_HEAD}
    for name, module in model_map.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor):
            continue
        stored = original.tensor(f"{name}.weight")
        if weight.dim() == 2 and stored not in quantized:
            kept |= {name, stored.removesuffix(".weight")}
    patterns = name_patterns(plain, formats) if plain else ()
    return [*sorted(kept), *(f"re:{pattern}" for pattern in patterns)]


def check_files(out: Path, engine: str) -> None:
    """Refuse files of compressed-tensors that an engine would not load, or load wrong.

    Args:
        out: the checkpoint, from anywhere; targets are full names or expressions.
        engine: name of a profile: `vllm`, `sglang` or `transformers`.

    Raises:
        StoreError: naming two modules that do not fit together, and the profile to search with.
    """
    check_modules(_modules(out), engine, out)


def _modules(out: Path) -> dict[str, StoredModule]:
    """The modules of a written checkpoint, with the group of each."""
    entry = quantization_of(out)
    ignore, groups = entry.get("ignore", []), entry.get("config_groups", {})

    def scheme(name: str, tensors: Mapping[str, StoredTensor]) -> Any:
        if _matches(name, ignore):
            return None
        found = (key for key, group in groups.items() if _matches(name, group["targets"]))
        return next(found, None)

    return read_modules(out, scheme)


def _matches(name: str, targets: Iterable[str]) -> bool:
    """Whether a module is named by full name or by an expression."""
    return any(
        re.match(target.removeprefix("re:"), name) is not None
        if target.startswith("re:")
        else target == name
        for target in targets
    )
