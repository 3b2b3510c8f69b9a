"""Tiny models as packed checkpoints in given formats, and what they are dequantized.

    model = save_rounded("olmoe", folder, lambda matrix: "int4-g32")

Widths are multiples of 128 so that every block of llama.cpp fits, of 256 for gate and up.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.demo import model_path
from alphaquant.exports.gguf.dialects import find_dialect
from alphaquant.exports.gguf.entries import GgufEntry, entries_of
from alphaquant.exports.gguf.twins import plain_twin
from alphaquant.exports.gguf.writer import write_file
from alphaquant.exports.packed import open_packed
from alphaquant.models.mapping import map_model
from alphaquant.quant.engine import quantize_layer
from alphaquant.runtime.checkpoint import CheckpointWriter
from alphaquant.runtime.parts import open_part
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model

_WIDTHS: Mapping[str, Any] = {
    "hidden_size": 256,
    "vocab_size": 256,
    "initializer_range": 0.06,
    "intermediate_size": 128,
}
_MOE = {"moe_intermediate_size": 128}
_HEADS = {"head_dim": 32}

EXPORTED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "olmoe": {"num_key_value_heads": 4},
    "mixtral": {},
    "qwen2": {},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 64},
    "qwen3": _HEADS,
    "qwen3_moe": {**_MOE, **_HEADS},
    "deepseek_v2": {
        **_MOE,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
    },
    "gpt_oss": _HEADS,
    "gemma3_text": {
        **_HEADS,
        "num_hidden_layers": 6,  # five with a sliding window, one without
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
    },
}
"""Architectures that are written as GGUF files, and what they need beyond `tiny_model`."""


def save_rounded(
    family: str,
    folder: Path,
    format_of: Callable[[Matrix], str],
    *,
    include: Sequence[str] = (),
    **changes: Any,
) -> nn.Module:
    """Write a packed checkpoint of a random model, rounded to nearest.

    Norms and biases are random too, so that none can be left out unseen.

    Args:
        family: key of `EXPORTED`.
        folder: directory to make; what is there is replaced.
        format_of: the format of each matrix.
        include: what beside the layers is rounded too.
        changes: configuration fields to set otherwise.

    Returns:
        The model with its matrices dequantized, float32.
    """
    model = tiny_model(family, **{**_WIDTHS, **EXPORTED[family], **changes})
    _shake(model)
    model_map = map_model(model, include=include)
    formats = {m.name: format_of(m) for m in model_map.inventory.matrices}
    shutil.rmtree(folder, ignore_errors=True)
    with open_part(folder) as part:
        writer = CheckpointWriter(part.checkpoint)
        for layer in model_map.parts:
            items = list(
                quantize_layer(
                    model_map,
                    layer,
                    None,
                    sorted(set(formats.values())),
                    QuantSettings(method="rtn"),
                    lambda m, name: formats[m.name] == name,
                )
            )
            writer.add_layer(layer.index, items)
            for item in items:
                model_map.view(item.matrix.name).copy_(item.packed.dequantize())
        writer.finish(model_map)
        writer.write_json("quantize_report.json", {"matrices": []})
        part.place()
    return model


def add_tokenizer(packed: Path) -> None:
    """Give a checkpoint of 4096 tokens the demo's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / name, packed / name)


def write_float32(packed: Path, file: Path) -> None:
    """Write a packed checkpoint as a GGUF file with bfloat16 numbers as float32."""
    source = open_packed(packed)
    entries = entries_of(source, find_dialect(source.model_map.model.config))
    write_file(source, file, [_widened(entry) for entry in entries])


def _widened(entry: GgufEntry) -> GgufEntry:
    if entry.twin.name != "BF16":
        return entry

    def read() -> Tensor:
        return entry.read().view(torch.bfloat16).float().view(torch.uint8)

    return replace(entry, twin=plain_twin(torch.empty(0)), read=read)


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Add random numbers to everything that starts as zeros or ones; all stays bfloat16."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks", "norm.weight")):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        parameter.copy_(parameter.to(torch.bfloat16))
