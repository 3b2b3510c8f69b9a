"""GPTQ v1: numbers read back as every reader does, and one scheme per layer by `dynamic`."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaquant.commands.statements import Skeleton, read_statement
from alphaquant.errors import ConfigError, StoreError
from alphaquant.exports.gptq import GptqExport, gptq_tensors, quantization_entry, scheme_in
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.testing.kernels import pack_drawn
from alphaquant.testing.packed import plan_of, save_export, served_model


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of int32 words, the lowest bits first: [R, C] -> [R, C * 32 / bits]."""
    shifts = torch.arange(0, 32, bits)
    return ((words.long().unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128", "int8-g64", "int8-row", "int4-row"])
def test_a_reader_of_v1_gets_our_numbers_bit_for_bit(name: str) -> None:
    matrix = pack_drawn(name, 64, 256)
    bits, stored = matrix.format.bits, gptq_tensors(matrix)
    codes = unpacked(stored["qweight"].t(), bits)  # [N, K]
    zeros = unpacked(stored["qzeros"], bits).t() + 1  # v1 stores one less; [N, G]
    group = stored["g_idx"].long()
    scales = stored["scales"].t().float()
    weight = (codes - zeros[:, group]) * scales[:, group]
    assert torch.equal(weight, matrix.dequantize())
    assert stored["qweight"].shape == (256 * bits // 32, 64)
    assert stored["g_idx"].dtype == torch.int32 and stored["scales"].dtype == torch.float16


def mixed(matrix: Matrix) -> str:
    """Another format for the experts of layer 1, the attention output and one attention."""
    if matrix.kind == "expert":
        return "bf16" if matrix.layer else "int4-g128"
    return {"o_proj": "int8-g128"}.get(matrix.projection, "int4-g64" if matrix.layer else "bf16")


def test_vllm_finds_the_scheme_of_every_module_under_its_own_names(tmp_path: Path) -> None:
    out = save_export(served_model("olmoe"), tmp_path, mixed, "gptq")
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    layer = "model.layers."
    expected = {
        f"{layer}0.mlp.experts": (4, 128),
        f"{layer}1.mlp.experts": None,
        f"{layer}0.self_attn.qkv_proj": None,
        f"{layer}1.self_attn.qkv_proj": (4, 64),
        f"{layer}0.self_attn.o_proj": (8, 128),
        f"{layer}1.self_attn.o_proj": (8, 128),
    }
    for name, scheme in expected.items():
        integers = {} if scheme is None else {"qweight": ((1, 1), "I32")}
        assert scheme_in(entry, name, integers) == scheme  # type: ignore[arg-type]
    stored = read_tensors(out)
    assert stored["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.mlp.gate.weight" in stored


def test_the_files_say_the_plan_that_they_were_made_of(tmp_path: Path) -> None:
    model = served_model("mixtral")
    statement = read_statement(save_export(model, tmp_path, mixed, "gptq"))
    plan = statement.plan_on(Skeleton("m", map_model(model).inventory, None))
    assert dict(plan.assignment.formats) == dict(plan_of(model, mixed).formats)


def test_the_format_of_most_matrices_is_not_named(tmp_path: Path) -> None:
    formats = {f"model.layers.{i}.self_attn.o_proj": parse_format("int4-g128") for i in range(3)}
    assert quantization_entry(formats)["dynamic"] == {}
    formats["model.layers.3.self_attn.o_proj"] = parse_format("int8-row")
    dynamic = quantization_entry(formats)["dynamic"]
    assert dynamic == {r"+:^model\.layers\.3\.self_attn\.o_proj$": {"bits": 8, "group_size": -1}}


@pytest.mark.parametrize("name", ["int3-g128", "int4-g128-asym", "mxfp4", "int4-g256"])
def test_what_no_engine_loads_is_refused_with_the_search_to_run(name: str) -> None:
    model = served_model("llama")
    with pytest.raises(ConfigError, match=r"--export gptq: .*--profile vllm --kernels marlin"):
        GptqExport().check(plan_of(model, lambda m: name), map_model(model))


def test_a_mix_of_experts_is_refused() -> None:
    model = served_model("olmoe")
    plan = plan_of(model, lambda m: "int8-g128" if m.expert == 5 else "int4-g128")
    with pytest.raises(ConfigError, match=r"mlp\.experts has int4-g128, int8-g128"):
        GptqExport().check(plan, map_model(model))


@pytest.mark.parametrize("damage", ["skip", "group"])
def test_files_that_do_not_fit_together_are_refused(damage: str, tmp_path: Path) -> None:
    out = save_export(served_model("olmoe"), tmp_path, mixed, "gptq")
    GptqExport().verify(out)
    config = json.loads((out / "config.json").read_text())
    dynamic = config["quantization_config"]["dynamic"]
    if damage == "skip":
        for pattern in [p for p in dynamic if "experts" in p]:
            del dynamic[pattern]
        text = r"is quantized in config\.json and has weight BF16"
    else:
        file = out / "model-00001-of-00003.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.mlp.experts.2.up_proj.scales"
        tensors[name] = tensors[name].repeat(2, 1)
        save_file(tensors, file, {"format": "pt"})
        text = r"experts of model\.layers\.0\.mlp\.experts differ"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=text):
        GptqExport().verify(out)


def test_names_of_fused_modules_end_where_vllm_s_do(tmp_path: Path) -> None:
    formats = {
        f"model.layers.{layer}.{name}": parse_format("int4-g64" if layer else "int4-g128")
        for layer in range(2)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.gate_proj")
    }
    patterns = list(quantization_entry(formats)["dynamic"])
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "self_attn.q_proj"):
        found = [p for p in patterns if re.match(p[2:], f"model.layers.1.{name}")]
        assert len(found) == 1
