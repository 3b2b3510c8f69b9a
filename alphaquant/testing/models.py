"""Tiny random models of every supported architecture, from configurations: no files, no network.

    model = tiny_model("mixtral")

They are for tests of code that takes a model. Sizes are odd on purpose where an architecture
allows it (experts 24 wide, 40 hidden features), so that groups of 32 have a short last group.
"""

from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.models.loading import register_architectures

VOCABULARY = 96
N_LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Outputs must depend on every matrix; the default gives nearly constant logits.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}

_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "intermediate_size": 72,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 72},
    "qwen3": {"intermediate_size": 72, "head_dim": 16},
    "olmoe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 72,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        "intermediate_size": 72,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "deepseek_v2": {
        **_LATENT_ATTENTION,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v3": {**_LATENT_ATTENTION, "q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    "deepseek": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "intermediate_size": 72,
    },
    "glm4_moe": {
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "intermediate_size": 72,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 16,
        "use_qk_norm": True,
    },
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "listed_moe": {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3},
    "nemotron_h": {
        "layers_block_type": ["full_attention", "moe"],
        "head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
    },
    "llama4_text": {
        "intermediate_size": 24,
        "intermediate_size_mlp": 72,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "head_dim": 16,
        "attention_chunk_size": 32,
    },
}
"""Configuration of each family beyond the common part, by `model_type`."""

_GEMMA: dict[str, Any] = {"intermediate_size": 72, "head_dim": 16, "sliding_window": 8}
_OTHERS: dict[str, dict[str, Any]] = {"gemma2": _GEMMA, "gemma3_text": _GEMMA}
"""Of families that no suite runs over; by themselves they have matrices of 9216 columns."""

ROUTED_EXPERTS: dict[str, int] = {
    "olmoe": 8,
    "mixtral": 4,
    "qwen2_moe": 6,
    "qwen3_moe": 6,
    "deepseek_v2": 6,
    "deepseek_v3": 6,
    "deepseek": 8,
    "glm4_moe": 6,
    "gpt_oss": 4,
    "listed_moe": 8,
    "nemotron_h": 6,
    "llama4_text": 6,
}
"""Experts per sparse layer of the families that have any."""

TOP_K: dict[str, int] = {
    "olmoe": 3,
    "mixtral": 2,
    "qwen2_moe": 2,
    "qwen3_moe": 2,
    "deepseek_v2": 3,
    "deepseek_v3": 3,
    "deepseek": 3,
    "glm4_moe": 2,
    "gpt_oss": 2,
    "listed_moe": 3,
    "nemotron_h": 2,
    "llama4_text": 2,
}
"""Routed experts per token of these families."""


def tiny_model(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A random model of two decoder layers, in evaluation mode, gradients off.

    Args:
        family: a key of `FAMILIES`, or any other `model_type` of transformers with all it needs in
            `changes`.
        seed: of the weights.
        changes: configuration fields to set otherwise.

    Returns:
        The transformers model in float32 on the CPU. Its configuration says bfloat16 and all its
        weights are bfloat16 numbers, as after loading a published checkpoint on the CPU. Experts
        run one by one (`eager`), so that its outputs can be compared exactly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from alphaquant.testing.listed import register as register_listed

    register_architectures()
    register_listed()
    own = (FAMILIES | _OTHERS).get(family, {})
    config = AutoConfig.for_model(family, **{**_COMMON, **own, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, experts_implementation="eager"
        )
        for module in model.modules():
            _fill_zeros(module)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    model.config.dtype = torch.bfloat16
    model.requires_grad_(False)
    return model.eval()


def tiny_tokens(n_windows: int, n_tokens: int, seed: int = 0) -> Tensor:
    """Random token ids, int64 [n_windows, n_tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (n_windows, n_tokens), generator=generator)


def _fill_zeros(module: nn.Module) -> None:
    """Buffers and biases are zero at first, which would hide one that is lost on the way."""
    for name in ("e_score_correction_bias", "gate_up_proj_bias", "down_proj_bias", "bias"):
        bias = getattr(module, name, None)
        if isinstance(bias, Tensor):
            bias.data.uniform_(0.0, 0.1)
