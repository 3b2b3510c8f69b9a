"""Names to devices, lengths, models and the cache directory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from alphaquant.errors import DataError, ModelError
from alphaquant.progress import Stage
from alphaquant.studies.inputs import (
    SOURCE_STEPS,
    cache_dir,
    find_device,
    load_source,
    model_location,
    read_text,
    seq_len_of,
)
from alphaquant.testing.checkpoints import save_tiny


def model_of_length(limit: int | None) -> Any:
    text = SimpleNamespace() if limit is None else SimpleNamespace(max_position_embeddings=limit)
    model = nn.Identity()
    model.config = SimpleNamespace(get_text_config=lambda: text)
    return model


@pytest.mark.parametrize(
    ("name", "limit", "asked", "found"),
    [
        ("demo", 2048, None, 256),
        ("demo", 128, None, 128),
        ("other", 32768, None, 512),
        ("other", 300, None, 300),
        ("other", None, None, 512),
        ("other", 512, 512, 512),
        ("other", 512, 7, 7),
        ("other", None, 5000, 5000),
    ],
)
def test_windows_are_as_long_as_asked_or_as_the_model_takes(
    name: str, limit: int | None, asked: int | None, found: int
) -> None:
    assert seq_len_of(name, model_of_length(limit), asked) == found


def test_windows_beyond_the_model_are_refused() -> None:
    with pytest.raises(DataError, match="513 tokens asked; other takes 1 to 512; lower --seq-len"):
        seq_len_of("other", model_of_length(512), 513)


def test_auto_and_cpu_are_devices() -> None:
    assert find_device("auto") in ("cpu", "cuda")
    assert find_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["quantum", "meta", "mps", "cuda:99", ""])
def test_device_that_holds_no_numbers_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=r"device .* cannot be used .*; use cpu") as caught:
        find_device(name)
    assert "\n" not in str(caught.value)


def test_demo_is_the_embedded_model_and_anything_else_is_itself() -> None:
    assert (Path(model_location("demo")) / "config.json").exists()
    assert model_location("org/model") == "org/model"


def test_source_says_what_it_is_and_runs_as(tiny: Path) -> None:
    told: list[tuple[str, int, int]] = []
    source = load_source(str(tiny), "cpu", "auto", progress=lambda *a: told.append(a))
    loading = [done for stage, done, total in told if (stage, total) == (Stage.LOAD, SOURCE_STEPS)]
    assert loading == list(range(1, SOURCE_STEPS + 1))
    assert source.runs_as == "float32-cpu"
    assert source.facts() == {
        "model": str(tiny),
        "model_type": "olmoe",
        "model_digest": source.digest,
    }
    half = load_source(str(tiny), "cpu", "bfloat16")
    assert half.runs_as == "bfloat16-cpu"
    assert half.digest == source.digest


def test_a_text_needs_a_tokenizer_and_weights_do_not(tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    source = load_source(str(bare), "cpu", "auto")
    assert source.tokenizer is None
    with pytest.raises(ModelError, match=r"bare has no tokenizer.*copy .*tokenizer\.json"):
        read_text(source, "demo", "search", 1, 8, 0)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", vocab_size=100)
    source = load_source(str(small), "cpu", "auto")
    with pytest.raises(
        DataError, match=r"token id \d+, and .*small embeds the ids 0 to 99; .*4096"
    ):
        read_text(source, "demo", "search", 1, 8, 0)


def test_windows_of_a_text_start_as_asked(tiny: Path) -> None:
    source = load_source(str(tiny), "cpu", "auto")
    auto, never, always = (
        read_text(source, "demo", "search", 2, 8, 0, bos) for bos in ("auto", "never", "always")
    )
    assert auto == never and auto.bos == ()
    assert always.bos == (source.tokenizer.bos_token_id,)
    assert always.tokens.shape == (2, 8) and always.digest != auto.digest


def test_cache_is_as_asked_then_of_the_environment_then_at_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALPHAQUANT_CACHE", "/env")
    assert cache_dir(Path("/asked")) == Path("/asked")
    assert cache_dir(None) == Path("/env")
    monkeypatch.delenv("ALPHAQUANT_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir(None) == Path("/home/me/.cache/alphaquant")
