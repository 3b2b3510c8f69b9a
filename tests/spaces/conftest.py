"""Small inventories with the names, shapes and kept tensors of real architectures.

They are fixtures and not a module to import: tests are collected with importmode=importlib.
"""

import pytest

from alphaquant.spaces.units import Inventory, Kept, Matrix

HIDDEN = 256
INNER = 128


def attention(layer: int, projections: tuple[str, ...] = ("q", "k", "v", "o")) -> list[Matrix]:
    """Square attention projections of one layer."""
    prefix = f"model.layers.{layer}.self_attn"
    return [Matrix(f"{prefix}.{p}_proj", HIDDEN, HIDDEN, "attention", layer) for p in projections]


def mlp(prefix: str, layer: int, kind: str, inner: int = INNER) -> list[Matrix]:
    """Gate, up and down of one MLP that is not a routed expert."""
    return [
        Matrix(f"{prefix}.gate_proj", inner, HIDDEN, kind, layer),
        Matrix(f"{prefix}.up_proj", inner, HIDDEN, kind, layer),
        Matrix(f"{prefix}.down_proj", HIDDEN, inner, kind, layer),
    ]


def experts(layer: int, n_experts: int, *, mixtral_aliases: bool = False) -> list[Matrix]:
    """Gate, up and down of the routed experts of one layer."""
    matrices = []
    for expert in range(n_experts):
        for projection, alias in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            rows, cols = (HIDDEN, INNER) if projection == "down_proj" else (INNER, HIDDEN)
            name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
            old = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{alias}"
            aliases = (old,) if mixtral_aliases else ()
            matrices.append(Matrix(name, rows, cols, "expert", layer, expert, aliases))
    return matrices


def kept(n_weights: int, name: str, *aliases: str) -> Kept:
    """A bf16 tensor that stays as it is."""
    return Kept(name, n_weights, 2 * n_weights, aliases)


def ends() -> list[Kept]:
    """Embeddings, final norm and lm_head."""
    return [
        kept(4096 * HIDDEN, "model.embed_tokens.weight"),
        kept(HIDDEN, "model.norm.weight"),
        kept(4096 * HIDDEN, "lm_head.weight"),
    ]


@pytest.fixture(scope="session")
def olmoe() -> Inventory:
    """12 layers of 64 experts: two-digit layers and experts, no shared expert."""
    matrices = [m for i in range(12) for m in attention(i) + experts(i, 64)]
    routers = [kept(64 * HIDDEN, f"model.layers.{i}.mlp.gate.weight") for i in range(12)]
    return Inventory("olmoe", tuple(matrices), (*ends(), *routers))


@pytest.fixture(scope="session")
def qwen2_moe() -> Inventory:
    """2 layers of 16 experts with a shared expert and its gate."""
    matrices = []
    for i in range(2):
        shared = mlp(f"model.layers.{i}.mlp.shared_expert", i, "shared", 4 * INNER)
        matrices += attention(i) + experts(i, 16) + shared
    routers = [
        kept(HIDDEN, f"model.layers.{i}.mlp.{name}.weight")
        for i in range(2)
        for name in ("gate", "shared_expert_gate")
    ]
    return Inventory("qwen2_moe", tuple(matrices), (*ends(), *routers))


@pytest.fixture(scope="session")
def mixtral() -> Inventory:
    """2 layers of 8 experts, which older checkpoints call w1, w2, w3."""
    matrices = [m for i in range(2) for m in attention(i) + experts(i, 8, mixtral_aliases=True)]
    routers = [
        kept(
            8 * HIDDEN,
            f"model.layers.{i}.mlp.gate.weight",
            f"model.layers.{i}.block_sparse_moe.gate.weight",
        )
        for i in range(2)
    ]
    return Inventory("mixtral", tuple(matrices), (*ends(), *routers))


@pytest.fixture(scope="session")
def deepseek() -> Inventory:
    """MLA attention, a dense first layer whose inner width 10944 no group of 128 divides."""
    mla = ("q_a", "q_b", "kv_b", "o")
    matrices = []
    for i in range(2):
        prefix = f"model.layers.{i}"
        pair = Matrix(f"{prefix}.self_attn.kv_a_proj_with_mqa", 320, HIDDEN, "attention", i)
        matrices += [*attention(i, mla), pair]
        if i == 0:
            matrices += mlp(f"{prefix}.mlp", i, "dense", 10944)
        else:
            matrices += experts(i, 4) + mlp(f"{prefix}.mlp.shared_experts", i, "shared")
    router = kept(4 * HIDDEN, "model.layers.1.mlp.gate.weight")
    return Inventory("deepseek_v2", tuple(matrices), (*ends(), router))


@pytest.fixture(scope="session")
def llama() -> Inventory:
    """2 dense layers, no router."""
    matrices = [
        m for i in range(2) for m in attention(i) + mlp(f"model.layers.{i}.mlp", i, "dense")
    ]
    return Inventory("llama", tuple(matrices), tuple(ends()))


@pytest.fixture(scope="session", params=["olmoe", "qwen2_moe", "mixtral", "deepseek", "llama"])
def inventory(request: pytest.FixtureRequest) -> Inventory:
    """Each of the five architectures in turn."""
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Inventory)
    return found
