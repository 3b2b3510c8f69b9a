"""Published models at their real size, on the meta device: every matrix, every weight once."""

from collections import Counter
from functools import cache

import pytest

from alphaquant.models.architectures import detect_moe_architecture, get_layers_for_model
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.published import PUBLISHED, skeleton

# Sparse layers, routed experts, hidden size, expert width.
EXPERTS = {
    "olmoe-1b-7b": (16, 64, 2048, 1024),
    "qwen1.5-moe-a2.7b": (24, 60, 2048, 1408),
    "mixtral-8x7b": (32, 8, 4096, 14336),
    "deepseek-moe-16b": (27, 64, 2048, 1408),
    "qwen3-30b-a3b": (48, 128, 2048, 768),
    "gpt-oss-20b": (24, 32, 2880, 2880),
    "glm-4.5-air": (45, 128, 4096, 1408),
}

# Parameters, as the files of the checkpoints hold them, and the percentage in routed experts.
TOTALS = {
    "olmoe-1b-7b": (6_919_161_856, 93.1),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 87.0),
    "mixtral-8x7b": (46_702_792_704, 96.6),
    "deepseek-moe-16b": (16_375_728_128, 91.3),
    "qwen3-30b-a3b": (30_532_122_624, 94.9),
    "gpt-oss-20b": (20_914_757_184, 91.4),
    "glm-4.5-air": (106_852_251_264, 93.3),
}

ARCHITECTURE = {
    "olmoe-1b-7b": "olmoe",
    "qwen1.5-moe-a2.7b": "qwen",
    "mixtral-8x7b": "mixtral",
    "deepseek-moe-16b": "deepseek",
    "qwen3-30b-a3b": "generic_moe",
    "gpt-oss-20b": "generic_moe",
    "glm-4.5-air": "generic_moe",
}


@cache
def mapped(name: str) -> ModelMap:
    return map_model(skeleton(name))


@pytest.fixture(scope="module", params=PUBLISHED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_expert_matrices_are_listed(name: str) -> None:
    n_layers, n_experts, hidden, width = EXPERTS[name]
    experts = [m for m in mapped(name).inventory.matrices if m.kind == "expert"]
    assert len(experts) == n_layers * n_experts * 3
    n_all = PUBLISHED[name][1]["num_hidden_layers"]
    first = n_all - n_layers
    assert {m.name for m in experts} == {
        f"model.layers.{layer}.mlp.experts.{e}.{projection}"
        for layer in range(first, n_all)
        for e in range(n_experts)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    shapes = Counter((m.rows, m.cols, m.projection == "down_proj") for m in experts)
    count = n_layers * n_experts
    assert shapes == Counter(
        {(width, hidden, False): 2 * count, (hidden, width, True): count},
    )


def test_parameters_and_the_share_of_experts_are_the_published_ones(name: str) -> None:
    inventory = mapped(name).inventory
    total = inventory.n_weights + sum(kept.n_weights for kept in inventory.kept)
    routed = sum(m.n_weights for m in inventory.matrices if m.kind == "expert")
    n_layers, n_experts, hidden, width = EXPERTS[name]
    assert routed == 3 * n_layers * n_experts * hidden * width
    expected, percent = TOTALS[name]
    assert total == expected
    assert abs(100 * routed / total - percent) < 0.06


def test_architecture_is_found_on_the_meta_device(name: str) -> None:
    model = mapped(name).model
    assert detect_moe_architecture(model) == ARCHITECTURE[name]
    assert detect_moe_architecture(model.config) == ARCHITECTURE[name]
    assert len(get_layers_for_model(model)) == PUBLISHED[name][1]["num_hidden_layers"]


def test_shared_experts_and_dense_layers_are_listed_apart() -> None:
    kinds = {
        name: Counter(m.kind for m in mapped(name).inventory.matrices if m.kind != "attention")
        for name in ("qwen1.5-moe-a2.7b", "deepseek-moe-16b", "glm-4.5-air", "olmoe-1b-7b")
    }
    assert kinds["olmoe-1b-7b"] == {"expert": 3072}
    assert kinds["qwen1.5-moe-a2.7b"] == {"expert": 4320, "shared": 72}
    assert kinds["deepseek-moe-16b"] == {"expert": 5184, "shared": 81, "dense": 3}
    assert kinds["glm-4.5-air"] == {"expert": 17280, "shared": 135, "dense": 3}
    by_name = mapped("deepseek-moe-16b").inventory.by_name
    assert by_name["model.layers.0.mlp.down_proj"].cols == 10944
    assert by_name["model.layers.1.mlp.shared_experts.down_proj"].cols == 2 * 1408
    shared = mapped("qwen1.5-moe-a2.7b").inventory.by_name[
        "model.layers.0.mlp.shared_expert.up_proj"
    ]
    assert (shared.rows, shared.cols) == (5632, 2048)


def test_nemotron_3_nano_has_two_matrices_per_expert() -> None:
    inventory = map_model(skeleton("nemotron-3-nano-30b-a3b")).inventory
    experts = [m for m in inventory.matrices if m.kind == "expert"]
    assert Counter((m.projection, m.rows, m.cols) for m in experts) == {
        ("up_proj", 1856, 2688): 23 * 128,
        ("down_proj", 2688, 1856): 23 * 128,
    }
    # 23 Mamba layers of two linears, 6 of attention, a shared expert beside the routed ones.
    kinds = Counter(m.kind for m in inventory.matrices)
    assert kinds == {"expert": 5888, "dense": 46, "attention": 24, "shared": 46}
    # As published, and the routers' correction biases.
    total = inventory.n_weights + sum(kept.n_weights for kept in inventory.kept)
    assert total == 31_577_937_344 + 23 * 128


def test_a_width_that_no_group_divides_has_a_short_last_group() -> None:
    down = mapped("deepseek-moe-16b").inventory.by_name["model.layers.0.mlp.down_proj"]
    fmt = parse_format("int4-g128")
    # 10944 = 85 * 128 + 64
    assert fmt.n_groups(down.cols) == 86
    assert down.storage_bits(fmt) == 2048 * (10944 * 4 + 86 * 16)
