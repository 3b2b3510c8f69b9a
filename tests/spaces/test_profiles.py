"""Profiles: which matrices they couple, which formats they leave, and what they refuse."""

import re
from dataclasses import replace

import pytest

from alphaquant.errors import ConfigError, FormatError
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import DEFAULT_MENU, MENUS
from alphaquant.spaces.profiles import (
    PROFILES,
    allowed_formats,
    find_profile,
    included,
    is_loadable,
    narrow_menu,
    units_of,
)
from alphaquant.spaces.units import Inventory, Matrix, Unit
from alphaquant.specs.flat import texts_of
from alphaquant.specs.limits import LimitSpec


def unit_names(model: Inventory, profile: str, layer: int) -> list[str]:
    """Names of a layer's units, and how many matrices each has."""
    units = [u for u in units_of(model, PROFILES[profile]) if u.layer == layer]
    start = f"model.layers.{layer}."
    return [f"{u.name.removeprefix(start)} {len(u.matrices)}" for u in units]


def test_a_profile_is_found_by_name_and_others_are_listed() -> None:
    assert all(find_profile(name).name == name for name in PROFILES)
    with pytest.raises(
        ConfigError, match="'tgi'; known are any, kernels, vllm, sglang, transformers"
    ):
        find_profile("tgi")


@pytest.mark.parametrize("profile", PROFILES)
def test_every_matrix_is_in_exactly_one_unit_of_one_kind(
    inventory: Inventory, profile: str
) -> None:
    units = units_of(inventory, PROFILES[profile])
    names = [m.name for u in units for m in u.matrices]
    assert sorted(names) == sorted(inventory.by_name)
    assert len({u.name for u in units}) == len(units)
    assert all({m.kind for m in u.matrices} == {u.kind} for u in units)


SHARED = "mlp.shared_expert"
ATTENTION = ["self_attn.q_proj 1", "self_attn.k_proj 1", "self_attn.v_proj 1"]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FREE_EXPERTS = [f"mlp.experts.{i}.{name} 1" for i in range(16) for name in PROJECTIONS]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (
            "any",
            [*ATTENTION, "self_attn.o_proj 1", *FREE_EXPERTS]
            + [f"{SHARED}.{name} 1" for name in PROJECTIONS],
        ),
        (
            "kernels",
            [*ATTENTION, "self_attn.o_proj 1"]
            + [f"mlp.experts.{i}.{part}" for i in range(16) for part in ("w13 2", "down_proj 1")]
            + [f"{SHARED}.{name} 1" for name in PROJECTIONS],
        ),
        (
            "vllm",
            ["self_attn.qkv 3", "self_attn.o_proj 1", "mlp.experts 48"]
            + [f"{SHARED}.w13 2", f"{SHARED}.down_proj 1"],
        ),
        (
            "sglang",
            ["self_attn.qkv 3", "self_attn.o_proj 1", "mlp.experts 48"]
            + [f"{SHARED}.w13 2", f"{SHARED}.down_proj 1"],
        ),
        (
            "transformers",
            [*ATTENTION, "self_attn.o_proj 1"]
            + [f"{SHARED}.gate_proj 1", f"{SHARED}.up_proj 1", f"{SHARED}.down_proj 1"],
        ),
    ],
)
def test_qwen2_moe_has_these_units_in_layer_1(
    qwen2_moe: Inventory, profile: str, expected: list[str]
) -> None:
    assert unit_names(qwen2_moe, profile, 1) == expected


def test_all_experts_of_the_model_are_one_unit_in_transformers(olmoe: Inventory) -> None:
    units = [u for u in units_of(olmoe, PROFILES["transformers"]) if u.kind == "expert"]
    assert [(u.name, len(u.matrices)) for u in units] == [("model.layers.experts", 12 * 64 * 3)]
    assert units[0].family == "expert.all"


@pytest.mark.parametrize("profile", ["vllm", "sglang"])
def test_the_mla_pair_is_fused_and_the_rest_of_mla_is_free(
    deepseek: Inventory, profile: str
) -> None:
    names = unit_names(deepseek, profile, 0)
    attention = [name for name in names if name.startswith("self_attn")]
    assert attention == [
        "self_attn.qkv_a 2",
        "self_attn.q_b_proj 1",
        "self_attn.kv_b_proj 1",
        "self_attn.o_proj 1",
    ]
    assert "mlp.w13 2" in names
    assert "self_attn.q_a_proj 1" in unit_names(deepseek, "any", 0)


