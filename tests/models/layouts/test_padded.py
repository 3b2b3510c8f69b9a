"""Experts in half precision on a CPU get multiples of 32 tokens, and give what they gave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from alphaquant.models.layouts.padded import (
    IMPLEMENTATION,
    MULTIPLE,
    added_experts,
    pad_experts,
)

MakeModel = Callable[..., nn.Module]


@pytest.fixture
def make_model() -> MakeModel:
    """Make a Qwen2-MoE with 6 experts: `make_model(torch.bfloat16, top_k=3)`."""

    def make(dtype: torch.dtype, top_k: int = 2) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 32}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes |= {"num_experts": 6, "num_experts_per_tok": top_k, "vocab_size": 100}
        sizes |= {"shared_expert_intermediate_size": 32, "eos_token_id": 0}
        config = AutoConfig.for_model("qwen2_moe", **sizes)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval().requires_grad_(False)

    return make


def outputs(model: nn.Module, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their squares at the embeddings."""
    typed: Any = model
    tokens = torch.arange(n_tokens).unsqueeze(0) * 7 % 100
    embedded = typed.get_input_embeddings()(tokens).requires_grad_()
    logits: Tensor = typed(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded)
    return logits.detach(), gradient.float()


def test_worked_example_of_what_is_added() -> None:
    chosen = torch.tensor([[0, 1]] * 96 + [[0, 2]] * 3 + [[1, 2]])
    assert torch.bincount(chosen.flatten()).tolist() == [99, 97, 4]
    added = added_experts(chosen, 3)
    assert torch.bincount(added.flatten()).tolist() == [29, 31, 28]
    assert added.shape == (44, 2)


def test_few_tokens_are_left_alone() -> None:
    assert len(added_experts(torch.tensor([[0, 1]] * (MULTIPLE * 3 // 2 - 1)), 3)) == 0


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6])
def test_every_expert_gets_a_multiple_and_the_fewest(top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    chosen = torch.rand(501, 7, generator=generator).argsort(-1)[:, :top_k]
    added = added_experts(chosen, 7)
    counts = torch.bincount(torch.cat([chosen, added]).flatten(), minlength=7)
    assert bool((counts % MULTIPLE == 0).all())
    assert added.numel() < MULTIPLE * (7 + top_k)


def test_what_is_no_expert_is_left_alone() -> None:
    chosen = torch.full((500, 2), 3)  # a sentinel of expert parallelism
    assert len(added_experts(chosen, 3)) == 0


@pytest.mark.parametrize(("top_k", "n_tokens"), [(2, 301), (3, 301), (2, 5)])
def test_a_model_computes_the_same(top_k: int, n_tokens: int, make_model: MakeModel) -> None:
    model: Any = make_model(torch.bfloat16, top_k)
    logits, gradient = outputs(model, n_tokens)
    pad_experts(model)
    assert model.config._experts_implementation == IMPLEMENTATION
    found, at_inputs = outputs(model, n_tokens)
    assert torch.equal(found, logits)
    assert float((at_inputs - gradient).norm()) <= 5e-3 * float(gradient.norm())
    assert IMPLEMENTATION not in model.config.to_json_string(), "nothing of it is saved"


def test_float32_and_other_implementations_stay(make_model: MakeModel) -> None:
    full: Any = make_model(torch.float32)
    pad_experts(full)
    assert full.config._experts_implementation == "grouped_mm"
    mixed: Any = make_model(torch.bfloat16)
    mixed.model.layers[1].mlp.experts.float()  # as where a part is quantized by somebody else
    pad_experts(mixed)
    assert mixed.config._experts_implementation == "grouped_mm"
    eager: Any = make_model(torch.bfloat16)
    eager.set_experts_implementation("eager")
    pad_experts(eager)
    assert eager.config._experts_implementation == "eager"
