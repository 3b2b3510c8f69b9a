"""Packed matrices in kernel order and back: what a checkpoint stores, as GPU kernels take it."""

import torch

from alphaquant.kernels.bodies import is_foldable
from alphaquant.kernels.order import (
    KernelWeight,
    check_super,
    from_kernel_order,
    groups_from_kernel_order,
    groups_to_kernel_order,
    order_bfloat16,
    restore_bfloat16,
    to_kernel_order,
)
from alphaquant.kernels.packing import pack_codes, unpack_codes
from alphaquant.quant.matrix import PackedMatrix, pack_multiples
from alphaquant.spaces.formats import Format


def order_matrix(matrix: PackedMatrix) -> KernelWeight:
    """A stored matrix in kernel order, on its device.

    Args:
        matrix: of any format.

    Raises:
        FormatError: its group size or super-block has no kernel order.
    """
    fmt, cols = matrix.format, matrix.cols
    if not fmt.is_quantized:
        return order_bfloat16(matrix.tensors["weight"])
    if fmt.super_size:
        check_super(fmt.super_size, cols)
    group_size = fmt.columns_per_scale(cols)
    zeros = None
    if "zeros" in matrix.tensors:
        shape = (matrix.rows, fmt.n_groups(cols))
        flat = unpack_codes(matrix.tensors["zeros"], fmt.bits, shape[0] * shape[1])
        zeros = groups_to_kernel_order(flat.reshape(shape), group_size, cols)
    element = fmt.code
    stored, supers = matrix.tensors["scales"], None
    if fmt.super_size:
        stored = matrix.multiples().to(torch.int8)
        supers = groups_to_kernel_order(matrix.tensors["super_scales"], fmt.super_size, cols)
    scales = groups_to_kernel_order(stored, group_size, cols)
    global_scale = matrix.tensors.get("global_scale")
    return KernelWeight(
        element=element,
        rows=matrix.rows,
        cols=cols,
        group_size=group_size,
        words=to_kernel_order(unpack_codes(matrix.tensors["codes"], fmt.bits, cols), element),
        scales=scales,
        zeros=zeros,
        global_scale=global_scale,
        is_foldable=is_foldable(element, scales, global_scale),
        super_scales=supers,
        super_size=fmt.super_size,
    )


def restore_matrix(weight: KernelWeight, fmt: Format) -> PackedMatrix:
    """Undo `order_matrix`, bit for bit.

    Args:
        weight: what it gave.
        fmt: format of the matrix that it was given.
    """
    rows, cols = weight.rows, weight.cols
    if not fmt.is_quantized:
        return PackedMatrix(fmt, rows, cols, {"weight": restore_bfloat16(weight)})
    codes = from_kernel_order(weight.words, weight.element, rows, cols)
    stored = {
        "codes": pack_codes(codes, fmt.bits),
        "scales": groups_from_kernel_order(weight.scales, weight.group_size, rows, cols),
    }
    if weight.super_scales is not None:
        supers = groups_from_kernel_order(weight.super_scales, weight.super_size, rows, cols)
        stored |= {"scales": pack_multiples(stored["scales"]), "super_scales": supers}
    if weight.zeros is not None:
        zeros = groups_from_kernel_order(weight.zeros, weight.group_size, rows, cols)
        stored["zeros"] = pack_codes(zeros.flatten(), fmt.bits)
    if weight.global_scale is not None:
        stored["global_scale"] = weight.global_scale
    return PackedMatrix(fmt, rows, cols, stored)
