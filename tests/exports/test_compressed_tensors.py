"""`--export compressed-tensors` through its real client: transformers with compressed-tensors.

Logits are compared with those of our own packed checkpoint of the same numbers. In float32 the
package dequantizes experts into the dtype of the scales, float16: 2^-11 per weight, and mxfp4 into
bfloat16, 2^-8; both averaged over products. A group, a zero point or an expert in the wrong place
gives 0.1 and more.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaquant.commands.statements import Skeleton, read_statement
from alphaquant.errors import ConfigError
from alphaquant.exports.compressed_tensors import CompressedTensorsExport
from alphaquant.models.mapping import map_model
from alphaquant.models.quantization_config import REPORT
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.spaces.foreign import Foreign
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.units import Matrix
from alphaquant.testing.packed import (
    SERVED_FAMILIES,
    Choice,
    plan_of,
    relative_difference,
    save_export,
    served_model,
)

TOKENS = torch.arange(3, 67).reshape(2, 32)
MENU = menu_of("auto", find_profile("transformers"))
LINEAR_MENU = tuple(n for n in MENU if n not in ("mxfp4", "nvfp4"))
"""What linears can have in float32; the package dequantizes fp4 of linears into bfloat16."""
EXPERT_MENU = tuple(n for n in MENU if n not in ("nvfp4", "bf16"))
FAMILY_EXPERTS = {
    "llama": "bf16",
    "olmoe": "int2-g64",
    "mixtral": "int3-g64",
    "qwen2_moe": "fp8-e4m3-row",
    "qwen3_moe": "int6-g128",
}
"""The experts' format with which an architecture is tried; the others are tried in one layer."""
ONE_LAYER = {"hidden_size": 128, "num_hidden_layers": 1, "num_experts": 3}
ONE_LAYER |= {"num_experts_per_tok": 2}


def client_logits(out: Path, dtype: torch.dtype) -> Tensor:
    """What transformers computes with the files, float32 [T, V]."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
        if model.config.num_hidden_layers > 1:  # else it is the same code on fewer layers
            generated = model.generate(TOKENS[:1, :4], max_new_tokens=2, min_new_tokens=2)
            assert generated.shape == (1, 6)
    return logits.float().flatten(0, 1)


def difference(out: Path, dtype: torch.dtype = torch.float32) -> float:
    """Relative difference of the client's logits and ours, in the same dtype."""
    ours: Any = load(out.parent / "packed", dtype=dtype)
    with torch.no_grad():
        reference = ours(TOKENS).logits.float().flatten(0, 1)
    return relative_difference(client_logits(out, dtype), reference)


def in_turn(formats: tuple[str, ...], experts: str) -> Choice:
    """The formats one linear after the other, one format for experts."""
    linears: dict[str, str] = {}

    def choose(matrix: Matrix) -> str:
        if matrix.kind == "expert":
            return experts
        return linears.setdefault(matrix.name, formats[len(linears) % len(formats)])

    return choose


@pytest.mark.parametrize("family", SERVED_FAMILIES)
def test_linears_of_every_architecture_are_free(family: str, tmp_path: Path) -> None:
    # Ten bits and more of the menu in one file; a dense model takes all of it.
    model = served_model(family, num_hidden_layers=3 if family == "llama" else 2)
    out = save_export(
        model, tmp_path, in_turn(LINEAR_MENU, FAMILY_EXPERTS[family]), "compressed-tensors"
    )
    assert difference(out) < 1e-3
    report = json.loads((out / REPORT).read_text())["export"]["loads_in"]
    assert report["transformers"]["loads"] and not report["vllm"]["loads"]
    assert "matrices need one format there" in report["vllm"]["reason"]


@pytest.mark.parametrize("name", sorted({*EXPERT_MENU} - {*FAMILY_EXPERTS.values()}))
def test_experts_of_every_format_are_read_right(name: str, tmp_path: Path) -> None:
    # mxfp4 goes through bfloat16, whatever the dtype: 2^-8 per weight
    model = served_model("olmoe", **ONE_LAYER)
    out = save_export(model, tmp_path, in_turn(("int4-g32",), name), "compressed-tensors")
    assert difference(out) < (4e-3 if name == "mxfp4" else 1e-3)


def test_linears_in_fp4_are_read_right_in_bfloat16(tmp_path: Path) -> None:
    # Both compute in bfloat16, in another order: the noise of this dtype, not a wrong block.
    model = served_model("llama", num_hidden_layers=1)
    out = save_export(model, tmp_path, in_turn(("mxfp4", "nvfp4"), "bf16"), "compressed-tensors")
    assert difference(out, torch.bfloat16) < 1e-2
    scale = json.loads((out / REPORT).read_text())["export"]["global_scale_rounding"]
    assert 0.0 < scale <= 2.0**-23


