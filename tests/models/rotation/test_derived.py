"""A rotated checkpoint predicts what the original does, or the architecture is refused by name."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.models.rotation import derived
from alphaquant.models.rotation.derived import rotated, rotation_of
from alphaquant.models.rotation.hadamard import Rotation
from alphaquant.models.rotation.streams import Streams
from alphaquant.models.walk import relative_error
from alphaquant.testing.any_model import routed_architectures, tiny_model_of
from alphaquant.testing.models import FAMILIES, tiny_model

MEAN = "is no root mean square norm"
ADDED = "normalizes what is added to the residual stream"
ELSE = "something else reads or writes its stream"
TOWERS = "has towers for images or sound"
ENDS = "no plain embeddings or head"

REFUSED = {
    "afmoe": ADDED,
    "axk1": ADDED,
    "axk2": ELSE,
    "beam": ADDED,
    "cohere2_moe": MEAN,
    "dbrx": MEAN,
    "deepseek_v4": ELSE,
    "doge": "promises routed experts",
    "dots3_note": TOWERS,
    "flex_olmo": ADDED,
    "gemma4": TOWERS,
    "gemma4_text": ADDED,
    "hy_v4": ELSE,
    "inkling2_text": ENDS,
    "inkling_text": ENDS,
    "jetmoe": "unsupported layout",
    "kolibri1": ADDED,
    "llama4": TOWERS,
    "longcat_flash": ELSE,
    "minimax": ELSE,
    "phimoe": MEAN,
    "qwen3_5_moe": TOWERS,
    "qwen4_exp": TOWERS,
    "qwen4_exp_text": "no norm gives what the head of",
    "zaya": ELSE,
}
"""Refused by name, and a part of the message; all others are right."""

FAST = ("qwen2_moe", "deepseek_v3", "gpt_oss", "listed_moe")
"""Families with a way of their own to hold experts or biases; the others are slow ones."""

FAST_REFUSED = ("cohere2_moe", "flex_olmo", "longcat_flash", "qwen3_5_moe")
"""One of each common reason."""


def saved(model: nn.Module, folder: Path) -> Path:
    """A model whose norms have gains, in float32, so that files round nothing."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            parameter.data.add_(torch.rand(parameter.shape, generator=generator) * 0.5)
    typed: Any = model
    typed.config.dtype = torch.float32
    typed.save_pretrained(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model: Any = load_model(folder)
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, min(vocabulary, 4000), (2, 24), generator=generator)
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def assert_right(model: nn.Module, folder: Path) -> Path:
    source = saved(model, folder / "source")
    found = rotated(source, "tiny", 0, folder / "cache")
    assert relative_error(logits(found), logits(source)) < 1e-3
    plain, turned = load_model(source).state_dict(), load_model(found).state_dict()
    changed = [n for n in plain if not torch.equal(plain[n], turned[n])]
    # what is no vector is a matrix of the stream or one inside, and most are of the stream
    assert len(changed) > len(plain) / 3
    return found


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow)
                                    for f in FAMILIES])  # fmt: skip
def test_a_rotated_family_predicts_the_same(family: str, tmp_path: Path) -> None:
    found = assert_right(tiny_model(family), tmp_path)
    facts = rotation_of(found)
    assert facts is not None
    assert (facts.matrix, facts.seed, facts.source) == ("Hadamard 20 x 2", 0, "tiny")
    assert max(facts.error, facts.stored_error) < 1e-5


@pytest.mark.parametrize("arch", FAST_REFUSED)
def test_what_cannot_be_rotated_is_refused_by_name(arch: str, tmp_path: Path) -> None:
    source = saved(tiny_model_of(arch), tmp_path / "source")
    with pytest.raises(ModelError, match=REFUSED[arch]):
        rotated(source, arch, 0, tmp_path / "cache")
    left = [p.name for p in (tmp_path / "cache" / "rotated").iterdir() if p.name != "read"]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("arch", routed_architectures())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_architecture_is_rotated_right_or_refused_by_name(arch: str, tmp_path: Path) -> None:
    if arch in REFUSED:
        source = saved(tiny_model_of(arch), tmp_path / "source")
        with pytest.raises(ModelError, match=REFUSED[arch]):
            rotated(source, arch, 0, tmp_path / "cache")
    else:
        assert_right(tiny_model_of(arch), tmp_path)


