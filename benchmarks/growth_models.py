"""Random mixture-of-experts checkpoints of any size, written with the memory of one layer.

The names and shapes are those in which transformers saves such a model (experts one by one), in
bfloat16, a shard per decoder layer. Matrices are normal with a standard deviation of one over the
square root of their columns, norms are one: activations stay finite, and routers spread tokens.
Numbers are drawn once, and every matrix takes a stretch of them from a place of its own: 1.3e9
weights take 4 processor seconds instead of 20.
The tokenizer is the demo's, so vocabularies have at least its 4096 ids.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from alphaquant import demo
from alphaquant.models.pages.tensor_files import write_aligned

_DRAWN = 2**22
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        hidden: features of the residual stream.
        width: of each expert.
        n_experts: routed experts of a layer.
        top_k: experts per token.
        n_layers: decoder layers.
        n_heads: of attention.
        vocabulary: token ids.
        model_type: `olmoe` or `qwen3_moe`.
        others: further fields of the configuration.
    """

    hidden: int
    width: int
    n_experts: int
    top_k: int
    n_layers: int
    n_heads: int
    vocabulary: int = 4096
    model_type: str = "olmoe"
    others: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """The configuration of transformers."""
        own = {"olmoe": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
        settings = {
            "hidden_size": self.hidden,
            own[self.model_type]: self.width,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "bfloat16",
        }
        return AutoConfig.for_model(self.model_type, **{**settings, **self.others})


SHAPES: dict[str, Shape] = {
    "10m": Shape(256, 128, 16, 4, 4, 4),
    "40m": Shape(512, 128, 32, 4, 5, 8),
    "160m": Shape(768, 256, 32, 4, 7, 12),
    "640m": Shape(1024, 512, 32, 8, 12, 16),
    "1.3b": Shape(1024, 512, 64, 8, 12, 16),
    "olmoe": Shape(2048, 1024, 64, 8, 16, 16, vocabulary=50304),
    "qwen3-30b": Shape(
        *(2048, 768, 128, 8, 48, 32, 151936, "qwen3_moe"),
        others={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-235b": Shape(
        *(4096, 1536, 128, 8, 94, 64, 151936, "qwen3_moe"),
        others={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 12288,
            "norm_topk_prob": True,
        },
    ),
}
"""Models by name; the last ones have the shapes of OLMoE-1B-7B, Qwen3-30B-A3B and
Qwen3-235B-A22B."""


def write_model(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a random checkpoint.

    Args:
        folder: made if there is none.
        shape: of the model.
        seed: of its weights.

    Returns:
        The number of its weights.
    """
    config = shape.config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(demo.model_path() / file, folder)
    shards = _shards(revert_weight_conversion(model, model.state_dict()))
    pool, places = _Pool(seed), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Not safetensors' own function, which holds all bytes of a file a second time.
        write_aligned(folder / file, {n: pool.take(shape) for n, shape in names.items()})
        places |= dict.fromkeys(names, file)
    n_weights = sum(shape.numel() for names in shards for shape in names.values())
    index = {"metadata": {"total_size": 2 * n_weights}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return n_weights


def _shards(state: Mapping[str, Tensor]) -> list[dict[str, torch.Size]]:
    """Shapes of the tensors of each file: one for what is beside the layers, one per layer."""
    shards: dict[int, dict[str, torch.Size]] = defaultdict(dict)
    for name, tensor in state.items():
        number = next(_numbers(name), -1)
        shards[number][name] = tensor.shape
    return [shards[number] for number in sorted(shards)]


def _numbers(name: str) -> Iterator[int]:
    return (int(part) for part in name.split(".") if part.isdigit())


class _Pool:
    """Normal numbers, of which every tensor takes a stretch."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.randn(_DRAWN, generator=self._generator)
        self._scaled: dict[int, Tensor] = {}

    def take(self, shape: torch.Size) -> Tensor:
        """Weights of one tensor, bfloat16."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        n_cols, wanted = shape[-1], shape.numel()
        if n_cols not in self._scaled:
            self._scaled[n_cols] = (self._drawn * n_cols**-0.5).to(torch.bfloat16)
        numbers = self._scaled[n_cols]
        start = int(torch.randint(_DRAWN, (), generator=self._generator))
        n_repeats = -(-(start + wanted) // _DRAWN)
        found = numbers if n_repeats == 1 else numbers.repeat(n_repeats)
        return found[start : start + wanted].reshape(shape).clone()
