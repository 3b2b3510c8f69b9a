"""Experts on a CPU that are given numbers of tokens of which the same few come again and again.

In half precision torch multiplies on CPUs by oneDNN, which compiles a kernel for every shape that
it has not met of late, milliseconds each, and keeps the last 1024, about a megabyte each. Routed
experts have another number of tokens in every call. So tokens of zeros are added that make their
numbers multiples of 32; what experts make of these nobody sees. 64 experts of 1024 x 512 with
about 256 tokens each: a kernel for 3 instead of 50 % of the products, and 123 MiB in place of
943 MiB (`findings/onednn_kernels_of_every_number_of_tokens.sh`).

Letters: n tokens, H hidden size, k experts of a token, E experts, P tokens that are added.
"""

from typing import Any

import torch
from torch import Tensor, nn

IMPLEMENTATION = "alphaquant_padded"
"""Name among transformers' implementations of experts."""
MULTIPLE = 32
_PLAIN = "grouped_mm"


def pad_experts(model: nn.Module) -> None:
    """Let the experts of a model on a CPU be called with multiples of 32 tokens.

    Nothing is done where another implementation than transformers' default runs them, and where
    weights are not all in half precision: for products in float32 torch compiles nothing.

    Args:
        model: a causal language model of transformers.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    typed: Any = model
    experts = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts")]
    kinds = {(p.device.type, p.dtype) for m in experts for p in m.parameters()}
    is_half = bool(kinds) and kinds <= {("cpu", torch.bfloat16), ("cpu", torch.float16)}
    config = typed.config.get_text_config()
    if is_half and getattr(config, "_experts_implementation", None) == _PLAIN:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, padded_experts_forward)
        typed.set_experts_implementation(IMPLEMENTATION)


def padded_experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward pass of an experts module of transformers, with tokens of zeros added.

    Args:
        module: of transformers, with `num_experts`.
        hidden_states: [n, H].
        top_k_index: int64 [n, k].
        top_k_weights: [n, k].

    Returns:
        [n, H].
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    added = added_experts(top_k_index, module.num_experts)  # [P, k]
    n, n_added = len(hidden_states), len(added)
    if n_added:
        hidden_states = torch.cat(
            [hidden_states, hidden_states.new_zeros(n_added, *hidden_states.shape[1:])]
        )
        top_k_index = torch.cat([top_k_index, added])
        top_k_weights = torch.cat([top_k_weights, top_k_weights.new_zeros(added.shape)])
    found: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return found[:n]


def added_experts(chosen: Tensor, n_experts: int) -> Tensor:
    """Experts of tokens that fill up every expert's number of tokens.

    Worked example: 100 tokens, two experts each, chose experts 0, 1 and 2 of three 99, 97 and 4
    times. They lack 29, 31 and 28 tokens to 128, 128 and 32: 44 tokens of two experts each.

    Args:
        chosen: int64 [n, k].
        n_experts: E.

    Returns:
        int64 [P, k]; nothing where experts have fewer tokens than they would be filled up to, or
        where something else than an expert was chosen.
    """
    n, k = chosen.shape
    nothing = chosen.new_zeros(0, k)
    if n * k < MULTIPLE * n_experts:
        return nothing
    counts = torch.bincount(chosen.flatten(), minlength=n_experts)
    if len(counts) > n_experts:
        return nothing
    lacking = (-counts) % MULTIPLE
    busiest = int(counts.argmax())
    while int(lacking.sum()) % k:
        lacking[busiest] += MULTIPLE
    experts = torch.arange(n_experts, device=chosen.device)
    return experts.repeat_interleave(lacking).view(-1, k)
