"""A GGUF file is converted once, whole or not at all, and only where nothing better is there."""

import json
import shutil
from pathlib import Path

import pytest

from alphaquant.errors import ModelError, StoreError
from alphaquant.files import locked, sha256_of
from alphaquant.models.gguf import converted as module
from alphaquant.models.gguf.converted import GgufOrigin, converted, find_gguf, origin_of
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.gguf_files import save_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_gguf(path, "llama", "Q4_0", split="smollm")
    return path


def test_a_second_conversion_reads_the_first(tiny: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    first = converted(tiny, tmp_path, lambda *step: steps.append(step))
    assert first.parent == tmp_path / "gguf" / sha256_of(tiny)
    assert steps[0] == ("convert", 0, steps[-1][2])
    assert steps[-1] == ("convert", len(steps) - 1, len(steps) - 1)
    written = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    shutil.copy(tiny, tmp_path / "copy.gguf")
    assert converted(tmp_path / "copy.gguf", tmp_path, lambda *step: steps.append(step)) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == written
    assert [folder.name for folder in first.parent.iterdir()] == [first.name]


def test_a_conversion_that_stops_leaves_nothing_and_the_next_one_is_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(module, "GgufOrigin", None)
        with pytest.raises(TypeError):
            converted(tiny, cache)
    assert not cache.exists()
    left = converted(tiny, cache)
    (left / "gguf.json").unlink()  # as a kill between two writes would leave it
    left.rename(left.with_name(f"{left.name}.part"))
    assert origin_of(converted(tiny, cache)) is not None
    assert [folder.name for folder in left.parent.iterdir()] == [left.name]


def test_a_file_that_another_process_converts_is_left_to_it(tiny: Path, tmp_path: Path) -> None:
    lock = tmp_path / "gguf" / sha256_of(tiny) / ".lock"
    with (
        locked(lock, "the other"),
        pytest.raises(StoreError, match=r"conversion of .*tiny.gguf is in use.*ALPHAQUANT_CACHE"),
    ):
        converted(tiny, tmp_path)


def test_the_checkpoint_says_what_it_was_made_from(tiny: Path, tmp_path: Path) -> None:
    found = origin_of(converted(tiny, tmp_path))
    assert found is not None
    assert (found.file, found.sha256) == ("tiny.gguf", sha256_of(tiny))
    assert set(found.types) == {"Q4_0"}
    quantized, unread = found.notes
    assert "tiny.gguf is quantized already (99.9 % Q4_0 of its weights)" in quantized
    assert "results of 4 bits and more compare with a quantized original" in quantized
    assert "does not read 1 settings of tiny.gguf" in unread
    assert unread.endswith("tokenizer.ggml.pre smollm")
    assert origin_of(tmp_path) is None


@pytest.mark.parametrize(
    ("types", "bits"),
    [
        ({"Q4_K": 0.5, "Q6_K": 0.5}, 4),
        ({"IQ3_XXS": 0.9, "Q2_K": 0.01}, 3),
        ({"TQ1_0": 1.0}, 1),
        ({"MXFP4": 0.9, "Q8_0": 0.1}, 4),
        ({"Q8_0": 0.01}, 8),
    ],
)
def test_the_coarsest_common_type_says_which_results_are_affected(
    types: dict[str, float], bits: int
) -> None:
    (note,) = GgufOrigin("a.gguf", "0", types, 4.5).notes
    assert f"results of {bits} bits and more" in note


def test_a_file_of_floats_needs_no_note() -> None:
    assert GgufOrigin("a.gguf", "0", {}, 16.0).notes == []


def test_an_architecture_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes().replace(b"llama", b"mamba")
    (tmp_path / "tiny.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="architecture mamba; GGUF files of llama, qwen2, .* are"):
        converted(tmp_path / "tiny.gguf", tmp_path / "cache")


def test_safetensors_win_over_a_gguf_file_beside_them(tiny: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "both", "llama")
    shutil.copy(tiny, folder)
    assert find_gguf(folder) is None
    (folder / "model.safetensors").unlink()
    assert find_gguf(folder) == folder / "tiny.gguf"
    shutil.copy(tiny, folder / "other.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files \(other.gguf, tiny.gguf\) .*name one"):
        find_gguf(folder)


def test_a_file_is_known_by_its_first_bytes_or_its_name(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny, tmp_path / "model.bin")
    (tmp_path / "text.bin").write_text("hello")
    assert find_gguf(tmp_path / "model.bin") == tmp_path / "model.bin"
    assert find_gguf(tmp_path / "text.bin") is None
    assert find_gguf("org/name") is None
    with pytest.raises(ModelError, match=r"lost.gguf is not there; give a GGUF file"):
        find_gguf(tmp_path / "lost.gguf")


def test_the_record_is_written_last(tiny: Path, tmp_path: Path) -> None:
    folder = converted(tiny, tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert max(times, key=lambda name: times[name]) == "gguf.json"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
