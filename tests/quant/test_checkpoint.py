"""Packed checkpoints: bytes, exact logits, kept tensors, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.quant.checkpoint import (
    CheckpointWriter,
    is_packed,
    load,
    quantized_bytes,
    read_tensors,
)
from alphaquant.quant.engine import QuantizedMatrix, QuantSettings, quantize_layer
from alphaquant.quant.models import ModelMap, load_model, map_model
from alphaquant.quant.modules import PackedExperts, PackedLinear
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import MENUS
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens

RTN = QuantSettings(method="rtn")
TOKENS = tiny_tokens(2, 11)


def mixed_assignment(model_map: ModelMap) -> Assignment:
    """Every format of the menus, one matrix after the other."""
    formats = sorted(MENUS["all"])
    matrices = model_map.inventory.matrices
    return Assignment({m.name: formats[i % len(formats)] for i, m in enumerate(matrices)})


def quantize(model_map: ModelMap, assignment: Assignment) -> dict[int, list[QuantizedMatrix]]:
    names = sorted(set(assignment.formats.values()))
    return {
        layer.index: list(
            quantize_layer(
                model_map, layer, None, names, RTN, lambda m, n: assignment.formats[m.name] == n
            )
        )
        for layer in model_map.layers
    }


def write(model_map: ModelMap, target: Path) -> Path:
    writer = CheckpointWriter(target)
    for index, items in quantize(model_map, mixed_assignment(model_map)).items():
        writer.add_layer(index, items)
    return writer.finish(model_map, {"matrices": []})


def swapped_logits(model: nn.Module) -> Tensor:
    """Logits of the model with every weight replaced by its dequantized one."""
    model_map = map_model(model)
    with torch.no_grad():
        for items in quantize(model_map, mixed_assignment(model_map)).values():
            for item in items:
                model_map.view(item.matrix.name).copy_(item.packed.dequantize())
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return write(map_model(tiny_model("olmoe")), tmp_path / "packed")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_those_of_swapped_weights_exactly(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    path = write(map_model(model), tmp_path / "packed")
    loaded = load(path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, swapped_logits(model))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    kinds = {type(m) for m in loaded.modules()}
    assert PackedLinear in kinds and (PackedExperts in kinds) == (family != "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_in_the_files_are_those_that_the_formats_count(family: str, tmp_path: Path) -> None:
    model_map = map_model(tiny_model(family))
    path = write(model_map, tmp_path / "packed")
    counts = mixed_assignment(model_map).count_bits(model_map.inventory)
    assert quantized_bytes(path) == counts.quantized_bytes
    tensors = read_tensors(path)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert total == counts.checkpoint_bytes
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"]) == set(tensors)
    # Beyond the tensors a file has its header only.
    for file in set(index["weight_map"].values()):
        content = sum(
            t.numel() * t.element_size()
            for k, t in tensors.items()
            if index["weight_map"][k] == file
        )
        header = int.from_bytes((path / file).read_bytes()[:8], "little")
        assert (path / file).stat().st_size == content + header + 8


@pytest.mark.parametrize("family", ["llama", "olmoe", "qwen2_moe", "deepseek_v3"])
def test_kept_tensors_are_the_sources_byte_by_byte(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    source = load_file(tmp_path / "source" / "model.safetensors")
    model_map = map_model(load_model(tmp_path / "source"))
    kept = load_file(write(model_map, tmp_path / "packed") / "model-kept.safetensors")
    assert set(kept) == {k.name for k in model_map.inventory.kept} and set(kept) <= set(source)
    for name, tensor in kept.items():
        assert tensor.dtype == source[name].dtype == torch.bfloat16, name
        assert torch.equal(tensor.view(torch.int16), source[name].view(torch.int16)), name


def test_a_kept_tensor_that_is_no_bfloat16_number_stays_float32(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    path = write(map_model(model), tmp_path / "packed")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    kept, original = load_file(path / "model-kept.safetensors")[name], model.state_dict()[name]
    assert kept.dtype == torch.float32 and torch.equal(kept, original)
    assert torch.equal(load(path).state_dict()[name], original)


def test_a_loaded_checkpoint_generates(packed: Path) -> None:
    model = load(packed)
    made = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 16)


def test_a_checkpoint_loads_in_bfloat16_too(packed: Path) -> None:
    with torch.no_grad():
        exact, rough = load(packed)(TOKENS).logits, load(packed, dtype="bfloat16")(TOKENS).logits
    assert rough.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; two layers deep that is a few percent of the logits' spread.
    assert float((exact - rough.float()).abs().mean()) <= 0.1 * float(exact.std())


def test_only_our_directories_are_packed_checkpoints(packed: Path, tmp_path: Path) -> None:
    assert is_packed(packed) and not is_packed(tmp_path / "nothing")
    tiny_model("olmoe").save_pretrained(tmp_path / "plain")
    assert not is_packed(tmp_path / "plain")
    with pytest.raises(ModelError, match="plain is no packed checkpoint of aq-quantize"):
        load(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text("{")
    assert not is_packed(tmp_path / "plain")


def test_config_names_method_version_and_formats(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    model_map = map_model(tiny_model("olmoe"))
    assert config["quantization_config"] == {
        "quant_method": "alphaquant",
        "version": 1,
        "formats": dict(mixed_assignment(model_map).formats),
    }
    assert config["model_type"] == "olmoe" and config["dtype"] == "bfloat16"


def truncate(path: Path) -> None:
    file = path / "model-layer-001.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def remove_shard(path: Path) -> None:
    (path / "model-layer-000.safetensors").unlink()


def remove_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def garble_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("{")


def drop_kept_tensor(path: Path) -> None:
    tensors = load_file(path / "model-kept.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, path / "model-kept.safetensors")


def drop_codes(path: Path) -> None:
    tensors = load_file(path / "model-layer-001.safetensors")
    del tensors["model.layers.1.mlp.experts.3.down_proj.codes"]
    save_file(tensors, path / "model-layer-001.safetensors")


def add_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model-kept.safetensors")
    save_file({**tensors, "model.extra": torch.ones(1)}, path / "model-kept.safetensors")


def shorten_codes(path: Path) -> None:
    file, key = path / "model-layer-001.safetensors", "model.layers.1.self_attn.q_proj.codes"
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key][:-1].clone()}, file)


def edit_config(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def drop_a_format(path: Path) -> None:
    edit_config(path, lambda q: q["formats"].popitem())


def raise_version(path: Path) -> None:
    edit_config(path, lambda q: q.update(version=2))


def drop_version(path: Path) -> None:
    edit_config(path, lambda q: q.pop("version"))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        remove_shard,
        remove_index,
        garble_index,
        drop_kept_tensor,
        drop_codes,
        add_a_tensor,
        shorten_codes,
        drop_a_format,
        raise_version,
        drop_version,
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    damage: Callable[[Path], None], packed: Path
) -> None:
    damage(packed)
    with pytest.raises(StoreError) as error:
        load(packed)
    assert str(packed) in str(error.value) and "\n" not in str(error.value)


def test_a_lost_buffer_is_seen_too(tmp_path: Path) -> None:
    path = write(map_model(tiny_model("deepseek_v3")), tmp_path / "packed")
    tensors = load_file(path / "model-kept.safetensors")
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, path / "model-kept.safetensors")
    with pytest.raises(StoreError, match="e_score_correction_bias"):
        load(path)


def test_an_existing_target_is_refused_before_anything_is_written(packed: Path) -> None:
    before = {p.name: p.read_bytes() for p in packed.iterdir()}
    with pytest.raises(StoreError, match="exists already; give another --out, or --overwrite"):
        CheckpointWriter(packed)
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == before
    assert [p.name for p in packed.parent.iterdir()] == ["packed"]


def test_overwriting_replaces_the_old_one_only_at_the_end(packed: Path) -> None:
    (packed / "stray.txt").write_text("old")
    writer = CheckpointWriter(packed, overwrite=True)
    assert (packed / "stray.txt").exists()
    model_map = map_model(tiny_model("llama"))
    for index, items in quantize(model_map, mixed_assignment(model_map)).items():
        writer.add_layer(index, items)
    writer.finish(model_map, {})
    assert not (packed / "stray.txt").exists()
    assert [p.name for p in packed.parent.iterdir()] == ["packed"]
    assert type(load(packed)).__name__ == "LlamaForCausalLM"


def test_others_can_read_every_file(packed: Path) -> None:
    for file in packed.iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, file.name
