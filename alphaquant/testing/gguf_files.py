"""Tiny GGUF files as llama.cpp's converter writes them, for tests that start from one.

    model = save_gguf(folder / "tiny.gguf", "qwen2moe", "Q8_0")

Names are those of the package gguf; what the converter does to values is done here: Llama's
queries and keys are permuted, Gemma's norms are stored plus one, experts are stacked by
projection. The tokenizer is the demo's.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from alphaquant import demo
from alphaquant.testing.models import tiny_model

_FAMILIES: Mapping[str, str] = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "starcoder2")},
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
"""llama.cpp's name of an architecture -> transformers'."""

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "qwen2moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    "qwen3moe": {"moe_intermediate_size": 32, "head_dim": 32},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 256},
    "gemma3": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 256},
    "phi3": {"sliding_window": 8, "pad_token_id": 1},
}

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "vocab_size": "vocab_size",
}
_EPSILONS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def save_gguf(
    path: Path,
    architecture: str = "llama",
    kind: str = "BF16",
    settings: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    split: str = "gpt-2",
    **changes: Any,
) -> nn.Module:
    """Save a tiny random model as a GGUF file.

    Args:
        path: the file.
        architecture: as llama.cpp calls it.
        kind: type of all matrices, one that gguf can quantize to; vectors are F32.
        settings: more of the metadata, text or numbers.
        extra: more tensors, float32.
        without: tensors to leave out.
        split: what the tokenizer says of how texts are split into words.
        changes: configuration fields to set otherwise.

    Returns:
        The model before it was quantized, as `tiny_model` gives it.
    """
    import gguf

    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96}
    own = {"max_position_embeddings": 2048, **_CHANGES.get(architecture, {}), **changes}
    model = tiny_model(_FAMILIES[architecture], **{**sizes, **own})
    writer = gguf.GGUFWriter(path, architecture)
    _write_settings(writer, architecture, model)
    for key, value in (settings or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key, value)
    _write_tokenizer(writer, split)
    plain = gguf.GGMLQuantizationType.F32
    wanted = gguf.GGMLQuantizationType[kind]
    tensors = {**dict(_tensors(architecture, model)), **(extra or {})}
    for name in sorted(tensors.keys() - set(without)):
        values = np.ascontiguousarray(tensors[name], np.float32)
        used = plain if values.ndim < 2 else wanted
        writer.add_tensor(name, gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_settings(writer: Any, architecture: str, model: nn.Module) -> None:
    config: Any = model.config
    found = {key: getattr(config, field, None) for key, field in _KEYS.items()}
    numbers = {key: getattr(config, field, None) for key, field in _EPSILONS.items()}
    numbers["rope.freq_base"] = (
        config.rope_parameters.get("rope_theta")
        or (config.rope_parameters["full_attention"]["rope_theta"])
    )
    for key, value in found.items():
        if value is not None and (key != "attention.key_length" or hasattr(config, "head_dim")):
            writer.add_uint32(f"{architecture}.{key}", value)
    for key, number in numbers.items():
        if number is not None:
            writer.add_float32(f"{architecture}.{key}", number)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_uint32(f"{architecture}.rope.dimension_count", width)


def _write_tokenizer(writer: Any, split: str) -> None:
    content = json.loads((demo.model_path() / "tokenizer.json").read_text(encoding="utf-8"))
    words = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if number in special else 1 for _, number in words])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)


def _tensors(architecture: str, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The tensors of a model under llama.cpp's names, as its converter stores them."""
    import gguf

    config: Any = model.config
    (kind,) = (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        stem, dot, suffix = name.rpartition(".")
        if suffix == "gate_up_proj":  # [E, 2I, H]: gate first
            block = f"blk.{name.split('.')[2]}"
            gate, up = np.split(values, 2, 1)
            yield f"{block}.ffn_gate_exps.weight", gate
            yield f"{block}.ffn_up_exps.weight", up
        elif suffix == "down_proj":
            yield f"blk.{name.split('.')[2]}.ffn_down_exps.weight", values
        else:
            found = names.get_name(stem)
            assert found is not None, name
            yield f"{found}{dot}{suffix}", _stored(architecture, found, values, config)


def _stored(architecture: str, name: str, values: Any, config: Any) -> Any:
    """What llama.cpp's converter makes of the values of one tensor."""
    if architecture.startswith("gemma") and name.endswith("norm"):
        return values + 1
    if name.endswith("ffn_gate_inp_shexp"):
        return values[0]
    is_query, is_key = name.endswith("attn_q"), name.endswith("attn_k")
    if architecture == "llama" and (is_query or is_key):
        # Halves of each head's rotated pairs are interleaved: [heads, 2, d/2] -> [heads, d/2, 2].
        n_heads = config.num_attention_heads if is_query else config.num_key_value_heads
        halves = values.reshape(n_heads, 2, -1, values.shape[-1])
        return halves.swapaxes(1, 2).reshape(values.shape)
    return values
