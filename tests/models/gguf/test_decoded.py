"""GGUF files become the model that they were made from, tensor by tensor, or are refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from alphaquant.demo import model_path
from alphaquant.errors import ModelError
from alphaquant.models.gguf.converted import converted
from alphaquant.models.gguf.decoded import ARCHITECTURES, read_config, unread_settings
from alphaquant.models.gguf.header import read_header
from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.testing.gguf_files import save_gguf

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
"""Types with blocks of at most 32 weights that gguf can quantize to; those of 256 are below."""


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(2, 26)[None] * 37
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_file_computes_what_its_model_computed(architecture: str, tmp_path: Path) -> None:
    model: Any = save_gguf(tmp_path / "tiny.gguf", architecture)
    found: Any = load_model(converted(tmp_path / "tiny.gguf", tmp_path / "cache"))
    assert type(found) is type(model)
    assert torch.equal(logits(found), logits(model))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_decodes_to_bfloat16_of_what_gguf_says(kind: str, tmp_path: Path) -> None:
    model: Any = save_gguf(tmp_path / "tiny.gguf", "qwen2", kind)
    found = read_tensors(converted(tmp_path / "tiny.gguf", tmp_path / "cache"))
    name = "model.layers.1.mlp.down_proj.weight"
    wanted = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(model.state_dict()[name].numpy(), wanted)
    values = torch.from_numpy(np.array(gguf.quants.dequantize(packed, wanted)))
    assert torch.equal(found[name].float(), values.to(torch.bfloat16).float())


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_super_blocks_of_256_decode_too(kind: str, tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", "qwen2", kind, hidden_size=256, intermediate_size=256)
    found = read_tensors(converted(tmp_path / "tiny.gguf", tmp_path / "cache"))
    weight = found["model.layers.0.mlp.up_proj.weight"]
    assert len(weight[0].unique()) == 3


def test_the_tokenizer_is_the_one_in_the_file(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    found = load_tokenizer(converted(tmp_path / "tiny.gguf", tmp_path / "cache"))
    text = "The winter of 1846 was cold,\n  and long."
    assert found(text).input_ids == load_tokenizer(model_path())(text).input_ids


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    save_gguf(tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(ModelError, match=r"1 tensors have no place .*: rope_freqs.weight"):
        converted(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_parameter_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", without=("blk.1.ffn_norm.weight",))
    with pytest.raises(ModelError, match=r"1 parameters .*model.layers.1.post_attention_layern"):
        converted(tmp_path / "tiny.gguf", tmp_path / "cache")


def test_a_tensor_of_another_shape_than_the_metadata_says_is_named(tmp_path: Path) -> None:
    extra = {"output.weight": np.ones((10, 64), np.float32)}
    save_gguf(tmp_path / "tiny.gguf", extra=extra, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"lm_head.weight \[10, 64\] instead of \[4096, 64\]"):
        converted(tmp_path / "tiny.gguf", tmp_path / "cache")


def test_rope_that_transformers_would_not_scale_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf", settings={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ModelError, match=r"llama.rope.scaling.type yarn.*original checkpoint"):
        read_config(read_header(tmp_path / "tiny.gguf"))


def test_settings_that_nobody_reads_are_told(tmp_path: Path) -> None:
    settings = {"llama.some_scale": 2.0, "general.note": "about nothing"}
    save_gguf(tmp_path / "tiny.gguf", settings=settings, split="smollm")
    found = unread_settings(read_header(tmp_path / "tiny.gguf"))
    assert found == ("llama.some_scale 2.0", "tokenizer.ggml.pre smollm")


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model: Any = save_gguf(tmp_path / "tiny.gguf", tie_word_embeddings=True)
    found: Any = load_model(converted(tmp_path / "tiny.gguf", tmp_path / "cache"))
    assert found.config.tie_word_embeddings is True
    assert torch.equal(logits(found), logits(model))
