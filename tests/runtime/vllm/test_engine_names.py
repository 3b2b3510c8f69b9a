"""Names of vLLM's layers and the matrices of a checkpoint."""

from types import SimpleNamespace
from typing import Any

import pytest

from alphaquant.errors import ModelError
from alphaquant.runtime.vllm.engine_names import (
    Ends,
    check_served,
    find_ends,
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


TABLE, HEAD = "model.embed_tokens", "lm_head"
PACKED = (f"{LAYER}.mlp.gate_proj", TABLE, HEAD)


def config(**fields: Any) -> Any:
    return SimpleNamespace(**{"vocab_size": 96, "tie_word_embeddings": False, **fields})


@pytest.mark.parametrize(
    ("names", "head", "embeddings"),
    [
        (PACKED, HEAD, TABLE),
        (PACKED[:2], None, TABLE),
        (PACKED[:1], None, None),
        (
            ("language_model.lm_head", "transformer.wte"),
            "language_model.lm_head",
            "transformer.wte",
        ),
        # a head for further tokens, in a layer of its own
        (("model.layers.61.lm_head", "model.layers.61.embed_tokens"), None, None),
    ],
)
def test_what_is_packed_beside_the_layers_is_found_by_its_name(
    names: tuple[str, ...], head: str | None, embeddings: str | None
) -> None:
    assert find_ends(names, config()) == Ends(head, embeddings, 96)


def test_words_and_ties_are_those_of_the_text_model() -> None:
    text = config(vocab_size=128)
    whole = SimpleNamespace(tie_word_embeddings=True, get_text_config=lambda: text)
    assert find_ends((TABLE,), whole) == Ends(None, TABLE, 128, is_tied=True)
    assert find_ends((TABLE,), config()).is_tied is False


@pytest.mark.parametrize("prefix", ["", "embed_tokens", ".embed_tokens", TABLE])
def test_embeddings_are_found_without_their_whole_name(prefix: str) -> None:
    ends = Ends(HEAD, TABLE, 96)
    assert ends.matrix_of(prefix, 96, is_head=False) == TABLE


@pytest.mark.parametrize(
    ("prefix", "n_words", "is_head"),
    [
        ("", 512, False),  # positions
        ("model.layers.2.embed_tokens", 96, False),  # of a head for further tokens
        ("model.pos_embed_tokens", 96, False),
        ("model.layers.2.shared_head.head", 96, True),
    ],
)
def test_other_layers_with_a_row_per_word_are_none(
    prefix: str, n_words: int, is_head: bool
) -> None:
    assert Ends(HEAD, TABLE, 96).matrix_of(prefix, n_words, is_head=is_head) is None


def test_a_head_without_a_matrix_has_that_of_the_embeddings_where_they_are_tied() -> None:
    assert Ends(None, TABLE, 96, is_tied=True).is_tied_head(96)
    assert not Ends(None, TABLE, 96, is_tied=True).is_tied_head(64)
    assert not Ends(None, TABLE, 96).is_tied_head(96)  # in bf16
    assert not Ends(HEAD, TABLE, 96, is_tied=True).is_tied_head(96)
    assert not Ends(None, None, 96, is_tied=True).is_tied_head(96)


def test_a_packed_matrix_without_a_layer_is_refused() -> None:
    check_served(PACKED, [*PACKED, "model.layers.0.mlp.up_proj"])
    with pytest.raises(
        ModelError, match=r"2 packed matrices have no layer .* lm_head, model\.emb"
    ):
        check_served(PACKED, PACKED[:1])
