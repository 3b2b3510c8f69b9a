"""What a configuration means on a model: numbers by hand, engines, and what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from alphaquant.commands.inspect import Active, Inspection, inspect_config, scheme_label
from alphaquant.commands.statements import read_skeleton
from alphaquant.errors import ConfigError, ModelError, StoreError
from alphaquant.models.quantization_config import PackedFormats, make_quantization_config
from alphaquant.spaces.config import ResolvedScheme
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.models import tiny_model

# OLMoE of `tiny_model`: 2 layers, 8 experts of 24 x 40, 3 per token; attention of four
# projections of 40 x 40, two of them with half the rows.
ATTENTION_WEIGHTS = 2 * (2 * 40 * 40 + 2 * 20 * 40)
EXPERT_WEIGHTS = 2 * 8 * 3 * 24 * 40
ATTENTION = ("attention q", "attention k", "attention v", "attention o")


def save_config(folder: Path, family: str = "olmoe", **changes: Any) -> Path:
    """Folder of a model that has its config.json only."""
    model: Any = tiny_model(family, **changes)
    model.config.save_pretrained(folder)
    return folder


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_config(tmp_path_factory.mktemp("olmoe")))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """int8 rows everywhere, half the experts and all attention in bf16."""
    overrides = [
        {"pattern": "*.experts.{4..7}.*", "wq": "bf16"},
        {"pattern": "*.self_attn.*", "wq": "bf16"},
        {"pattern": "*.nothing", "wq": "int4"},
    ]
    default = {"wq": "int8", "group_size": -1}
    return write(tmp_path / "mixed.json", {"default": default, "overrides": overrides})


@pytest.fixture
def found(mixed: Path, olmoe: str) -> Inspection:
    return inspect_config(mixed, olmoe)


def test_roles_and_layers_add_up_to_the_model(found: Inspection) -> None:
    roles = {part.name: part for part in found.roles}
    assert list(roles) == [*ATTENTION, "routed gate", "routed up", "routed down"]
    assert sum(roles[name].n_weights for name in ATTENTION) == ATTENTION_WEIGHTS
    assert {roles[name].bits_per_weight for name in ATTENTION} == {16.0}
    assert sum(part.n_weights for part in found.roles) == ATTENTION_WEIGHTS + EXPERT_WEIGHTS
    assert [part.name for part in found.layers] == ["0", "1"]
    for parts in (found.roles, found.layers):
        assert -(-sum(part.n_bits for part in parts) // 8) == found.counts.quantized_bytes
        assert sum(part.n_matrices for part in parts) == 2 * (4 + 8 * 3)


def test_formats_of_a_role_are_counted_in_weights(found: Inspection) -> None:
    gate = found.roles[len(ATTENTION)]
    assert gate.weights_by_format == {"int8-row": 2 * 4 * 24 * 40, "bf16": 2 * 4 * 24 * 40}
    one = parse_format("int8-row").storage_bits(24, 40)
    assert gate.n_bits == 2 * 4 * (one + 16 * 24 * 40)
    assert gate.n_bytes == gate.n_bits // 8


def test_token_reads_the_share_of_experts_that_it_uses_and_all_else(found: Inspection) -> None:
    expert_bits = sum(part.n_bits for part in found.roles[len(ATTENTION) :])
    n_bytes = -(-(ATTENTION_WEIGHTS * 16 + expert_bits * 3 // 8) // 8)
    n_weights = ATTENTION_WEIGHTS + EXPERT_WEIGHTS * 3 // 8
    assert found.active == Active(3, n_weights, n_bytes)


def test_token_reads_all_of_a_model_without_routed_experts(mixed: Path, tmp_path: Path) -> None:
    found = inspect_config(mixed, str(save_config(tmp_path / "llama", "llama")))
    n_weights = found.model.inventory.n_weights
    assert found.active == Active(0, n_weights, found.counts.quantized_bytes)


def test_what_a_token_reads_is_unknown_without_experts_per_token(
    found: Inspection, mixed: Path
) -> None:
    skeleton = type(found.model)(found.model.name, found.model.inventory, None)
    assert Inspection(found.statement, skeleton, found.plan).active is None


@pytest.mark.parametrize(
    ("family", "k"),
    [("olmoe", 3), ("mixtral", 2), ("qwen2_moe", 2), ("deepseek_v3", 3), ("llama", None)],
)
def test_experts_per_token_come_from_the_model(family: str, k: int | None, tmp_path: Path) -> None:
    assert read_skeleton(str(save_config(tmp_path, family))).experts_per_token == k


def test_roles_of_shared_and_dense_matrices_are_named(tmp_path: Path) -> None:
    skeleton = read_skeleton(str(save_config(tmp_path, "deepseek_v3")))
    roles = {m.role for m in skeleton.inventory.matrices if m.kind != "attention"}
    assert roles == {
        *("shared gate", "shared up", "shared down"),
        *("dense gate", "dense up", "dense down"),
        *("routed gate", "routed up", "routed down"),
    }


def test_matrices_that_no_pattern_names_are_counted(found: Inspection) -> None:
    routed = ("routed gate", "routed up", "routed down")
    assert found.unnamed == {(role, "int8-row"): 2 * 4 for role in routed}


def test_alias_names_a_matrix_too(tmp_path: Path) -> None:
    overrides = [{"pattern": "*.w1", "wq": "int4"}, {"pattern": "*.self_attn.*", "wq": "int4"}]
    path = write(tmp_path / "c.json", {"overrides": overrides})
    found = inspect_config(path, str(save_config(tmp_path / "mixtral", "mixtral")))
    assert found.unnamed == {("routed up", "bf16"): 8, ("routed down", "bf16"): 8}


def test_pattern_that_matches_nothing_is_told(found: Inspection) -> None:
    assert found.plan.unmatched_patterns == ("*.nothing",)
    assert len(found.warnings) == 1
    assert "'*.nothing'" in found.warnings[0]


def test_rounded_inputs_are_part_of_the_label() -> None:
    assert scheme_label(ResolvedScheme(parse_format("int4-g64"))) == "int4-g64"
    both = ResolvedScheme(parse_format("int4-g64"), parse_format("int8-row"))
    assert scheme_label(both) == "int4-g64 of int8-row inputs"


SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ({"default": {"wq": "int4", "group_size": 64}}, {}),
        (
            {"default": {"wq": "int3", "group_size": 64}},
            {"sglang": "does not load"},
        ),
        (
            {
                "default": {"wq": "int4", "group_size": 64},
                "overrides": [{"pattern": "*.layers.1.*.experts.*", "wq": "int8"}],
            },
            {"transformers": "1 of its 9 units must"},
        ),
        (
            {"default": {"wq": "int4", "group_size": 64, "aq": "int8"}},
            dict.fromkeys(("vllm", "sglang", "transformers"), "round their inputs"),
        ),
    ],
)
def test_engines_say_why_they_do_not_load(
    config: dict[str, Any], reasons: dict[str, str], tmp_path: Path
) -> None:
    model = str(save_config(tmp_path / "m", **SIZES))
    found = inspect_config(write(tmp_path / "c.json", config), model)
    assert {e.engine for e in found.engines if e.reasons} == set(reasons)
    for engine in found.engines:
        assert reasons.get(engine.engine, "") in " ".join(engine.reasons)


def test_model_is_the_one_that_the_summary_names_and_another_is_warned_of(
    mixed: Path, olmoe: str, tmp_path: Path
) -> None:
    config = json.loads(mixed.read_text())
    path = write(tmp_path / "s.json", {**config, "summary": {"model": olmoe}})
    assert inspect_config(path).model.name == olmoe
    other = str(save_config(tmp_path / "other"))
    text = inspect_config(path, other).warnings[-1]
    assert olmoe in text
    assert other in text


def test_edited_configuration_is_warned_of(found: Inspection, tmp_path: Path, olmoe: str) -> None:
    config = {"default": {"wq": "int8", "group_size": -1}}
    digest = inspect_config(write(tmp_path / "c.json", config), olmoe).plan.assignment.digest
    for stated, n_warnings in ((digest, 0), (found.plan.assignment.digest, 1)):
        path = write(tmp_path / "s.json", {**config, "summary": {"assignment_digest": stated}})
        warnings = inspect_config(path, olmoe).warnings
        assert len(warnings) == n_warnings
        assert all("edited" in text for text in warnings)


def test_directory_of_a_search_is_its_best(mixed: Path, olmoe: str, tmp_path: Path) -> None:
    best = write(tmp_path / "out" / "best.json", json.loads(mixed.read_text()))
    found = inspect_config(tmp_path / "out", olmoe)
    assert (found.statement.path, found.counts.quantized_bytes) == (
        best,
        inspect_config(mixed, olmoe).counts.quantized_bytes,
    )


def pack(folder: Path, found: Inspection, **changes: Any) -> Path:
    """A packed checkpoint's config.json with the formats of an inspection."""
    formats = {name: scheme.weight_format for name, scheme in found.plan.schemes.items()}
    first = next(iter(formats))
    entry = make_quantization_config(PackedFormats(formats, {first: parse_format("int8-row")}))
    config = json.loads((Path(found.model.name) / "config.json").read_text())
    write(folder / "config.json", {**config, "quantization_config": {**entry, **changes}})
    return folder


