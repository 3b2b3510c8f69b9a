"""A stored matrix as one argument: what the tuple holds, and when two matrices share a binary."""

import ast
import importlib
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from alphaquant.kernels.order import KernelWeight
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import pack_drawn

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

KERNELS = Path(__file__).parents[2] / "alphaquant" / "kernels"
MOST_OF_A_KERNEL, MOST_OF_A_FUNCTION = 14, 8


@pytest.fixture(scope="module")
def matrices() -> ModuleType:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        return importlib.import_module("alphaquant.kernels.matrix_triton")


def drawn(name: str) -> KernelWeight:
    return order_matrix(pack_drawn(name, 130, 300))  # 256 rows, 3 tiles


def test_a_tuple_holds_a_matrix_as_it_is_stored(matrices: ModuleType) -> None:
    weight = drawn("int3-g64-asym")
    found = matrices.matrix_of(weight)
    assert found.words is weight.words and found.zeros is weight.zeros
    assert found.scales.dtype == torch.float16 and found.global_scales is None
    assert (found.padded_rows, found.n_cols, found.tiles_per_step) == (256, 300, 1)
    assert found.plane_bytes == weight.words.numel() // len(weight.words)


def test_small_scales_are_passed_as_bytes(matrices: ModuleType) -> None:
    found = matrices.matrix_of(drawn("nvfp4"))
    assert found.scales.dtype == torch.uint8 and found.zeros is None
    assert found.global_scales.tolist() == drawn("nvfp4").global_scale.tolist()


def test_matrices_of_one_kind_are_decoded_by_one_constant(matrices: ModuleType) -> None:
    weight = drawn("mxfp4")
    other = order_matrix(pack_drawn("mxfp4", 64, 128))
    first = matrices.decoding_of(weight, torch.float16, use_asm=True)
    assert matrices.decoding_of(other, torch.float16, use_asm=True) is first
    unfolded = replace(weight, is_foldable=False)
    different = [
        first,
        matrices.decoding_of(weight, torch.float16, use_asm=False),
        matrices.decoding_of(weight, torch.bfloat16, use_asm=True),
        matrices.decoding_of(unfolded, torch.float16, use_asm=True),
        matrices.decoding_of(drawn("mxfp6"), torch.float16, use_asm=True),
    ]
    assert len(set(map(repr, different))) == len(set(different)) == len(different)


@pytest.mark.parametrize(("name", "middle"), [("int4-g64", 0), ("int4-g64-asym", 8)])
def test_zero_points_are_counted_from_the_middle(
    matrices: ModuleType, name: str, middle: int
) -> None:
    assert matrices.decoding_of(drawn(name), torch.float32, use_asm=False).middle == middle


def test_what_travels_together_is_one_parameter() -> None:
    """Most parameters of any kernel, and of any function on the host."""
    too_many = []
    for file in KERNELS.rglob("*_triton.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                is_kernel = any("jit" in ast.unparse(one) for one in node.decorator_list)
                most = MOST_OF_A_KERNEL if is_kernel else MOST_OF_A_FUNCTION
                n_parameters = len(node.args.args) + len(node.args.kwonlyargs)
                too_many += [f"{file.name}: {node.name}"] if n_parameters > most else []
    assert too_many == []
