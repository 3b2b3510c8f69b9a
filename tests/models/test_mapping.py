"""What is found in each architecture, what is left alone, and that views write the model."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.loading import load_model, load_skeleton, load_tokenizer
from alphaquant.models.mapping import checkpoint_dtype, map_model, stored_dtype, weights_digest
from alphaquant.testing.models import FAMILIES, ROUTED_EXPERTS, tiny_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("probed_each_time")

ATTENTION = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
LATENT = {"kv_a_proj_with_mqa": 2, "kv_b_proj": 2, "o_proj": 2}
EXPECTED: dict[str, dict[str, dict[str, int]]] = {
    "llama": {"attention": ATTENTION, "dense": {"gate_proj": 2, "up_proj": 2, "down_proj": 2}},
    "olmoe": {"attention": ATTENTION, "expert": {"gate_proj": 16, "up_proj": 16, "down_proj": 16}},
    "mixtral": {"attention": ATTENTION, "expert": {"gate_proj": 8, "up_proj": 8, "down_proj": 8}},
    "qwen2_moe": {
        "attention": ATTENTION,
        "expert": {"gate_proj": 12, "up_proj": 12, "down_proj": 12},
        "shared": {"gate_proj": 2, "up_proj": 2, "down_proj": 2},
    },
    "qwen3_moe": {
        "attention": ATTENTION,
        "expert": {"gate_proj": 12, "up_proj": 12, "down_proj": 12},
    },
    "deepseek_v2": {
        "attention": {"q_proj": 2, **LATENT},
        "expert": {"gate_proj": 6, "up_proj": 6, "down_proj": 6},
        "shared": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
        "dense": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
    },
    "qwen3": {"attention": ATTENTION, "dense": {"gate_proj": 2, "up_proj": 2, "down_proj": 2}},
    "deepseek": {
        "attention": ATTENTION,
        "expert": {"gate_proj": 8, "up_proj": 8, "down_proj": 8},
        "shared": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
        "dense": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
    },
    "glm4_moe": {
        "attention": ATTENTION,
        "expert": {"gate_proj": 6, "up_proj": 6, "down_proj": 6},
        "shared": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
        "dense": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
    },
    "gpt_oss": {"attention": ATTENTION, "expert": {"gate_proj": 8, "up_proj": 8, "down_proj": 8}},
    "listed_moe": {
        "attention": ATTENTION,
        "expert": {"w1": 16, "w3": 16, "w2": 16},
        "shared": {"w1": 2, "w3": 2, "w2": 2},
    },
    "nemotron_h": {
        "attention": {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1},
        "expert": {"up_proj": 6, "down_proj": 6},
        "shared": {"up_proj": 1, "down_proj": 1},
    },
    "llama4_text": {
        "attention": ATTENTION,
        "expert": {"gate_proj": 6, "up_proj": 6, "down_proj": 6},
        "shared": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
        "dense": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
    },
    "deepseek_v3": {
        "attention": {"q_a_proj": 2, "q_b_proj": 2, **LATENT},
        "expert": {"gate_proj": 6, "up_proj": 6, "down_proj": 6},
        "shared": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
        "dense": {"gate_proj": 1, "up_proj": 1, "down_proj": 1},
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_matrix_is_found_with_its_kind(family: str) -> None:
    inventory = map_model(tiny_model(family)).inventory
    assert inventory.model_type == family
    found: dict[str, Counter[str]] = {}
    for matrix in inventory.matrices:
        found.setdefault(matrix.kind, Counter())[matrix.projection] += 1
    assert found == EXPECTED[family]
    names = [m.name for m in inventory.matrices]
    assert len(set(names)) == len(names) and inventory.n_layers == 2


def test_matrices_and_kept_tensors_are_all_parameters_once(family: str) -> None:
    model = tiny_model(family)
    inventory = map_model(model).inventory
    n_kept = sum(k.n_weights for k in inventory.kept)
    n_persistent = sum(
        t.numel() for k, t in model.state_dict().items() if k.endswith("e_score_correction_bias")
    )
    assert inventory.n_weights + n_kept == n_persistent + sum(
        p.numel() for p in model.parameters()
    )


def test_kept_bytes_are_those_of_the_checkpoints_dtype(family: str) -> None:
    for kept in map_model(tiny_model(family)).inventory.kept:
        # DeepSeek-V3's correction bias is float32 in bfloat16 checkpoints.
        width = 4 if kept.name.endswith("e_score_correction_bias") else 2
        assert kept.n_bytes == width * kept.n_weights, kept.name


@pytest.mark.parametrize("family_with_router", ROUTED_EXPERTS)
def test_routers_and_shared_gates_are_kept(family_with_router: str) -> None:
    inventory = map_model(tiny_model(family_with_router)).inventory
    kept = {k.name for k in inventory.kept}
    routers = {
        "gpt_oss": "mlp.router",
        "listed_moe": "mlp.block_sparse_moe.gate",
        "nemotron_h": "mixer.gate",
        "llama4_text": "feed_forward.router",
    }
    router = routers.get(family_with_router, "mlp.gate")
    assert f"model.layers.1.{router}.weight" in kept
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    assert (gate in kept) == (family_with_router == "qwen2_moe")
    assert not any(
        m.name.endswith((".gate", ".router", ".shared_expert_gate")) for m in inventory.matrices
    )
    of_nemotron = {"model.embeddings.weight", "model.norm_f.weight"}
    usual = {"model.embed_tokens.weight", "model.norm.weight"}
    assert "lm_head.weight" in kept
    assert (of_nemotron if family_with_router == "nemotron_h" else usual) <= kept


def test_views_have_the_shape_of_their_matrix_and_write_the_model(family: str) -> None:
    model = tiny_model(family)
    model_map, tokens = map_model(model), tiny_tokens(1, 7)
    before = model(tokens).logits
    with torch.no_grad():
        for matrix in model_map.inventory.matrices:
            view = model_map.view(matrix.name)
            assert view.shape == (matrix.rows, matrix.cols)
            view.zero_()
    assert not torch.equal(model(tokens).logits, before)
    state = model.state_dict()
    for layer in model_map.layers:
        for site in layer.experts:
            assert not any(bool(state[name].any()) for name in site.state_names())
        for linear in layer.linears:
            assert not bool(state[f"{linear.matrix.name}.weight"].any())


def test_gate_rows_come_first_in_the_fused_parameter() -> None:
    model_map = map_model(tiny_model("mixtral"))
    site = model_map.layers[1].experts[0]
    fused = site.module.gate_up_proj
    assert torch.equal(model_map.view("model.layers.1.mlp.experts.3.gate_proj"), fused[3, :24])
    assert torch.equal(model_map.view("model.layers.1.mlp.experts.3.up_proj"), fused[3, 24:])
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    gate, up = model_map.view(site.gate[3].name), model_map.view(site.up[3].name)
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    assert torch.allclose(site.apply_gate(site.gate_up(3, x)), expected, atol=1e-6)


def test_experts_and_routers_have_mixtrals_old_names_too() -> None:
    inventory = map_model(tiny_model("mixtral")).inventory
    down = inventory.by_name["model.layers.0.mlp.experts.2.down_proj"]
    assert "model.layers.0.block_sparse_moe.experts.2.w2" in down.aliases
    kept = {k.name: k for k in inventory.kept}
    router = kept["model.layers.0.mlp.gate.weight"]
    assert router.aliases == ("model.layers.0.block_sparse_moe.gate.weight",)
    assert kept["model.norm.weight"].aliases == ()


def test_tied_embeddings_are_kept_once() -> None:
    model_map = map_model(tiny_model("olmoe", tie_word_embeddings=True))
    names = [k.name for k in model_map.inventory.kept]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_interleaved_experts_show_gate_and_up_rows() -> None:
    model = tiny_model("gpt_oss")
    site = map_model(model).layers[1].experts[0]
    fused = model.model.layers[1].mlp.experts.gate_up_proj  # [E, H, 2I], gate and up alternate
    gate, up, down = site.views(3)
    assert torch.equal(gate, fused[3, :, 0::2].T) and torch.equal(up, fused[3, :, 1::2].T)
    assert torch.equal(down, model.model.layers[1].mlp.experts.down_proj[3].T)


def test_fused_experts_of_another_kind_are_refused_by_name() -> None:
    model = tiny_model("olmoe")
    model.model.layers[0].mlp.experts.has_gate = False
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts \(OlmoeExperts\).*has_gate"):
        map_model(model)


def test_a_model_without_decoder_layers_is_refused_with_its_class() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of 7 decoder layers"):
        map_model(model)


def test_a_model_without_matrices_is_refused() -> None:
    model = tiny_model("llama")
    for i in range(2):
        model.model.layers[i] = nn.LayerNorm(40)
    with pytest.raises(ModelError, match="has no quantizable matrices"):
        map_model(model)


def test_what_the_code_of_a_model_uses_otherwise_stays_and_is_listed() -> None:
    model = tiny_model("olmoe")
    block = model.model.layers[0].mlp
    block.unused = nn.Linear(40, 9)

    class Router(nn.Module):
        """Two products before the choice: no name and no size tells it apart."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scores = self.second(torch.relu(self.first(x.reshape(-1, 40)))).softmax(-1)
            weights, ids = scores.topk(3, -1)
            return scores, weights, ids

    block.gate = Router()
    found = map_model(model)
    names = {m.name for m in found.inventory.matrices}
    reasons = {part.name: part.reason for part in found.staying}
    prefix = "model.layers.0.mlp"
    for name in (f"{prefix}.gate.first", f"{prefix}.gate.second"):
        assert name not in names
        assert reasons[f"{name}.weight"] == "it chooses or weighs, and computes nothing else"
    assert reasons[f"{prefix}.unused.weight"] == "it is never called"
    assert "model.layers.0.self_attn.q_proj" in names


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, torch.bfloat16),  # exact in bfloat16
        (1.0 + 2.0**-20, torch.float32),  # not exact
    ],
)
def test_kept_tensors_are_stored_in_the_checkpoints_dtype_where_exact(
    value: float, dtype: torch.dtype
) -> None:
    assert stored_dtype(torch.tensor([value]), torch.bfloat16) == dtype
    assert stored_dtype(torch.tensor([3]), torch.bfloat16) == torch.int64