def test_packed_checkpoint_is_its_own_model(found: Inspection, tmp_path: Path) -> None:
    path = pack(tmp_path / "packed", found)
    facts = {"model": "somewhere", "model_digest": "d", "warnings": []}
    write(path / "quantize_report.json", facts)
    packed = inspect_config(path)
    assert packed.counts == found.counts
    assert packed.statement.summary == {"model": "somewhere", "model_digest": "d"}
    assert (packed.unnamed, packed.warnings) == ({}, ())
    assert packed.label(packed.model.inventory.matrices[0]) == "bf16 of int8-row inputs"


def test_packed_checkpoint_of_other_matrices_is_refused(found: Inspection, tmp_path: Path) -> None:
    path = pack(tmp_path / "packed", found)
    with pytest.raises(ConfigError, match="is of another model"):
        inspect_config(path, str(save_config(tmp_path / "llama", "llama")))


def test_packed_checkpoint_of_another_version_is_refused(
    found: Inspection, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="version 99"):
        inspect_config(pack(tmp_path / "packed", found, version=99))


def test_damaged_report_of_a_packed_checkpoint_is_refused(
    found: Inspection, tmp_path: Path
) -> None:
    path = pack(tmp_path / "packed", found)
    (path / "quantize_report.json").write_text("{")
    with pytest.raises(ConfigError, match=r"quantize_report.json is damaged"):
        inspect_config(path)


