"""What the kernels compute, in plain torch and float32: their oracle, and a path without a GPU.

    weight = (value - zero) * scale * global scale        y[m, n] = sum over k of x[m, k] W[n, k]

Letters: M rows of activations, N outputs, K inputs, G groups per row.
"""

import torch
from torch import Tensor

from alphaquant.kernels.bodies import FLOATS
from alphaquant.kernels.grids import FloatGrid, Grid, from_e8m0, whole_grid
from alphaquant.kernels.order import (
    BFLOAT16,
    KernelWeight,
    from_kernel_order,
    groups_from_kernel_order,
    restore_bfloat16,
)


def grid_of(element: str, *, is_signed: bool) -> Grid:
    """The values that the codes of an element stand for.

    Args:
        element: name in `alphaquant.kernels.order.LAYOUTS`.
        is_signed: whether integers are centred; false where they have zero points.
    """
    if element in FLOATS:
        # Only rounding asks for the largest value, and kernels never round to a grid.
        return FloatGrid(*FLOATS[element], max_value=float("inf"))
    return whole_grid(element, is_signed=is_signed)


def dequantize(weight: KernelWeight) -> Tensor:
    """The matrix that a weight in kernel order stands for.

    Args:
        weight: of any element and group size that has a kernel order.

    Returns:
        float32 [N, K] on the weight's device.
    """
    if weight.element == BFLOAT16:
        values = restore_bfloat16(weight).to(torch.float32)
    else:
        codes = from_kernel_order(weight.words, weight.element, weight.rows, weight.cols)
        values = grid_of(weight.element, is_signed=weight.zeros is None).to_values(codes)
    if weight.zeros is not None:
        values = values - _columns(weight, weight.zeros).to(torch.float32)
    stored = _columns(weight, weight.scales)
    scales = from_e8m0(stored) if stored.dtype == torch.uint8 else stored.to(torch.float32)
    if weight.global_scale is not None:
        scales = scales * weight.global_scale
    if weight.super_scales is not None:
        scales = scales * _columns(weight, weight.super_scales, weight.super_size).float()
    return values * scales


def linear(x: Tensor, weight: KernelWeight) -> Tensor:
    """Activations times the transposed matrix.

    Args:
        x: [M, K] of any float dtype.
        weight: the matrix [N, K].

    Returns:
        float32 [M, N].
    """
    return x.to(torch.float32) @ dequantize(weight).T


def _columns(weight: KernelWeight, ordered: Tensor, size: int = 0) -> Tensor:
    """What groups share, once per column: [N, K]; of groups of `size` where it is given."""
    size = size or weight.group_size
    groups = groups_from_kernel_order(ordered, size, weight.rows, weight.cols)
    index = torch.arange(weight.cols, device=groups.device) // size
    bits = groups if groups.element_size() == 2 else groups.view(torch.uint8)
    return bits[:, index].view(groups.dtype)
