"""llama.cpp as an engine: a directory's one file, its logits, and what is refused."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from alphaquant.errors import ModelError
from alphaquant.evaluators.engines import llama_cpp
from alphaquant.evaluators.engines.llama_cpp import open_llama_cpp
from alphaquant.evaluators.engines.protocol import EngineRequest
from alphaquant.exports.gguf.writer import MODEL_FILE
from alphaquant.testing.llama.exported import save_rounded, write_float32

pytestmark = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp (the extra llamacpp) is not installed"
)


def test_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = save_rounded("olmoe", tmp_path / "packed", lambda matrix: "bf16")
    (tmp_path / "export").mkdir()
    write_float32(tmp_path / "packed", tmp_path / "export" / MODEL_FILE)
    with open_llama_cpp(EngineRequest(tmp_path / "export", "auto", 24)) as engine:
        for tokens in (np.arange(3, 27), np.arange(90, 60, -2)):  # nothing is left of the first
            with torch.no_grad():
                right = model(torch.from_numpy(tokens).unsqueeze(0)).logits[0].numpy()
            found = engine.logits(tokens)
            assert found.shape == right.shape
            assert np.linalg.norm(found - right) < 1e-5 * np.linalg.norm(right)
        assert engine.facts["engine"] == "llama.cpp"
        assert engine.facts["file"] == MODEL_FILE


def test_directory_without_one_file_is_refused(tmp_path: Path) -> None:
    for n_files in (0, 2):
        for i in range(n_files):
            (tmp_path / f"{i}.gguf").write_bytes(b"GGUF")
        says = f"holds {n_files} GGUF files, and one is run; give the file"
        with pytest.raises(ModelError, match=says):
            open_llama_cpp(EngineRequest(tmp_path, "auto", 24)).__enter__()


def test_library_with_other_structures_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_rounded("olmoe", tmp_path / "packed", lambda matrix: "bf16")
    write_float32(tmp_path / "packed", tmp_path / MODEL_FILE)
    monkeypatch.setattr(llama_cpp, "_KV_TYPES", (0, 1))  # numbers of tokens
    with (
        pytest.raises(ModelError, match=r"has other structures than .*install xllamacpp=="),
        open_llama_cpp(EngineRequest(tmp_path, "auto", 24)) as engine,
    ):
        engine.logits(np.arange(3, 27))


def test_file_that_is_none_is_told_in_its_words(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not what it says")
    with pytest.raises(ModelError, match=r"llama.cpp does not load .*model.gguf \(.+\); give"):
        open_llama_cpp(EngineRequest(file, "auto", 24)).__enter__()