def test_configuration_of_another_model_is_refused(olmoe: str, tmp_path: Path) -> None:
    overrides = [{"pattern": "transformer.h.*", "wq": "int4"}]
    path = write(tmp_path / "c.json", {"overrides": overrides})
    with pytest.raises(ConfigError, match=r"is of another model than .*1 of its 1 patterns"):
        inspect_config(path, olmoe)


def test_searched_configuration_with_lost_patterns_is_of_another_model(
    mixed: Path, olmoe: str, tmp_path: Path
) -> None:
    config = json.loads(mixed.read_text())
    path = write(tmp_path / "s.json", {**config, "summary": {"assignment_digest": "other"}})
    with pytest.raises(ConfigError, match=r"1 of its 3 patterns match nothing, e\.g\. '\*\.noth"):
        inspect_config(path, olmoe)


def test_model_that_nothing_names_is_asked_for(mixed: Path) -> None:
    with pytest.raises(ModelError, match="does not say which model"):
        inspect_config(mixed)


def test_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without best\.json"):
        inspect_config(tmp_path, "demo")


def test_model_of_thirty_billion_weights_takes_its_config_json_only(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "model")
    path = write(
        tmp_path / "c.json",
        {
            "default": {"wq": "int4", "group_size": 64},
            "overrides": [{"pattern": "*.experts.{0..63}.*", "wq": "int3"}],
        },
    )
    found = inspect_config(path, str(tmp_path / "model"))
    experts, attention = 48 * 128 * 3 * 768 * 2048, 48 * (2 * 4096 * 2048 + 2 * 512 * 2048)
    assert found.model.inventory.n_weights == experts + attention
    assert found.counts.routed_bits_per_weight == 3.75
    assert found.counts.quantized_bytes * 8 == 3.75 * experts + 4.25 * attention
    assert found.active == Active(
        8, experts // 16 + attention, int((3.75 * experts / 16 + 4.25 * attention) / 8)
    )
    assert [bool(engine.reasons) for engine in found.engines] == [True, True, True]
