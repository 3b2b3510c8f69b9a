"""lm_head and embeddings of ranks, with the padding of vLLM, are those of the whole matrix."""

import importlib
import os
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from alphaquant.errors import ModelError, StoreError
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.vllm.ordered_layers import VARIABLE
from alphaquant.runtime.vllm.packed_layers import MEMORY
from alphaquant.runtime.vllm.packed_vocabulary import PackedVocabulary
from alphaquant.testing.packed import draw_packed

HIDDEN, N_WORDS, PADDING = 64, 150, 64
FORMATS = ("int4-g32", "int3-g32-asym", "nl3-g32-s256", "nvfp4", "mxfp4", "int8-row", "int1-g32")
FLOAT32 = torch.float32


@dataclass(frozen=True)
class Words:
    """Of a rank, as vLLM's `VocabParallelEmbeddingShardIndices` names them."""

    org_vocab_start_index: int
    org_vocab_end_index: int


class Layer(nn.Module):
    """What vLLM's `VocabParallelEmbedding` says of itself: 150 words, padded to 192."""

    def __init__(self, rank: int = 0, n_ranks: int = 1, n_added: int = 0) -> None:
        super().__init__()
        self.num_added_embeddings = n_added
        self.org_vocab_size, self.embedding_dim = N_WORDS, HIDDEN
        width = -(-N_WORDS // PADDING) * PADDING // n_ranks
        self.num_embeddings_per_partition = width
        start, end = (min(edge * width, N_WORDS) for edge in (rank, rank + 1))
        self.shard_indices = Words(start, end)


def built(
    layer: Layer, stored: PackedMatrix, *, without: str = "", **uses: bool
) -> PackedVocabulary:
    """The matrix in a layer, loaded as vLLM loads: tensor by tensor, through placeholders."""
    matrix = PackedVocabulary("lm_head", stored.format, set(), **uses)
    matrix.make_room(layer, FLOAT32)
    holders: dict[str, Any] = dict(layer.named_parameters())
    for name, tensor in stored.tensors.items():
        if name != without:
            holders[name].weight_loader(holders[name], tensor)
    matrix.finish(layer)
    return matrix


def check_close(found: Tensor, expected: Tensor) -> None:
    # float32 sums of 64 products in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_of_ranks_beside_each_other_are_those_of_all_words(name: str, n_ranks: int) -> None:
    """Of six ranks with 32 rows the last has nothing but padding, the one before 22 words."""
    stored = draw_packed(name, N_WORDS, HIDDEN)
    x = torch.randn(2, 3, HIDDEN)
    parts = []
    for rank in range(n_ranks):
        layer = Layer(rank, n_ranks)
        matrix = built(layer, stored, is_multiplied=True)
        parts.append(matrix.product(layer, x))
        assert parts[-1].shape == (2, 3, layer.num_embeddings_per_partition)
    logits = torch.cat(parts, -1)
    check_close(logits[..., :N_WORDS], linear(x, stored.dequantize()))
    assert not logits[..., N_WORDS:].any()


@pytest.mark.parametrize("n_ranks", [1, 2, 6])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_ranks_added_up_are_those_of_all_words(name: str, n_ranks: int) -> None:
    stored = draw_packed(name, N_WORDS, HIDDEN)
    ids = torch.tensor([0, 149, 75, 149, 128])
    found = torch.zeros(len(ids), HIDDEN)
    for rank in range(n_ranks):
        layer = Layer(rank, n_ranks)
        matrix = built(layer, stored, is_looked_up=True)
        own = layer.shard_indices
        is_own = (ids >= own.org_vocab_start_index) & (ids < own.org_vocab_end_index)
        # As vLLM does: words of other ranks are looked up as 0, and the result made zero.
        rows = matrix.look_up(layer, is_own * (ids - own.org_vocab_start_index))
        found += rows.masked_fill(~is_own.unsqueeze(-1), 0)
    assert torch.equal(found, stored.dequantize()[ids])


def test_a_bias_is_added() -> None:
    layer, stored = Layer(), draw_packed("int4-g32", N_WORDS, HIDDEN)
    matrix = built(layer, stored, is_multiplied=True)
    x, bias = torch.randn(2, HIDDEN), torch.randn(192)
    expected = linear(x, stored.dequantize(), bias[:N_WORDS])
    check_close(matrix.product(layer, x, bias)[:, :N_WORDS], expected)


def test_a_rank_holds_its_words_alone() -> None:
    stored = draw_packed("int3-g32-asym", N_WORDS, HIDDEN)
    sizes = []
    for rank in range(3):
        layer = Layer(rank, 3)
        built(layer, stored, is_looked_up=True)
        sizes.append(layer.get_buffer(MEMORY).numel())
    assert sum(sizes) < 1.01 * stored.n_bytes + 9 * 16  # alignment


@pytest.mark.parametrize(
    ("uses", "is_kept"),
    [
        ({"is_multiplied": True}, False),
        ({"is_looked_up": True, "is_multiplied": True}, True),  # tied
        ({"is_looked_up": True}, True),
    ],
)
def test_kernels_multiply_and_stored_rows_are_looked_up(
    uses: dict[str, bool], is_kept: bool
) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", VARIABLE: "1"}):
        importlib.import_module("alphaquant.kernels.ops_triton")
        layer, stored = Layer(1, 2), draw_packed("int4-g32", N_WORDS, HIDDEN)
        matrix = built(layer, stored, **uses)
        assert bool(matrix.shards) is uses.get("is_multiplied", False)
        assert (getattr(layer, MEMORY) is not None) is is_kept
        x, weight = torch.randn(3, HIDDEN), stored.dequantize()
        if matrix.is_multiplied:
            expected = nn.functional.pad(linear(x, weight[96:]), (0, 96 - 54))
            check_close(matrix.product(layer, x), expected)
        if matrix.is_looked_up:
            ids = torch.tensor([53, 0])
            assert torch.equal(matrix.look_up(layer, ids), weight[ids + 96])


def test_a_missing_tensor_is_refused() -> None:
    with pytest.raises(StoreError, match=r"lm_head: 1 tensors of it .* lm_head\.scales"):
        built(Layer(), draw_packed("int4-g32", N_WORDS, HIDDEN), without="scales")


def test_a_matrix_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(StoreError, match=r"lm_head\.codes is .*int4-g32 \[150, 64\] has"):
        built(Layer(), draw_packed("int4-g32", N_WORDS + 1, HIDDEN))


def test_added_words_are_refused() -> None:
    with pytest.raises(ModelError, match="adds 16 words to the 150 .*--include none"):
        built(Layer(n_added=16), draw_packed("int4-g32", N_WORDS, HIDDEN))
