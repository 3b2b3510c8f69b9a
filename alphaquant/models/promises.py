"""What a configuration of transformers says about routed experts."""

from typing import Any

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SWITCHES = ("is_moe", "enable_moe_block")


def promises_experts(config: Any) -> bool:
    """Whether the fields of a configuration promise routed experts in at least one layer.

    Args:
        config: of transformers; of a multimodal model, what its text decoder says counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts = [text, getattr(text, "ffn_config", None)]  # DBRX keeps its experts in a part
    count = max(_count(part, name) for part in parts for name in _COUNTS)
    if not count or not all(getattr(text, name, True) for name in _SWITCHES):
        return False
    n_layers = int(getattr(text, "num_hidden_layers", 1))
    return any(_is_sparse(text, layer) for layer in range(n_layers))


def zero_experts(config: Any) -> int:
    """Experts without weights that a router chooses among the others; 0 in most models.

    Args:
        config: as in `promises_experts`.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _count(text, "zero_expert_num")


def _count(part: Any, name: str) -> int:
    """A number of experts, 0 where it is absent or no number."""
    found = getattr(part, name, None)
    return found if isinstance(found, int) else 0


def _is_sparse(config: Any, layer: int) -> bool:
    """Whether a layer has experts, by the three ways in which configurations say that it has not.

    A list of kinds; dense layers at the start; and every n-th layer without some.
    """
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds:
        return bool(kinds[layer] != "dense")
    step = getattr(config, "decoder_sparse_step", None) or 1
    is_dense = layer < (getattr(config, "first_k_dense_replace", None) or 0)
    is_dense |= layer in (getattr(config, "mlp_only_layers", None) or ())
    return not is_dense and (layer + 1) % step == 0
