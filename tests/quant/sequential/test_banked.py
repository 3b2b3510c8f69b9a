"""A bank of one assignment, rounded layer after layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import Bank, open_bank
from alphaquant.quant.filling import BankRequest
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.sequential.banked import fill_sequentially
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(4, 16)
SETTINGS = QuantSettings(sequential=True, refine_sweeps=0)
FORMATS = ("int3-g32", "int4-g32")


def format_of(matrix: Matrix) -> str:
    return FORMATS["down_proj" in matrix.name]


def wanted(matrix: Matrix, name: str) -> bool:
    return name == format_of(matrix)


@pytest.fixture
def model_map() -> ModelMap:
    return map_model(tiny_model("olmoe"))


@pytest.fixture
def new_bank(tmp_path: Path, model_map: ModelMap) -> Callable[[str], Bank]:
    return lambda name: open_bank(tmp_path / name, "0" * 24, model_map.inventory, {})


def test_it_holds_what_quantizing_the_assignment_gives(
    model_map: ModelMap, new_bank: Callable[[str], Bank]
) -> None:
    bank, request = new_bank("bank"), BankRequest(FORMATS, SETTINGS, wanted)
    told: list[tuple[int, int]] = []
    written = fill_sequentially(
        bank, model_map, TOKENS, request, lambda stage, done, total: told.append((done, total))
    )
    assert written == 4 and told == [(0, 2), (1, 2), (2, 2)]
    bank.verify(FORMATS)
    formats = {m.name: format_of(m) for m in model_map.inventory.matrices}
    for done in quantize_layers(model_map, Assignment(formats), SETTINGS, TOKENS):
        for item in done.items:
            found = bank.read(item.matrix, formats[item.matrix.name]).dequantize()
            assert torch.equal(found, item.packed.dequantize()), item.matrix.name
    assert fill_sequentially(bank, model_map, TOKENS, request) == 0


def test_a_stopped_one_goes_on_with_the_layers_that_are_missing(
    model_map: ModelMap, new_bank: Callable[[str], Bank]
) -> None:
    request = BankRequest(FORMATS, SETTINGS, wanted)
    whole, bank = new_bank("whole"), new_bank("bank")
    fill_sequentially(whole, model_map, TOKENS, request)

    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_sequentially(bank, model_map, TOKENS, request, stop)
    bank.file(FORMATS[1], 0, 0).unlink()  # half of a layer
    bank.file(FORMATS[1], 0, 0).with_suffix(".json").unlink()
    assert fill_sequentially(bank, model_map, TOKENS, request) == 3
    for path in whole.path.rglob("*.safetensors"):
        assert path.read_bytes() == (bank.path / path.relative_to(whole.path)).read_bytes()


def test_every_matrix_needs_one_format(
    model_map: ModelMap, new_bank: Callable[[str], Bank]
) -> None:
    everything: Any = BankRequest(FORMATS, SETTINGS)
    with pytest.raises(ModelError, match="is wanted in 2 formats"):
        fill_sequentially(new_bank("bank"), model_map, TOKENS, everything)
