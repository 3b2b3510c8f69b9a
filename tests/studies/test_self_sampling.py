"""Text that a model writes itself: the same one again, of its own predictions, kept by digest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.errors import ConfigError, DataError, ModelError
from alphaquant.specs.search import SearchSpec
from alphaquant.studies import self_sampling
from alphaquant.studies.inputs import Source, load_source, read_text
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.texts.windows import check_sources


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Source:
    return load_source(str(tiny), "cpu", "auto", cache=tmp_path / "cache")


def written(source: Source, seed: int = 0, text: str = "ebss", n: int = 3) -> torch.Tensor:
    return read_text(source, text, "calibration", n, 12, seed).tokens


def test_a_text_is_kept_and_another_seed_starts_otherwise(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(source)
    assert first.shape == (3, 12)
    assert len(list((source.cache or Path()).glob("written/*.safetensors"))) == 1
    other = written(source, seed=1)
    assert not torch.equal(first[:, 0], other[:, 0])
    monkeypatch.setattr(self_sampling, "_write", None)
    assert torch.equal(written(source), first)


def test_the_same_text_is_written_again(source: Source) -> None:
    first = written(source)
    for file in (source.cache or Path()).glob("written/*"):
        file.unlink()
    assert torch.equal(written(source), first)


def test_texts_written_together_are_those_written_apart(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = written(source, n=4)
    monkeypatch.setattr(self_sampling, "BATCH", 1)  # and part of the key
    assert torch.equal(written(source, n=4), first)


def test_a_mixture_has_written_and_read_windows(source: Source) -> None:
    found = read_text(source, "ebss=0.5,demo=0.5", "calibration", 4, 12, 0)
    assert found.domains == ("ebss", "ebss", "demo", "demo")
    assert torch.equal(found.tokens[:2], written(source, n=2))
    assert found.provenance()["source"] == "ebss=0.5,demo=0.5"


def test_first_tokens_are_no_special_ones(source: Source) -> None:
    special = set(source.tokenizer.all_special_ids)
    starts = written(source, n=20)[:, 0].tolist()
    assert not special & set(starts)
    assert len(set(starts)) > 10


def test_a_cache_that_gives_other_predictions_is_noticed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = self_sampling._ModelWriter._read

    def forgetting(writer: Any, tokens: Any, past: Any = None) -> Any:
        return read(writer, tokens)  # every token is the first one

    monkeypatch.setattr(self_sampling._ModelWriter, "_read", forgetting)
    with pytest.raises((ModelError, RuntimeError), match="other predictions with its cache"):
        written(source)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    dense = load_source(str(save_tiny(tmp_path / "dense", "llama", hidden_size=40)), "cpu", "auto")
    with pytest.raises(ConfigError, match=r"balances routed experts.*LlamaForCausalLM"):
        written(dense)


@pytest.mark.parametrize("role", ["search", "heldout"])
def test_nothing_is_compared_on_what_a_model_writes(role: str, source: Source) -> None:
    with pytest.raises(DataError, match=f"{role} text 'ebss'.*is for calibration"):
        check_sources({role: "ebss"})
    with pytest.raises(DataError, match="written by the model that is quantized"):
        read_text(source, "ebss", role, 2, 12, 0)
    SearchSpec.of(budget="4bits", calibration="ebss")
