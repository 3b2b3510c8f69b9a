"""`aq-quantize --export gguf` from its command line: what it writes, says and refuses."""

import json
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant.models.gguf.header import read_header
from alphaquant.quant.ggml import library
from alphaquant.testing.checkpoints import save_tiny

WIDTHS = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gguf") / "model", **WIDTHS)


def options(model: Path, folder: Path, content: Any) -> list[str]:
    (folder / "config.json").write_text(json.dumps(content))
    given = ["--model", str(model), "--config", str(folder / "config.json"), "--method", "rtn"]
    return [*given, "--export", "gguf", "--out", str(folder / "out")]


def test_the_last_line_is_the_command_that_serves_the_file(
    run: Any, model: Path, tmp_path: Path
) -> None:
    content = {"default": {"wq": "int4", "group_size": 32}}
    done = run("aq-quantize", *options(model, tmp_path, content))
    assert done.code == 0, done.err
    out = tmp_path / "out"
    assert done.err.splitlines()[-1] == f"llama-server -m {out}/model.gguf"
    assert not list(tmp_path.glob("*.part"))
    summary = json.loads(done.out)
    assert summary["export"]["tokenizer"] == "gpt2 split as gpt-2"
    assert summary["export"]["types"]["Q4_0"] == 2 * 7
    assert summary["export"]["run"] == done.err.splitlines()[-1]
    files = sorted(path.name for path in out.iterdir())
    assert files == ["SHA256SUMS", "model.gguf", "quantize_report.json"]
    assert read_header(out / "model.gguf").architecture == "olmoe"
    assert json.loads((out / "quantize_report.json").read_text())["export"]["format"] == "gguf"


def test_that_command_quotes_a_directory_with_spaces(
    run: Any, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "two words"
    folder.mkdir()
    done = run("aq-quantize", *options(model, folder, {"default": {"wq": "bf16"}}))
    assert shlex.split(done.err.splitlines()[-1])[2:] == [f"{folder}/out/model.gguf"]


def test_tensors_that_the_model_does_not_load_are_left_out_and_told(
    run: Any, model: Path, tmp_path: Path
) -> None:
    source, extra = tmp_path / "source", "model.layers.0.self_attn.rotary_emb.inv_freq"
    shutil.copytree(model, source)
    (file,) = source.glob("*.safetensors")
    save_file({**load_file(file), extra: torch.ones(4)}, file, {"format": "pt"})
    done = run("aq-quantize", *options(source, tmp_path, {"default": {"wq": "bf16"}}))
    assert done.code == 0, done.err
    assert json.loads(done.out)["export"]["left_out"] == [extra]
    header = read_header(tmp_path / "out" / "model.gguf")
    assert not [t.name for t in header.tensors if "rot" in t.name]


def test_a_tokenizer_that_is_not_written_is_refused_before_weights_are_loaded(
    run: Any, model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "model": {**content["model"], "type": "Unigram"}}))
    given = options(source, tmp_path, {"default": {"wq": "bf16"}})
    done = run("aq-quantize", *given, "--dry-run")
    assert done.code == 1
    assert f"{file} is of type Unigram, and BPE is written" in done.err


def test_a_plan_that_has_no_twin_is_refused_before_anything_is_written(
    run: Any, model: Path, tmp_path: Path
) -> None:
    done = run("aq-quantize", *options(model, tmp_path, {"default": {"wq": "int3"}}))
    assert done.code == 1
    assert "is int3-g128, which no type of llama.cpp holds exactly" in done.err
    assert not (tmp_path / "out").exists()


def test_types_of_llama_cpp_without_its_library_are_refused_with_what_to_install(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "is_installed", lambda: False)
    done = run("aq-quantize", *options(model, tmp_path, {"default": {"wq": "iq4_nl"}}))
    assert done.code == 1
    assert "iq4_nl: weights become llama.cpp's types by its own code" in done.err
    assert "pip install 'aq-search[llamacpp]'" in done.err
    assert "formats of ours (nl4-g32 is iq4_nl, number for number)" in done.err
    given = ("--model", "demo", "--profile", "gguf", "--budget", "3bits", "--plan")
    assert "aq-search[llamacpp]" in run("aq-search", *given).err


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_types_of_llama_cpp_are_written_as_they_are(run: Any, model: Path, tmp_path: Path) -> None:
    overrides = [{"pattern": "*.down_proj", "wq": "iq4_nl"}]
    content = {"default": {"wq": "q3_k"}, "overrides": overrides}
    done = run("aq-quantize", *options(model, tmp_path, content))
    assert done.code == 0, done.err
    types = json.loads(done.out)["export"]["types"]
    assert (types["Q3_K"], types["IQ4_NL"]) == (2 * 6, 2)
