"""A tiny random model of any decoder that transformers has, from its default configuration.

    save_any("qwen3_5_moe", folder)     # with its vision tower

The configuration is shrunk by field name: 4 layers, hidden 64, 8 experts of width 48 (one and a
half groups of 32), 2 chosen, vocabulary of the demo. Lists with one entry per layer keep each of
their values. A field that is not in `SIZES` keeps its default, so a new architecture may need a
row in `OVERRIDES`. Image-text models get a vision tower that is as deep as the text decoder.
"""

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaquant.demo import model_path

N_LAYERS = 4

SIZES: dict[str, int | None] = {
    # vocabulary, widths
    "vocab_size": 4096,
    "vocab_size_per_layer_input": 4096,
    "unpadded_vocab_size": 4096,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "prefix_dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "shared_experts_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "moe_latent_size": None,
    # layers
    "num_hidden_layers": N_LAYERS,
    "n_layers": N_LAYERS,
    "num_layers": 2,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": N_LAYERS - 1,
    "moe_layer_freq": None,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "layer_group_size": 2,
    "global_attn_every_n_layers": 2,
    "sliding_window_pattern": 2,
    "max_window_layers": 2,
    "n_layers_per_attn_res_block": 2,
    # attention
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "swa_v_head_dim": 16,
    "rotary_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "keep_window_size": 16,
    "attention_chunk_size": 32,
    "max_position_embeddings": 512,
    "max_seq_len": 512,
    "model_max_length": 512,
    "floor_scale": 64,
    "log_scaling_n_floor": 64,
    "d_rel": 8,
    "rel_extent": 64,
    "block_size": 16,
    # sparse attention by an index
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
    "index_block_size": 8,
    "index_topk_blocks": 4,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    # linear attention, state spaces
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 16,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "n_groups": 2,
    # experts and routers
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "zero_expert_num": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "router_hidden_size": 16,
    # embeddings per layer, n-grams, low ranks
    "hidden_size_per_layer_input": 16,
    "gated_norm_rank": 8,
    "hc_lowrank": 16,
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8,
}
"""Values by name of field; None leaves a field at its default when that is a number."""

VISION_SIZES: dict[str, int] = {
    "depth": N_LAYERS,
    "num_hidden_layers": N_LAYERS,
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "out_hidden_size": 64,
    "output_dim": 64,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "projection_dim": 64,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
}
"""Values by name of field of a vision tower."""

_EXPERT_FIELDS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "ffn_config",
)

TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}

NESTED = {"id2label", "label2id", "rope_parameters", "rope_scaling", "architectures", "dtype"}
NESTED |= {"per_layer_config", "text_config", "vision_config", "audio_config", "attn_config"}
NESTED |= {"ffn_config", "transformers_version", "model_type"}
"""Fields that are never shrunk."""

_HYBRID = ["mamba", "attention", "mamba", "attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "aria_text": {"intermediate_size": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots3_note_text": {  # its layers with a sliding window have sizes of their own
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "moe_intermediate_size": 48,
        "adapter_in_dim": 32,
        "adapter_out_dim": 64,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "per_layer_config": {i: {"num_local_experts": 4} for i in (1, 3)},
    },
    "dots3_note_audio_encoder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "feature_size": 16,
        "downsample_hidden_size": 16,
        "adapter_input_size": 32,
        "adapter_out_dim": 64,
    },
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "per_layer_config": {},
    },
    "granitemoe_swa": {"shared_intermediate_size": 48},
    "granitemoehybrid": {
        "layers_block_type": _HYBRID,
        "layer_types": _HYBRID,
        "num_local_experts": 8,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": {"shared_intermediate_size": 48},
    "hunyuan_v1_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "moe_topk": 2,
        "moe_intermediate_size": 48,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "llama4_text": {
        "interleave_moe_layer_step": 2,
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "qwen3_vl_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        }
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1, 3],
        "ple_embed_dim": 32,
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
}
"""What the field names alone do not give."""


def tiny_config(arch: str, extra: Mapping[str, Any] | None = None) -> Any:
    """The shrunk configuration of an architecture; `extra` fields win."""
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[arch]
    default = config_class()
    if getattr(default, "text_config", None) is not None:
        return _image_text_config(default, extra or {})
    return config_class(**{**_fields(arch, default.to_dict()), **(extra or {})})


