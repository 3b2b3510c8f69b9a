"""Memory of a cache of keys and values, against the cache that transformers fills."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaquant.errors import ConfigError
from alphaquant.models.serving_memory import activation_bytes, cache_parts
from alphaquant.testing.models import tiny_model, tiny_tokens


def config_of(**fields: Any) -> Any:
    text = SimpleNamespace(**fields)
    return SimpleNamespace(get_text_config=lambda: text)


LARGE = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 32000,
}


def test_the_worked_example() -> None:
    (found,) = cache_parts(config_of(**LARGE), 32768, 1, 2, is_folded=False)
    assert (found.kind, found.n_layers, found.n_tokens) == ("full_attention", 32, 32768)
    assert found.n_bytes == 4 * 2**30


@pytest.mark.parametrize("family", ["llama", "olmoe", "qwen3", "deepseek_v3"])
def test_it_is_what_a_cache_of_transformers_holds(family: str) -> None:
    model: Any = tiny_model(family)
    with torch.no_grad():
        cache = model(tiny_tokens(3, 12), use_cache=True).past_key_values
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    found = cache_parts(model.config, 12, 3, 1, is_folded=True)
    assert sum(part.n_bytes for part in found) == held


def test_layers_of_a_window_keep_no_more() -> None:
    config = tiny_model("gemma2", sliding_window=8).config
    parts = {p.kind: p for p in cache_parts(config, 64, 1, 2, is_folded=False)}
    assert parts["sliding_attention"].n_tokens == 8
    assert parts["full_attention"].n_tokens == 64


def test_folded_latents_are_a_latent_and_a_rotated_key() -> None:
    config = tiny_model("deepseek_v3").config
    (found,) = cache_parts(config, 10, 2, 2, is_folded=True)
    assert (found.kind, found.n_bytes) == ("latent_attention", 2 * 2 * 10 * (16 + 8) * 2)
    (whole,) = cache_parts(config, 10, 2, 2, is_folded=False)
    assert whole.n_bytes == 2 * 2 * 10 * 4 * (8 + 8 + 8) * 2


@pytest.mark.parametrize(
    ("fields", "context", "said"),
    [
        ({"layer_types": ["linear_attention"] * 32}, 10, "32 layers are linear_attention, whose"),
        ({"global_head_dim": 512}, 10, "heads of this model differ by layer"),
        ({"max_position_embeddings": 2048}, 4096, "the model takes 2048 tokens at most"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    fields: dict[str, Any], context: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        cache_parts(config_of(**LARGE, **fields), context, 1, 2, is_folded=False)


def test_activations_grow_with_the_step_up_to_its_limit() -> None:
    config = config_of(**LARGE)
    one, step, long = (activation_bytes(config, n, 1) for n in (1, 2048, 8192))
    assert one == (4 * 4096 + 3 * 14336) * 2 + 4 * 32000
    assert step == long == 2048 * (4 * 4096 + 3 * 14336) * 2 + 4 * 32000
