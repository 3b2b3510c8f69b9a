"""Layers in kernel order give what dequantized weights give, and kernels are tried first."""

import importlib
import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from alphaquant.errors import ConfigError, ModelError
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.runtime.vllm import ordered_layers
from alphaquant.runtime.vllm.ordered_layers import (
    VARIABLE,
    Checked,
    Projections,
    order_experts,
    order_shards,
    wants_kernels,
    why_no_kernels,
)
from alphaquant.runtime.vllm.slices import Slice, part_of
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.packed import draw_packed

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

CPU = torch.device("cpu")
HIDDEN, WIDTH = 64, 32


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        importlib.import_module("alphaquant.kernels.ops_triton")
        yield


def check_close(found: Tensor, expected: Tensor) -> None:
    # float32 sums of 64 products in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_shards_multiply_as_their_dequantized_weights() -> None:
    layer, checked = nn.Module(), Checked()
    matrices = [draw_packed(name, 16, HIDDEN) for name in ("int4-g32", "bf16", "nvfp4")]
    shards = order_shards(layer, matrices, torch.float32, checked)
    x = torch.randn(3, HIDDEN)
    for shard, matrix in zip(shards, matrices, strict=True):
        check_close(shard.product(layer, x), linear(x, matrix.dequantize()))
    assert {fmt.name for _, fmt in checked} == {"int4-g32", "nvfp4"}
    assert not layer.state_dict()


def cut_down(matrix: PackedMatrix) -> PackedMatrix:
    """What the second of two ranks holds of a matrix, by columns."""
    cols = part_of(matrix.cols, 1, 2)
    part = Slice(matrix.format, matrix.rows, matrix.cols, range(matrix.rows), cols)
    tensors = {name: part.cut(name, tensor) for name, tensor in matrix.tensors.items()}
    return PackedMatrix(part.format, matrix.rows, len(cols), tensors)


@pytest.mark.parametrize("name", ["int3-g64-asym", "mxfp4", "nvfp4", "int8-row"])
def test_the_part_of_a_rank_has_a_kernel(name: str) -> None:
    """Groups that the boundary cuts are shorter: mxfp4 of 96 inputs has 16 on two ranks."""
    layer, matrix = nn.Module(), cut_down(draw_packed(name, 16, 96))
    (shard,) = order_shards(layer, [matrix], torch.float32, set())
    x = torch.randn(2, matrix.cols)
    check_close(shard.product(layer, x), linear(x, matrix.dequantize()))


def experts() -> list[Projections]:
    names = [("int4-g32", "int4-g32", "mxfp4"), ("int3-g64-asym", "bf16", "int8-row")]
    return [
        (
            draw_packed(gate, WIDTH, HIDDEN),
            draw_packed(up, WIDTH, HIDDEN),
            draw_packed(down, HIDDEN, WIDTH),
        )
        for gate, up, down in names
    ]


def test_experts_of_a_rank_add_their_weighted_outputs() -> None:
    layer, own = nn.Module(), experts()
    ordered = order_experts(layer, own, 2, torch.float32, set())
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, 2)
    ids = torch.tensor([[2, 3], [3, 0], [5, 2]], dtype=torch.int32)  # 0 and 5 are of others
    expected = torch.zeros_like(x)
    for token in range(3):
        for slot in range(2):
            number = int(ids[token, slot]) - 2
            if number in (0, 1):
                gate, up, down = (matrix.dequantize() for matrix in own[number])
                inner = silu(linear(x[token], gate)) * linear(x[token], up)
                expected[token] += weights[token, slot] * linear(inner, down)
    check_close(ordered.product(layer, x, ids, weights), expected)


def test_a_kernel_that_gives_other_numbers_is_refused() -> None:
    matrix = draw_packed("int4-g32", 16, HIDDEN)
    doubled = draw_packed("int4-g32", 16, HIDDEN)
    doubled.tensors["scales"].mul_(2)
    with (
        mock.patch.object(ordered_layers, "order_matrix", lambda m: ordered_layers_order(doubled)),
        pytest.raises(
            ModelError, match=r"kernel of int4-g32 .*other numbers.*ALPHAQUANT_KERNELS=0"
        ),
    ):
        order_shards(nn.Module(), [matrix], torch.float32, set())


ordered_layers_order = ordered_layers.order_matrix


@pytest.mark.parametrize(
    ("setting", "interpreted", "wanted"),
    [
        (None, "1", False),
        ("auto", "1", False),
        ("0", "1", False),
        ("1", "1", True),
        ("0", "0", False),
    ],
)
def test_on_a_cpu_kernels_run_where_they_are_asked_for(
    setting: str | None, interpreted: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.delenv(VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(VARIABLE, setting)
    assert wants_kernels(CPU) is wanted


def test_kernels_that_cannot_run_are_an_error_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(ModelError, match=r"=1 asks for kernels, but the model is on cpu.*=auto"):
        wants_kernels(CPU)


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ConfigError, match=r"ALPHAQUANT_KERNELS='yes' .*auto, 0 or 1"):
        wants_kernels(CPU)


def test_a_group_size_without_kernel_order_is_told() -> None:
    formats = [(parse_format("int4-g64"), HIDDEN), (parse_format("int4-g12"), HIDDEN)]
    assert why_no_kernels(formats[:1], CPU) is None
    assert "no order for groups of 12" in str(why_no_kernels(formats, CPU))