def _fields(arch: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text decoder that change."""
    depth = next((fields[n] for n in ("num_hidden_layers", "n_layers") if fields.get(n)), 0)
    shrunk = {
        name: value
        for name, old in fields.items()
        if name not in NESTED
        for value in [_shrunk(name, old, fields, depth)]
        if value is not None
    }
    if "initializer_range" in fields:
        shrunk["initializer_range"] = 0.1  # the default gives nearly constant outputs
    if {"head_dim", "qk_rope_head_dim"} <= shrunk.keys() and arch != "deepseek_v4":
        shrunk["head_dim"] = SIZES["qk_rope_head_dim"]
    return {**shrunk, **OVERRIDES.get(arch, {})}


def _image_text_config(default: Any, extra: Mapping[str, Any]) -> Any:
    """The shrunk configuration of an image-text model; `extra` goes to its text decoder."""
    from transformers import CONFIG_MAPPING

    text_arch = default.text_config.model_type
    text = {**_fields(text_arch, CONFIG_MAPPING[text_arch]().to_dict()), **extra}
    changed: dict[str, Any] = {"text_config": text}
    vision = getattr(default, "vision_config", None)
    if vision is None and "vision_config" in type(default).sub_configs:
        vision = type(default).sub_configs["vision_config"]()
    if vision is not None:
        own = OVERRIDES.get(vision.model_type, {})
        changed["vision_config"] = {**_vision_fields(vision.to_dict()), **own}
    if hasattr(default, "audio_config"):
        changed["audio_config"] = OVERRIDES.get(f"{default.model_type}_audio_encoder")
    special = [f for f in default.to_dict() if f.endswith(("_token_id", "_token_index"))]
    special = [f for f in special if f not in TOKENS]
    return type(default)(**changed, **{f: 4000 + i for i, f in enumerate(special)})


def _vision_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {n: v for n, v in VISION_SIZES.items() if n in fields}
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        if isinstance(fields.get(name), list):
            changed[name] = [0, 1]
    if isinstance(fields.get("layer_types"), list):
        changed["layer_types"] = fields["layer_types"][:N_LAYERS]
    return changed


def _shrunk(name: str, old: Any, fields: Mapping[str, Any], depth: int) -> Any:
    """The new value of a field; None to leave it at its default."""
    if name in TOKENS:
        return TOKENS[name]
    if isinstance(old, list) and old and len(old) == depth:
        return _per_layer(name, old)
    is_number = isinstance(old, int) and not isinstance(old, bool) and old != 0
    if name not in SIZES or not (is_number or name == "unpadded_vocab_size"):
        return None
    if name == "num_key_value_heads":
        return {fields.get("num_attention_heads"): 4, 1: 1}.get(old, SIZES[name])
    if name == "num_experts_per_tok" and old == 1:
        return 1
    return SIZES[name]


def _per_layer(name: str, old: list[Any]) -> list[Any]:
    """A list for `N_LAYERS` layers in which each value of the old one still occurs."""
    plain = all(isinstance(v, (str, int, float)) for v in old)
    values = list(dict.fromkeys(old)) if plain else old[:1]
    if name == "num_attention_heads_per_layer":
        values = [4]
    elif all(isinstance(v, (int, float)) and v > 4 for v in values):
        values = [SIZES.get(name.replace("_per_layer", ""), values[0])]
    if name == "mlp_layer_types" and "dense" in values and len(values) > 1:
        return ["dense"] + ["sparse"] * (N_LAYERS - 1)
    return [values[i % len(values)] for i in range(N_LAYERS)]


def tiny_model_of(arch: str, extra: Mapping[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """The random model, float32 with values that bfloat16 holds, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = tiny_config(arch, extra)
    has_images = hasattr(config, "text_config")
    auto: Any = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    torch.manual_seed(seed)
    model: nn.Module = auto.from_config(config, dtype=torch.float32).eval()
    fill(model, seed)
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give parameters that start empty, zero or huge, and routing biases, small random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        largest = parameter.abs().max()
        if not torch.isfinite(parameter).all() or largest == 0 or largest > 1e4:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.1)
        parameter.copy_(parameter.to(torch.bfloat16).float())
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias", "moe_statics")):
            values = torch.rand(buffer.shape, generator=generator) * 0.1
            buffer.copy_(values.to(torch.bfloat16).float())


@cache
def routed_architectures() -> tuple[str, ...]:
    """Every `model_type` of a causal language model of transformers that can have experts."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config: Any = CONFIG_MAPPING[name]
        try:
            text = config().get_text_config()
        except Exception:  # encoder-decoder models, and defaults that their own checks refuse
            continue
        if any(hasattr(text, field) for field in _EXPERT_FIELDS):
            found.append(name)
    return tuple(found)


def save_any(arch: str, folder: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Save a tiny model of an architecture in bfloat16, with the demo's tokenizer.

    Args:
        arch: key of transformers' configuration mapping.
        folder: directory to write; what is there is replaced.
        extra: fields of the configuration to set otherwise.
    """
    model: Any = tiny_model_of(arch, extra)
    model.config.dtype = torch.bfloat16
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path() / file, folder / file)
    return folder
