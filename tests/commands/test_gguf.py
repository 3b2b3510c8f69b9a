"""Every command takes a GGUF file as a model, and says what its original is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.evaluate_text import evaluation_json
from alphaquant.commands.inspect import inspect_config
from alphaquant.commands.quantize import dry_run, quantize
from alphaquant.commands.search import search
from alphaquant.commands.sensitivity import measure_expert_sensitivity, sensitivity_json
from alphaquant.errors import ModelError
from alphaquant.models.gguf.converted import converted
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.testing.checkpoints import save_texts
from alphaquant.testing.gguf_files import save_gguf

NOTE = "tiny.gguf is quantized already (99.9 % Q8_0 of its weights)"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.gguf`, texts, a configuration and a cache."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "model").mkdir()
    save_gguf(folder / "model" / "tiny.gguf", "qwen3moe", "Q8_0")
    save_texts(folder)
    (folder / "int4.json").write_text('{"default": {"wq": "int4", "group_size": 32}}')
    return folder


@pytest.fixture(autouse=True)
def cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALPHAQUANT_CACHE", str(here / "cache"))
    return here / "cache"


@pytest.fixture
def model(here: Path) -> str:
    return str(here / "model" / "tiny.gguf")


def test_a_search_says_it_in_run_json_the_report_and_the_log_once(
    here: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stages: list[str] = []
    spec = SearchSpec.of(
        model=model,
        budget="5.2bits",
        formats="int3-g32,int4-g32,int8-row",
        trials=2,
        calibration=str(here / "calibration.txt"),
        calibration_samples=8,
        evaluation=str(here / "search.txt"),
        evaluation_samples=4,
        heldout=str(here / "heldout.txt"),
        heldout_samples=4,
        seq_len=32,
        refine_sweeps=0,
        n_starts=1,
        out=tmp_path / "out",
        cache=tmp_path / "cache",
    )
    search(spec, progress=lambda stage, *_: stages.append(stage))
    assert "convert" in stages
    assert len([r for r in caplog.records if NOTE in r.getMessage()]) == 1
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["facts"]
    assert facts["gguf"]["types"] == {"Q8_0": pytest.approx(0.9986, abs=1e-3)}
    front = json.loads((tmp_path / "out" / "front.json").read_text())
    assert front["provenance"]["gguf"] == facts["gguf"]
    for name in ("report.md", "report.html"):
        assert (tmp_path / "out" / name).read_text().count(NOTE) == 1
    stages.clear()
    search(spec, progress=lambda stage, *_: stages.append(stage))
    assert "convert" not in stages


def test_a_folder_with_nothing_else_is_quantized_as_its_file_is(
    here: Path, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    packed = {}
    for name in (model, str(here / "model")):
        out = tmp_path / str(len(packed))
        spec = QuantizeSpec.of(model=name, config=here / "int4.json", out=out, method="rtn")
        assert dry_run(spec).counts.checkpoint_bytes == quantize(spec).checkpoint_bytes
        packed[name] = b"".join(p.read_bytes() for p in sorted(out.glob("*.safetensors")))
        report = json.loads((out / "quantize_report.json").read_text())
        assert report["gguf"]["file"] == "tiny.gguf"
        assert any(NOTE in warning for warning in report["warnings"])
    assert len(set(packed.values())) == 1
    assert NOTE in caplog.text


def test_an_evaluation_compares_with_the_decoded_original(
    here: Path, model: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data: dict[str, Any] = {"data": str(here / "heldout.txt"), "samples": 2, "seq_len": 16}
    decoded = str(converted(Path(model), cache))
    found = evaluate(EvaluateSpec(model=decoded, reference=model, **data))
    assert {s.metric: s.value for s in found.scores}["kl"] == pytest.approx(0, abs=1e-7)
    written = evaluation_json(found)
    assert written["reference"] == model
    assert written["gguf"]["reference"]["bits_per_weight"] == pytest.approx(8.5, abs=0.2)
    assert caplog.text.count(NOTE) == 1


def test_sensitivities_and_inspections_take_it_too(here: Path, model: str) -> None:
    spec = SensitivitySpec.of(
        model=model,
        format="int3-g32",
        calibration=str(here / "calibration.txt"),
        calibration_samples=4,
        seq_len=32,
        method="rtn",
    )
    found = sensitivity_json(measure_expert_sensitivity(spec))
    assert found["gguf"]["file"] == "tiny.gguf"
    inspection = inspect_config(here / "int4.json", model)
    assert inspection.model.name == model
    assert NOTE in inspection.warnings[0]


def test_a_damaged_file_leaves_nothing(here: Path, model: str, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "tiny.gguf")
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.truncate(100_000)
    before = sorted((here / "cache").rglob("*"))
    spec = QuantizeSpec.of(
        model=str(tmp_path / "tiny.gguf"),
        config=here / "int4.json",
        out=tmp_path / "out",
        method="rtn",
    )
    with pytest.raises(ModelError, match=r"tiny.gguf is damaged or incomplete"):
        quantize(spec)
    assert not (tmp_path / "out").exists()
    assert sorted((here / "cache").rglob("*")) == before
