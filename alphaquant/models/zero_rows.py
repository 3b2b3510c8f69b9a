"""Reading files of LongCat-Flash that hold nothing for experts without weights.

transformers wants rows of `gate_up_proj` for the experts without weights too, `[E + zero, 2I, H]`;
no code reads them. Files with the E experts that have weights, and nothing for the others, are of
another shape to it. Their tensors are read here; the other rows become zeros.

Letters: E experts with weights, H hidden size, I expert width.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from alphaquant.models.layouts.zero_experts import ZeroExperts
from alphaquant.models.source_files import weight_files

Misfit = tuple[str, torch.Size, torch.Size]
"""Name of a parameter, its shape in the files, its shape in the model."""


@torch.no_grad()
def read_missing_rows(
    model: nn.Module, directory: Path, misfits: Iterable[Misfit]
) -> list[Misfit]:
    """Fill parameters that lack nothing but rows for zero experts.

    Args:
        model: as transformers loaded it; those parameters hold random numbers.
        directory: with its files.
        misfits: what transformers reports.

    Returns:
        What is left of the misfits.
    """
    modules = {f"{n}.gate_up_proj": m for n, m in model.named_modules() if _has_zero(m, n)}
    files: dict[str, Path] | None = None
    left = []
    for name, found, wanted in misfits:
        n_experts = len(modules[name].get_parameter("down_proj")) if name in modules else 0
        if not n_experts or found != torch.Size((n_experts, *wanted[1:])):
            left.append((name, found, wanted))
            continue
        files = _files_by_tensor(directory) if files is None else files
        experts = name.rpartition(".")[0]
        keys = [
            (f"{experts}.{e}.gate_proj.weight", f"{experts}.{e}.up_proj.weight")
            for e in range(n_experts)
        ]
        if not all(key in files for pair in keys for key in pair):
            left.append((name, found, wanted))
            continue
        rows = modules[name].get_parameter("gate_up_proj")
        rows.zero_()
        for e, pair in enumerate(keys):
            for half, key in zip(rows[e].chunk(2), pair, strict=True):
                with safe_open(files[key], framework="pt") as opened:
                    half.copy_(opened.get_tensor(key))
    return left


def _has_zero(module: nn.Module, name: str) -> bool:
    return ZeroExperts.sizes(module, name) is not None


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