def saved(model: nn.Module, path: Path) -> Path:
    """A checkpoint as published: bfloat16."""
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("moe", ["olmoe", "mixtral", "deepseek_v3"])
def test_a_loaded_model_and_its_skeleton_have_the_same_inventory(moe: str, tmp_path: Path) -> None:
    path = saved(tiny_model(moe), tmp_path / "model")
    loaded, skeleton = load_model(path), load_skeleton(path)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert checkpoint_dtype(loaded) == checkpoint_dtype(skeleton) == torch.bfloat16
    assert map_model(loaded).inventory.digest == map_model(skeleton).inventory.digest
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


def test_a_loaded_model_computes_what_was_saved(tmp_path: Path) -> None:
    model, tokens = tiny_model("qwen2_moe"), tiny_tokens(2, 9)
    expected = model(tokens).logits
    loaded = load_model(saved(model, tmp_path / "model"), dtype="float32")
    # Experts may run grouped: the same sums in another order.
    assert torch.allclose(loaded(tokens).logits, expected, atol=1e-4)


def test_weights_digest_follows_the_weights() -> None:
    first, same = map_model(tiny_model("olmoe")), map_model(tiny_model("olmoe"))
    assert weights_digest(first) == weights_digest(same)
    same.view("model.layers.1.mlp.experts.7.down_proj")[3, 4] += 1e-3
    assert weights_digest(first) != weights_digest(same)


