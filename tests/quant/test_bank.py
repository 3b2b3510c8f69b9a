"""The bank: what is written, what is resumed, and what is not believed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from alphaquant.errors import FormatError, ModelError, StoreError
from alphaquant.files import locked
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import LOCK_FILE, Bank, bank_key, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens
from tests.damage import garble, truncate

FORMATS = ["int3-g32-asym", "mxfp4", "nvfp4", "bf16"]
SETTINGS = QuantSettings(refine_sweeps=0)  # refinement has tests of its own and takes its time
TOKENS = tiny_tokens(4, 16)


def make(root: Path, model_map: ModelMap, formats: list[str] = FORMATS) -> tuple[Bank, int]:
    bank = open_bank(root, "key", model_map.inventory, {"model": "tiny"})
    return bank, fill_bank(bank, model_map, TOKENS, BankRequest(formats, SETTINGS), batch_size=2)


def contents(bank: Bank) -> dict[str, bytes]:
    return {
        str(p.relative_to(bank.path)): p.read_bytes()
        for p in sorted(bank.path.rglob("*"))
        if p.is_file() and p.suffix != ".part"
    }


@pytest.fixture(scope="module")
def model_map() -> ModelMap:
    return map_model(tiny_model("qwen2_moe"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model_map: ModelMap) -> Path:
    """Where a bank is that tests copy."""
    root = tmp_path_factory.mktemp("made")
    assert make(root, model_map)[1] == len(FORMATS) * 2
    return root


@pytest.fixture
def bank(made: Path, tmp_path: Path, model_map: ModelMap) -> Bank:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return open_bank(tmp_path, "key", model_map.inventory, {"model": "tiny"})


def test_every_matrix_is_there_in_every_format_with_its_bytes(
    bank: Bank, model_map: ModelMap
) -> None:
    assert bank.formats() == sorted(FORMATS)
    for name in FORMATS:
        for matrix in model_map.inventory.matrices:
            packed = bank.read(matrix, name)
            assert packed.format.name == name
            assert 8 * packed.n_bytes == matrix.storage_bits(packed.format)
            assert bool(torch.isfinite(packed.dequantize()).all())
    bank.verify(FORMATS)
    assert bank.n_bytes() > 0


def test_records_tell_how_each_matrix_was_made(bank: Bank, model_map: ModelMap) -> None:
    for layer in model_map.layers:
        names = {m.name for m in layer.matrices()}
        for fmt in FORMATS:
            rows = bank.records(fmt, layer.index)
            assert {r["matrix"] for r in rows} == names and len(rows) == len(names)
            assert {r["format"] for r in rows} == {fmt}
            assert {r["method"] for r in rows} == {"none" if fmt == "bf16" else "gptq"}
        experts = [r for r in bank.records("mxfp4", layer.index) if ".experts." in r["matrix"]]
        assert {r["hessian"] for r in experts} <= {"routing_weighted+pooled", "pooled"}
        assert all(0 < r["output_error"] < 1 and 0 < r["weight_error"] < 1 for r in experts)
        counts = bank.utilization(layer.index)
        assert {k: sum(v) for k, v in counts.items()} == {f"{layer.name}.mlp.experts": 64 * 2}
        for row in experts:
            expert = int(row["matrix"].split(".experts.")[1].split(".")[0])
            assert row["n_tokens"] == counts[f"{layer.name}.mlp.experts"][expert]


def test_nothing_is_written_when_all_is_there(bank: Bank, model_map: ModelMap) -> None:
    before = contents(bank)
    again, n_written = make(bank.path.parent, model_map)
    assert n_written == 0 and contents(again) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("layer", [0, 1])
def test_only_a_deleted_file_is_written_again_and_is_the_same(
    suffix: str, layer: int, bank: Bank, model_map: ModelMap
) -> None:
    before = contents(bank)
    deleted = bank.file("mxfp4", layer).with_suffix(suffix)
    stamps = {p: p.stat().st_mtime_ns for p in bank.path.rglob("*.safetensors")}
    deleted.unlink()
    assert not bank.has("mxfp4", layer) and "mxfp4" not in bank.formats()
    _, n_written = make(bank.path.parent, model_map)
    assert n_written == 1 and contents(bank) == before
    touched = {p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert touched == {bank.file("mxfp4", layer)}


def test_a_new_format_adds_files_and_leaves_the_others(bank: Bank, model_map: ModelMap) -> None:
    before = contents(bank)
    _, n_written = make(bank.path.parent, model_map, [*FORMATS, "int4-g64"])
    after = contents(bank)
    assert n_written == 2 and before.items() <= after.items()
    assert set(after) - set(before) == {
        f"int4-g64/layer-00{i}.{suffix}" for i in range(2) for suffix in ("json", "safetensors")
    }


def test_what_a_killed_run_left_behind_is_ignored(bank: Bank, model_map: ModelMap) -> None:
    before = contents(bank)
    path = bank.file("nvfp4", 1)
    path.unlink()
    part = path.with_suffix(".part")
    part.write_bytes(b"half a file")
    assert not bank.has("nvfp4", 1)
    _, n_written = make(bank.path.parent, model_map)
    part.unlink(missing_ok=True)
    assert n_written == 1 and contents(bank) == before


def test_a_run_that_dies_while_writing_leaves_complete_files_only(
    tmp_path: Path, model_map: ModelMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alphaquant.quant import filling as module

    honest, calls = module.save_file, []

    def die(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        honest(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save_file", die)
        make(tmp_path, model_map)
    bank, n_written = make(tmp_path, model_map)
    assert n_written == 2 * len(FORMATS) - 2
    bank.verify(FORMATS)


def drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.codes"]
    save_file(tensors, path)


def shorten_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    key = "model.layers.1.self_attn.q_proj.codes"
    save_file({**tensors, key: tensors[key][:-1].clone()}, path)


@pytest.mark.parametrize(
    "damage", [truncate, garble, drop_a_tensor, shorten_a_tensor, Path.unlink]
)
def test_reading_a_damaged_file_names_it(
    damage: Callable[[Path], None], bank: Bank, model_map: ModelMap
) -> None:
    path = bank.file("mxfp4", 1)
    damage(path)
    matrix = model_map.inventory.by_name["model.layers.1.self_attn.q_proj"]
    with pytest.raises(StoreError, match="damaged") as error:
        bank.read(matrix, "mxfp4")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    bank.read(matrix, "nvfp4")


def test_verify_sees_one_changed_byte(bank: Bank) -> None:
    path = bank.file("nvfp4", 0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    bank.verify(["mxfp4", "int3-g32-asym"])
    with pytest.raises(StoreError, match=r"nvfp4/layer-000\.safetensors is damaged \(its sha256"):
        bank.verify(FORMATS)


@pytest.mark.parametrize("text", ["{", "[]", '{"inventory": "x"}', "{}"])
def test_a_damaged_index_is_an_error_that_names_it(
    text: str, bank: Bank, model_map: ModelMap
) -> None:
    (bank.path / "bank.json").write_text(text)
    with pytest.raises(StoreError, match=r"bank\.json is damaged"):
        open_bank(bank.path.parent, "key", model_map.inventory, {})


@pytest.mark.parametrize("text", ["{", "{}", "[]", "3"])
def test_a_damaged_sidecar_is_an_error_that_names_it(text: str, bank: Bank) -> None:
    bank.file("mxfp4", 0).with_suffix(".json").write_text(text)
    for read in (lambda: bank.records("mxfp4", 0), lambda: bank.verify(["mxfp4"])):
        with pytest.raises(StoreError, match=r"layer-000\.json is damaged"):
            read()


def test_the_bank_of_another_model_is_refused(bank: Bank) -> None:
    other = map_model(tiny_model("olmoe")).inventory
    with pytest.raises(StoreError, match="another model's matrices"):
        open_bank(bank.path.parent, "key", other, {})


def test_the_index_states_what_the_bank_belongs_to(bank: Bank, model_map: ModelMap) -> None:
    stated = json.loads((bank.path / "bank.json").read_text())
    assert stated == {"inventory": model_map.inventory.digest, "model": "tiny", "version": 2}


def test_the_key_follows_weights_tokens_and_settings() -> None:
    keys = {
        bank_key("w", "c", SETTINGS),
        bank_key("w2", "c", SETTINGS),
        bank_key("w", "c2", SETTINGS),
        *(
            bank_key("w", "c", QuantSettings(**{**asdict(SETTINGS), field: value}))
            for field, value in {
                "method": "rtn",
                "percdamp": 0.02,
                "scale_search": "minmax",
                "route_exponent": 1,
                "pooled_tokens": 0,
            }.items()
        ),
    }
    assert len(keys) == 8 and bank_key("w", "c", QuantSettings(refine_sweeps=0)) in keys
    corrected = [
        QuantSettings(sequential=s, correction=c) for s in (False, True) for c in (0.0, 0.5)
    ]
    assert len({bank_key("w", "c", settings) for settings in corrected}) == 3


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    broken = map_model(tiny_model("olmoe"))
    broken.view("model.layers.1.mlp.experts.2.up_proj")[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"experts\.2\.up_proj has 1 NaN"):
        # Layer 0 is fine and is written; layer 1 is where the walk stops.
        make(tmp_path, broken, ["int4-g32"])


def test_progress_goes_up_to_the_number_of_layers(tmp_path: Path, model_map: ModelMap) -> None:
    seen: list[tuple[str, int, int]] = []
    bank = open_bank(tmp_path, "key", model_map.inventory, {})
    fill_bank(
        bank,
        model_map,
        TOKENS,
        BankRequest(["mxfp4"], SETTINGS),
        progress=lambda *a: seen.append(a),
    )
    stages = {stage: [s for s in seen if s[0] == stage] for stage in ("hessians", "bank")}
    assert stages["bank"] == [("bank", 0, 2), ("bank", 1, 2), ("bank", 2, 2)]
    assert stages["hessians"][0] == ("hessians", 0, 2)
    assert stages["hessians"][-1] == ("hessians", 2, 2)


def test_swapping_writes_what_changed_and_nothing_else(bank: Bank) -> None:
    model_map = map_model(tiny_model("qwen2_moe"))
    inventory = model_map.inventory
    swapper = Swapper(model_map, bank.layer)
    first = uniform_assignment(inventory, "mxfp4")
    assert swapper.apply(first) == len(inventory.matrices)
    assert swapper.apply(first) == 0
    name = "model.layers.0.mlp.experts.3.up_proj"
    second = Assignment({**first.formats, name: "int3-g32-asym"})
    assert swapper.apply(second) == 1
    for matrix in inventory.matrices:
        expected = bank.read(matrix, second.formats[matrix.name]).dequantize()
        assert torch.equal(model_map.view(matrix.name), expected)
    # bf16 gives the original back: the tiny model's weights are bfloat16 numbers.
    swapper.apply(uniform_assignment(inventory, "bf16"))
    original = map_model(tiny_model("qwen2_moe"))
    for matrix in inventory.matrices:
        assert torch.equal(model_map.view(matrix.name), original.view(matrix.name))


def test_a_bank_cannot_be_sequential(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("llama"))
    bank = open_bank(tmp_path, "bank", model_map.inventory, {})
    with pytest.raises(ModelError, match="use sequential=False"):
        fill_bank(
            bank,
            model_map,
            tiny_tokens(2, 8),
            BankRequest(["int4-g32"], QuantSettings(sequential=True)),
        )


def test_a_bank_that_another_process_fills_is_refused_and_a_full_one_is_not(
    bank: Bank, model_map: ModelMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    have = bank.formats()
    with locked(bank.path / LOCK_FILE, "it"):
        assert fill_bank(bank, model_map, TOKENS, BankRequest(have, SETTINGS)) == 0
        with pytest.raises(StoreError, match="the bank .* is in use: process .*another --cache"):
            fill_bank(bank, model_map, TOKENS, BankRequest([*have, "int5-g32"], SETTINGS))


def test_matrices_that_are_wanted_later_join_those_that_are_there(
    tmp_path: Path, model_map: ModelMap, bank: Bank
) -> None:
    later = open_bank(tmp_path / "later", "key", model_map.inventory, {})
    down = frozenset(m.name for m in model_map.inventory.matrices if "down" in m.name)

    def fill(wanted: Callable[[Matrix, str], bool]) -> int:
        return fill_bank(
            later, model_map, TOKENS, BankRequest(["mxfp4"], SETTINGS, wanted=wanted), batch_size=2
        )

    assert fill(lambda matrix, name: matrix.name in down) == 2
    assert not later.has("mxfp4", 0) and later.formats() == []
    assert later.matrices("mxfp4", 0) | later.matrices("mxfp4", 1) == down
    assert fill(lambda matrix, name: matrix.name in down) == 0
    assert fill(lambda matrix, name: True) == 2
    assert later.has("mxfp4", 1) and later.formats() == ["mxfp4"]
    later.verify(["mxfp4"])
    for matrix in model_map.inventory.matrices:
        found, whole = (b.read(matrix, "mxfp4").tensors for b in (later, bank))
        assert all(torch.equal(found[k], whole[k]) for k in whole)
    assert later.utilization(0) == bank.utilization(0)
