"""Which checkpoints can be candidates, and what is told of those that cannot."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import open_bank
from alphaquant.quant.foreign.candidates import ORIGINAL, TAKEN, find_candidates, store_candidates
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import (
    Layout,
    auto_round,
    awq,
    fp8,
    gptq,
    int8,
    save_foreign,
)

NAME = "model.layers.1.mlp.experts.2.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("base") / "base", hidden_size=64, intermediate_size=64
    )


@pytest.fixture(scope="module")
def model_map(base: Path) -> ModelMap:
    return map_model(load_model(base, dtype="float32"))


def test_a_bank_holds_what_candidates_have(
    base: Path, model_map: ModelMap, tmp_path: Path
) -> None:
    save_foreign(base, tmp_path / "gptq", gptq(), lambda m: m == NAME)
    right = save_foreign(base, tmp_path / "awq", awq())
    names = [str(tmp_path / name) for name in ("gptq", "awq")]
    found = find_candidates(names, model_map.inventory)
    assert found.menu == ("bf16", "int4-g32", "int4-g32-asym")
    assert found.held[NAME] == {"bf16": ORIGINAL, "int4-g32": names[0], "int4-g32-asym": names[1]}
    bank = open_bank(tmp_path / "bank", "key", model_map.inventory, {})
    assert store_candidates(bank, model_map, found) == 1 + 2
    assert store_candidates(bank, model_map, found) == 0
    matrix = model_map.inventory.by_name[NAME]
    assert bank.read(matrix, "int4-g32-asym").dequantize().equal(right[NAME])
    assert bank.matrices("int4-g32", 1) == {NAME}
    bank.verify(["int4-g32", "int4-g32-asym"])
    record = next(r for r in bank.records("int4-g32-asym", 1) if r["matrix"] == NAME)
    original = model_map.view(NAME)
    error = (right[NAME] - original).square().sum() / original.square().sum()
    assert record["weight_error"] == pytest.approx(float(error), rel=1e-5)
    assert record["method"] == TAKEN


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (fp8(), "29 matrices that cannot be candidates.*fp8-e4m3-row holds other numbers"),
        (int8(), "int8-row holds other numbers"),
        (gptq(act_order=True), r"act-order.*GPTQ and AWQ without act-order.*leave this one out"),
    ],
    ids=["fp8 blocks", "int8 blocks", "act-order"],
)
def test_what_has_no_exact_format_is_refused_by_name(
    base: Path, model_map: ModelMap, tmp_path: Path, layout: Layout, said: str
) -> None:
    save_foreign(base, tmp_path / "wrong", layout)
    with pytest.raises(ConfigError, match=said.replace("29", r"\d+")):
        find_candidates([str(tmp_path / "wrong")], model_map.inventory)


def test_a_checkpoint_of_auto_round_is_a_candidate(
    base: Path, model_map: ModelMap, tmp_path: Path
) -> None:
    right = save_foreign(base, tmp_path / "a", auto_round("auto_round", symmetric=False))
    found = find_candidates([str(tmp_path / "a")], model_map.inventory)
    assert found.menu == ("bf16", "int4-g32-asym")
    matrix = model_map.inventory.by_name[NAME]
    assert found.packed(matrix, "int4-g32-asym").dequantize().equal(right[NAME])


def test_one_format_from_two_candidates_is_refused(
    base: Path, model_map: ModelMap, tmp_path: Path
) -> None:
    save_foreign(base, tmp_path / "a", gptq())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ConfigError, match="a and .*b both have .*q_proj in int4-g32"):
        find_candidates([str(tmp_path / "a"), str(tmp_path / "b")], model_map.inventory)


def test_an_unquantized_checkpoint_is_no_candidate(base: Path, model_map: ModelMap) -> None:
    with pytest.raises(ConfigError, match="has no quantized matrix of this model"):
        find_candidates([str(base)], model_map.inventory)


def test_a_checkpoint_of_another_model_is_no_candidate(
    base: Path, model_map: ModelMap, tmp_path: Path
) -> None:
    save_foreign(base, tmp_path / "gptq", gptq())
    file = tmp_path / "gptq" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.1." not in n}, file)
    with pytest.raises(ModelError, match=r"has no weight of model.layers.1"):
        find_candidates([str(tmp_path / "gptq")], model_map.inventory)


def test_other_files_make_another_digest(base: Path, model_map: ModelMap, tmp_path: Path) -> None:
    save_foreign(base, tmp_path / "a", gptq())
    first = find_candidates([str(tmp_path / "a")], model_map.inventory)
    assert find_candidates([str(tmp_path / "a")], model_map.inventory).digest == first.digest
    save_foreign(base, tmp_path / "a", gptq(8))
    assert find_candidates([str(tmp_path / "a")], model_map.inventory).digest != first.digest
