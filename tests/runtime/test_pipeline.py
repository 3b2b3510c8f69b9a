"""From a model to a packed checkpoint: the report, agreement with the bank, failures."""

import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaquant.errors import FormatError, ModelError, StoreError
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant import layerwise
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.quant.swap import Swapper
from alphaquant.runtime import checkpoint, pipeline
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.pipeline import PackingJob, PipelineResult, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import MENUS
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import FAMILIES, ROUTED_EXPERTS, TOP_K, tiny_model, tiny_tokens

Made = Callable[[str], PipelineResult]

TOKENS = tiny_tokens(4, 16)
SETTINGS = QuantSettings(refine_sweeps=0)  # refinement has tests of its own and takes its time


def mixed_assignment(model_map: ModelMap) -> Assignment:
    formats = sorted(MENUS["all"])
    matrices = model_map.inventory.matrices
    return Assignment({m.name: formats[i % len(formats)] for i, m in enumerate(matrices)})


def run(model_map: ModelMap, target: Path, **changes: Any) -> PipelineResult:
    parts = {f.name: changes.pop(f.name) for f in fields(PackingJob) if f.name in changes}
    usual = {"assignment": mixed_assignment(model_map), "settings": SETTINGS, "tokens": TOKENS}
    job = PackingJob(**{"model_map": model_map, "batch_size": 2, **usual, **parts})
    return quantize_to_checkpoint(job, target, **{"facts": {"model": {"name": "tiny"}}, **changes})


def report_of(result: PipelineResult) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((result.path / "quantize_report.json").read_text())
    return report


# One family of every layout in the default run, all of them with the slow tests.
LAYOUTS = ("llama", "olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "listed_moe")
BY_LAYOUT = [f if f in LAYOUTS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A family's checkpoint in mixed formats, made once: `made("olmoe")`."""
    return cache(
        lambda family: run(
            map_model(tiny_model(family)), tmp_path_factory.mktemp(family) / "packed"
        )
    )


@pytest.mark.parametrize("family", BY_LAYOUT)
def test_a_checkpoint_has_the_codes_and_logits_of_the_bank(
    family: str, made: Made, tmp_path: Path
) -> None:
    model = tiny_model(family)
    model_map = map_model(model)
    assignment = mixed_assignment(model_map)
    bank, names = open_bank(tmp_path, "bank", model_map.inventory, {}), sorted(MENUS["all"])

    def wanted(matrix: Matrix, name: str) -> bool:
        return assignment.formats[matrix.name] == name

    fill_bank(bank, model_map, TOKENS, BankRequest(names, SETTINGS, wanted=wanted), batch_size=2)
    loaded = load(made(family).path)
    Swapper(model_map, bank.layer).apply(assignment)
    tokens = tiny_tokens(2, 11, 5)
    with torch.no_grad():
        found, expected = loaded(tokens).logits, model(tokens).logits
    if (
        family == "gpt_oss"
    ):  # its own experts multiply by transposed weights: another order of sums
        assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "include"),
    [("olmoe", ("head", "embeddings")), ("gemma2", ("head",)), ("gemma3_text", ("embeddings",))],
)
def test_head_and_embeddings_are_packed_too_tied_or_scaled(
    family: str, include: tuple[str, ...], tmp_path: Path
) -> None:
    model = tiny_model(family)
    model_map = map_model(model, include=include)
    assignment = mixed_assignment(model_map)
    result = run(model_map, tmp_path / "packed", assignment=assignment)
    tokens = tiny_tokens(2, 11, 5)
    bank = open_bank(tmp_path, "bank", model_map.inventory, {})
    chosen = BankRequest(
        *(sorted(set(assignment.formats.values())), SETTINGS),
        wanted=lambda matrix, name: assignment.formats[matrix.name] == name,
    )
    fill_bank(bank, model_map, TOKENS, chosen, batch_size=2)
    Swapper(model_map, bank.layer).apply(assignment)
    with torch.no_grad():
        expected = model(tokens).logits
        loaded = load(result.path)
        assert torch.equal(loaded(tokens).logits, expected)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")(tokens).logits, expected)
    assert not any(p.numel() >= 96 * 40 for p in loaded.parameters())
    assert result.quantized_bytes == quantized_bytes(result.path)
    assert assignment.count_bits(model_map.inventory).quantized_bytes == result.quantized_bytes
    assert loaded.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 13)


