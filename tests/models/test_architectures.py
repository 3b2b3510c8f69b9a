"""Six names for models, from configurations and from structure."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from alphaquant.errors import ModelError
from alphaquant.models.architectures import (
    ARCHITECTURES,
    Architecture,
    choose_architecture,
    detect_moe_architecture,
    get_layers_for_model,
)
from alphaquant.models.deepseek_moe import DeepseekConfig
from alphaquant.testing.models import FAMILIES, N_LAYERS, tiny_model

pytestmark = pytest.mark.usefixtures("probed_each_time")

EXPECTED = {
    "llama": "standard",
    "qwen3": "standard",
    "olmoe": "olmoe",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen",
    "qwen3_moe": "generic_moe",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek": "deepseek",
    "glm4_moe": "generic_moe",
    "gpt_oss": "generic_moe",
    "listed_moe": "generic_moe",
    "nemotron_h": "generic_moe",
    "llama4_text": "generic_moe",
}


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **fields)
    return config


def test_the_names_are_the_six() -> None:
    assert " ".join(ARCHITECTURES) == "olmoe qwen mixtral deepseek generic_moe standard"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_and_its_configuration_are_of_the_same_architecture(family: str) -> None:
    model = tiny_model(family)
    assert detect_moe_architecture(model) == EXPECTED[family]
    assert detect_moe_architecture(model.config) == EXPECTED[family]


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        # What the configurations of published models say.
        ("olmoe", {"num_experts": 64}, "olmoe"),
        ("qwen2_moe", {"num_experts": 60, "decoder_sparse_step": 1}, "qwen"),
        ("mixtral", {"num_local_experts": 8}, "mixtral"),
        ("deepseek_v2", {"n_routed_experts": 64, "first_k_dense_replace": 1}, "deepseek"),
        ("deepseek_v3", {"n_routed_experts": 256, "first_k_dense_replace": 3}, "deepseek"),
        ("qwen3_moe", {"num_experts": 128}, "generic_moe"),
        ("gpt_oss", {"num_local_experts": 32}, "generic_moe"),
        ("glm4_moe", {"n_routed_experts": 128, "first_k_dense_replace": 1}, "generic_moe"),
        ("phimoe", {"num_local_experts": 16}, "generic_moe"),
        ("qwen3_next", {"num_experts": 512}, "generic_moe"),
        ("ernie4_5_moe", {"moe_num_experts": 64}, "generic_moe"),
        ("llama4", {}, "generic_moe"),
        # Dense relatives.
        ("qwen2", {}, "standard"),
        ("qwen3", {}, "standard"),
        ("olmo2", {}, "standard"),
        ("mistral", {}, "standard"),
        ("llama", {}, "standard"),
        # Sparse types without a sparse layer.
        ("olmoe", {"num_experts": 0}, "standard"),
        ("granitemoehybrid", {"num_local_experts": 0}, "standard"),
        ("deepseek_v2", {"num_hidden_layers": 3, "first_k_dense_replace": 3}, "standard"),
        ("qwen2_moe", {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}, "standard"),
        ("qwen2_moe", {"num_hidden_layers": 2, "mlp_only_layers": [0]}, "qwen"),
        ("qwen2_moe", {"num_hidden_layers": 3, "decoder_sparse_step": 4}, "standard"),
        ("doge", {}, "standard"),
        ("doge", {"is_moe": True}, "generic_moe"),
        ("exaone_moe", {"num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}, "standard"),
        ("exaone_moe", {"num_hidden_layers": 2}, "generic_moe"),
    ],
)
def test_a_configuration_alone_is_enough(
    model_type: str, fields: dict[str, Any], expected: str
) -> None:
    assert detect_moe_architecture(config_of(model_type, **fields)) == expected


def test_deepseek_moe_v1_needs_no_registration() -> None:
    assert detect_moe_architecture(DeepseekConfig()) == "deepseek"
    assert detect_moe_architecture(DeepseekConfig(first_k_dense_replace=32)) == "standard"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "olmo2"])
def test_dense_relatives_of_sparse_models_are_standard(model_type: str) -> None:
    model = tiny_model(model_type, intermediate_size=72)
    assert detect_moe_architecture(model) == "standard"


class SmoeLike(nn.Module):
    """A name that contains moe, and nothing else that does."""

    def __init__(self) -> None:
        super().__init__()
        self.smoe_like = nn.Linear(4, 4)
        self.mixtral_experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))


def test_names_of_classes_and_modules_do_not_count() -> None:
    assert detect_moe_architecture(SmoeLike()) == "standard"
    model = tiny_model("llama")
    get_layers_for_model(model)[0].add_module("smoe_like", SmoeLike())
    assert detect_moe_architecture(model) == "standard"


@pytest.mark.parametrize(
    ("family", "model_type", "expected"),
    [
        ("olmoe", "my_own", "generic_moe"),
        ("llama", "mixtral", "standard"),
        ("llama", "olmoe_like", "standard"),
    ],
)
def test_the_stated_type_counts_only_where_the_structure_agrees(
    family: str, model_type: str, expected: str
) -> None:
    model: Any = tiny_model(family)
    model.config.model_type = model_type
    assert detect_moe_architecture(model) == expected


def test_experts_in_a_layout_that_cannot_be_quantized_are_experts() -> None:
    model = tiny_model("llama")
    layer: Any = get_layers_for_model(model)[1]
    layer.mlp.weights = nn.Parameter(torch.zeros(4, 8, 8))
    assert detect_moe_architecture(model) == "generic_moe"


@pytest.mark.parametrize(
    ("family", "asked", "name"),
    [
        ("olmoe", "auto", "olmoe"),
        ("olmoe", "olmoe", "olmoe"),
        ("olmoe", "generic_moe", "generic_moe"),
        ("qwen3_moe", "qwen", "qwen"),
        ("llama", "standard", "standard"),
    ],
)
def test_a_name_that_fits_is_taken(family: str, asked: str, name: str) -> None:
    expected = Architecture(name, EXPECTED[family])
    assert choose_architecture(tiny_model(family), asked) == expected


def test_another_family_is_taken_with_a_warning() -> None:
    found = choose_architecture(tiny_model("olmoe"), "mixtral")
    assert (found.name, found.detected) == ("mixtral", "olmoe")
    assert "model type mixtral asked, but this model looks like olmoe" in found.warnings[0]


@pytest.mark.parametrize(
    ("family", "asked", "words"),
    [
        ("olmoe", "standard", r"has routed experts \(olmoe\); use auto or olmoe"),
        ("llama", "mixtral", r"has no routed experts \(standard\); use auto or standard"),
        ("olmoe", "olmo", "unknown model type 'olmo'; known are " + ", ".join(ARCHITECTURES)),
    ],
)
def test_a_name_that_contradicts_the_model_is_refused(family: str, asked: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        choose_architecture(tiny_model(family), asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_are_found_in_every_family(family: str) -> None:
    model: Any = tiny_model(family)
    for model_type in ("auto", *ARCHITECTURES):
        layers = get_layers_for_model(model, model_type)
        assert layers is model.model.layers and len(layers) == N_LAYERS, model_type


def test_decoder_layers_are_found_where_the_configuration_says() -> None:
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=8, n_head=2, vocab_size=9)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert get_layers_for_model(model) is model.transformer.h
    assert get_layers_for_model(model, "standard") is model.transformer.h


class Unknown(nn.Module):
    """Decoder layers, and no configuration that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(4, 4)])


def test_a_named_type_finds_layers_that_no_configuration_states() -> None:
    model = Unknown()
    with pytest.raises(ModelError, match="Unknown has no decoder layers .* pass model_type, one"):
        get_layers_for_model(model)
    assert get_layers_for_model(model, "standard") is model.model.layers


def test_a_model_without_layers_is_refused_by_its_class() -> None:
    with pytest.raises(ModelError, match="SmoeLike has no decoder layers at model.layers"):
        get_layers_for_model(SmoeLike(), "mixtral")
    wrong = tiny_model("llama")
    wrong.config.num_hidden_layers = 5  # type: ignore[union-attr,assignment]
    with pytest.raises(ModelError, match="LlamaForCausalLM has no decoder layers that"):
        get_layers_for_model(wrong)
    with pytest.raises(ModelError, match="known are " + ", ".join(ARCHITECTURES)):
        get_layers_for_model(wrong, "llama")
