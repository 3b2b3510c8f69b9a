"""Names of vLLM's layers and the matrices of a checkpoint."""

import pytest

from alphaquant.errors import ModelError
from alphaquant.runtime.vllm.engine_names import (
    formats_of,
    rename_matrices,
    shard_names,
    substituted,
)
from alphaquant.spaces.formats import parse_format

INT4, INT8 = parse_format("int4-g64"), parse_format("int8-row")
LAYER = "model.layers.0"


@pytest.mark.parametrize(
    ("layer", "shards"),
    [
        (
            f"{LAYER}.self_attn.qkv_proj",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ),
        (f"{LAYER}.mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
        (f"{LAYER}.self_attn.o_proj", ["self_attn.o_proj"]),
    ],
)
def test_a_fused_layer_has_its_shards_in_order(layer: str, shards: list[str]) -> None:
    assert shard_names(layer, {}) == tuple(f"{LAYER}.{shard}" for shard in shards)


def test_the_model_class_names_shards_of_its_own() -> None:
    assert shard_names("a.qkv_proj", {"qkv_proj": ["query", "kv"]}) == ("a.query", "a.kv")


def test_a_layer_that_is_not_packed_has_no_formats() -> None:
    assert formats_of(["a.q", "a.k"], {"b.q": INT4}, "a") is None


def test_formats_are_in_the_order_of_the_shards() -> None:
    assert formats_of(["a.q", "a.k"], {"a.k": INT8, "a.q": INT4}, "a") == [INT4, INT8]


def test_a_layer_packed_in_part_is_refused() -> None:
    with pytest.raises(ModelError, match=r"1 of its 2 matrices and none for a\.k; .*bf16 keeps"):
        formats_of(["a.q", "a.k"], {"a.q": INT4}, "a")


def test_names_are_renamed_as_tensors_are() -> None:
    formats = {f"{LAYER}.mlp.experts.3.gate_proj": INT4, "drop.me": INT8}

    def as_mixtral(name: str) -> str | None:
        dropped = name.startswith("drop")
        return None if dropped else substituted(name, "mixtral").replace(".gate_proj.", ".w1.")

    assert rename_matrices(formats, as_mixtral) == {f"{LAYER}.block_sparse_moe.experts.3.w1": INT4}


def test_other_models_keep_their_names() -> None:
    name = f"{LAYER}.mlp.experts.3.gate_proj.codes"
    assert substituted(name, "olmoe") == name
