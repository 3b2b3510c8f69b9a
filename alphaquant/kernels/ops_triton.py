# mypy: ignore-errors
"""The kernels as operators of torch.

`torch.compile` takes each for one node whose result has a known shape, and captures it in CUDA
graphs, without looking at how the kernels are launched. Operators take tensors and plain values,
so weights come in parts (`alphaquant.kernels.parts`). There are no gradients.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from alphaquant.kernels.linear import product_triton
from alphaquant.kernels.moe import launch_triton
from alphaquant.kernels.parts import put_together, read_facts


@torch.library.custom_op("alphaquant::packed_linear", mutates_args=())
def packed_linear(x: Tensor, tensors: list[Tensor], facts: str) -> Tensor:
    """`alphaquant.kernels.linear.product_triton.packed_linear`, [M, K] -> [M, N].

    Args:
        x: [M, K].
        tensors: of a `KernelWeight` taken apart.
        facts: likewise.
    """
    with _device_of(x):
        return product_triton.packed_linear(x, put_together(tensors, facts))


@packed_linear.register_fake
def _(x: Tensor, tensors: list[Tensor], facts: str) -> Tensor:
    return x.new_empty(len(x), read_facts(facts)["KernelWeight"]["rows"])


@torch.library.custom_op("alphaquant::grouped_moe", mutates_args=())
def grouped_moe(
    x: Tensor, expert_ids: Tensor, weights: Tensor, tensors: list[Tensor], facts: str
) -> Tensor:
    """`alphaquant.kernels.moe.launch_triton.grouped_moe`, [n, H] -> [n, H].

    Args:
        x: [n, H].
        expert_ids: integers [n, k].
        weights: [n, k].
        tensors: of `GroupedExperts` taken apart.
        facts: likewise.
    """
    with _device_of(x):
        experts = put_together(tensors, facts)
        return launch_triton.grouped_moe(x, expert_ids, weights, experts)


@grouped_moe.register_fake
def _(x: Tensor, expert_ids: Tensor, weights: Tensor, tensors: list[Tensor], facts: str) -> Tensor:
    return x.new_empty(x.shape)


def _device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may be another than x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
