"""Checkpoints of other tools: every weight as its own tool reads it, and every flaw named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.quantized.compressed import PlainForm
from alphaquant.models.quantized.foreign_files import ForeignCheckpoint, open_foreign
from alphaquant.models.quantized.stated import METHODS, _read_auto_round, _read_compressed
from alphaquant.spaces.units import Matrix
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import (
    CT_SCHEMES,
    Layout,
    auto_round,
    awq,
    compressed,
    fp8,
    gptq,
    int8,
    save_foreign,
)

FIRST = "model.layers.0.self_attn.q_proj"

LAYOUTS: dict[str, Layout] = {
    "gptq v1": gptq(),
    "gptq v1 of gptqmodel": gptq(symmetric=False, made_by="gptqmodel:5.0.0"),
    "gptq v2": gptq(version=2, symmetric=False),
    "gptq 2 bits": gptq(2, symmetric=False),
    "gptq 3 bits": gptq(3),
    "gptq 8 bits by row": gptq(8, -1),
    "gptq act-order": gptq(act_order=True, symmetric=False),
    "awq": awq(),
    "auto-round as gptq": auto_round(),
    "auto-round with its own zero points": auto_round("auto_round", symmetric=False),
    "auto-round as awq": auto_round("auto_round:auto_awq", symmetric=False),
    "fp8 by block": fp8(),
    "fp8 by row": fp8("row"),
    "fp8 whole": fp8("tensor"),
    "int8 by block": int8(),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("base") / "base", hidden_size=128, intermediate_size=64
    )


def is_first_layer(module: str) -> bool:
    return ".layers.0." in module and ".experts.3." not in module


def matrix_of(module: str, weight: Tensor) -> Matrix:
    return Matrix(module, *weight.shape, "dense", 0)


def read(checkpoint: ForeignCheckpoint, module: str, weight: Tensor) -> Tensor:
    return checkpoint.read(checkpoint.find(matrix_of(module, weight))).dequantize()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_is_exactly_what_its_codes_say(base: Path, tmp_path: Path, name: str) -> None:
    """Capabilities 80 to 83: bits, groups and versions come from the checkpoint."""
    right = save_foreign(base, tmp_path, LAYOUTS[name], is_first_layer)
    checkpoint = open_foreign(tmp_path)
    assert len(right) == 4 + 3 * 3
    for module, weight in right.items():
        assert torch.equal(read(checkpoint, module, weight), weight), module


@pytest.mark.parametrize("scheme", CT_SCHEMES)
def test_compressed_tensors_are_read_as_their_library_reads_them(
    base: Path, tmp_path: Path, scheme: str
) -> None:
    right = save_foreign(base, tmp_path, compressed(scheme), is_first_layer)
    checkpoint = open_foreign(tmp_path)
    for module, weight in right.items():
        found = read(checkpoint, module, weight)
        # The library multiplies in bfloat16: half a unit in the last of its 8 bits, twice.
        torch.testing.assert_close(found, weight, rtol=2**-7, atol=0)
        assert float((found - weight).abs().max()) < 2**-8 * float(weight.abs().max()) + 1e-12


def test_fp8_blocks_are_dequantized_as_transformers_does(tmp_path: Path) -> None:
    """Capability 82, with the other program that reads these files on a CPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    encoded = fp8().encode(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)))
    scale = encoded.tensors["weight_scale_inv"]
    theirs = Fp8Dequantize(None)._dequantize_one(encoded.tensors["weight"], scale)
    assert torch.equal(theirs, encoded.weight)


