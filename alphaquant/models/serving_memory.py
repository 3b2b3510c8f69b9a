"""What serving takes of a GPU's memory besides the weights: cache of keys and values, activations.

The cache is counted by layer kind from the configuration: full attention keeps every token,
sliding and chunked attention those of a window, latent attention (MLA) one latent and one rotated
key per token where they are kept folded (vLLM, SGLang, transformers 5.23), and whole keys and
values in llama.cpp, whose files of ours have the folding matrix whole. Layers of any other kind
(linear attention, state space) are refused by name: their state is not known here.

Activations are those of the largest step, `STEP_TOKENS` tokens at most: hidden states, what goes
into and out of a layer's widest matrices, and the logits of one token per sequence. That is an
estimate; an engine measures its own when it starts.

Worked example: 32 layers, 8 heads of keys of 128 numbers, bf16, one sequence of 32768 tokens:
32 * 2 * 8 * 128 * 2 * 32768 bytes = 4 GiB.

Sources: KVCacheSpec and MLAAttentionSpec of vLLM 0.32.0; DeepSeek-V2, arXiv 2405.04434, 2.1.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from alphaquant.errors import ConfigError

STEP_TOKENS = 2048
"""Tokens of a step at most: `max_num_batched_tokens` of vLLM 0.32.0 by default."""

_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class CachePart:
    """The cache of the layers of one kind.

    Attributes:
        kind: as the configuration calls it, `latent_attention` for MLA.
        n_layers: how many.
        n_tokens: that each keeps of a sequence.
        n_bytes: of all of them, for all sequences.
    """

    kind: str
    n_layers: int
    n_tokens: int
    n_bytes: int


def cache_parts(
    config: Any, context: int, sequences: int, itemsize: int, *, is_folded: bool
) -> list[CachePart]:
    """The cache of keys and values.

    Args:
        config: of the model.
        context: tokens of a sequence.
        sequences: at the same time.
        itemsize: bytes of a number of the cache.
        is_folded: whether latent attention keeps latents.

    Raises:
        ConfigError: layers of a kind whose state is not known, or a longer context than the model
            has.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if isinstance(most, int) and context > most:
        raise ConfigError(
            f"--context {context}: the model takes {most} tokens at most; give at most that"
        )
    found = []
    for kind, n_layers in Counter(_kinds(text)).items():
        window = getattr(text, _WINDOWED.get(kind, ""), None)
        if kind != "full_attention" and not isinstance(window, int):
            raise ConfigError(
                f"--fit: {n_layers} layers are {kind}, whose state is not counted here; full, "
                "sliding, chunked and latent attention are: give --budget in bytes instead"
            )
        n_tokens = context if window is None else min(context, window)
        numbers, name = _numbers(text, is_folded=is_folded)
        n_bytes = sequences * n_layers * n_tokens * numbers * itemsize
        found.append(CachePart(name or kind, n_layers, n_tokens, n_bytes))
    return found


def activation_bytes(config: Any, context: int, sequences: int) -> int:
    """Of the largest step, an estimate; see the file header."""
    text = config.get_text_config()
    n_tokens = min(context * sequences, STEP_TOKENS)
    fields = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    widths = [getattr(text, name, None) for name in fields]
    width = max((w for w in widths if isinstance(w, int)), default=4 * text.hidden_size)
    of_token = (4 * text.hidden_size + 3 * width) * _ACTIVATION_BYTES
    return int(n_tokens * of_token + 4 * sequences * text.vocab_size)


def _kinds(text: Any) -> list[str]:
    """The kind of every layer."""
    stated = getattr(text, "layer_types", None)
    if stated:
        return list(stated)
    window = getattr(text, "sliding_window", None)
    kind = "sliding_attention" if isinstance(window, int) else "full_attention"
    return [kind] * int(text.num_hidden_layers)


def _numbers(text: Any, *, is_folded: bool) -> tuple[int, str]:
    """Numbers that a layer keeps of a token, and what it is called if not by its kind."""
    n_heads = int(text.num_attention_heads)
    rank = getattr(text, "kv_lora_rank", None)
    if isinstance(rank, int):
        if is_folded:
            return rank + int(text.qk_rope_head_dim), "latent_attention"
        keys = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return n_heads * (keys + int(text.v_head_dim)), "latent_attention"
    if getattr(text, "global_head_dim", None) is not None:
        raise ConfigError(
            "--fit: heads of this model differ by layer, which is not counted here; give --budget "
            "in bytes instead"
        )
    n_keys = getattr(text, "num_key_value_heads", None) or n_heads
    width = getattr(text, "head_dim", None) or int(text.hidden_size) // n_heads
    return 2 * int(n_keys) * int(width), ""
