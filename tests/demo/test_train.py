"""The training script runs from text to a checkpoint that loads, and repeats exactly."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaquant.demo import text_path
from alphaquant.demo.train import ModelShape, Recipe, encode, main, train_model, train_tokenizer
from alphaquant.errors import DataError

TINY = ModelShape(
    vocab_size=300,
    hidden_size=32,
    expert_size=16,
    n_layers=1,
    n_heads=2,
    n_experts=4,
    experts_per_token=2,
)
TINY_RECIPE = Recipe(n_steps=3, window_tokens=16, batch_windows=2)


@pytest.fixture(scope="module")
def text() -> str:
    return text_path("calibration").read_text(encoding="utf-8")[:8000]


@pytest.fixture
def text_file(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "books.txt"
    path.write_text(text, encoding="utf-8")
    return path


def tiny_arguments(text_file: Path, out: Path) -> list[str]:
    sizes = "--steps 3 --window 16 --batch 2 --layers 1 --hidden 32 --experts 4 --vocab 300"
    return ["--text", str(text_file), "--out", str(out), *sizes.split()]


def test_command_writes_a_bf16_checkpoint_with_tokenizer(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(tiny_arguments(text_file, out)) == 0
    assert capsys.readouterr().out == f"{out}\n"
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (model.dtype, model.config.model_type) == (torch.bfloat16, "olmoe")
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_existing_output_folder_is_left_alone(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_arguments(text_file, tmp_path)) == 1
    assert "exists; give --out a new folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text_file]


def test_missing_text_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_arguments(tmp_path / "none.txt", tmp_path / "out")) == 1
    assert "no text file at" in capsys.readouterr().err


def test_text_that_is_not_utf8_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Ántonia".encode("latin-1"))
    assert main(tiny_arguments(latin, tmp_path / "out")) == 1
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_length_that_is_not_positive_is_a_usage_error(steps: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--text", "t", "--out", str(tmp_path / "out"), "--steps", steps])


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(text: str) -> None:
    tokens = encode(text, train_tokenizer(text, TINY))
    states = [
        train_model(tokens, TINY, Recipe(3, n_steps=3, seed=s, window_tokens=16, batch_windows=2))
        for s in (0, 0, 1)
    ]
    one, same, other = (model.state_dict()["lm_head.weight"] for model in states)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_encoding_round_trips_beyond_ascii(text: str) -> None:
    tokenizer = train_tokenizer(text, TINY)
    sample = "My Ántonia, naïve -- \n\n 1918"
    assert tokenizer.decode(encode(sample, tokenizer)) == sample


def test_encoding_in_pieces_loses_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(text, TINY)
    monkeypatch.setattr("alphaquant.demo.train.ENCODE_CHARS", 1000)
    assert tokenizer.decode(encode(text, tokenizer)) == text


@pytest.mark.parametrize(
    ("n_tokens", "is_enough"), [(TINY_RECIPE.window_tokens, False), (17, True)]
)
def test_one_window_and_one_token_are_the_least_text(n_tokens: int, is_enough: bool) -> None:
    tokens = torch.arange(n_tokens)
    if is_enough:
        train_model(tokens, TINY, TINY_RECIPE)
        return
    with pytest.raises(DataError, match="16 tokens of text"):
        train_model(tokens, TINY, TINY_RECIPE)


@pytest.mark.parametrize(
    ("progress", "rate"),
    [(0.0, 2.5e-3), (0.3, 2.5e-3), (0.65, 1.275e-3), (1.0, 5e-5), (1.2, 5e-5)],
)
def test_learning_rate_is_constant_and_then_a_cosine(progress: float, rate: float) -> None:
    assert Recipe().rate(progress) == pytest.approx(rate, rel=1e-12)


def test_progress_follows_steps_when_given_and_time_otherwise() -> None:
    assert Recipe(n_steps=10).progress(5, seconds=1e6) == 0.5
    assert Recipe(minutes=2.0).progress(5, seconds=30.0) == 0.25


def test_qwen2_moe_has_a_shared_expert_and_loads(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    chosen = ["--architecture", "qwen2_moe", "--top-k", "2"]
    assert main([*tiny_arguments(text_file, out), *chosen]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.config.model_type, model.config.num_experts_per_tok) == ("qwen2_moe", 2)
    assert any(".shared_expert." in name for name, _ in model.named_parameters())


def test_llama_is_dense_and_loads(
    text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main([*tiny_arguments(text_file, out), "--architecture", "llama"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "llama"
    assert not any("expert" in name for name, _ in model.named_parameters())
