"""SGLang's configurations: arguments of the checkpoint's own numbers, within stored signatures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import ConfigError
from alphaquant.exports.sglang_configs import (
    LATEST,
    SIGNATURES,
    SglangConfig,
    check_kwargs,
    installed_signatures,
    sglang_config,
    sglang_configs,
)
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import (
    Layout,
    awq,
    compressed,
    fp8,
    gptq,
    int8,
    save_foreign,
)

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("base") / "base", hidden_size=128, intermediate_size=64
    )


@pytest.fixture
def save(base: Path, tmp_path: Path) -> Save:
    def saved(layout: Layout, **fields: Any) -> Path:
        own = Layout({**layout.config, **fields}, layout.encode)
        folder = tmp_path / str(own.config["quant_method"])
        save_foreign(
            base, folder, own, lambda module: module.endswith("layers.0.self_attn.q_proj")
        )
        return folder

    return saved


@pytest.mark.parametrize("version", SIGNATURES)
def test_fp8_has_the_blocks_of_the_checkpoint(save: Save, version: str) -> None:
    """Capability 89: not None, as the documents had it."""
    found = sglang_config(save(fp8(), modules_to_not_convert=["lm_head"]), version)
    assert found.class_name == "Fp8Config"
    assert found.kwargs == {
        "is_checkpoint_fp8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
        "weight_block_size": [128, 128],
    }


def test_fp8_without_blocks_has_none(save: Save) -> None:
    """Capability 89."""
    assert sglang_config(save(fp8("tensor"))).kwargs["weight_block_size"] is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_has_the_bits_and_rules_of_the_checkpoint(save: Save, bits: int) -> None:
    """Capability 90."""
    dynamic = {r"+:.*down_proj": {"bits": 8}, r"-:.*gate": {}}
    found = sglang_config(save(gptq(bits), dynamic=dynamic, lm_head=False), "0.4.7")
    assert found.class_name == "GPTQConfig"
    assert found.kwargs == {
        "weight_bits": bits,
        "group_size": 32,
        "desc_act": False,
        "lm_head_quantized": False,
        "dynamic": dynamic,
    }


@pytest.mark.parametrize(
    ("layout", "stated", "ordered"),
    [
        (gptq(act_order=True), True, True),
        (gptq(act_order=True), False, True),
        (gptq(), True, False),
    ],
)
def test_desc_act_is_that_of_the_files(
    save: Save, layout: Layout, stated: bool, ordered: bool
) -> None:
    """Capability 90: only where groups of inputs do not stand together."""
    found = sglang_config(save(layout, desc_act=stated))
    assert found.kwargs["desc_act"] is ordered


def test_versions_of_gptq_are_said_where_they_can_be(save: Save) -> None:
    """Zero points of version 2 would be off by one, with nothing to see."""
    folder = save(gptq(version=2))
    assert sglang_config(folder, "0.5.23").kwargs["checkpoint_format"] == "gptq_v2"
    with pytest.raises(ConfigError, match="is gptq_v2, and GPTQConfig of SGLang 0.4.7"):
        sglang_config(folder, "0.4.7")


def test_awq_has_the_group_of_the_checkpoint(save: Save) -> None:
    """Capability 91."""
    assert sglang_config(save(awq(64))).kwargs == {
        "weight_bits": 4,
        "group_size": 64,
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def test_int8_is_serialized_dynamic_and_has_two_numbers(save: Save) -> None:
    """Capability 92."""
    assert sglang_config(save(int8())).kwargs == {
        "is_checkpoint_int8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": None,
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("layout", [fp8(), int8()], ids=["fp8", "int8"])
def test_blocks_with_static_inputs_are_refused(save: Save, layout: Layout) -> None:
    """Capability 92."""
    with pytest.raises(ConfigError, match="activation_scheme is 'static'.*dynamic"):
        sglang_config(save(layout, activation_scheme="static"))


@pytest.mark.parametrize("version", SIGNATURES)
def test_wrong_arguments_are_our_error_with_the_right_fields(version: str) -> None:
    """Capability 93: the TypeError that the documents begin with."""
    wrong = {"weight_bits": 8, "group_size": 128}
    with pytest.raises(ConfigError, match="Fp8Config.*has no weight_bits, has no group_size"):
        check_kwargs("Fp8Config", wrong, version)
    with pytest.raises(ConfigError, match="weight_block_size"):
        SglangConfig("Fp8Config", wrong, version)
    with pytest.raises(ConfigError, match="AWQConfig.*has no desc_act, needs zero_point"):
        check_kwargs("AWQConfig", {"weight_bits": 4, "group_size": 128, "desc_act": True}, version)


@pytest.mark.parametrize(
    ("class_name", "version", "said"),
    [
        ("Fp8Config", "1.0", "SGLang 1.0: its signatures are not stored; 0.4.7, 0.5.23 are"),
        ("Fp9Config", LATEST, "Fp9Config is no configuration"),
    ],
)
def test_unknown_names_are_told(class_name: str, version: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_kwargs(class_name, {}, version)


def test_kinds_without_a_configuration_are_told(save: Save, base: Path) -> None:
    with pytest.raises(ConfigError, match="is of compressed-tensors; configurations are made for"):
        sglang_config(save(compressed("int4-g32")))
    with pytest.raises(ConfigError, match="is not quantized"):
        sglang_config(base)


def test_every_source_of_a_file_has_its_configuration(save: Save, base: Path) -> None:
    paths = {"fp8": save(fp8()), "awq_int4": save(awq()), "fp16": base}
    config = MixedPrecisionConfig(base, paths, {f"m.{name}.weight": name for name in paths})
    found = sglang_configs(config)
    assert {name: one.class_name for name, one in found.items()} == {
        "fp8": "Fp8Config",
        "awq_int4": "AWQConfig",
    }
    assert json.dumps({name: dict(one.kwargs) for name, one in found.items()})


def test_arguments_that_0_4_7_takes_are_taken_later_too() -> None:
    """Measured on the sources of both: later releases added optional ones only."""
    for name, old in SIGNATURES["0.4.7"].items():
        new = SIGNATURES["0.5.23"][name]
        assert set(old.fields) <= set(new.fields)
        assert new.required == old.required


def test_stored_signatures_hold_for_the_installed_sglang(save: Save) -> None:
    """Capabilities 89 to 92, with the real classes where they are."""
    installed = installed_signatures()
    if installed is None:
        pytest.skip("sglang is not installed: the stored signatures are used")
    for layout in (fp8(), gptq(), awq(), int8()):
        found = sglang_config(save(layout))
        assert set(found.kwargs) <= set(installed[found.class_name].fields)
        assert type(found.make()).__name__ == found.class_name


def test_making_one_without_sglang_is_told(save: Save) -> None:
    if installed_signatures() is not None:
        pytest.skip("sglang is installed")
    with pytest.raises(ConfigError, match="Fp8Config of SGLang is not here"):
        sglang_config(save(fp8())).make()
