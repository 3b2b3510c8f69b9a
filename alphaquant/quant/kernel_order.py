"""Packed matrices in kernel order: what a checkpoint stores, as the GPU kernels take it."""

from alphaquant.kernels.order import KernelWeight, groups_to_kernel_order, to_kernel_order
from alphaquant.kernels.packing import unpack_codes
from alphaquant.quant.matrix import PackedMatrix


def order_matrix(matrix: PackedMatrix) -> KernelWeight:
    """A stored matrix in kernel order, on its device.

    Args:
        matrix: of any quantized format.

    Raises:
        FormatError: its group size has no kernel order.
    """
    fmt, cols = matrix.format, matrix.cols
    group_size = cols if fmt.n_groups(cols) == 1 else fmt.group_size
    zeros = None
    if "zeros" in matrix.tensors:
        shape = (matrix.rows, fmt.n_groups(cols))
        flat = unpack_codes(matrix.tensors["zeros"], fmt.bits, shape[0] * shape[1])
        zeros = groups_to_kernel_order(flat.reshape(shape), group_size, cols)
    element = fmt.element or fmt.kind
    return KernelWeight(
        element=element,
        rows=matrix.rows,
        cols=cols,
        group_size=group_size,
        words=to_kernel_order(unpack_codes(matrix.tensors["codes"], fmt.bits, cols), element),
        scales=groups_to_kernel_order(matrix.tensors["scales"], group_size, cols),
        zeros=zeros,
        global_scale=matrix.tensors.get("global_scale"),
    )
