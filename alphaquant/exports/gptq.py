r"""`--export gptq`: GPTQ v1 files, which vLLM loads with one scheme per layer.

Integers of 4 and 8 bits, symmetric, as the Marlin kernels have them: other widths and zero points
have a layout, but vLLM 0.32.0 refuses them by name ("Unsupported quantization config: bits=4,
sym=False"). Per matrix [N, K] with G groups of g inputs, b bits:

    qweight   int32 [K * b / 32, N]   codes along the inputs, the first in the lowest bits
    qzeros    int32 [G, N * b / 32]   2^(b - 1) - 1: v1 stores a zero point less one
    scales    float16 [G, N]
    g_idx     int32 [K]               k // g, the group of each input

    quantization_config:
        bits, group_size    those of most matrices
        dynamic             "+:regex" other bits and groups, "-:regex" left as it is; the first
                            that matches the start of a name counts. Engines look for the names of
                            fused modules: qkv_proj, gate_up_proj, experts

Source: AutoGPTQConfig and get_dynamic_override of vLLM 0.32.0; letters: N outputs, K inputs.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.exports.checker import Served, check_quantized, served_by, served_facts
from alphaquant.exports.file_checker import (
    check_modules,
    is_expert,
    quantization_of,
    read_modules,
)
from alphaquant.exports.names import matrix_names
from alphaquant.exports.packed import PackedSource
from alphaquant.exports.shards import copy_beside, write_config, write_layers
from alphaquant.exports.targets import name_patterns
from alphaquant.kernels.packing import pack_codes, unpack_codes
from alphaquant.models.sites import ModelMap
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.checkpoint_files import StoredTensor
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import Format
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.units import GATE, UP

_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    **dict.fromkeys((*GATE, *UP), "gate_up_proj"),
}
"""Projection -> the linear that vLLM makes of it and its neighbours."""


@dataclass(frozen=True)
class GptqExport:
    """The exporter; see `alphaquant.exports.contract.Exporter`."""

    name: str = "gptq"
    profiles: tuple[str, ...] = ("vllm",)

    def check(self, assignment: Assignment, model_map: ModelMap) -> None:
        """Refuse a plan that vLLM would not load, and models whose experts have no names.

        Raises:
            ConfigError: naming a unit and the profile to search with, or the model.
        """
        check_quantized(assignment, self.name)
        self._served(assignment, model_map)
        matrix_names(model_map, self.name)

    def write(self, source: PackedSource, out: Path) -> dict[str, Any]:
        """Write the checkpoint, a file per layer.

        Raises:
            StoreError: the disk is full, or the packed checkpoint is damaged.
        """
        names = matrix_names(source.model_map, self.name)
        n_bytes = write_layers(source, names, gptq_tensors, out)
        formats = {names[name]: fmt for name, fmt in source.formats.weights.items()}
        entry = quantization_entry(formats)
        write_config(source, entry, out)
        copy_beside(source, out)
        served = self._served(source.assignment, source.model_map)
        return {**served_facts(served), "tensor_bytes": n_bytes}

    def verify(self, out: Path) -> None:
        """Check the files as vLLM would read them.

        Raises:
            StoreError: naming two modules that do not fit together.
        """
        entry = quantization_of(out)
        for engine in self.profiles:
            modules = read_modules(out, partial(scheme_in, entry))
            check_modules(modules, engine, out)

    def _served(self, assignment: Assignment, model_map: ModelMap) -> dict[str, Served]:
        """Under the profile of the Marlin kernels, which has just what the files can hold."""
        profiles = [find_profile(name, "marlin") for name in self.profiles]
        return served_by(assignment, model_map.inventory, profiles, self.name)


def gptq_tensors(matrix: PackedMatrix) -> dict[str, Tensor]:
    """The tensors of a matrix, by the last part of their names.

    Args:
        matrix: symmetric integers of 4 or 8 bits whose group divides the inputs, or bf16.
    """
    fmt, parts = matrix.format, matrix.tensors
    if not fmt.is_quantized:
        return {"weight": parts["weight"]}
    codes = unpack_codes(parts["codes"], fmt.bits, matrix.cols)  # [N, K]
    n_groups = fmt.n_groups(matrix.cols)
    zero = torch.full((n_groups, matrix.rows), 2 ** (fmt.bits - 1) - 1, dtype=torch.uint8)
    inputs = torch.arange(matrix.cols, dtype=torch.int32)
    return {
        "qweight": _words(codes, fmt.bits).t().contiguous(),  # [K * b / 32, N]
        "qzeros": _words(zero, fmt.bits),
        "scales": parts["scales"].t().contiguous(),
        "g_idx": inputs // fmt.columns_per_scale(matrix.cols),
    }


def quantization_entry(formats: Mapping[str, Format]) -> dict[str, Any]:
    """`quantization_config` for matrices in these formats.

    Args:
        formats: format of every matrix, by its original name.
    """
    quantized = Counter(fmt for fmt in formats.values() if fmt.is_quantized)
    base = quantized.most_common(1)[0][0]
    known = {name: fmt for original, fmt in formats.items() for name in _engine_names(original)}
    dynamic: dict[str, dict[str, Any]] = {}
    for fmt in dict.fromkeys(known.values()):
        if fmt == base:
            continue
        sign, change = ("+", _sizes(fmt)) if fmt.is_quantized else ("-", {})
        names = [name for name, own in known.items() if own == fmt]
        dynamic |= {f"{sign}:{pattern}": change for pattern in name_patterns(names, known)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **_sizes(base),
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "dynamic": dynamic,
    }


def scheme_in(
    entry: Mapping[str, Any], name: str, tensors: Mapping[str, StoredTensor]
) -> tuple[int, int] | None:
    """Bits and group size that vLLM would give a module; None for unquantized.

    It skips what `dynamic` says; of the rest, linears are quantized where the files have integers
    of them, and experts always.

    Args:
        entry: `quantization_config`.
        name: of the module.
        tensors: what the files have of it.
    """
    change: Mapping[str, Any] = {}
    for pattern, own in entry.get("dynamic", {}).items():
        if re.match(pattern[2:], name):
            if pattern.startswith("-:"):
                return None
            change = own
            break
    if "qweight" not in tensors and not is_expert(name):
        return None
    return change.get("bits", entry["bits"]), change.get("group_size", entry["group_size"])


def _sizes(fmt: Format) -> dict[str, int]:
    return {"bits": fmt.bits, "group_size": fmt.group_size}


def _engine_names(name: str) -> list[str]:
    """A matrix's own name, and that of the module in which vLLM computes it."""
    if is_expert(name):
        return [name, name.rsplit(".", 2)[0]]
    parent, _, projection = name.rpartition(".")
    fused = _FUSED.get(projection)
    return [name] if fused is None else [name, f"{parent}.{fused}"]


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes packed along the last dimension into words: uint8 [R, C] -> int32 [R, C * b / 32]."""
    return pack_codes(codes, bits).contiguous().view(torch.int32)
