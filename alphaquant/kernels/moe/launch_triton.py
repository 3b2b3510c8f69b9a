# mypy: ignore-errors
"""A layer of packed experts on its routed tokens, in Triton: any format per expert and matrix.

    y[t] = sum over j of weight[t, j] * down(silu(gate(x[t])) * up(x[t]))   of expert id[t, j]

Three steps on tables of blocks (`alphaquant.kernels.moe.slots`). Per format of gate and up one
launch writes the gated products of its experts' tokens, one row per sorted slot; where gate and up
of any expert differ in format, each has its own launches, and one more gates. Per format of down
one launch multiplies those rows and writes each one, weighted, to its slot. A last kernel
adds the slots of every token from first to last, so that results do not depend on timing.
Launches and grids depend on n, k and the formats only: programs beyond the number of blocks,
which only the device knows, return at once.

Where blocks are too few for a GPU, programs have 64 rows, and then columns are split: float32
parts are added in a fixed order, those of gate and up by a kernel that also gates, those of down
by the last one. Where an expert has many slots, its weights are dequantized once
(`alphaquant.kernels.moe.dense_triton`). `alphaquant.kernels.moe.config` decides.

Numbers are those of `alphaquant.kernels.linear.product_triton`: products and sums in float32, and
gating too; rows between the steps have the type of x, and parts are float32.

Limits: the gating function is silu(gate) * up, and experts have no biases. Nothing here was run
on a GPU: the tests run it in Triton's interpreter and compile it for sm_90.

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width, T tiles of 128
columns, L splits of them, B rows and Z slots of a block; P, N, Q, S, C as in
`alphaquant.kernels.order`.
"""

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.linear.product_triton import IS_INTERPRETED
from alphaquant.kernels.moe.config import DENSE_SLOTS, GroupedConfig
from alphaquant.kernels.moe.dense_triton import can_multiply_dense, multiply_dense
from alphaquant.kernels.moe.plan import GroupedExperts
from alphaquant.kernels.moe.products_triton import multiply_packed
from alphaquant.kernels.moe.rows_triton import add_slots

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def grouped_moe(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    experts: GroupedExperts,
    *,
    config: GroupedConfig | None = None,
    dense_slots: int = DENSE_SLOTS,
) -> Tensor:
    """Weighted sum of the chosen experts' outputs.

    Args:
        x: [n, H], float16, bfloat16 or float32, on the experts' device.
        expert_ids: integers [n, k]; ids that are none of these experts add nothing.
        weights: [n, k] of any float dtype.
        experts: from `alphaquant.kernels.moe.plan.stack_experts`.
        config: how to launch both products in all formats; by default
            `alphaquant.kernels.moe.config.default_config` per format.
        dense_slots: from this average of slots per expert on, n k / E, torch multiplies weights
            dequantized one format at a time; in bfloat16 on sm_90 and sm_100, H and I multiples
            of 8, where it need not wait (`alphaquant.kernels.moe.dense_triton`).

    Returns:
        [n, H] in x's dtype; with expert parallelism this rank's part of the sum.

    Raises:
        FormatError: shapes or types that do not fit.
    """
    _check(x, expert_ids, weights, experts)
    if not expert_ids.numel():
        return torch.zeros_like(x)
    if IS_INTERPRETED and x.dtype == torch.bfloat16:
        # Triton's interpreter computes wrong numbers in bfloat16 without a word.
        options = {"config": config, "dense_slots": dense_slots}
        return grouped_moe(x.float(), expert_ids, weights, experts, **options).to(x.dtype)
    x, weights = x.contiguous(), weights.contiguous()
    given = (x, expert_ids, weights, experts)
    is_dense = expert_ids.numel() >= dense_slots * experts.n_experts
    is_dense = is_dense and can_multiply_dense(x, experts)
    parts = multiply_dense(*given) if is_dense else multiply_packed(*given, config)
    return add_slots(parts, expert_ids.to(torch.int64).contiguous(), experts, x.dtype)


def _check(x: Tensor, expert_ids: Tensor, weights: Tensor, experts: GroupedExperts) -> None:
    if x.dim() != 2 or x.shape[1] != experts.hidden or x.dtype not in _DTYPES:
        raise FormatError(
            f"x is {x.dtype} {list(x.shape)}; these experts take [tokens, {experts.hidden}] in "
            "float16, bfloat16 or float32: reshape or convert x"
        )
    if expert_ids.dim() != 2 or len(expert_ids) != len(x) or weights.shape != expert_ids.shape:
        raise FormatError(
            f"expert ids are {list(expert_ids.shape)} and weights {list(weights.shape)} for "
            f"{len(x)} tokens; both are [tokens, choices]: reshape them"
        )
