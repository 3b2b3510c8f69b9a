"""lm_head and embeddings that are packed: a row for every word, and what a rank holds of them.

vLLM pads the vocabulary to a multiple of 64 and gives every rank the same number of rows, the last
ones of padding: 1010 words on two ranks are 512 and 498 rows. Only words are stored here. Outputs
for padding are zeros, which vLLM cuts off; a rank may have nothing but padding.

What is looked up stays as it is stored, because only some rows are wanted; what is multiplied with
is put into kernel order where kernels run. Tied weights are both, and lie there twice then.

Letters: V words of this rank, P outputs with padding, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from alphaquant.errors import ModelError
from alphaquant.runtime.vllm.dequantized_products import dequantized_rows
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
from alphaquant.runtime.vllm.slices import Slice
from alphaquant.spaces.formats import Format


class PackedVocabulary:
    """One matrix with a row per word, in a layer of vLLM."""

    def __init__(
        self,
        name: str,
        fmt: Format,
        checked: Checked,
        *,
        is_looked_up: bool = False,
        is_multiplied: bool = False,
    ) -> None:
        """Take what it is for.

        Args:
            name: of the matrix.
            fmt: its format.
            checked: of `order_shards`.
            is_looked_up: whether it is embeddings.
            is_multiplied: whether it is lm_head; tied weights are both.
        """
        self.name, self.format, self.checked = name, fmt, checked
        self.is_looked_up, self.is_multiplied = is_looked_up, is_multiplied
        self.bank, self.facts = MatrixBank({}), ""
        self.shards: tuple[OrderedShard, ...] = ()
        self.dtype = torch.bfloat16
        self.n_inputs, self.n_outputs = 0, 0

    def make_room(self, layer: Any, dtype: torch.dtype) -> None:
        """Make room for the words of this rank.

        Args:
            layer: a `VocabParallelEmbedding` of vLLM or an object with the same sizes.
            dtype: of the model.

        Raises:
            ModelError: the layer has words beside those of the checkpoint.
        """
        if layer.num_added_embeddings:
            raise ModelError(
                f"{self.name}: vLLM adds {layer.num_added_embeddings} words to the "
                f"{layer.org_vocab_size} that are packed as {self.format.name}; keep it in bf16: "
                "search with --include none"
            )
        own = layer.shard_indices
        words = range(own.org_vocab_start_index, own.org_vocab_end_index)
        inputs = range(layer.embedding_dim)
        part = Slice(self.format, layer.org_vocab_size, layer.embedding_dim, words, inputs)
        self.bank = MatrixBank({self.name: part} if words else {})
        self.facts, self.dtype = self.bank.facts, dtype
        self.n_inputs, self.n_outputs = len(inputs), layer.num_embeddings_per_partition

        def load(param: Any, tensor: Tensor) -> None:
            if words:
                self.bank.load(layer.get_buffer(MEMORY), 0, param.part, tensor)

        make_room(layer, self.bank)
        add_placeholders(layer, "", load, stored_dtypes(self.bank))

    def finish(self, layer: nn.Module) -> None:
        """Check what was loaded; put it into kernel order where kernels multiply with it.

        Raises:
            StoreError: a tensor is missing, or holds numbers that cannot be used.
            ModelError: kernels were asked for and cannot run, or give other numbers.
        """
        matrices = take_matrices(layer, self.bank, self.name)
        device = layer.get_buffer(MEMORY).device
        if not (matrices and self.is_multiplied and wants_kernels(device)):
            return
        if why_no_kernels([(matrix.format, matrix.cols) for matrix in matrices], device) is None:
            self.shards = order_shards(layer, matrices, self.dtype, self.checked)
            if not self.is_looked_up:
                give_up(layer)

    def look_up(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Rows of words, int64 [...] -> [..., H] in the model's dtype.

        Args:
            layer: of vLLM.
            ids: numbers of words as this rank counts; any where it has none, as for words of
                other ranks, whose rows vLLM overwrites with zeros.
        """
        if not self.bank.slices:
            return ids.new_zeros((*ids.shape, self.n_inputs), dtype=self.dtype)
        rows: Tensor = dequantized_rows(ids, layer.get_buffer(MEMORY), self.facts, self.dtype)
        return rows

    def product(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank, [..., H] -> [..., P]; zeros for padding.

        Args:
            layer: of vLLM.
            x: hidden states.
            bias: [P], added to the logits.
        """
        if self.bank.slices:
            logits = multiply(layer, x, self.shards, self.facts)
            logits = pad(logits, (0, self.n_outputs - logits.shape[-1]))
        else:
            logits = x.new_zeros(*x.shape[:-1], self.n_outputs)
        return logits if bias is None else logits + bias
