"""DeepSeek-MoE v1: a checkpoint with the published names and configuration; what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.deepseek_moe import DeepseekConfig, DeepseekMoe
from alphaquant.models.loading import load_model, load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.testing.models import tiny_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("probed_each_time")

# The entries of deepseek-moe-16b's config.json that differ from other Llamas, at tiny sizes.
PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 40,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
    "model_type": "deepseek",
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def published_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the names of the published files: experts one by one."""
    state = {}
    for name, tensor in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                state[f"{stem}.{e}.gate_proj.weight"] = gate
                state[f"{stem}.{e}.up_proj.weight"] = up
        elif stem.endswith("experts") and last == "down_proj":
            state |= {f"{stem}.{e}.down_proj.weight": w for e, w in enumerate(tensor)}
        else:
            state[name] = tensor
    return {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}


def publish(folder: Path, model: nn.Module, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
    save_file(published_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def test_a_published_checkpoint_loads_without_its_remote_code(tmp_path: Path) -> None:
    model = tiny_model("deepseek")
    state = published_state(model)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in state
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in state
    assert "model.layers.1.mlp.gate.weight" in state
    assert "model.layers.0.mlp.gate_proj.weight" in state
    loaded = load_model(publish(tmp_path / "published", model))
    tokens = tiny_tokens(2, 11)
    assert torch.allclose(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    assert loaded.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3).shape == (1, 14)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@torch.no_grad()
def test_the_block_computes_the_papers_sum(norm_topk_prob: bool) -> None:
    """ArXiv 2401.06066, equations 3 to 5, token by token in float64."""
    config = DeepseekConfig(**{**PUBLISHED, "norm_topk_prob": norm_topk_prob})
    torch.manual_seed(0)
    block = DeepseekMoe(config).double()
    for parameter in block.parameters():
        parameter.normal_(0.0, 0.2)
    hidden = torch.randn(2, 5, 40, dtype=torch.float64)

    def network(gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        gate, up = (gate_up @ x).chunk(2)
        return down @ (gate * torch.sigmoid(gate) * up)

    shared = block.shared_experts
    assert shared is not None
    both = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    for x, found in zip(hidden.flatten(0, 1), block(hidden).flatten(0, 1), strict=True):
        affinity = torch.softmax(block.gate.weight @ x, 0)
        weights, chosen = affinity.topk(3)
        weights = weights / weights.sum() if norm_topk_prob else weights
        expected = network(both, shared.down_proj.weight, x)
        for weight, e in zip(weights, chosen, strict=True):
            expert = network(block.experts.gate_up_proj[e], block.experts.down_proj[e], x)
            expected = expected + weight * expert
        # Equal but for the router's softmax, which transformers computes in float32.
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_layers_before_the_first_sparse_one_are_dense(tmp_path: Path) -> None:
    skeleton = load_skeleton(publish(tmp_path / "published", tiny_model("deepseek")))
    inventory = map_model(skeleton).inventory
    kinds = {(m.layer, m.kind) for m in inventory.matrices}
    assert kinds >= {(0, "dense"), (1, "expert"), (1, "shared")}
    assert (0, "expert") not in kinds and (1, "dense") not in kinds
    assert inventory.by_name["model.layers.1.mlp.shared_experts.up_proj"].rows == 2 * 24


def test_every_second_layer_can_be_sparse() -> None:
    config = DeepseekConfig(**{**PUBLISHED, "moe_layer_freq": 2, "num_hidden_layers": 6})
    assert [config.is_sparse(i) for i in range(6)] == [False, False, True, False, True, False]


def test_a_model_without_shared_experts_runs() -> None:
    model = tiny_model("deepseek", n_shared_experts=None)
    assert not any(m.kind == "shared" for m in map_model(model).inventory.matrices)
    assert bool(torch.isfinite(model(tiny_tokens(1, 5)).logits).all())


def test_another_router_is_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "published", tiny_model("deepseek"), scoring_func="sigmoid")
    with pytest.raises(ModelError, match="scoring_func 'sigmoid' is not supported for deepseek"):
        load_model(folder)
