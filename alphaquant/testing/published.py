"""Published models by their numbers: skeletons of the real size, without weights or network.

    model = skeleton("olmoe-1b-7b")

Parameters live on the meta device, so 100 billion of them take seconds and no memory. The fields
are those that decide shapes, from the models' configuration files.
"""

from typing import Any

import torch
from torch import nn

from alphaquant.models.loading import register_architectures

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe-1b-7b": (
        "olmoe",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek-moe-16b": (
        "deepseek",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
        },
    ),
    "glm-4.5-air": (
        "glm4_moe",
        {
            "vocab_size": 151552,
            "hidden_size": 4096,
            "num_hidden_layers": 46,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "use_qk_norm": False,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
        },
    ),
}
"""`model_type` and configuration fields, by model."""


UNGATED: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron-3-nano-30b-a3b": (
        "nemotron_h",
        {
            "vocab_size": 131072,
            "hidden_size": 2688,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
    ),
}
"""Likewise, of models whose experts have two matrices each and whose layers differ in kind."""


def skeleton(name: str) -> nn.Module:
    """A published model on the meta device.

    Args:
        name: a key of `PUBLISHED` or of `UNGATED`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_architectures()
    model_type, fields = (PUBLISHED | UNGATED)[name]
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            AutoConfig.for_model(model_type, tie_word_embeddings=False, **fields)
        )
    return model