def test_tied_embeddings_with_a_gain_are_untied(tmp_path: Path) -> None:
    found = assert_right(tiny_model("llama", tie_word_embeddings=True), tmp_path)
    facts = rotation_of(found)
    assert facts is not None and facts.is_untied
    assert json.loads((found / "config.json").read_text())["tie_word_embeddings"] is False
    model: Any = load_model(found)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_tied_embeddings_without_a_gain_stay_tied(tmp_path: Path) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    typed = saved(model, tmp_path / "source")
    loaded: Any = load_model(typed)
    loaded.model.norm.weight.data.fill_(1.0)
    loaded.save_pretrained(typed)
    facts = rotation_of(found := rotated(typed, "tiny", 0, tmp_path / "cache"))
    assert facts is not None and not facts.is_untied
    turned: Any = load_model(found)
    assert turned.lm_head.weight is turned.model.embed_tokens.weight
    assert relative_error(logits(found), logits(typed)) < 1e-3


def test_the_same_rotation_is_found_again_and_another_seed_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = saved(tiny_model("llama"), tmp_path / "source"), tmp_path / "cache"
    first = rotated(source, "tiny", 0, cache)
    shutil.copytree(first, tmp_path / "kept")
    (first / "model-00001-of-00003.safetensors").touch()
    assert rotated(source, "tiny", 0, cache) == first
    other = rotated(source, "tiny", 7, cache)
    assert other != first
    assert not torch.equal(
        load_model(first).state_dict()["model.embed_tokens.weight"],
        load_model(other).state_dict()["model.embed_tokens.weight"],
    )
    assert not caplog.records or caplog.records[0].levelno < logging.ERROR


def test_weights_are_what_the_formula_says(tmp_path: Path) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    found = rotated(source, "tiny", 4, tmp_path / "cache")
    plain, turned = load_model(source).state_dict(), load_model(found).state_dict()
    q = Rotation(40, 4).rotated(torch.eye(40))
    layer = "model.layers.1."
    gain = plain[f"{layer}post_attention_layernorm.weight"]
    for name, wanted in {
        "model.embed_tokens.weight": plain["model.embed_tokens.weight"] @ q,
        f"{layer}mlp.up_proj.weight": plain[f"{layer}mlp.up_proj.weight"] * gain @ q,
        f"{layer}mlp.down_proj.weight": q.T @ plain[f"{layer}mlp.down_proj.weight"],
        f"{layer}post_attention_layernorm.weight": torch.ones(40),
        "lm_head.weight": plain["lm_head.weight"] * plain["model.norm.weight"] @ q,
    }.items():
        assert torch.allclose(turned[name], wanted, atol=1e-5), name


def test_a_reader_that_is_overlooked_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tiny_model("olmoe"), tmp_path / "source")
    whole = derived.find_streams

    def without_router(layer: Any, call: Any) -> Streams:
        found = whole(layer, call)
        readers = tuple(r for r in found.readers if not r.name.endswith("gate"))
        return Streams(found.norms, readers, found.writers)

    monkeypatch.setattr(derived, "find_streams", without_router)
    with pytest.raises(ModelError, match=r"OlmoeForCausalLM with a rotated.*at most 1e-03"):
        rotated(source, "tiny", 0, tmp_path / "cache")


def test_files_that_are_read_back_otherwise_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tiny_model("llama"), tmp_path / "source")
    write = derived._Work._write

    def scrambled(work: Any, state: Any, dtypes: Any) -> None:
        write(work, {n: t.flip(0) if "embed" in n else t for n, t in state.items()}, dtypes)

    monkeypatch.setattr(derived._Work, "_write", scrambled)
    with pytest.raises(ModelError, match="the files of the rotated LlamaForCausalLM predict"):
        rotated(source, "tiny", 0, tmp_path / "cache")


def test_tensors_that_no_model_loads_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = saved(tiny_model("llama"), tmp_path / "source")
    file = source / "model.safetensors"
    save_file({**load_file(file), "mtp.weight": torch.zeros(4, 40)}, file, {"format": "pt"})
    assert map_model(load_model(source)).inventory
    with pytest.raises(ModelError, match=r"1 tensors of the checkpoint.*mtp.weight"):
        rotated(source, "tiny", 0, tmp_path / "cache")


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no safetensors here that could be rotated"):
        rotated(tmp_path, "nothing", 0, tmp_path / "cache")