def test_weights_that_a_checkpoint_keeps_plain_are_plain(base: Path, tmp_path: Path) -> None:
    save_foreign(base, tmp_path, gptq(), is_first_layer)
    weight = load_file(base / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    found = open_foreign(tmp_path).find(matrix_of("model.layers.1.self_attn.q_proj", weight))
    assert isinstance(found.form, PlainForm)
    assert torch.equal(open_foreign(tmp_path).read(found).tensors["weight"], weight)


def test_names_of_mixtral_are_found_by_alias(base: Path, tmp_path: Path) -> None:
    """Capability 84."""
    right = save_foreign(base, tmp_path, gptq(), is_first_layer)
    weight = right["model.layers.0.mlp.experts.0.gate_proj"]
    alias = "model.layers.0.mlp.experts.0.gate_proj"
    matrix = Matrix("other.name", *weight.shape, "expert", 0, 0, ("nothing.w1", alias))
    checkpoint = open_foreign(tmp_path)
    assert torch.equal(checkpoint.read(checkpoint.find(matrix)).dequantize(), weight)


@pytest.mark.parametrize(
    ("layout", "fields", "bits", "group"),
    [(gptq(), {"bits": 8, "group_size": 64}, 8, 64), (gptq(8, 64), {"bits": 4}, 4, 64)],
)
def test_dynamic_rules_of_gptq_change_bits_and_skip(
    base: Path, tmp_path: Path, layout: Layout, fields: dict[str, Any], bits: int, group: int
) -> None:
    """Capability 80: the form of a module is that of its rule, not that of the file's head."""
    config = dict(layout.config, dynamic={r"+:.*\.o_proj": fields, r"-:.*\.k_proj": {}})
    own = gptq(bits, group)

    def encode(weight: Tensor) -> Any:
        return own.encode(weight)

    right = save_foreign(base, tmp_path, Layout(config, encode), lambda m: m.endswith("o_proj"))
    checkpoint = open_foreign(tmp_path)
    for module, weight in right.items():
        assert torch.equal(read(checkpoint, module, weight), weight)
    assert checkpoint.stated is not None
    assert checkpoint.stated.form_of("model.layers.0.self_attn.k_proj") is None


@pytest.mark.parametrize("old", ["quantize_config.json", "quant_config.json"])
def test_configurations_in_older_files_are_read(base: Path, tmp_path: Path, old: str) -> None:
    layout = gptq(8, 64) if old == "quantize_config.json" else awq(64)
    right = save_foreign(base, tmp_path, layout, is_first_layer)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = {"bits": "w_bit", "group_size": "q_group_size"} if "quant_c" in old else {}
    older = {names.get(k, k): v for k, v in entry.items() if k != "quant_method"}
    (tmp_path / old).write_text(json.dumps(older))
    checkpoint = open_foreign(tmp_path)
    assert torch.equal(read(checkpoint, FIRST, right[FIRST]), right[FIRST])


Damage = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("layout", "damage", "said"),
    [
        (fp8(), lambda t: t.pop(f"{FIRST}.weight_scale_inv"), "lacks weight_scale_inv"),
        (fp8("row"), lambda t: t.pop(f"{FIRST}.weight_scale"), "lacks weight_scale"),
        (gptq(), lambda t: t.pop(f"{FIRST}.qzeros"), "lacks qzeros"),
        (gptq(act_order=True), lambda t: t.pop(f"{FIRST}.g_idx"), "lacks g_idx"),
        (awq(), lambda t: t.pop(f"{FIRST}.scales"), "lacks scales"),
        (
            gptq(),
            lambda t: t.update({f"{FIRST}.scales": t[f"{FIRST}.scales"][:2]}),
            r"scales is F16 \[2, 128\]; gptq v1 4 bits g32 has BF16 or F16 or F32 \[4, 128\]",
        ),
        (
            int8(),
            lambda t: t.update({f"{FIRST}.weight": t[f"{FIRST}.weight"].to(torch.float8_e4m3fn)}),
            r"weight is F8_E4M3 \[128, 128\]; int8 128x128 has I8",
        ),
        (
            fp8(),
            lambda t: t.update({f"{FIRST}.weight": t[f"{FIRST}.weight"].to(torch.int8)}),
            r"weight is I8 \[128, 128\]; fp8 128x128 has F8_E4M3",
        ),
        (awq(), lambda t: t.update({f"{FIRST}.g_idx": torch.zeros(128)}), "has g_idx, and awq"),
        (  # 4-bit words have one layout in all releases
            compressed("int4-g32"),
            lambda t: t.update({f"{FIRST}.weight_packed": t[f"{FIRST}.weight_packed"].long()}),
            r"weight_packed is I64 \[128, 16\]; .*do not belong together",
        ),
        (
            compressed("int4-g32"),
            lambda t: t.update({f"{FIRST}.weight_g_idx": torch.zeros(128)}),
            "has weight_g_idx, and compressed-tensors int4 g32 has",
        ),
        (
            gptq(),
            lambda t: [t.pop(f"{FIRST}.{e}") for e in ("qweight", "qzeros", "scales", "g_idx")],
            f"has no weight of {FIRST}",
        ),
    ],
)
def test_a_flaw_is_told_before_any_tensor_is_read(
    base: Path, tmp_path: Path, layout: Layout, damage: Damage, said: str
) -> None:
    """Capability 82, and 87: nothing is guessed."""
    right = save_foreign(base, tmp_path, layout, is_first_layer)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "model.safetensors")
    checkpoint = open_foreign(tmp_path)
    with pytest.raises(ModelError, match=said):
        checkpoint.find(matrix_of(FIRST, right[FIRST]))