def test_two_experts_in_each_other_s_place_are_seen(tmp_path: Path) -> None:
    model = served_model("olmoe", **ONE_LAYER)
    out = save_export(model, tmp_path, in_turn(("int4-g64",), "int4-g64"), "compressed-tensors")
    file = out / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    swapped = {k: k.replace("experts.0.", "experts.#.") for k in tensors}
    swapped = {k: v.replace("experts.1.", "experts.0.") for k, v in swapped.items()}
    swapped = {k: v.replace("experts.#.", "experts.1.") for k, v in swapped.items()}
    save_file({swapped[k]: t for k, t in tensors.items()}, file, {"format": "pt"})
    assert difference(out) > 0.02


def test_a_tied_head_is_ignored_though_the_file_has_none(tmp_path: Path) -> None:
    model = served_model("llama", tie_word_embeddings=True, num_hidden_layers=1)
    out = save_export(model, tmp_path, lambda m: "int4-g128", "compressed-tensors")
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "lm_head" in entry["ignore"] and "lm_head.weight" not in read_tensors(out)
    assert difference(out) < 1e-3


def layered(matrix: Matrix) -> str:
    """What only vLLM loads: experts by layer, one of them as it is."""
    if matrix.kind == "expert":
        return "bf16" if matrix.layer else "int4-g128-asym"
    return "int3-g64" if matrix.projection != "o_proj" else "nvfp4"


def test_the_entry_names_what_vllm_asks_for(tmp_path: Path) -> None:
    out = save_export(served_model("mixtral"), tmp_path, layered, "compressed-tensors")
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "mixed-precision" and entry["quantization_status"] == "compressed"
    groups = {g["targets"][0]: g for g in entry["config_groups"].values()}
    experts = r"re:^model\.layers\.0\.block_sparse_moe\.experts\.\d+\.w1$"
    assert groups[experts]["format"] == "pack-quantized"
    assert groups[experts]["weights"] == {
        **{"num_bits": 4, "type": "int", "symmetric": False},
        **{"strategy": "group", "dynamic": False, "group_size": 128},
    }
    assert all(group["input_activations"] is None for group in groups.values())
    assert r"re:^model\.layers\.1\.block_sparse_moe\.experts\.\d+\.w2$" in entry["ignore"]
    assert {"lm_head", "model.layers.0.block_sparse_moe.gate"} <= set(entry["ignore"])
    found = json.loads((out / REPORT).read_text())["export"]["loads_in"]
    assert {name: served["loads"] for name, served in found.items()} == {
        "vllm": True,
        "sglang": False,
        "transformers": False,
    }


def test_every_key_of_the_source_s_configuration_stays(tmp_path: Path) -> None:
    out = save_export(served_model("olmoe"), tmp_path, lambda m: "int4-g128", "compressed-tensors")
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (out.parent / "packed", out)
    )
    assert theirs.pop("quantization_config")["format"] == "pack-quantized"
    ours.pop("quantization_config")
    assert theirs.pop("architectures") == ["OlmoeForCausalLM"]
    assert ours.pop("architectures") is None and theirs == ours
    assert (out / "generation_config.json").exists()
    assert {file.name for file in out.glob("*.safetensors")} == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_the_files_say_the_plan_that_they_were_made_of(family: str, tmp_path: Path) -> None:
    model = served_model(family)
    out = save_export(model, tmp_path, layered, "compressed-tensors")
    statement = read_statement(out)
    assert isinstance(statement.content, Foreign)
    expected, inventory = plan_of(model, layered), map_model(model).inventory
    plan = statement.plan_on(Skeleton("m", inventory, None))
    assert dict(plan.assignment.formats) == dict(expected.formats)


def refusal(choose: Choice, family: str = "olmoe") -> str:
    model = served_model(family)
    with pytest.raises(ConfigError) as caught:
        CompressedTensorsExport().check(plan_of(model, choose), map_model(model))
    return str(caught.value)


def test_a_mix_within_experts_is_refused_with_the_search_to_run() -> None:
    text = refusal(lambda m: "int8-g128" if m.expert == 5 else "int4-g128")
    assert "none of vllm, sglang, transformers loads this" in text
    assert "model.layers.0.mlp.experts has int4-g128, int8-g128" in text
    assert "--profile sglang or --profile transformers, or use --export alphaquant" in text


@pytest.mark.parametrize("name", ["int1-g64", "int4-g24", "fp6-e3m2-g128", "mxfp8", "nvfp4"])
def test_formats_that_no_engine_has_for_experts_are_refused(name: str) -> None:
    assert parse_format(name).name in refusal(lambda m: name)


def test_a_model_in_bf16_has_nothing_to_export() -> None:
    assert "every matrix is bf16" in refusal(lambda m: "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED_FAMILIES)
@pytest.mark.parametrize("name", MENU)
def test_every_format_in_every_architecture(family: str, name: str, tmp_path: Path) -> None:
    # slow: 90 cases of a second or two; the default run has each format and each architecture
    experts = name if name in EXPERT_MENU else "int4-g32"
    if name == "bf16" and family == "llama":
        pytest.skip("nothing would be quantized")
    out = save_export(
        served_model(family), tmp_path, in_turn((name,), experts), "compressed-tensors"
    )
    is_float32 = name in LINEAR_MENU
    dtype = torch.float32 if is_float32 else torch.bfloat16
    assert difference(out, dtype) < (1e-3 if is_float32 else 1e-2)
