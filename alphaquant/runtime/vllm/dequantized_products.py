"""Products with packed matrices in plain torch, as operators that a compiler does not look into.

What runs where no kernel can: on a CPU, and on GPUs for formats that kernels do not take. A weight
is dequantized when it is used and forgotten: of a linear and of lm_head some rows at a time, of
experts one expert at a time and only those that have tokens, of embeddings the rows that are
looked up. The arithmetic is that of `alphaquant.runtime.modules`, in the dtype of the inputs.

Experts are found by counting on the host, so this is nothing for CUDA graphs.

Letters: n tokens, k experts per token, E experts of this rank, H hidden size, I expert width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from alphaquant.models.routing import tokens_by_expert
from alphaquant.runtime.vllm.matrix_bank import Place, read_places

N_WEIGHTS = 2**24
"""Weights that are dequantized together, 64 MiB in float32; lm_head may have 2^29."""


@torch.library.custom_op("alphaquant::dequantized_linear", mutates_args=())
def dequantized_linear(x: Tensor, memory: Tensor, facts: str) -> Tensor:
    """The outputs of all matrices of a bank beside each other, [..., K] -> [..., N].

    Args:
        x: [..., K].
        memory: uint8, of a `MatrixBank`.
        facts: likewise.
    """
    places = read_places(facts)
    blocks = (weight for place in places for weight in _blocks(place, memory, x.dtype))
    return torch.cat([linear(x, weight) for weight in blocks], -1)


@dequantized_linear.register_fake
def _(x: Tensor, memory: Tensor, facts: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(place.rows for place in read_places(facts)))


@torch.library.custom_op("alphaquant::dequantized_rows", mutates_args=())
def dequantized_rows(ids: Tensor, memory: Tensor, facts: str, dtype: torch.dtype) -> Tensor:
    """Rows of the one matrix of a bank, [...] -> [..., H].

    Args:
        ids: int64 [...], numbers of rows.
        memory: uint8, of a `MatrixBank`.
        facts: likewise.
        dtype: of the result.
    """
    (place,) = read_places(facts)
    rows = place.matrix(memory).rows_at(ids.flatten())
    return rows.to(dtype).reshape(*ids.shape, place.cols)


@dequantized_rows.register_fake
def _(ids: Tensor, memory: Tensor, facts: str, dtype: torch.dtype) -> Tensor:
    (place,) = read_places(facts)
    return memory.new_empty((*ids.shape, place.cols), dtype=dtype)


@torch.library.custom_op("alphaquant::dequantized_experts", mutates_args=())
def dequantized_experts(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    memory: Tensor,
    facts: str,
    first_expert: int,
) -> Tensor:
    """Sum of this rank's experts, silu(gate) * up then down, weighted, [n, H] -> [n, H].

    Args:
        x: [n, H].
        expert_ids: integers [n, k], as the whole layer counts; others than this rank's add
            nothing.
        weights: [n, k].
        memory: uint8, of a `MatrixBank`: gate, up and down of an expert, then those of the next.
        facts: likewise.
        first_expert: number of this rank's first expert; the others follow it.
    """
    places = read_places(facts)
    n_experts = len(places) // 3
    local = expert_ids.to(torch.int64) - first_expert
    is_own = (local >= 0) & (local < n_experts)
    output = torch.zeros_like(x)
    for tokens in tokens_by_expert(local.where(is_own, n_experts), weights, n_experts):
        gate, up, down = places[3 * tokens.expert : 3 * tokens.expert + 3]
        inputs = x[tokens.rows]
        inner = silu(linear(inputs, _weight(gate, memory, x.dtype)))
        inner = inner * linear(inputs, _weight(up, memory, x.dtype))
        y = linear(inner, _weight(down, memory, x.dtype))
        output.index_add_(0, tokens.rows, (y * tokens.weights.unsqueeze(-1)).to(x.dtype))
    return output


@dequantized_experts.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


def _weight(place: Place, memory: Tensor, dtype: torch.dtype) -> Tensor:
    """A dequantized weight, [rows, cols]."""
    return place.matrix(memory).dequantize().to(dtype)


def _blocks(place: Place, memory: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A dequantized weight, `N_WEIGHTS` at a time: [some rows, cols] each."""
    n_rows = max(1, N_WEIGHTS // place.cols)
    if place.rows <= n_rows:
        yield _weight(place, memory, dtype)
        return
    matrix = place.matrix(memory)
    for start in range(0, place.rows, n_rows):
        end = min(start + n_rows, place.rows)
        yield matrix.rows_at(torch.arange(start, end, device=memory.device)).to(dtype)