def test_groups_that_do_not_exist_are_told(base: Path, tmp_path: Path) -> None:
    right = save_foreign(base, tmp_path, gptq(act_order=True), is_first_layer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{FIRST}.g_idx"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"g_idx names groups 1 to 4 of 4"):
        read(open_foreign(tmp_path), FIRST, right[FIRST])


@pytest.mark.parametrize(("bits", "words"), [(3, 13), (5, 22), (6, 26)])
def test_words_of_an_older_compressed_tensors_are_told(
    base: Path, tmp_path: Path, bits: int, words: int
) -> None:
    """128 codes; see findings/compressed_tensors_three_bits_of_an_older_release.sh."""
    right = save_foreign(base, tmp_path, compressed("int4-g32"), is_first_layer)
    config = json.loads((tmp_path / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = bits
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{FIRST}.weight_packed"] = torch.zeros(128, words, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"words of compressed-tensors 0\.17 and older.*again"):
        open_foreign(tmp_path).find(matrix_of(FIRST, right[FIRST]))


def test_a_stated_shape_of_another_model_is_told(base: Path, tmp_path: Path) -> None:
    right = save_foreign(base, tmp_path, compressed("int4-g32"), is_first_layer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{FIRST}.weight_shape"] = torch.tensor([128, 127])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"weight_shape is \[128, 127\], and the model has"):
        read(open_foreign(tmp_path), FIRST, right[FIRST])


def test_a_field_that_no_awq_file_has_is_ignored(base: Path, tmp_path: Path) -> None:
    """Capability 81: `qweight_scale`, which documents name."""
    right = save_foreign(base, tmp_path, awq(), is_first_layer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{FIRST}.qweight_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_foreign(tmp_path)
    found = checkpoint.find(matrix_of(FIRST, right[FIRST]))
    assert found.ignored == ("qweight_scale",)
    assert torch.equal(checkpoint.read(found).dequantize(), right[FIRST])


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AUTO_ROUND = dict(auto_round().config)
MODELOPT: dict[str, Any] = {  # as nvidia-modelopt 0.47.0 writes it into config.json
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quant_method": "modelopt",
}
GROUP: dict[str, Any] = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
}
COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which is not read; gptq, awq"),
        ({"bits": 4}, "quantized by None"),
        (GPTQ | {"bits": 5}, "gptq with bits 5 is not read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read"),
        (GPTQ | {"pack_dtype": "int64"}, "pack_dtype 'int64' is not read"),
        ({"quant_method": "gptq", "bits": 4}, "not as gptq writes it .*group_size"),
        ({"quant_method": "awq", "bits": 8, "group_size": 32}, "awq with bits 8"),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
            "version 'gemv'",
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False},
            "zero_point False",
        ),
        (AUTO_ROUND | {"data_type": "mx_fp", "act_bits": 4}, "data_type 'mx_fp' and act_bits 4"),
        (AUTO_ROUND | {"packing_format": "auto_round:llm_compressor"}, "llm_compressor' of auto-"),
        (
            AUTO_ROUND | {"quant_method": "intel/auto-round", "bits": 5},
            "gptq with bits 5 is not read",
        ),
        (AUTO_ROUND | {"rotation_config": {"rotation_type": "hadamard"}}, "rotates weights"),
        (MODELOPT, r"quantized by 'modelopt', which is not read; gptq, .* are: give such"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not as fp8 writes it"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "it is two numbers"),
        ({"quant_method": "blockwise_int8"}, "states no weight_block_size"),
        (
            COMPRESSED | {"config_groups": {"a": GROUP}, "transform_config": {"r": 1}},
            "rotates weights",
        ),
        (
            COMPRESSED | {"config_groups": {"a": GROUP | {"format": "marlin-24"}}},
            "int of 4 bits by group in marlin-24 are not read",
        ),
        (
            COMPRESSED
            | {"config_groups": {"a": GROUP | {"weights": GROUP["weights"] | {"num_bits": 64}}}},
            "int of 64 bits by group in pack-quantized are not read",
        ),
    ],
)
def test_what_is_not_read_is_told_with_what_is(
    base: Path, tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    with pytest.raises(ModelError, match=said) as caught:
        open_foreign(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_modelopt_checkpoint_that_says_so_in_a_file_of_its_own_is_told(
    base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "made")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A16_AWQ"}}
    (tmp_path / "made" / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="quantized by 'modelopt', which is not read; gptq, awq"):
        open_foreign(tmp_path / "made")


def test_auto_round_names_matrices_before_parts_of_names_and_patterns() -> None:
    more = {"layers.1.mlp": {"bits": 8}, r".*\.q_proj": {"bits": 2}, FIRST: {"bits": 16}}
    stated = _read_auto_round(AUTO_ROUND | {"extra_config": more})
    names = ("m.k_proj", "m.layers.1.mlp.up", "m.layers.10.mlp.up", "m.q_proj", FIRST)
    forms = [stated.form_of(name) for name in names]
    assert [form and form.code_bits() for form in forms] == [4, 8, 4, 2, None]


def test_compressed_tensors_by_target() -> None:
    """What is ignored, then whole names, then patterns, then all linears."""

    def group(bits: int, targets: list[str]) -> dict[str, Any]:
        return {"targets": targets, "weights": GROUP["weights"] | {"num_bits": bits}}

    stated = _read_compressed(
        COMPRESSED
        | {
            "ignore": ["lm_head", "re:.*gate$"],
            "config_groups": {
                "a": group(4, ["Linear"]),
                "b": group(8, [r"re:.*experts.*"]),
                "c": group(3, ["m.experts.0.up"]),
            },
        }
    )
    names = ("lm_head", "m.gate", "m.q", "m.experts.1.up", "m.experts.0.up")
    forms = [stated.form_of(name) for name in names]
    assert [form and form.code_bits() for form in forms] == [None, None, 4, 8, 3]


def test_every_method_has_a_layout_here() -> None:
    made = {str(layout.config["quant_method"]) for layout in LAYOUTS.values()}
    assert made | {"compressed-tensors"} == set(METHODS)


@pytest.mark.parametrize("what", ["nothing", "config", "truncated"])
def test_a_directory_that_is_no_checkpoint_is_told(base: Path, tmp_path: Path, what: str) -> None:
    if what != "nothing":
        save_foreign(base, tmp_path, gptq(), is_first_layer)
    if what == "config":
        (tmp_path / "model.safetensors").unlink()
    if what == "truncated":
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError):
        open_foreign(tmp_path / "missing" if what == "nothing" else tmp_path)