def test_default_settings_agree_with_the_bank_too(tmp_path: Path) -> None:
    model_map, settings = map_model(tiny_model("olmoe")), QuantSettings()
    assignment = uniform_assignment(model_map.inventory, "int3-g32-asym")
    result = run(model_map, tmp_path / "packed", assignment=assignment, settings=settings)
    bank = open_bank(tmp_path, "bank", model_map.inventory, {})
    fill_bank(bank, model_map, TOKENS, BankRequest(["int3-g32-asym"], settings), batch_size=2)
    loaded = load(result.path)
    for matrix in model_map.inventory.matrices:
        expected = bank.read(matrix, "int3-g32-asym").dequantize()
        assert torch.equal(loaded.get_submodule(matrix.name).packed().dequantize(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_has_a_row_for_every_matrix(family: str, made: Made) -> None:
    model_map = map_model(tiny_model(family))
    assignment = mixed_assignment(model_map)
    report = report_of(made(family))
    rows = {row["matrix"]: row for row in report["matrices"]}
    assert set(rows) == set(assignment.formats) and len(report["matrices"]) == len(rows)
    for matrix in model_map.inventory.matrices:
        row, fmt = rows[matrix.name], assignment.format_of(matrix.name)
        assert row["format"] == fmt.name and row["fallback"] is None
        assert row["method"] == ("gptq" if fmt.is_quantized else "none")
        assert row["bits_per_weight"] * matrix.n_weights == pytest.approx(matrix.storage_bits(fmt))
        assert row["seconds"] > 0
        if fmt.is_quantized:
            assert 0 < row["weight_error"] < 1.5 and 0 <= row["output_error"] < 1
            assert row["damp"] == 0.01 and row["n_tokens"] >= 0
            weighted = matrix.kind == "expert" or (
                matrix.kind == "shared" and family == "qwen2_moe"
            )
            assert ("routing_weighted" in row["hessian"] or row["hessian"] == "pooled") == weighted
    assert report["model"] == {"name": "tiny"} and report["settings"]["method"] == "gptq"
    assert {"torch", "transformers", "python"} <= set(report["versions"])
    for used in report["utilization"].values():
        counts = used["utilization_count"]
        assert len(counts) == ROUTED_EXPERTS[family] and sum(counts) == 64 * TOP_K[family]
    assert bool(report["utilization"]) == (family in ROUTED_EXPERTS)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_bytes_are_those_of_the_assignment(family: str, made: Made) -> None:
    model_map = map_model(tiny_model(family))
    assignment, result = mixed_assignment(model_map), made(family)
    expected = assignment.storage_bits(model_map.inventory) / 8
    assert result.quantized_bytes == quantized_bytes(result.path) == expected
    report = report_of(result)
    assert report["bits"]["quantized_bytes"] == expected
    assert report["bits"]["checkpoint_bytes"] == result.checkpoint_bytes
    assert result.checkpoint_bytes == expected + model_map.inventory.kept_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_rtn_needs_no_tokens_no_hidden_states_and_rounds_matrix_by_matrix(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model(family))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("hidden states")

    monkeypatch.setattr(layerwise, "walk", refuse)
    assignment = uniform_assignment(model_map.inventory, "int4-g32")
    settings = QuantSettings(method="rtn")
    result = run(
        model_map, tmp_path / "packed", assignment=assignment, settings=settings, tokens=None
    )
    rows = report_of(result)["matrices"]
    assert {(r["method"], r["fallback"], r["hessian"]) for r in rows} == {("rtn", None, None)}
    assert not result.fallbacks
    loaded = load(result.path)
    for matrix in model_map.inventory.matrices:
        weight = model_map.view(matrix.name)[None]
        expected = quantize_rtn(weight, parse_format("int4-g32"), "mse").weights()[0]
        made = loaded.get_submodule(matrix.name).packed().dequantize()
        # Two scales whose errors are equal but for the order of float32 sums may change places.
        errors = [(found - weight[0]).square().sum(-1) for found in (made, expected)]
        assert torch.allclose(*errors, rtol=1e-5)


def test_gptq_without_tokens_is_refused_before_a_directory_is_made(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--calibration, or --method rtn"):
        run(map_model(tiny_model("llama")), tmp_path / "packed", tokens=None)
    assert not list(tmp_path.iterdir())


def test_experts_that_no_token_reached_are_listed_when_pooling_is_off(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    for layer in model.model.layers:
        layer.mlp.gate.weight[5] = 0.0  # a logit of zero is below the largest three of seven
        layer.mlp.gate.weight[:5] = layer.mlp.gate.weight[:5].abs()
    tokens = tiny_tokens(1, 1)
    settings = QuantSettings(pooled_tokens=0, refine_sweeps=0)
    result = run(map_model(model), tmp_path / "packed", tokens=tokens, settings=settings)
    report = report_of(result)
    empty = {
        f"{name}.{e}.{projection}"
        for name, used in report["utilization"].items()
        for e, count in enumerate(used["utilization_count"])
        if not count
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    rows = {r["matrix"]: r for r in report["matrices"]}
    expected = {n: "no_tokens" for n in empty if rows[n]["method"] != "none"}
    assert len(empty) == 2 * 5 * 3 and dict(result.fallbacks) == expected


def test_nothing_is_left_after_a_failure_in_the_first_layer(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"))
    model_map.view("model.layers.0.mlp.experts.2.up_proj")[0, 0] = float("nan")
    with pytest.raises(FormatError, match=r"experts\.2\.up_proj has"):
        run(model_map, tmp_path / "new" / "packed")
    assert not list(tmp_path.iterdir())


def stop_after_one(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("quantize", 1):
        raise KeyboardInterrupt


def made_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the layers that are quantized from now on."""
    made: list[int] = []
    plain = layerwise.quantize_layer

    def spy(model_map: ModelMap, layer: LayerSite, *args: Any) -> Any:
        made.append(layer.index)
        return plain(model_map, layer, *args)

    monkeypatch.setattr(layerwise, "quantize_layer", spy)
    return made


@pytest.mark.parametrize("sequential", [False, True])
def test_a_stopped_run_goes_on_with_what_is_finished_and_comes_to_the_same_bytes(
    sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QuantSettings(refine_sweeps=0, sequential=sequential)
    model_map = map_model(tiny_model("olmoe"))
    whole = run(model_map, tmp_path / "whole", settings=settings)
    made = made_layers(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(model_map, tmp_path / "packed", settings=settings, progress=stop_after_one)
    assert made == [0]
    result = run(model_map, tmp_path / "packed", settings=settings)
    assert made == [0, 1]
    for file in sorted(whole.path.iterdir()):
        if file.name not in ("quantize_report.json", "SHA256SUMS"):
            assert file.read_bytes() == (result.path / file.name).read_bytes(), file.name
    first, second = report_of(whole), report_of(result)
    assert [r["output_error"] for r in first["matrices"]] == [
        r["output_error"] for r in second["matrices"]
    ]
    assert first["utilization"] == second["utilization"]
    assert result.quantized_bytes == whole.quantized_bytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed", "whole"]


def test_a_finished_layer_that_was_damaged_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        run(model_map, tmp_path / "packed", progress=stop_after_one)
    file = tmp_path / "packed.part" / "checkpoint" / "model-layer-000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    made = made_layers(monkeypatch)
    run(model_map, tmp_path / "packed")
    assert made == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": QuantSettings(refine_sweeps=1)}, "settings.refine_sweeps was 0, now 1"),
        ({"tokens": tiny_tokens(4, 16, 3)}, "windows was"),
        ({"batch_size": 4}, "batch_size was 2, now 4"),
        ({"facts": {"model_digest": "ab"}}, "model_digest was"),
    ],
)
def test_an_unfinished_checkpoint_of_another_job_is_refused_and_dropped_on_request(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        run(model_map, tmp_path / "packed", progress=stop_after_one)
    with pytest.raises(StoreError, match=f"another job .{words}"):
        run(model_map, tmp_path / "packed", **changes)
    assert (tmp_path / "packed.part" / "layers" / "000.json").exists()
    made = made_layers(monkeypatch)
    run(model_map, tmp_path / "packed", overwrite=True, **changes)
    assert made == [0, 1] and [p.name for p in tmp_path.iterdir()] == ["packed"]


def test_a_disk_that_is_too_small_is_told_before_a_layer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("llama"))
    n_bytes = mixed_assignment(model_map).count_bits(model_map.inventory).checkpoint_bytes
    made = made_layers(monkeypatch)
    monkeypatch.setattr(
        pipeline.shutil, "disk_usage", lambda path: SimpleNamespace(free=n_bytes - 1)
    )
    with pytest.raises(StoreError, match=f"packed.part needs {n_bytes} bytes more and .* free"):
        run(model_map, tmp_path / "packed")
    assert not made and not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_keeps_what_is_finished_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("llama"))
    plain = checkpoint.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "model.norm.weight" in tensors:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        plain(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            StoreError, match=r"checkpoint/model-kept\.safetensors .* needs \d+ by"
        ):
            run(model_map, tmp_path / "packed")
    folder = tmp_path / "packed.part"
    assert len(list((folder / "layers").iterdir())) == 2
    assert not list((folder / "checkpoint").glob("*.part"))
    made = made_layers(monkeypatch)
    load(run(model_map, tmp_path / "packed").path)
    assert not made


def test_an_existing_target_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine.txt").write_text("precious")
    with pytest.raises(StoreError, match="exists and is no packed checkpoint"):
        run(map_model(tiny_model("llama")), tmp_path / "packed")
    assert (tmp_path / "packed" / "mine.txt").read_text() == "precious"


def test_the_weights_of_the_model_are_not_changed(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("mixtral"))
    run(model_map, tmp_path / "packed")
    original = map_model(tiny_model("mixtral"))
    for matrix in original.inventory.matrices:
        assert torch.equal(model_map.view(matrix.name), original.view(matrix.name))


def test_the_same_run_writes_the_same_bytes(made: Made, tmp_path: Path) -> None:
    paths = [made("olmoe").path, run(map_model(tiny_model("olmoe")), tmp_path / "b").path]
    for file in sorted(paths[0].glob("*.safetensors")):
        assert file.read_bytes() == (paths[1] / file.name).read_bytes()
