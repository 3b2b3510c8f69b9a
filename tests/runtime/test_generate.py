"""Text from a packed model is that of the model with dequantized weights, token by token."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from alphaquant.demo import model_path
from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.modules import PackedLinear, cache_dequantized
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.specs.quantizer import QuantSettings

FORMATS = ("int4-g64", "mxfp4", "int3-g64-asym", "int8-row", "nvfp4", "bf16", "fp8-e4m3-row")
PROMPTS = [
    "It was a dark evening, and the old man",
    "She said",
    "The house stood at the end of the road, and nobody had lived there for many years",
]
N_NEW = 10


class Pair(NamedTuple):
    """The packed demo, and the demo with the same weights dequantized."""

    packed: Any
    dequantized: Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_map = map_model(load_model(model_path()))
    matrices = model_map.inventory.matrices
    mixed = {m.name: FORMATS[i % len(FORMATS)] for i, m in enumerate(matrices)}
    target = tmp_path_factory.mktemp("generate") / "packed"
    settings = QuantSettings(method="rtn")
    return quantize_to_checkpoint(
        PackingJob(model_map, Assignment(mixed), settings), target, facts={}
    ).path


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, folder: Path) -> Pair:
    packed, plain = (
        load(folder, dtype=request.param),
        load_model(model_path(), dtype=request.param),
    )
    # Other ways of running experts add in another order; one by one is ours.
    plain.set_experts_implementation("eager")  # type: ignore[operator]
    views = map_model(plain).views
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            views[name].copy_(module.packed().dequantize())
    return Pair(packed, plain)


def batch(n_prompts: int) -> dict[str, Tensor]:
    """Prompts of other lengths, padded on the left."""
    tokenizer = load_tokenizer(model_path())
    tokenizer.padding_side = "left"
    made = tokenizer(PROMPTS[:n_prompts], return_tensors="pt", padding=True)
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def generate(model: Any, inputs: dict[str, Tensor], cache: str) -> Any:
    """Greedy tokens and their scores; it does not stop at an end of text."""
    return model.generate(
        **inputs,
        max_new_tokens=N_NEW,
        min_new_tokens=N_NEW,
        do_sample=False,
        cache_implementation=cache,
        output_scores=True,
        return_dict_in_generate=True,
    )


@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_tokens_are_those_of_the_dequantized_model(cache: str, n_prompts: int, pair: Pair) -> None:
    inputs = batch(n_prompts)
    made = generate(pair.packed, inputs, cache)
    expected = generate(pair.dequantized, inputs, cache)
    n_prompt = inputs["input_ids"].shape[1]
    assert made.sequences.shape == (n_prompts, n_prompt + N_NEW)
    assert torch.equal(made.sequences, expected.sequences)
    # Not one token over and over, which any model could give.
    assert len(set(made.sequences[0, n_prompt:].tolist())) > 5
    for one, other in zip(made.scores, expected.scores, strict=True):
        assert torch.equal(one, other)


def test_kept_weights_change_no_token(pair: Pair) -> None:
    inputs = batch(3)
    expected = generate(pair.packed, inputs, "dynamic")
    for size in ("4MiB", "64MiB"):
        kept = cache_dequantized(pair.packed, size)
        made = generate(pair.packed, inputs, "dynamic")
        assert torch.equal(made.sequences, expected.sequences), size
        for one, other in zip(made.scores, expected.scores, strict=True):
            assert torch.equal(one, other), size
        assert 0 < kept.n_bytes <= kept.max_bytes and kept.n_found > 0, size
    cache_dequantized(pair.packed, 0)


# Padding changes last bits of the scores, which in bfloat16 can change the likeliest token.
@pytest.mark.parametrize("pair", ["float32"], indirect=True)
def test_padding_on_the_left_changes_no_token_of_the_prompt(pair: Pair) -> None:
    together = generate(pair.packed, batch(3), "dynamic").sequences
    alone = generate(pair.packed, batch(1), "dynamic").sequences
    assert torch.equal(together[0, -N_NEW:], alone[0, -N_NEW:])
