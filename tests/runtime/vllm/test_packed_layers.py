"""What a layer of vLLM gets: one buffer of bytes, and placeholders that load into it."""

from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.errors import StoreError
from alphaquant.quant.matrix import packed_shapes
from alphaquant.runtime.vllm.matrix_bank import TENSORS, MatrixBank
from alphaquant.runtime.vllm.packed_layers import (
    MEMORY,
    add_placeholders,
    give_up,
    make_room,
    stored_dtypes,
    take_matrices,
)
from alphaquant.runtime.vllm.slices import Slice
from alphaquant.spaces.formats import FORMAT_KINDS, make_format, parse_format
from alphaquant.testing.packed import draw_packed

ROWS, COLS = 4, 64


def bank_of(*names: str) -> MatrixBank:
    return MatrixBank(
        {n: Slice(parse_format(n), ROWS, COLS, range(ROWS), range(COLS)) for n in names}
    )


def loaded(layer: nn.Module, *names: str) -> MatrixBank:
    bank = bank_of(*names)
    make_room(layer, bank)
    for index, name in enumerate(names):
        for part, tensor in draw_packed(name, ROWS, COLS).tensors.items():
            bank.load(layer.get_buffer(MEMORY), index, part, tensor)
    return bank


def test_formats_have_no_other_tensors_than_placeholders() -> None:
    formats = [make_format(kind) for kind in FORMAT_KINDS]
    formats += map(parse_format, ("int4-g32-asym", "int4-g32-s256"))
    assert {part for fmt in formats for part in packed_shapes(fmt, 1, 1)} == set(TENSORS)


def test_placeholders_have_no_elements_and_know_what_they_are_for() -> None:
    layer, calls = nn.Module(), []
    bank = bank_of("int4-g32")

    def loader(param: Any, tensor: Any) -> None:
        calls.append((param.part, tensor))

    add_placeholders(layer, "w13_", loader, stored_dtypes(bank))
    found: dict[str, Any] = dict(layer.named_parameters())
    assert set(found) == {f"w13_{part}" for part in TENSORS}
    assert all(holder.numel() == 0 for holder in found.values())
    found["w13_scales"].weight_loader(found["w13_scales"], 1)
    assert calls == [("scales", 1)]
    assert found["w13_scales"].dtype == torch.float16


def test_bytes_are_no_parameter_and_not_saved() -> None:
    layer = nn.Module()
    make_room(layer, bank_of("int4-g32"))
    assert not list(layer.parameters()) and not layer.state_dict()
    give_up(layer)
    assert getattr(layer, MEMORY) is None


@pytest.mark.parametrize(
    ("names", "dtypes"),
    [
        (("nvfp4",), {"codes": torch.uint8, "scales": torch.float8_e4m3fn}),
        (("int4-g32", "mxfp4"), {}),
        (("bf16",), {}),  # a bfloat16 `weight` would be taken for the weight itself
    ],
)
def test_placeholders_of_one_matrix_have_its_dtypes(
    names: tuple[str, ...], dtypes: dict[str, torch.dtype]
) -> None:
    found = stored_dtypes(bank_of(*names))
    assert {name: found[name] for name in dtypes} == dtypes
    assert bool(found) is bool(dtypes)


def test_matrices_are_taken_as_they_were_loaded() -> None:
    layer = nn.Module()
    bank = loaded(layer, "int4-g32", "nvfp4")
    for matrix in take_matrices(layer, bank, "layer"):
        expected = draw_packed(matrix.format.name, ROWS, COLS)
        assert torch.equal(matrix.dequantize(), expected.dequantize())


def test_numbers_that_cannot_be_used_are_refused() -> None:
    layer = nn.Module()
    bank = loaded(layer, "int4-g32")
    scales = draw_packed("int4-g32", ROWS, COLS).tensors["scales"]
    scales[1, 0] = float("nan")
    bank.load(layer.get_buffer(MEMORY), 0, "scales", scales)
    with pytest.raises(StoreError, match=r"int4-g32\.scales holds .* numbers"):
        take_matrices(layer, bank, "layer")


def test_a_missing_tensor_is_refused() -> None:
    layer, bank = nn.Module(), bank_of("int4-g32")
    make_room(layer, bank)
    with pytest.raises(StoreError, match=r"layer: 2 tensors of it are not in the checkpoint"):
        take_matrices(layer, bank, "layer")
