"""What packed layers have in common: their bytes in a layer of vLLM, and their products.

A layer gets one buffer of bytes, and a parameter without elements for every kind of
tensor that a file may have (`codes`, `scales`, ...): vLLM finds these by the last part of a
tensor's name, and they carry the function that loads it. Buffers, because vLLM counts a parameter
that no tensor was loaded into as missing where it is asked to look.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.runtime.integrity import bad_span, numbers_error, span_of
from alphaquant.runtime.vllm.dequantized_products import dequantized_linear
from alphaquant.runtime.vllm.matrix_bank import TENSORS, MatrixBank
from alphaquant.runtime.vllm.ordered_layers import OrderedShard

Loader = Callable[..., Any]

MEMORY = "packed_bytes"
"""Name of the buffer."""


def make_room(layer: nn.Module, bank: MatrixBank) -> None:
    """Give a layer the bytes of its matrices.

    Args:
        layer: of vLLM, being built on its device.
        bank: the matrices.
    """
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    layer.register_buffer(MEMORY, memory, persistent=False)


def give_up(layer: nn.Module) -> None:
    """Free the bytes of a layer whose matrices are in kernel order."""
    layer.register_buffer(MEMORY, None, persistent=False)


def add_placeholders(
    layer: nn.Module, prefix: str, loader: Loader, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Give a layer what vLLM finds by the names of tensors.

    Args:
        layer: of vLLM.
        prefix: of their names: none, `w13_`, `w2_`.
        loader: their `weight_loader`; it finds the kind of tensor as `part` of the parameter that
            it is given.
        dtypes: of some kinds of tensor; the others are uint8.
    """
    for name in TENSORS:
        empty = torch.empty(0, dtype=dtypes.get(name, torch.uint8))
        holder: Any = nn.Parameter(empty, requires_grad=False)
        holder.weight_loader, holder.part = loader, name
        layer.register_parameter(f"{prefix}{name}", holder)


def stored_dtypes(bank: MatrixBank) -> Mapping[str, torch.dtype]:
    """Dtype of each kind of tensor in a bank of one matrix, of which vLLM warns otherwise.

    But `weight` stays uint8: vLLM takes a bfloat16 one for the weight itself.
    """
    if len(bank.names) != 1:
        return {}
    shapes = packed_shapes(bank.places[0].format, 1, 1)
    return {name: dtype for name, (_, dtype) in shapes.items() if name != "weight"}


def take_matrices(layer: nn.Module, bank: MatrixBank, label: str) -> list[PackedMatrix]:
    """The matrices of a layer after loading, checked; their tensors are views of the bytes.

    Args:
        layer: of vLLM.
        bank: the matrices.
        label: name of the layer, for messages.

    Raises:
        StoreError: a tensor is missing, or holds numbers that cannot be used.
    """
    bank.check_complete(label)
    memory = layer.get_buffer(MEMORY)
    matrices = [bank.matrix(memory, index) for index in range(len(bank.names))]
    named = dict(zip(bank.names, matrices, strict=True))
    formats = {name: matrix.format for name, matrix in named.items()}
    spans = (span_of(name, tensor, formats) for name, tensor in _tensors(named))
    bad = bad_span(span for span in spans if span is not None)
    if bad is not None:
        raise numbers_error(*bad, "the checkpoint")
    return matrices


def multiply(layer: nn.Module, x: Tensor, shards: Sequence[OrderedShard], facts: str) -> Tensor:
    """The outputs of a layer's matrices beside each other, [..., K] -> [..., N].

    Args:
        layer: of vLLM.
        x: [..., K].
        shards: its matrices in kernel order; none where torch multiplies.
        facts: of its bank.
    """
    if not shards:
        y: Tensor = dequantized_linear(x, layer.get_buffer(MEMORY), facts)
        return y
    flat = x.reshape(-1, x.shape[-1])
    outputs = [shard.product(layer, flat) for shard in shards]
    y = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _tensors(matrices: Mapping[str, PackedMatrix]) -> Iterator[tuple[str, Tensor]]:
    for name, matrix in matrices.items():
        for part, tensor in matrix.tensors.items():
            yield f"{name}.{part}", tensor
