"""Products with packed matrices as operators equal those with dequantized weights."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.vllm import dequantized_products
from alphaquant.runtime.vllm.dequantized_products import (
    dequantized_experts,
    dequantized_linear,
    dequantized_rows,
)
from alphaquant.runtime.vllm.matrix_bank import MatrixBank
from alphaquant.runtime.vllm.slices import Slice
from alphaquant.testing.packed import draw_packed

FORMATS = ("int4-g32", "int3-g64-asym", "bf16", "nvfp4", "mxfp4", "int8-row")
HIDDEN, WIDTH, N_EXPERTS = 64, 32, 4


def stored(matrices: list[PackedMatrix]) -> tuple[MatrixBank, Tensor]:
    bank = MatrixBank(
        {
            str(i): Slice(m.format, m.rows, m.cols, range(m.rows), range(m.cols))
            for i, m in enumerate(matrices)
        }
    )
    memory = torch.zeros(bank.n_bytes, dtype=torch.uint8)
    for index, matrix in enumerate(matrices):
        for name, tensor in matrix.tensors.items():
            bank.load(memory, index, name, tensor)
    return bank, memory


def experts() -> list[PackedMatrix]:
    """Gate, up and down of each expert, formats by turns."""
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)] * N_EXPERTS
    return [draw_packed(FORMATS[(i + i // 3) % len(FORMATS)], *s) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_of_shards_stand_beside_each_other(dtype: torch.dtype) -> None:
    matrices = [draw_packed(name, 8 + i, HIDDEN) for i, name in enumerate(FORMATS)]
    bank, memory = stored(matrices)
    x = torch.randn(2, 3, HIDDEN).to(dtype)
    expected = torch.cat([linear(x, m.dequantize().to(dtype)) for m in matrices], -1)
    assert torch.equal(dequantized_linear(x, memory, bank.facts), expected)


def test_rows_of_a_large_matrix_are_dequantized_some_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As lm_head is, whose weight may not fit into memory."""
    matrices = [draw_packed(name, 11, HIDDEN) for name in FORMATS]
    bank, memory = stored(matrices)
    x = torch.randn(2, HIDDEN)
    whole = dequantized_linear(x, memory, bank.facts)
    sizes = []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(weight.shape[0])
        return linear(x, weight)

    monkeypatch.setattr(dequantized_products, "N_WEIGHTS", 4 * HIDDEN + 1)
    monkeypatch.setattr(dequantized_products, "linear", counted)
    found = dequantized_linear(x, memory, bank.facts)
    assert sizes == [4, 4, 3] * len(FORMATS)
    # float32 sums of 64 products in another order
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_looked_up_rows_are_those_of_the_weights(name: str, dtype: torch.dtype) -> None:
    matrix = draw_packed(name, 11, HIDDEN)
    bank, memory = stored([matrix])
    ids = torch.tensor([[3, 10], [0, 3]])
    found = dequantized_rows(ids, memory, bank.facts, dtype)
    assert torch.equal(found, matrix.dequantize()[ids].to(dtype))


@pytest.mark.parametrize("first", [0, 2])
def test_experts_of_a_rank_add_their_weighted_outputs(first: int) -> None:
    matrices = experts()
    bank, memory = stored(matrices)
    x = torch.randn(5, HIDDEN)
    # Of the whole layer: some are of other ranks, -1 is padding; nobody chooses the second one.
    chosen = torch.tensor([[0, 2], [2, 3], [3, 0], [-1, 2], [4, 5]], dtype=torch.int32)
    ids = chosen + torch.where(chosen == -1, 0, first).to(torch.int32)
    ids[4] = torch.tensor([first - 1, first + N_EXPERTS])
    weights = torch.rand(5, 2)
    expected = torch.zeros_like(x)
    for token in range(5):
        for slot in range(2):
            number = int(ids[token, slot]) - first
            if 0 <= number < N_EXPERTS:
                gate, up, down = (m.dequantize() for m in matrices[3 * number : 3 * number + 3])
                inner = silu(linear(x[token], gate)) * linear(x[token], up)
                expected[token] += weights[token, slot] * linear(inner, down)
    found = dequantized_experts(x, ids, weights, memory, bank.facts, first)
    # float32 sums of 64 products in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_operators_have_the_shapes_that_a_compiler_is_told() -> None:
    matrices = experts()
    bank, memory = stored(matrices)
    x, ids = torch.randn(5, HIDDEN), torch.zeros(5, 2, dtype=torch.int32)
    args = (x, ids, torch.rand(5, 2), memory, bank.facts, 0)
    torch.library.opcheck(dequantized_experts, args, test_utils="test_faketensor")
    pair, bytes_ = stored([draw_packed("int4-g32", 8, HIDDEN), draw_packed("bf16", 4, HIDDEN)])
    torch.library.opcheck(
        dequantized_linear, (x, bytes_, pair.facts), test_utils="test_faketensor"
    )
    one, memory = stored([draw_packed("int4-g32", 8, HIDDEN)])
    rows = (torch.zeros(3, dtype=torch.int64), memory, one.facts, torch.bfloat16)
    torch.library.opcheck(dequantized_rows, rows, test_utils="test_faketensor")
