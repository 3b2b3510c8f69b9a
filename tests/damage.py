"""Ways to damage a file, and a packed checkpoint: a folder of an OLMoE of two layers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT, FIRST, SECOND = (f"model-{part}.safetensors" for part in ("kept", "layer-000", "layer-001"))


def truncate(path: Path) -> None:
    """Cut off its end."""
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    """Write something else."""
    path.write_bytes(b"\xff" * 64)


def flip_a_bit(path: Path) -> None:
    """Of the last number: a value that is only a little wrong."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def edit(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file({k: t.clone() for k, t in tensors.items()}, file, metadata={"format": "pt"})


def drop_a_router(path: Path) -> None:
    edit(path / KEPT, lambda t: t.pop("model.layers.1.mlp.gate.weight"))


def drop_codes(path: Path) -> None:
    edit(path / SECOND, lambda t: t.pop("model.layers.1.mlp.experts.3.down_proj.codes"))


def add_a_tensor(path: Path) -> None:
    edit(path / KEPT, lambda t: t.update({"model.extra": torch.ones(1)}))


def shorten_codes(path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.codes"
    edit(path / SECOND, lambda t: t.update({name: t[name][:-1]}))


def cut_a_shard(path: Path) -> None:
    (path / SECOND).write_bytes((path / SECOND).read_bytes()[:500])


def remove_a_shard(path: Path) -> None:
    (path / FIRST).unlink()


def edit_entry(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the `quantization_config` of a checkpoint."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def raise_version(path: Path) -> None:
    edit_entry(path, lambda q: q.update(version=2))


def drop_version(path: Path) -> None:
    edit_entry(path, lambda q: q.pop("version"))


def drop_a_format(path: Path) -> None:
    edit_entry(path, lambda q: q["formats"].popitem())


def misspell_a_format(path: Path) -> None:
    edit_entry(path, lambda q: q["formats"].update(dict.fromkeys(q["formats"], "int99")))


def drop_formats(path: Path) -> None:
    edit_entry(path, lambda q: q.pop("formats"))


def add_an_entry(path: Path) -> None:
    edit_entry(path, lambda q: q.update(rotation="hadamard"))
