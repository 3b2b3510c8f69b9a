"""Linear layers of vLLM with a format per shard: q, k and v, gate and up, and single matrices.

`create_weights` lays the shards of this rank out, vLLM's loader fills them through `load`,
`process_weights_after_loading` puts them into kernel order where kernels run, `apply` multiplies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    QKVParallelLinear,
)

from alphaquant.errors import ModelError
from alphaquant.runtime.vllm.matrix_bank import MatrixBank
from alphaquant.runtime.vllm.ordered_layers import (
    Checked,
    OrderedShard,
    order_shards,
    wants_kernels,
    why_no_kernels,
)
from alphaquant.runtime.vllm.packed_layers import (
    MEMORY,
    add_placeholders,
    give_up,
    make_room,
    multiply,
    stored_dtypes,
    take_matrices,
)
from alphaquant.runtime.vllm.slices import Slice, part_of
from alphaquant.spaces.formats import Format

_SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not there to be checked
    """Loads and runs one linear layer."""

    def __init__(self, formats: Mapping[str, Format], checked: Checked) -> None:
        """Take the formats.

        Args:
            formats: of the shards, by name, in the order of their outputs.
            checked: of `order_shards`.
        """
        super().__init__()
        self.formats, self.checked = formats, checked
        self.bank, self.facts = MatrixBank({}), ""
        self.shards: tuple[OrderedShard, ...] = ()
        self.dtype = torch.bfloat16

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for this rank's part of the shards; sizes are those of vLLM.

        Raises:
            ModelError: the layer has other shards than the checkpoint.
        """
        self.dtype = params_dtype
        if len(output_partition_sizes) != len(self.formats):
            raise ModelError(
                f"{', '.join(self.formats)}: vLLM's layer has {len(output_partition_sizes)} "
                f"shards, not {len(self.formats)}; this model is not served yet: please report it"
            )
        slices = {}
        for index, (name, fmt) in enumerate(self.formats.items()):
            n_rows = output_partition_sizes[index]
            rank, n_ranks = _rank_of_rows(layer, index)
            slices[name] = Slice(
                fmt,
                n_rows * n_ranks,
                input_size,
                part_of(n_rows * n_ranks, rank, n_ranks),
                _columns(layer, input_size_per_partition, input_size),
            )
        self.bank = MatrixBank(slices)
        self.facts = self.bank.facts

        def load(param: Any, tensor: Tensor, shard_id: Any = None) -> None:
            index = self._index(shard_id)
            self.bank.load(layer.get_buffer(MEMORY), index, param.part, tensor)

        make_room(layer, self.bank)
        add_placeholders(layer, "", load, stored_dtypes(self.bank))

    def _index(self, shard_id: Any) -> int:
        """Which shard vLLM means.

        Raises:
            ModelError: one that has no name of its own, of several.
        """
        if shard_id is None and len(self.formats) > 1:
            raise ModelError(
                f"{', '.join(self.formats)}: the checkpoint has them as one tensor, and vLLM's "
                "plug-in takes them one by one; quantize again"
            )
        return int(_SHARDS.get(shard_id, shard_id))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded; put it into kernel order where kernels run.

        Raises:
            StoreError: a tensor is missing, or holds numbers that cannot be used.
            ModelError: kernels were asked for and cannot run, or give other numbers.
        """
        label = ", ".join(self.formats)
        matrices = take_matrices(layer, self.bank, label)
        device = layer.get_buffer(MEMORY).device
        sizes = [(matrix.format, matrix.cols) for matrix in matrices]
        if wants_kernels(device) and why_no_kernels(sizes, device) is None:
            self.shards = order_shards(layer, matrices, self.dtype, self.checked)
            give_up(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], shards beside each other."""
        y = multiply(layer, x, self.shards, self.facts)
        return y if bias is None else y + bias


def _rank_of_rows(layer: Any, index: int) -> tuple[int, int]:
    """Which of how many parts of a shard's rows this rank holds.

    Several ranks share a head of k and v where there are more ranks than heads.
    """
    if not isinstance(layer, ColumnParallelLinear):
        return 0, 1
    n_alike = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
    return layer.tp_rank // n_alike, layer.tp_size // n_alike


def _columns(layer: Any, n_own: int, n_all: int) -> range:
    """The inputs of this rank."""
    return part_of(n_all, layer.tp_rank if n_own < n_all else 0, n_all // n_own)
