"""Files made by hand as engines would load them wrong: each is refused, and a good one is not.

The cases are those that real engines loaded without an error and computed wrong numbers from.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.exports.compressed_tensors import CompressedTensorsExport, check_files

N, K = 32, 64
EXPERTS = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

Tensors = Mapping[str, Tensor]


def int8() -> dict[str, Tensor]:
    """A row-wise int8 matrix as `int-quantized` has it."""
    return {"weight": torch.ones(N, K, dtype=torch.int8), "weight_scale": torch.ones(N, 1)}


def fp8() -> dict[str, Tensor]:
    """A row-wise fp8 matrix: the same names and shapes as `int8`."""
    return int8() | {"weight": torch.ones(N, K).to(torch.float8_e4m3fn)}


def packed(bits: int, group: int, *, asymmetric: bool = False) -> dict[str, Tensor]:
    """Integers as `pack-quantized` has them."""
    words = torch.zeros(N, K * bits // 32, dtype=torch.int32)
    found = {"weight_packed": words, "weight_scale": torch.ones(N, K // group).half()}
    found["weight_shape"] = torch.tensor([N, K])
    if asymmetric:
        found["weight_zero_point"] = torch.zeros(N * bits // 32, K // group, dtype=torch.int32)
    return found


def nvfp4(scale: float = 1.0) -> dict[str, Tensor]:
    """Four bits with a global scale."""
    return {
        "weight_packed": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([scale]),
    }


def plain() -> dict[str, Tensor]:
    return {"weight": torch.ones(N, K).bfloat16()}


def scheme_key(tensors: Tensors) -> str:
    """Tells schemes apart, as a writer would."""
    return str({name: (t.dtype, t.shape) for name, t in tensors.items()})


def write(folder: Path, modules: Mapping[str, Tensors]) -> Path:
    """A checkpoint of these modules, each in the group of its tensors."""
    groups: dict[str, dict[str, Any]] = {}
    ignore = ["lm_head"]
    tensors = {}
    for name, own in modules.items():
        tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in own.items()}
        if own["weight" if "weight" in own else "weight_packed"].dtype == torch.bfloat16:
            ignore.append(name)
            continue
        group = groups.setdefault(scheme_key(own), {"targets": [], "weights": {}})
        group["targets"].append(f"re:^{name}$")
    entry = {
        "quant_method": "compressed-tensors",
        "ignore": ignore,
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def model(**changed: Tensors) -> dict[str, Tensors]:
    """Two layers of attention and four experts in int4; `l0_e2_up_proj` changes one matrix."""
    modules: dict[str, Tensors] = {}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name in ATTENTION:
            modules[f"{prefix}.self_attn.{name}"] = packed(4, 32)
        for expert in range(4):
            for name in EXPERTS:
                modules[f"{prefix}.mlp.experts.{expert}.{name}"] = packed(4, 32)
    for key, tensors in changed.items():
        layer_text, where, projection = key.split("_", 2)
        prefix = f"model.layers.{layer_text[1:]}"
        experts = range(4) if where == "e" else [where[1:]]
        names = EXPERTS if projection == "all" else (projection,)
        for name in names:
            if where == "attn":
                modules[f"{prefix}.self_attn.{name}"] = tensors
                continue
            for expert in experts:
                modules[f"{prefix}.mlp.experts.{expert}.{name}"] = tensors
    return modules


ENGINES = ("vllm", "sglang", "transformers")


def test_a_good_file_is_loaded_by_all(tmp_path: Path) -> None:
    out = write(tmp_path, model())
    for engine in ENGINES:
        check_files(out, engine)
    CompressedTensorsExport().verify(out)


BAD: dict[str, tuple[str, str, dict[str, Tensors]]] = {
    "an fp8 row expert among int8 rows": (
        "vllm sglang transformers",
        "differ",
        model(l0_e_all=int8(), l0_e2_all=fp8(), l1_e_all=int8()),
    ),
    "k in fp8 rows, q and v in int8 rows": (
        "vllm sglang",
        "computed as one",
        model(l0_attn_q_proj=int8(), l0_attn_k_proj=fp8(), l0_attn_v_proj=int8()),
    ),
    "experts that differ by layer": (
        "transformers",
        "experts of the model differ",
        model(l1_e_all=packed(8, 32)),
    ),
    "experts that differ by projection": (
        "vllm sglang transformers",
        "differ",
        model(l0_e_down_proj=packed(8, 32), l1_e_down_proj=packed(8, 32)),
    ),
    "one expert of eight bits": (
        "vllm sglang transformers",
        "differ",
        model(l0_e3_up_proj=packed(8, 32)),
    ),
    "one expert with other groups": (
        "vllm sglang transformers",
        "differ",
        model(l0_e3_all=packed(4, 64)),
    ),
    "an expert with zero points": (
        "vllm sglang transformers",
        "differ|has zero points",
        model(l0_e1_all=packed(4, 32, asymmetric=True)),
    ),
    "zero points": (
        "transformers",
        "has zero points",
        model(l0_attn_o_proj=packed(4, 32, asymmetric=True)),
    ),
    "experts in nvfp4": (
        "transformers",
        "dropped of experts",
        model(l0_e_all=nvfp4(), l1_e_all=nvfp4()),
    ),
    "fused nvfp4 with a scale each": (
        "vllm sglang",
        "computed as one have global scales",
        model(l0_attn_q_proj=nvfp4(), l0_attn_k_proj=nvfp4(2.0), l0_attn_v_proj=nvfp4()),
    ),
    "experts in nvfp4 with a scale each": (
        "vllm sglang transformers",
        "have global scales|dropped of experts",
        model(l0_e_all=nvfp4(), l0_e1_up_proj=nvfp4(2.0), l1_e_all=packed(4, 32)),
    ),
    "an expert that stays": (
        "vllm sglang transformers",
        "differ|is not quantized",
        model(l1_e2_all=plain()),
    ),
    "experts that stay beside quantized ones": (
        "transformers",
        "is not quantized, and other matrices are",
        model(l0_e_all=plain(), l1_e_all=plain()),
    ),
    "v stays, q and k do not": ("vllm sglang", "computed as one", model(l0_attn_v_proj=plain())),
}


@pytest.mark.parametrize("case", BAD)
def test_what_an_engine_loads_wrong_or_not_at_all_is_refused(case: str, tmp_path: Path) -> None:
    engines, text, modules = BAD[case]
    out = write(tmp_path, modules)
    for engine in ENGINES:
        if engine in engines.split():
            with pytest.raises(StoreError, match=f"({text}).*--profile {engine}"):
                check_files(out, engine)
        else:
            check_files(out, engine)
    if len(engines.split()) == len(ENGINES):
        with pytest.raises(StoreError, match=text):
            CompressedTensorsExport().verify(out)


def test_a_scheme_for_a_matrix_that_stays_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path, model(l0_attn_o_proj=plain()))
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]
    entry["ignore"].remove("model.layers.0.self_attn.o_proj")
    group = next(iter(entry["config_groups"].values()))
    group["targets"].append("re:.*o_proj$")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"o_proj is quantized in config\.json and has weight BF"):
        check_files(out, "vllm")


def test_a_quantized_matrix_that_no_group_names_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path, model())
    config = json.loads((out / "config.json").read_text())
    group = next(iter(config["quantization_config"]["config_groups"].values()))
    group["targets"] = [t for t in group["targets"] if "1.self_attn.o_proj" not in t]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"o_proj is unquantized in config\.json and has weight_"):
        check_files(out, "vllm")


def test_a_head_that_is_not_ignored_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path, model())
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="lm_head is not in ignore"):
        CompressedTensorsExport().verify(out)