@pytest.mark.parametrize("load", [load_model, load_skeleton, load_tokenizer])
def test_a_model_that_is_not_there_is_one_line(load: object, tmp_path: Path) -> None:
    assert callable(load)
    with pytest.raises(ModelError, match="cannot load model .* is no directory here") as error:
        load(tmp_path / "nothing")
    assert "\n" not in str(error.value) and "give 'demo'" in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not there; give a directory|transformers says"):
        load(tmp_path / "empty")


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match="unknown dtype 'fp32'; use auto, float32"):
        load_model("anything", dtype="fp32")
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load_model("anything", dtype="int8")


def test_random_tokens_are_in_the_vocabulary_and_seeded() -> None:
    tokens: Tensor = tiny_tokens(3, 50)
    assert tokens.shape == (3, 50) and int(tokens.max()) < 96 and int(tokens.min()) >= 0
    assert torch.equal(tokens, tiny_tokens(3, 50)) and not torch.equal(
        tokens, tiny_tokens(3, 50, 1)
    )


def test_unknown_three_dimensional_parameters_are_refused_by_name() -> None:
    model = tiny_model("llama")
    layer = model.get_submodule("model.layers.1")
    layer.register_parameter("bank", torch.nn.Parameter(torch.zeros(4, 8, 8)))
    with pytest.raises(ModelError, match=r"layers\.1\.bank \(4, 8, 8\)"):
        map_model(model)


def test_a_module_without_a_configuration_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no configuration of transformers"):
        map_model(nn.Linear(4, 4))
