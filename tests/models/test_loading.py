"""Checkpoints that are published quantized: what loads, bit for bit, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models import loading
from alphaquant.models.loading import load_model, load_skeleton, load_tokenizer
from alphaquant.models.mapping import map_model
from alphaquant.models.pages.opening import open_weights
from alphaquant.models.rotation.derived import rotated
from alphaquant.models.source_files import check_blocks, with_source
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.checkpoint import load
from alphaquant.spaces.formats import parse_format
from alphaquant.studies.inputs import load_source
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.models import tiny_model, tiny_tokens
from alphaquant.testing.packed import (
    relative_difference,
    save_export,
    save_packed,
    served_model,
)

TOKENS = tiny_tokens(2, 9)
FP8 = torch.float8_e4m3fn


def publish(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]
) -> Path:
    """A checkpoint of a model with some tensors replaced, and a `quantization_config`."""
    model.save_pretrained(folder)
    gone = {name.removesuffix("_blocks").removesuffix("_scale_inv") for name in tensors}
    state = load_file(folder / "model.safetensors")
    kept = {k: v.to(torch.bfloat16) for k, v in state.items() if k not in gone}
    save_file({**kept, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": entry}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_mxfp4(model: nn.Module) -> dict[str, Tensor]:
    """The experts in the blocks that gpt-oss is published in; the model gets their values."""
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            parameter = layer.mlp.experts.get_parameter(name)  # [E, K, N]
            weight = parameter.data.transpose(1, 2).contiguous()
            rounded = quantize_rtn(weight, parse_format("mxfp4"), "minmax")
            parameter.data.copy_(rounded.weights().transpose(1, 2))
            packed = [rounded.pack(e, slice(None)).tensors for e in range(len(weight))]
            n_experts, rows, cols = weight.shape
            codes = torch.stack([p["codes"] for p in packed])
            key = f"model.layers.{i}.mlp.experts.{name}"
            tensors[f"{key}_blocks"] = codes.reshape(n_experts, rows, cols // 32, 16)
            tensors[f"{key}_scales"] = torch.stack([p["scales"] for p in packed])
    return tensors


def in_fp8_blocks(model: nn.Module) -> dict[str, Tensor]:
    """Every linear in the 128 x 128 blocks of DeepSeek-V3; the model gets their values."""
    tensors = {}
    model_map = map_model(model)
    for matrix in model_map.inventory.matrices:
        view = model_map.view(matrix.name)
        assert max(view.shape) <= 128  # one block
        scale = view.abs().max().reshape(1, 1) / 448
        codes = (view / scale).to(FP8)
        view.copy_((codes.to(torch.float32) * scale).to(torch.bfloat16))
        tensors[f"{matrix.name}.weight"] = codes
        tensors[f"{matrix.name}.weight_scale_inv"] = scale
    return tensors


def published_tensors(family: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A tiny gpt-oss in mxfp4 or DeepSeek-V3 in fp8, as published; its quantization_config."""
    if family == "gpt_oss":
        model = tiny_model(family, hidden_size=64, intermediate_size=32)
        entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        return model, in_mxfp4(model), entry
    model = tiny_model(family)
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    return model, in_fp8_blocks(model), blocks


def in_files(folder: Path, cache: Path) -> list[Any]:
    """The model with its weights in files: as copied, and as found again."""
    opened = [open_weights(folder, "auto", cache) for _ in range(2)]
    assert all(o.pages is not None and not o.is_in_place for o in opened)
    assert [o.folder for o in opened][1:] == [opened[0].folder]
    return [o.model for o in opened]


