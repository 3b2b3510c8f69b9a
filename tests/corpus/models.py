"""Directories of models: what is missing, damaged or of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.corpus.engine import DRY_RUN, EVALUATE, QUANTIZE, Case, Make, Place

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"
HERE = f"{QUANTIZE} --model model"


def changed(change: Callable[[Path], object]) -> Make:
    """A copy of the tiny model, with one change, in `model`."""

    def make(place: Place) -> None:
        change(Path(shutil.copytree(place.tiny, place.here / "model")))

    return make


def _tensors(
    name: str, change: Callable[[dict[str, Tensor]], object], says: str, resumes: bool = False
) -> Case:
    """Weights with one change."""

    def rewrite(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return Case(name, HERE, says, make=changed(rewrite), resumes=resumes)


def _config(name: str, says: str, code: int = 1, **fields: Any) -> Case:
    """A config.json with some fields changed."""

    def rewrite(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return Case(name, HERE, says, code, make=changed(rewrite))


def _file(name: str, file: str, content: str | bytes, says: str, command: str = HERE) -> Case:
    """Another content of a file."""
    data = content if isinstance(content, bytes) else content.encode()
    return Case(name, command, says, make=changed(lambda m: (m / file).write_bytes(data)))


def _index(name: str, content: Any, says: str) -> Case:
    """An index beside weights that only it finds."""

    def write(model: Path) -> None:
        (model / WEIGHTS).rename(model / "other.safetensors")
        (model / INDEX).write_text(json.dumps(content))

    return Case(name, HERE, says, make=changed(write))


def _without_expert(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "layers.1.mlp.experts.3." in n]:
        del tensors[name]


def _cut(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _folder_for_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).mkdir()


def _pickled(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def _sharded(model: Path) -> None:
    shard = (model / WEIGHTS).rename(model / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(shard), shard.name)
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


TENSORS = (
    _tensors("matrix that is missing", lambda t: t.pop(QUERY), QUERY),
    _tensors("norm that is missing", lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    _tensors("expert that is missing", _without_expert, "[3, 32, 32] instead of [4, 32, 32]"),
    _tensors("matrix of another shape", lambda t: t.update({QUERY: torch.ones(4, 4)}), "[4, 4]"),
    _tensors(
        "NaN in a norm",
        lambda t: t["model.norm.weight"].fill_(torch.nan),
        "model.norm.weight holds NaN",
    ),
    _tensors(
        "infinity in an embedding",
        lambda t: t["model.embed_tokens.weight"].view(-1)[:1].fill_(torch.inf),
        "model.embed_tokens.weight holds",
    ),
    _tensors(
        "NaN in a matrix",
        lambda t: t[QUERY].view(-1)[:1].fill_(torch.nan),
        "layers.1.self_attn",
        True,
    ),
    _tensors("no tensor at all", lambda t: t.clear(), "tensors that config.json promises"),
)

FILES = (
    Case("weights cut short", HERE, "model.safetensors is damaged", make=changed(_cut)),
    _file("weights of nothing", WEIGHTS, b"", "model.safetensors is damaged"),
    _file("weights of zeros", WEIGHTS, b"\0" * 999, "model.safetensors is damaged"),
    _file("weights that promise much", WEIGHTS, b"\xff" * 8 + b"{}", "is damaged"),
    _file("weights that are a page", WEIGHTS, "<!doctype html>" * 99, "is damaged"),
    _file("weights that a pointer stands for", WEIGHTS, "version https://git-lfs", "is damaged"),
    Case("weights that are a folder", HERE, WEIGHTS, make=changed(_folder_for_weights)),
    Case("no weights", HERE, "model", make=changed(lambda m: (m / WEIGHTS).unlink())),
    Case("pickled weights", HERE, "safetensors", make=changed(_pickled)),
    _file("tokenizer of nothing", "tokenizer.json", "", "tokenizer", f"{EVALUATE} --model model"),
    Case(
        "no tokenizer where a text is read",
        f"{EVALUATE} --model model",
        "has no tokenizer",
        make=changed(_without_tokenizer),
    ),
    _index("index that is a list", [], "holds a list"),
    _index("weight map that is a list", {"weight_map": []}, "weight_map must be an object"),
    _index("weight map with a number", {"weight_map": {"a": 5}}, "weight_map must be an object"),
    _index("weight map of no file", {"weight_map": {"a": "b.safetensors"}}, "which is not there"),
    _index("weight map that leaves", {"weight_map": {"a": "../b.safetensors"}}, "outside"),
    _index("weight map of the root", {"weight_map": {"a": "/b.safetensors"}}, "outside"),
)

CONFIGS = (
    Case(
        "no config.json",
        HERE,
        "config.json is not there",
        make=changed(lambda m: (m / "config.json").unlink()),
    ),
    _file("config.json null", "config.json", "null", "config.json cannot be read"),
    _file("config.json a list", "config.json", "[1]", "config.json cannot be read"),
    _file("config.json cut short", "config.json", '{"model_type"', "config.json cannot be read"),
    _file("config.json nested", "config.json", "[" * 5000, "config.json cannot be read"),
    _file("config.json of nothing", "config.json", "{}", "model_type"),
    _config("architecture of nobody", "nonesuch", model_type="nonesuch"),
    _config("architecture that is a number", "model type `5`", model_type=5),
    _config("one layer more", "model.layers.2.", num_hidden_layers=3),
    _config("layers without end", "num_hidden_layers", num_hidden_layers=10**12),
    _config("no layers", "num_hidden_layers", num_hidden_layers=0),
    _config("vocabulary of another", "[5000, 32]", vocab_size=5000),
    _config("width of another", "instead of", hidden_size=64),
    _config("width in words", "hidden_size", hidden_size="32"),
    _config("width null", "model", hidden_size=None),
    _config("negative width", "model", hidden_size=-32),
    _config("no heads", "cannot load model", num_attention_heads=0),
    _config("activation of nobody", "nonesuch", hidden_act="nonesuch"),
    _config("no expert chosen", "num_experts_per_tok is 0", num_experts_per_tok=0),
    _config("more chosen than there", "num_experts_per_tok is 5", num_experts_per_tok=5),
    _config("quantization in words", "quantization_config is 'awq'", quantization_config="awq"),
    _config("bits without a method", "quantized already", quantization_config={"bits": 4}),
    _config(
        "quantized by another", "quant_method gptq", quantization_config={"quant_method": "gptq"}
    ),
)

PLANNED = (
    Case(
        "plan for a model that is quantized",
        f"{DRY_RUN} --config {{int4}} --model {{packed}}",
        "quantized already",
    ),
    _file(
        "plan for a model of nothing",
        "config.json",
        "null",
        "config.json cannot be read",
        f"{DRY_RUN} --config {{int4}} --model model",
    ),
)

RIGHT = (
    Case("model in shards", HERE, '"quantized_bytes"', 0, make=changed(_sharded)),
    _config("quantization null", '"quantized_bytes"', 0, quantization_config=None),
    Case("no tokenizer where none is needed", HERE, '"out"', 0, make=changed(_without_tokenizer)),
)

CASES = (*TENSORS, *FILES, *CONFIGS, *PLANNED, *RIGHT)