def test_mla_without_a_low_rank_query_fuses_nothing() -> None:
    names = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    prefix = "model.layers.0.self_attn"
    matrices = tuple(Matrix(f"{prefix}.{n}", 64, 128, "attention", 0) for n in names)
    units = units_of(Inventory("deepseek_v2", matrices), PROFILES["vllm"])
    assert [u.name for u in units] == [m.name for m in matrices]


def test_old_expert_names_couple_as_the_new_ones() -> None:
    prefix = "model.layers.0.block_sparse_moe.shared"
    matrices = tuple(Matrix(f"{prefix}.{n}", 64, 128, "shared", 0) for n in ("w1", "w2", "w3"))
    units = units_of(Inventory("mixtral", matrices), PROFILES["vllm"])
    assert [u.name for u in units] == [f"{prefix}.w13", f"{prefix}.w2"]
    assert [u.family for u in units] == ["shared.w13", "shared.w2"]


OURS = "any kernels"
ENGINES = "any kernels vllm sglang transformers"
LOADABLE = {
    # format: what loads it for attention's output, what for routed experts
    "int1-g128": (f"{OURS} gguf", f"{OURS} gguf"),
    "int4-g128": (ENGINES, ENGINES),
    "int8-g32": (f"{ENGINES} gguf", f"{ENGINES} gguf"),
    "int8-row": (ENGINES, ENGINES),
    "int4-g16": (f"{OURS} transformers", f"{OURS} transformers"),
    "int4-g128-asym": (f"{OURS} vllm", f"{OURS} vllm"),
    "int3-g64": (f"{OURS} vllm transformers", f"{OURS} vllm transformers"),
    "int2-g32-asym": (f"{OURS} vllm", f"{OURS} vllm"),
    "fp8-e4m3-row": (f"{OURS} vllm transformers", f"{OURS} transformers"),
    "fp8-e4m3-g128": (OURS, OURS),
    "fp8-e5m2-row": (OURS, OURS),
    "fp4-e2m1-g128": (OURS, OURS),
    "int4-g32-s256": (OURS, OURS),  # no stock engine has super-blocks
    "int3-g16-s256": (f"{OURS} gguf", OURS),  # Q3_K: blocks of 256, experts of 128
    "nl4-g32": (f"{OURS} gguf", f"{OURS} gguf"),
    "nl4-g64": (OURS, OURS),
    "mxfp4": (f"{OURS} vllm transformers gguf", f"{OURS} vllm transformers gguf"),
    "nvfp4": (f"{OURS} vllm transformers", OURS),
    "mxfp6": (OURS, OURS),
    "q4_1": (f"{OURS} gguf", f"{OURS} gguf"),
    "q4_k": (f"{OURS} gguf", ""),  # blocks of 256, experts of 128
    "bf16": (f"{ENGINES} gguf", f"{OURS} vllm sglang gguf"),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_a_format_is_loaded_by_these_profiles(olmoe: Inventory, name: str) -> None:
    found = []
    for projection in ("o_proj", "down_proj"):
        loads = []
        for profile in PROFILES.values():
            units = units_of(olmoe, profile)
            unit = next(u for u in units if projection in [m.projection for m in u.matrices])
            if is_loadable(unit, parse_format(name), profile):
                loads.append(profile.name)
        found.append(" ".join(loads))
    assert tuple(found) == LOADABLE[name]


def test_a_menu_is_narrowed_to_what_some_matrix_can_have() -> None:
    menu = ("int2-g32", "int4-g128", "int4-g128-asym", "mxfp4", "bf16")
    assert narrow_menu(menu, PROFILES["any"]) == menu
    assert narrow_menu(menu, PROFILES["vllm"]) == menu
    assert narrow_menu(menu, PROFILES["sglang"]) == ("int4-g128", "bf16")
    symmetric = ("int2-g32", "int4-g128", "mxfp4", "bf16")
    assert narrow_menu(menu, PROFILES["transformers"]) == symmetric
    assert narrow_menu(MENUS["all"], PROFILES["any"]) == MENUS["all"]


def test_an_empty_menu_is_refused_with_what_the_profile_loads() -> None:
    text = (
        "none of the formats mxfp6, int4-g128-asym can be loaded; profile sglang (SGLang 0.5.23) "
        "loads int4, int8 symmetric, group 32, 64, 128, row; bf16; change --formats, or use "
        "--profile any"
    )
    with pytest.raises(FormatError, match=re.escape(text)):
        narrow_menu(("mxfp6", "int4-g128-asym"), PROFILES["sglang"])


def test_experts_of_transformers_are_never_bf16_or_nvfp4(olmoe: Inventory) -> None:
    profile = PROFILES["transformers"]
    units = units_of(olmoe, profile)
    menu = ("int4-g128", "nvfp4", "bf16")
    for unit in units:
        expected = menu[:1] if unit.kind == "expert" else menu
        assert allowed_formats(unit, menu, profile) == expected
    experts = next(u for u in units if u.kind == "expert")
    with pytest.raises(FormatError, match=r"none of the formats bf16 .* model\.layers\.experts"):
        allowed_formats(experts, ("bf16",), profile)


def test_nvfp4_is_for_what_vllm_does_not_fuse(olmoe: Inventory) -> None:
    profile = PROFILES["vllm"]
    loads = {
        u.name: is_loadable(u, parse_format("nvfp4"), profile) for u in units_of(olmoe, profile)
    }
    assert loads["model.layers.0.self_attn.o_proj"]
    assert not loads["model.layers.0.self_attn.qkv"] and not loads["model.layers.0.mlp.experts"]


def test_marlin_kernels_narrow_the_engines_that_have_them() -> None:
    for name in ("vllm", "sglang"):
        narrowed = find_profile(name, "marlin")
        assert narrowed.text == (
            f"profile {name} ({narrowed.engine}) loads int4, int8 symmetric, group 32, 64, 128, "
            "row; bf16"
        )
        assert narrowed.couplings == find_profile(name).couplings
    with pytest.raises(ConfigError, match=r"--kernels marlin with --profile any.*vllm, sglang"):
        find_profile("any", "marlin")


@pytest.mark.parametrize("name", ["vllm", "sglang", "transformers"])
def test_help_names_the_version_that_an_engine_was_checked_against(name: str) -> None:
    profile = PROFILES[name]
    assert profile.checked and profile.export == "compressed-tensors"
    shown = " ".join(texts_of(LimitSpec)["profile"].split())
    assert all(version in shown for version in re.findall(r"[0-9.]+[0-9]", profile.engine))


@pytest.mark.parametrize(
    ("profile", "kind", "projection", "rows", "cols", "allowed"),
    [
        # 10944 = 64 * 171: Marlin wants inputs % 128
        ("sglang", "dense", "down_proj", 256, 10944, "bf16"),
        ("sglang", "dense", "up_proj", 10944, 256, "int4-g32 int4-g128 bf16"),
        ("sglang", "dense", "up_proj", 96, 256, "bf16"),
        ("vllm", "dense", "up_proj", 96, 256, "int4-g32 int4-g128 mxfp4 bf16"),
        ("vllm", "dense", "up_proj", 80, 256, "mxfp4 bf16"),
        ("transformers", "dense", "down_proj", 256, 10944, "int4-g32 mxfp4 bf16"),
        ("any", "dense", "down_proj", 256, 10944, "int4-g32 int4-g128 mxfp4 bf16"),
        ("any", "dense", "down_proj", 7, 33, "int4-g32 int4-g128 mxfp4 bf16"),
        # inner width of experts % max(64, group): outputs of up, inputs of down
        ("sglang", "expert", "up_proj", 192, 256, "int4-g32 bf16"),
        ("sglang", "expert", "down_proj", 256, 192, "int4-g32 bf16"),
        ("sglang", "expert", "up_proj", 96, 256, "bf16"),
        ("vllm", "expert", "down_proj", 256, 192, "int4-g32 mxfp4 bf16"),
        ("vllm", "dense", "up_proj", 64, 48, "bf16"),
    ],
)
def test_a_shape_narrows_the_formats(
    profile: str, kind: str, projection: str, rows: int, cols: int, allowed: str
) -> None:
    unit = Unit("u", (Matrix(f"m.{projection}", rows, cols, kind, 0, 0),))
    menu = ("int4-g32", "int4-g128", "mxfp4", "bf16")
    assert " ".join(allowed_formats(unit, menu, PROFILES[profile])) == allowed


def test_one_matrix_that_does_not_fit_keeps_the_format_from_the_unit() -> None:
    good = Matrix("m.experts.0.up_proj", 128, 256, "expert", 0, 0)
    bad = replace(good, name="m.experts.1.up_proj", rows=80, expert=1)
    fmt = parse_format("int4-g128")
    assert is_loadable(Unit("u", (good,)), fmt, PROFILES["vllm"])
    assert not is_loadable(Unit("u", (good, bad)), fmt, PROFILES["vllm"])


def test_our_runtime_loads_the_whole_default_menu_everywhere(inventory: Inventory) -> None:
    profile = PROFILES["any"]
    for unit in units_of(inventory, profile):
        assert allowed_formats(unit, DEFAULT_MENU, profile) == DEFAULT_MENU


def test_llama_cpp_has_one_type_for_each_projection_of_a_layer_s_experts(olmoe: Inventory) -> None:
    units = units_of(olmoe, PROFILES["gguf"])
    experts = [unit for unit in units if unit.kind == "expert" and unit.layer == 0]
    prefix = "model.layers.0.mlp.experts"
    assert [u.name for u in experts] == [f"{prefix}.{p}_proj" for p in ("gate", "up", "down")]
    assert all(len(unit.matrices) == 64 for unit in experts)
    others = [unit for unit in units if unit.kind != "expert"]
    assert all(len(unit.matrices) == 1 for unit in others)


def test_blocks_of_llama_cpp_are_offered_where_they_divide_the_width() -> None:
    names = ("q_proj", 256), ("k_proj", 128), ("v_proj", 96), ("o_proj", 80)
    matrices = tuple(Matrix(f"m.{n}", 32, cols, "attention", 0) for n, cols in names)
    units = units_of(Inventory("llama", matrices), PROFILES["gguf"])
    menu = ("int1-g128", "q4_k", "int4-g32", "int4-g64", "iq4_nl", "mxfp4", "bf16")
    found = [allowed_formats(unit, menu, PROFILES["gguf"]) for unit in units]
    small = ("int4-g32", "iq4_nl", "mxfp4", "bf16")
    assert found == [("int1-g128", "q4_k", *small), ("int1-g128", *small), small, ("bf16",)]


@pytest.mark.parametrize(
    ("asked", "budget", "profile", "expected"),
    [
        (None, "4bits", "any", ()),
        (None, "13GiB", "any", ("head", "embeddings")),
        (None, "4bpw-file", "gguf", ("head", "embeddings")),
        (None, "13GiB", "vllm", ()),
        ("none", "13GiB", "any", ()),
        ("embeddings, head", "4bits", "kernels", ("head", "embeddings")),
        ("head", "13GiB", "any", ("head",)),
    ],
)
def test_what_is_searched_beside_the_layers_follows_from_the_budget_unless_it_is_asked(
    asked: str | None, budget: str, profile: str, expected: tuple[str, ...]
) -> None:
    assert included(asked, parse_budget(budget), find_profile(profile)) == expected


@pytest.mark.parametrize(
    ("asked", "profile", "said"),
    [
        ("lm_head", "any", "--include lm_head; known are head, embeddings and none"),
        ("none,head", "any", "known are head, embeddings and none"),
        ("head", "vllm", "loads embeddings and lm_head as they are; leave --include out, or use"),
    ],
)
def test_others_are_refused(asked: str, profile: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        included(asked, parse_budget("4bits"), find_profile(profile))


@pytest.mark.parametrize("kind", ["head", "embedding"])
def test_what_a_profile_does_not_include_stays_in_bf16(kind: str) -> None:
    unit = Unit("end", (Matrix("end", 512, 256, kind, 2),))
    for profile in PROFILES.values():
        able = is_loadable(unit, parse_format("int8-g32"), profile)
        assert able == bool(profile.includes), profile.name
        if profile.name != "transformers":  # whose experts have no bf16
            assert is_loadable(unit, parse_format("bf16"), profile)
