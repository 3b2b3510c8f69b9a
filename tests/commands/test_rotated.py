"""`--rotate` from end to end: what is packed, exported and searched is of the rotated model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alphaquant
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.errors import ConfigError
from alphaquant.exports.gguf.writer import MODEL_FILE
from alphaquant.models.gguf.converted import converted
from alphaquant.models.loading import load_model
from alphaquant.spaces.config import load_config
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.testing.llama.exported import add_tokenizer
from alphaquant.testing.packed import served_model

TOKENS = torch.arange(3, 67).reshape(2, 32)
# int8 rounds weights by 0.4 %, and bfloat16 the rotated ones by as much; of other weights the
# logits would have nothing in common with those of the original (1.4).
CLOSE = 0.06
CONFIG = {"default": {"wq": "int8", "group_size": 32}, "rotate": 3}
DENSE = {"tie_word_embeddings": True, "vocab_size": 4096, "num_hidden_layers": 2}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS, use_cache=False).logits.float()
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


@pytest.fixture(
    scope="module", params=["qwen3_moe", pytest.param("llama", marks=pytest.mark.slow)]
)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of experts, and one with tied embeddings that has to be untied."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = DENSE if request.param == "llama" else {"vocab_size": 4096}
    model: Any = served_model(request.param, **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(torch.rand(parameter.shape, generator=generator))
            parameter.copy_(parameter.bfloat16())
    model.to(torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize("export", ["alphaquant", "compressed-tensors", "gguf"])
def test_every_checkpoint_of_a_rotated_model_predicts_what_the_original_does(
    original: Path, export: Any, tmp_path: Path
) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(CONFIG))
    spec = QuantizeSpec.of(
        **{"model": str(original), "config": config, "out": out, "export": export},
        **{"method": "rtn", "cache": tmp_path / "cache"},
    )
    quantize(spec)  # runs what it wrote, and compares
    report = json.loads((out / "quantize_report.json").read_text())
    assert report["rotation"]["seed"] == 3
    assert report["rotation"]["source"] == str(original)
    if export == "alphaquant":
        model: Any = alphaquant.load(out)
    elif export == "gguf":
        model = load_model(converted(out / MODEL_FILE, tmp_path / "back"))
    else:
        model = load_model(out, quantized=True)
    first: Any = load_model(original)
    assert distance(logits(model), logits(first)) < CLOSE
    own, plain = (m.get_input_embeddings().weight for m in (model, first))
    assert float((own - plain).norm() / plain.norm()) > 0.5


def test_a_flag_wins_over_the_configuration(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    reports = []
    for name, changes in {"file": {}, "flag": {"rotate": 5}}.items():
        spec = QuantizeSpec.of(
            **{"model": str(tiny), "config": config, "out": tmp_path / name, "method": "rtn"},
            **{"cache": tmp_path / "cache", **changes},
        )
        quantize(spec)
        reports.append(json.loads((tmp_path / name / "quantize_report.json").read_text()))
    assert [r["rotation"]["seed"] for r in reports] == [3, 5]
    assert reports[0]["model_digest"] != reports[1]["model_digest"]


def test_a_search_compares_with_the_original_and_its_winner_says_the_seed(
    make_spec: Callable[..., SearchSpec], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []
    cache, tiny = tmp_path / "cache", make_spec(tmp_path).checkpoint.model
    spec = make_spec(tmp_path / "out", trials=2, rotate=2, cache=cache)
    result = search(spec, tell=lines.append)
    rotation: Any = result.provenance.rotation
    assert rotation["seed"] == 2
    assert 0 < rotation["kl"] < result.gate.best.kl / 10
    assert any("rotated by Hadamard 32, seed 2: KL of the rotated" in line for line in lines)
    plain = search(make_spec(tmp_path / "plain", trials=2, cache=cache))
    # both are compared with the same predictions, those of the original
    assert len(list((cache / "teachers").iterdir())) == 2
    assert result.original_perplexity == plain.original_perplexity
    assert result.provenance.model_digest != plain.provenance.model_digest
    best = result.folder.path / "best.json"
    assert load_config(best).rotate == 2
    assert load_config(plain.folder.path / "best.json").rotate is None
    made = tmp_path / "made"
    quantize(QuantizeSpec.of(model=tiny, config=best, out=made, cache=cache))
    report = json.loads((made / "quantize_report.json").read_text())
    assert report["bank"]["key"] == result.provenance.bank
    assert report["searched"] is not None
    assert not [r for r in caplog.records if "other weights" in r.message]
    shutil.rmtree(made)


def test_candidates_are_not_rotated(make_spec: Callable[..., SearchSpec], tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out", rotate=2, candidates="a,b", formats="auto")
    with pytest.raises(ConfigError, match="--rotate 2 with --candidates"):
        search(spec)
