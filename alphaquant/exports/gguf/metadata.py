"""A configuration of transformers as metadata of a GGUF file.

Keys are those of the package gguf; which of them an architecture needs is llama.cpp's conversion
rule for it (release b11549).
"""

from collections.abc import Callable, Mapping
from typing import Any

from alphaquant.exports.gguf.dialects import Dialect, ropes_of

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size",),
    "head_count": ("num_attention_heads",),
    "head_count_kv": ("num_key_value_heads",),
    "layer_norm_rms_eps": ("rms_norm_eps",),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_shared_count": ("n_shared_experts",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""Method of gguf's writer without `add_` -> fields of which the first that is there counts."""


def add_metadata(writer: Any, config: Any, dialect: Dialect) -> None:
    """Write what a file says of its model, the vocabulary apart.

    Args:
        writer: a `gguf.GGUFWriter`.
        config: the model's configuration.
        dialect: its architecture.
    """
    import gguf

    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for method, fields in _FIELDS.items():
        values = [getattr(config, field, None) for field in fields]
        value = next((v for v in values if v is not None), None)
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if dialect.name != "deepseek2":
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_rope_dimension_count(width)
    _add_ropes(writer, config)
    own = _OWN.get(dialect.name)
    if own is not None:
        own(writer, config)


def _add_ropes(writer: Any, config: Any) -> None:
    ropes = ropes_of(config)
    rope = ropes.get("full_attention") or ropes[""]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_latent_attention(writer: Any, config: Any) -> None:
    """Of DeepSeek-V2: keys and values are unfolded, as `attn_kv_b` is written whole."""
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    if config.norm_topk_prob:
        writer.add_expert_weights_norm(True)
    rope = ropes_of(config)[""]
    if rope.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def _add_gpt_oss(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _add_gemma3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


_OWN: Mapping[str, Callable[[Any, Any], None]] = {
    "deepseek2": _add_latent_attention,
    "gpt-oss": _add_gpt_oss,
    "gemma3": _add_gemma3,
}