@torch.no_grad()
def test_the_mxfp4_blocks_of_gpt_oss_load_exactly(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", hidden_size=64, intermediate_size=32)
    tensors = in_mxfp4(model)
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    folder = publish(model, tmp_path / "published", tensors, entry)
    for loaded in (load_model(folder), *in_files(folder, tmp_path / "cache")):
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
        assert loaded.config.dtype == torch.bfloat16
        assert len(map_model(loaded).inventory.matrices) == 32


@torch.no_grad()
def test_the_fp8_blocks_of_deepseek_v3_load(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    tensors = in_fp8_blocks(model)
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    folder = publish(model, tmp_path / "published", tensors, entry)
    loaded: Any = load_model(folder)
    for other in in_files(folder, tmp_path / "cache"):
        assert all(p.dtype == torch.float32 for p in other.parameters())
        assert torch.equal(other(TOKENS).logits, loaded(TOKENS).logits)
    found, expected = map_model(loaded), map_model(model)
    assert [k.name for k in found.inventory.kept] == [k.name for k in expected.inventory.kept]
    for name, weight in expected.views.items():
        # transformers multiplies in bfloat16 or float32; the model here was rounded once.
        assert torch.allclose(found.view(name), weight, rtol=2**-7, atol=0), name
    assert torch.allclose(loaded(TOKENS).logits, model(TOKENS).logits, atol=0.1)


@pytest.mark.parametrize(("rows", "fits"), [(128, True), (256, True), (100, True), (192, False)])
def test_fp8_blocks_of_which_the_last_is_short_are_refused(
    tmp_path: Path, rows: int, fits: bool
) -> None:
    weight = torch.zeros(rows, 256, dtype=FP8)
    scales = torch.ones(-(-rows // 128), 2)
    save_file(
        {"a.weight": weight, "a.weight_scale_inv": scales, "b.weight": torch.zeros(3)},
        tmp_path / "model.safetensors",
    )
    if fits:
        check_blocks(tmp_path, (128, 128))
        return
    says = r"a\.weight has 192 rows or columns in 2 blocks of 128, the last one short"
    with pytest.raises(ModelError, match=says):
        check_blocks(tmp_path, (128, 128))


def test_a_published_checkpoint_with_a_short_block_is_refused_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=192)
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors = {name: torch.zeros(192, 64, dtype=FP8), f"{name}_scale_inv": torch.ones(2, 1)}
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    folder = publish(model, tmp_path / "published", tensors, entry)
    for loading_function in (load_model, load_skeleton):
        with pytest.raises(ModelError, match=r"192 rows or columns in 2 blocks of 128.*bfloat16"):
            loading_function(folder)


def test_our_own_packed_checkpoints_are_no_source(tmp_path: Path) -> None:
    folder = save_packed(tiny_model("olmoe"), tmp_path / "packed")
    with pytest.raises(ModelError, match=r"quantized already \(quant_method alphaquant\)"):
        load_model(folder)


def test_other_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    entry = {"quant_method": "gptq", "bits": 4}
    folder = publish(tiny_model("llama"), tmp_path / "published", {}, entry)
    with pytest.raises(ModelError, match=r"quantized already \(quant_method gptq\)"):
        load_model(folder)


@torch.no_grad()
def test_to_run_it_a_checkpoint_of_another_quantizer_is_left_to_transformers(
    tmp_path: Path,
) -> None:
    """transformers skips a method that it does not know, so the weights are plain ones."""
    model = tiny_model("llama")
    folder = publish(model, tmp_path / "published", {}, {"quant_method": "unheard-of"})
    with pytest.raises(ModelError, match="quantized already"):
        load_model(folder)
    assert torch.equal(load_model(folder, quantized=True)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "kept", [(), ("tokenizer_config.json",)], ids=["no file", "settings alone"]
)
def test_a_directory_without_a_vocabulary_has_no_tokenizer(
    tmp_path: Path, kept: tuple[str, ...]
) -> None:
    folder = save_tiny(tmp_path / "bare")
    assert len(load_tokenizer(folder)) == 4096
    for file in folder.glob("tokenizer*"):
        if file.name not in kept:
            file.unlink()
    assert load_tokenizer(folder) is None


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"model": 5}', '{"model": {}}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error_and_not_none(
    tmp_path: Path, content: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="broken is a directory, but transformers says"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("stored", "memory", "asked", "found"),
    [
        (torch.bfloat16, 4, "auto", torch.float32),
        (torch.bfloat16, 3.9, "auto", torch.bfloat16),
        (torch.bfloat16, 3.9, "float32", torch.float32),
        (torch.float16, 3.9, "auto", torch.float32),
        (torch.float32, 3.9, "auto", torch.float32),
    ],
)
def test_a_bfloat16_model_computes_as_it_is_stored_where_float32_would_fill_a_quarter(
    stored: torch.dtype,
    memory: float,
    asked: str,
    found: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Memory in multiples of the float32 weights."""
    model = tiny_model("olmoe")
    folder = tmp_path / "model"
    model.to(stored).save_pretrained(folder)
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(loading, "total_memory", lambda: int(memory * n_bytes))
    loaded: Any = load_model(folder, dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {found}
    said = [r.message for r in caplog.records if r.name == loading.__name__]
    assert bool(said) == (found == torch.bfloat16)
    assert all("computes in bfloat16" in line and "--dtype float32" in line for line in said)


EXPERT_SCALES = {
    "olmoe": ("experts.1.up_proj.weight_scale",),
    "mixtral": ("experts.1.w3.weight_scale",),
}
"""What transformers does not miss: it gives every later expert its neighbour's."""


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "llama"])
def test_what_compressed_tensors_decompresses_is_not_missing(family: str, tmp_path: Path) -> None:
    out = save_export(
        served_model(family), tmp_path, lambda matrix: "int4-g32", "compressed-tensors"
    )
    found: Any = load_model(out, quantized=True)
    expected: Any = load(tmp_path / "packed")
    # float16 scales; an expert in another's place gives 0.1 and more
    assert relative_difference(found(TOKENS).logits, expected(TOKENS).logits) < 1e-3
    file = next(out.glob("*00001*.safetensors"))
    tensors = load_file(file)
    for end in ("q_proj.weight_scale", *EXPERT_SCALES.get(family, ())):
        lost = next(name for name in tensors if name.endswith(end))
        save_file({k: t for k, t in tensors.items() if k != lost}, file, {"format": "pt"})
        with pytest.raises(ModelError, match=lost.rpartition(".")[0]):
            load_model(out, quantized=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_what_is_published_quantized_is_rotated_as_dequantized(
    family: str, tmp_path: Path
) -> None:
    model, tensors, entry = published_tensors(family)
    folder = publish(model, tmp_path / "published", tensors, entry)
    found: Any = load_model(rotated(folder, family, 0, tmp_path / "cache"))
    assert not hasattr(found.config, "quantization_config")
    assert relative_difference(found(TOKENS).logits[0], load_model(folder)(TOKENS).logits[0]) < 0.1


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_scales_of_weights_that_were_dequantized_are_not_carried(
    family: str, tmp_path: Path
) -> None:
    model, tensors, entry = published_tensors(family)
    tensors |= {"mtp.norm.weight": torch.ones(4)}  # what is really beside the model is
    folder = publish(model, tmp_path / "published", tensors, entry)
    source = load_source(str(folder), "cpu", "auto", cache=tmp_path / "cache")
    assert [c.name for c in source.map.carried] == ["mtp.norm.weight"]
    skeleton = with_source(map_model(load_skeleton(folder)), folder)
    assert skeleton.carried == source.map.carried
