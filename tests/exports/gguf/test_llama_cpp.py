"""llama.cpp computes from our files what the dequantized model computes."""

import json
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alphaquant.evaluators.engines.llama_cpp import generate, logits, tokenize
from alphaquant.exports.gguf.twins import twin_of
from alphaquant.exports.gguf.writer import MODEL_FILE, GgufExport
from alphaquant.exports.packed import open_packed
from alphaquant.models.gguf.header import read_header
from alphaquant.models.loading import load_tokenizer
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.units import Matrix
from alphaquant.testing.llama.exported import EXPORTED, add_tokenizer, save_rounded, write_float32

pytestmark = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="xllamacpp (the extra llamacpp) is not installed"
)

TOKENS = list(range(3, 99, 3))

GELU_BY_TABLE = 1e-3
"""llama.cpp looks gelu up in a table of float16."""

INPUTS_ROUNDED = 3e-2
"""llama.cpp rounds inputs of quantized matrices to 8 bits, of bfloat16 ones to bfloat16."""


def distance(file: Path, model: Any) -> float:
    """Median over tokens of the relative distance of logits."""
    with torch.no_grad():
        right = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = logits(file, [TOKENS])[0]
    norms = np.linalg.norm(found - right, axis=1) / np.linalg.norm(right, axis=1)
    return float(np.median(norms))


def export(packed: Path, out: Path) -> Path:
    out.mkdir()
    exporter = GgufExport()
    exporter.write(open_packed(packed), out)
    exporter.verify(out)
    return out / MODEL_FILE


@pytest.mark.parametrize("family", EXPORTED)
def test_a_file_of_float32_computes_what_the_model_computes(family: str, tmp_path: Path) -> None:
    model = save_rounded(family, tmp_path / "packed", lambda matrix: "bf16")
    write_float32(tmp_path / "packed", tmp_path / MODEL_FILE)
    allowed = GELU_BY_TABLE if family.startswith("gemma") else 1e-5
    assert distance(tmp_path / MODEL_FILE, model) < allowed


FIRST = ("llama", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe")
"""Architectures that every run loads quantized; float32 shows what the others differ in."""


@pytest.mark.parametrize(
    "family", [f if f in FIRST else pytest.param(f, marks=pytest.mark.slow) for f in EXPORTED]
)
def test_a_quantized_file_computes_what_its_dequantized_model_computes(
    family: str, tmp_path: Path
) -> None:
    formats = {"down_proj": "mxfp4", "o_proj": "int8-row", "q_proj": "int5-g32"}
    model = save_rounded(
        family, tmp_path / "packed", lambda m: formats.get(m.projection, "int4-g64")
    )
    file = export(tmp_path / "packed", tmp_path / "out")
    assert distance(file, model) < INPUTS_ROUNDED
    assert len(generate(file, TOKENS, 4)) == 4


@pytest.mark.parametrize(
    ("family", "include"),
    [("olmoe", ("head", "embeddings")), ("llama", ("embeddings",)), ("gemma3_text", ("head",))],
)
def test_a_quantized_head_and_embeddings_are_computed_tied_or_not(
    family: str, include: tuple[str, ...], tmp_path: Path
) -> None:
    formats = {"head": "int8-g32", "embedding": "int5-g32"}
    model = save_rounded(
        family, tmp_path / "packed", lambda m: formats.get(m.kind, "mxfp4"), include=include
    )
    file = export(tmp_path / "packed", tmp_path / "out")
    types = {t.name: t.type for t in read_header(file).tensors}
    assert types["token_embd.weight"] == ("Q8_0" if family == "gemma3_text" else "Q5_0")
    assert ("output.weight" in types) == (family != "gemma3_text")
    assert distance(file, model) < INPUTS_ROUNDED


def test_every_type_of_the_menu_is_computed(tmp_path: Path) -> None:
    menu = menu_of("auto", find_profile("gguf"))
    wide, narrow = (
        [name for name in menu if twin_of(parse_format(name), width)] for width in (256, 128)
    )
    assert set(wide) == set(menu) and len(narrow) > 5
    taken = {256: cycle(wide), 128: cycle(narrow)}

    def format_of(matrix: Matrix) -> str:
        return next(taken[matrix.cols])

    layers = -(-len(menu) // 6)  # six matrices of a layer are 256 wide, one 128
    model = save_rounded("llama", tmp_path / "packed", format_of, num_hidden_layers=layers)
    file = export(tmp_path / "packed", tmp_path / "out")
    named = open_packed(tmp_path / "packed").formats.weights.values()
    assert {fmt.name for fmt in named} == set(menu)
    assert distance(file, model) < INPUTS_ROUNDED


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "linear": ("qwen3", {"factor": 4.0}),
    "yarn": ("deepseek_v2", {"factor": 8.0, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "yarn of gpt-oss": ("gpt_oss", {"factor": 8.0}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotations_are_carried_over(kind: str, tmp_path: Path) -> None:
    family, fields = ROPES[kind]
    rope = {"rope_type": kind.split()[0], "rope_theta": 10000.0, **fields}
    rope["original_max_position_embeddings"] = 16
    model = save_rounded(family, tmp_path / "packed", lambda m: "bf16", rope_parameters=rope)
    write_float32(tmp_path / "packed", tmp_path / MODEL_FILE)
    assert distance(tmp_path / MODEL_FILE, model) < 1e-5


@pytest.mark.slow  # 27 layers
def test_deepseek_without_low_rank_queries_runs_where_it_has_as_many_layers_as_the_lite_one(
    tmp_path: Path,
) -> None:
    changes = {"q_lora_rank": None, "num_hidden_layers": 27, "tie_word_embeddings": True}
    model = save_rounded("deepseek_v2", tmp_path / "packed", lambda m: "bf16", **changes)
    write_float32(tmp_path / "packed", tmp_path / MODEL_FILE)
    assert distance(tmp_path / MODEL_FILE, model) < 2e-5  # of 27 layers


def test_texts_are_read_as_the_original_tokenizer_reads_them(tmp_path: Path) -> None:
    save_rounded("olmoe", tmp_path / "packed", lambda matrix: "int8-g32", vocab_size=4096)
    add_tokenizer(tmp_path / "packed")
    file = export(tmp_path / "packed", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "packed")
    for text in ("The winter of 1846 was cold,\n  and long.", "naïve café <|endoftext|> 12345"):
        assert tokenize(file, text) == tokenizer(text).input_ids


def test_characters_with_bytes_to_fall_back_to_are_read_the_same(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    raw.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3])
    text = "the cat sat on the mat and the hat of the cat was on the mat that the rat sat at"
    raw.train_from_iterator([text] * 4, trainer)
    content = json.loads(raw.to_str())
    vocabulary = content["model"]["vocab"]
    for word in special[3:]:
        vocabulary.setdefault(word, len(vocabulary))
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    save_rounded("llama", tmp_path / "packed", lambda matrix: "int8-g32", vocab_size=1024)
    made.save_pretrained(tmp_path / "packed")
    file = export(tmp_path / "packed", tmp_path / "out")
    for text in ("the cat sat", "a rat, é\n that hat"):
        assert tokenize(file, text)[-len(made(text).input_ids) :] == made(text).input_ids
