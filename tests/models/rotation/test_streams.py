"""Who reads and writes the residual stream, found on layers that are known."""

from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.rotation.streams import Streams, as_norm, find_streams, is_norm
from alphaquant.models.walk import walk
from alphaquant.testing.models import tiny_model, tiny_tokens


class Norm(nn.Module):
    """x / rms(x) times (offset + weight)."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(8)), offset

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mean = inputs.pow(2).mean(-1, keepdim=True) + 1e-6
        return inputs * mean.rsqrt() * (self.offset + self.weight)


def streams_of(family: str, index: int = -1) -> Streams:
    model_map = map_model(tiny_model(family))
    layer = model_map.layers[index]
    for step in walk(model_map, [tiny_tokens(2, 12)]):
        if step.layer is layer:
            return find_streams(step.layer, step.calls[0])
    raise AssertionError


def names(parts: Any) -> list[str]:
    return sorted(part.name.removeprefix("model.layers.1.") for part in parts)


def test_readers_writers_and_norms_of_latent_attention_with_experts() -> None:
    found = streams_of("deepseek_v3")
    assert names(found.norms) == ["input_layernorm", "post_attention_layernorm"]
    assert names(found.writers) == [
        *("mlp.experts", "mlp.shared_experts.down_proj", "self_attn.o_proj"),
    ]
    assert names(found.readers) == [
        *("mlp.experts", "mlp.gate"),
        *("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        *("self_attn.kv_a_proj_with_mqa", "self_attn.q_a_proj"),
    ]
    by_name = {r.name.rpartition(".")[2]: r.norm.name for r in found.readers if r.norm}
    assert by_name["gate"].endswith("post_attention_layernorm")
    assert by_name["q_a_proj"].endswith("input_layernorm")


def test_norms_of_heads_as_wide_as_the_stream_are_none_of_it() -> None:
    # OLMoE's q_norm has as many weights as the hidden states have features.
    found = streams_of("olmoe")
    assert names(found.norms) == ["input_layernorm", "post_attention_layernorm"]
    assert "self_attn.o_proj" in names(found.writers)
    assert names(found.readers)[-3:] == [f"self_attn.{p}_proj" for p in "kqv"]


def test_biases_of_experts_are_written_too() -> None:
    experts = next(w for w in streams_of("gpt_oss").writers if w.name.endswith("experts"))
    assert [tuple(bias.shape) for bias in experts.biases] == [(40,)] * 4


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_gain_is_read_and_cleared(offset: float) -> None:
    module = Norm(offset)
    norm = as_norm("norm", module, 8)
    assert torch.allclose(norm.gain(), module.weight + offset)
    norm.clear()
    assert torch.equal(norm.gain(), torch.ones(8))


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False)])
def test_a_norm_that_subtracts_the_mean_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"final \(LayerNorm\) is no root mean square norm"):
        as_norm("final", module, 8)


@pytest.mark.parametrize(
    ("module", "is_one"),
    [(Norm(0.0), True), (nn.LayerNorm(8), True), (nn.SiLU(), False), (nn.Sigmoid(), False)],
)
def test_norms_are_told_by_what_they_do(module: nn.Module, is_one: bool) -> None:
    inputs = torch.randn(3, 8)
    assert is_norm(module, (inputs,), module(inputs)) is is_one
