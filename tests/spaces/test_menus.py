"""Menus where nobody names formats, and what a profile leaves of those that somebody names."""

import pytest

from alphaquant.errors import FormatError
from alphaquant.spaces.formats import DEFAULT_MENU, parse_menu
from alphaquant.spaces.menus import SERVING_MENU, menu_of
from alphaquant.spaces.profiles import find_profile


def test_auto_menu_is_that_of_the_profile() -> None:
    for name in ("any", "kernels"):
        assert sorted(menu_of("auto", find_profile(name))) == sorted(DEFAULT_MENU)
    assert sorted(menu_of("auto", find_profile("vllm"))) == sorted(SERVING_MENU)
    assert "mxfp4" not in menu_of("auto", find_profile("sglang"))


def test_stated_menu_is_narrowed_to_what_the_profile_loads() -> None:
    assert menu_of("int4-g64,int3-g64-asym", find_profile("vllm")) == ("int4-g64",)
    with pytest.raises(FormatError, match="profile vllm loads"):
        menu_of("int3-g64-asym", find_profile("vllm"))


def test_the_menu_of_llama_cpp_is_all_of_its_types() -> None:
    assert menu_of("auto", find_profile("gguf")) == parse_menu("gguf")
    assert menu_of("int4-g128,q4_k", find_profile("gguf")) == ("q4_k",)
