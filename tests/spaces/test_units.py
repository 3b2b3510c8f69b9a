"""Matrices, units and inventories: names, families, sums and digests."""

from dataclasses import replace

import pytest

from alphaquant.spaces.formats import BF16, parse_format
from alphaquant.spaces.units import Inventory, Kept, Matrix, Unit, total_bits


def matrix(projection: str, kind: str, rows: int = 4, cols: int = 8) -> Matrix:
    return Matrix(f"model.layers.2.block.{projection}", rows, cols, kind, 2)


def test_a_matrix_knows_its_projection_and_size() -> None:
    found = matrix("down_proj", "dense", 3, 65)
    assert found.projection == "down_proj"
    assert found.n_weights == 195
    assert found.storage_bits(parse_format("int4-g64")) == 8 * (3 * 33 + 3 * 2 * 2)


@pytest.mark.parametrize(
    ("kind", "projection", "role"),
    [
        ("attention", "q_proj", "attention q"),
        ("attention", "qkv", "attention qkv"),
        ("expert", "gate_proj", "routed gate"),
        ("expert", "w1", "routed gate"),
        ("expert", "w3", "routed up"),
        ("expert", "w2", "routed down"),
        ("shared", "up_proj", "shared up"),
        ("dense", "down_proj", "dense down"),
        ("dense", "fc1", "dense fc1"),
    ],
)
def test_a_matrix_has_one_role_by_its_name(kind: str, projection: str, role: str) -> None:
    assert matrix(projection, kind).role == role


@pytest.mark.parametrize(
    ("kind", "projections", "family"),
    [
        ("attention", ("q_proj",), "attention"),
        ("attention", ("q_proj", "k_proj", "v_proj"), "attention"),
        ("expert", ("gate_proj", "up_proj"), "expert.w13"),
        ("expert", ("w1",), "expert.w13"),
        ("expert", ("w2",), "expert.w2"),
        ("expert", ("gate_proj", "up_proj", "down_proj"), "expert.all"),
        ("shared", ("up_proj",), "shared.w13"),
        ("dense", ("down_proj",), "dense.w2"),
    ],
)
def test_a_unit_has_the_family_that_allocators_group_by(
    kind: str, projections: tuple[str, ...], family: str
) -> None:
    assert Unit("u", tuple(matrix(p, kind) for p in projections)).family == family


def test_a_unit_sums_its_matrices() -> None:
    unit = Unit("u", (matrix("gate_proj", "expert", 3, 65), matrix("up_proj", "expert", 2, 10)))
    fmt = parse_format("int3-g64-asym")
    assert (unit.kind, unit.layer) == ("expert", 2)
    assert unit.n_weights == 195 + 20
    assert unit.storage_bits(fmt) == fmt.storage_bits(3, 65) + fmt.storage_bits(2, 10)


def test_an_inventory_sums_matrices_and_kept_tensors() -> None:
    matrices = (matrix("q_proj", "attention"), matrix("down_proj", "dense", 8, 16))
    inventory = Inventory("toy", matrices, (Kept("a.weight", 10, 20), Kept("b.weight", 1, 4)))
    assert inventory.n_weights == 32 + 128
    assert inventory.kept_bytes == 24
    assert inventory.n_layers == 3
    assert inventory.by_name[matrices[1].name] is matrices[1]
    assert inventory.storage_bits(BF16) == 16 * 160
    assert total_bits((m, BF16) for m in matrices) == 16 * 160


def test_the_digest_follows_names_shapes_and_kept_tensors(olmoe: Inventory) -> None:
    first, *rest = olmoe.matrices
    same = Inventory("olmoe", tuple(olmoe.matrices), tuple(olmoe.kept))
    others = [
        replace(olmoe, model_type="mixtral"),
        replace(olmoe, matrices=(replace(first, rows=first.rows + 1), *rest)),
        replace(olmoe, matrices=(*rest, first)),
        replace(olmoe, kept=olmoe.kept[1:]),
    ]
    assert same.digest == olmoe.digest
    assert len({olmoe.digest, *(other.digest for other in others)}) == 5


def test_the_fixtures_have_unique_names(inventory: Inventory) -> None:
    names = [name for m in inventory.matrices for name in (m.name, *m.aliases)]
    assert len(names) == len(set(names))


def test_what_is_beside_the_layers_is_none_of_them() -> None:
    layer = Matrix("model.layers.1.q_proj", 8, 8, "attention", 1)
    embeddings = Matrix("model.embed_tokens", 96, 8, "embedding", 2)
    head = Matrix("lm_head", 96, 8, "head", 2)
    tied = Matrix("model.embed_tokens", 96, 8, "head", 2, aliases=("lm_head",))
    kept = (Kept("norm.weight", 8, 16),)
    whole = Inventory("m", (layer, embeddings, head), kept)
    assert (whole.n_layers, whole.n_parts, whole.include) == (2, 3, ("head", "embeddings"))
    assert whole.n_file_weights == 64 + 2 * 768 + 8
    assert [m.place for m in whole.matrices] == ["1", "beside", "beside"]
    assert [m.role for m in whole.matrices] == ["attention q", "embedding", "head"]
    assert [m.is_looked_up for m in whole.matrices] == [False, True, False]
    assert [Unit(m.name, (m,)).family for m in whole.matrices] == [
        "attention",
        "embedding",
        "head",
    ]
    for matrix, included in (
        (layer, [True, True, True]),
        (head, [False, True, False]),
        (embeddings, [False, False, True]),
        (tied, [False, True, True]),
    ):
        asked = ((), ("head",), ("embeddings",))
        assert [matrix.is_included(include) for include in asked] == included


def test_a_digest_does_not_depend_on_what_is_included() -> None:
    layer = Matrix("model.layers.0.q_proj", 8, 8, "attention", 0)
    head, norm = Matrix("lm_head", 96, 8, "head", 1), Kept("norm.weight", 8, 16)
    stored = Kept("lm_head.weight", 768, 1536)
    kept = Inventory("m", (layer,), (norm, stored))
    assert kept.digest == Inventory("m", (layer, head), (norm,), (stored,)).digest
    assert kept.digest != Inventory("m", (layer,), (norm,)).digest
