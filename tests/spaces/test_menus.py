"""Menus where nobody names formats, and what a profile leaves of those that somebody names."""

import pytest

from alphaquant.cli.reference import reference
from alphaquant.demo import model_path
from alphaquant.errors import FormatError
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.menus import DEFAULT_MENU, MENUS, SERVING_MENU, menu_of, parse_menu
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import make_space
from alphaquant.testing.models import tiny_model


def test_auto_menu_is_that_of_the_profile() -> None:
    for name in ("any", "kernels"):
        assert sorted(menu_of("auto", find_profile(name))) == sorted(DEFAULT_MENU)
    assert sorted(menu_of("auto", find_profile("vllm"))) == sorted(SERVING_MENU)
    marlin = ("int4-g128", "int4-g64", "int4-g32", "int8-g128", "bf16")
    assert menu_of("auto", find_profile("vllm", "marlin")) == marlin
    assert menu_of("auto", find_profile("sglang")) == marlin
    symmetric = menu_of("auto", find_profile("transformers"))
    assert "int2-row" in symmetric and not any(name.endswith("asym") for name in symmetric)


def test_stated_menu_is_narrowed_to_what_the_profile_loads() -> None:
    assert menu_of("int4-g64,int1-g64", find_profile("vllm")) == ("int4-g64",)
    with pytest.raises(FormatError, match=r"profile vllm \(vLLM 0\.32\.0\) loads"):
        menu_of("int1-g64", find_profile("vllm"))


@pytest.mark.parametrize("family", ["llama", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_engines_have_formats_for_every_budget_from_two_bits_and_a_tenth(family: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    sizes |= {"shared_expert_intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 64}
    inventory = map_model(tiny_model(family, **sizes)).inventory
    for profile in (find_profile("vllm"), find_profile("transformers")):
        for budget in ("2.1bits", "2.5bits", "4.25bits", "8bits"):
            space = make_space(inventory, profile, menu_of("auto", profile), parse_budget(budget))
            assert all(space.allowed(unit) for unit in space.units)


def test_the_demo_can_be_searched_for_an_engine_at_two_bits_and_a_tenth() -> None:
    inventory = map_model(load_skeleton(model_path())).inventory
    for name in ("vllm", "transformers"):
        profile = find_profile(name)
        space = make_space(inventory, profile, menu_of("auto", profile), parse_budget("2.1bits"))
        assert space.reach_bits[0] <= 2.1 * inventory.n_weights


def test_the_menu_of_llama_cpp_is_all_of_its_types() -> None:
    assert menu_of("auto", find_profile("gguf")) == parse_menu("gguf")
    assert menu_of("int4-g128,q4_k", find_profile("gguf")) == ("q4_k",)


def test_a_menu_is_sorted_by_bits_and_without_duplicates() -> None:
    assert parse_menu("int8-g128, mxfp4,int4,int4-g128") == ("int4-g128", "mxfp4", "int8-g128")
    assert parse_menu("mx,mxfp4") == ("mxfp4", "mxfp6", "mxfp8")
    assert set(parse_menu("default")) == set(DEFAULT_MENU)


@pytest.mark.parametrize("menu", MENUS)
def test_every_menu_holds_canonical_names(menu: str) -> None:
    assert set(parse_menu(menu)) == set(MENUS[menu])


@pytest.mark.parametrize(
    ("text", "message"), [(" , ", "no formats in"), ("int4,huge", "unknown format 'huge'")]
)
def test_a_menu_without_formats_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_menu(text)


def test_the_help_names_every_menu() -> None:
    described = " ".join(reference().split())
    listed = described.split("menus: ", 1)[1].split(".", 1)[0]
    assert set(listed.split(", ")) == set(MENUS)
