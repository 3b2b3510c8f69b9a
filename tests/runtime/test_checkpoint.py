"""Packed checkpoints: bytes, exact logits, kept tensors, and what is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.models.quantization_config import is_packed
from alphaquant.runtime.activations import fake_quantize
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.runtime.modules import PackedLinear
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens
from alphaquant.testing.packed import mixed_assignment, quantize_mixed, save_packed
from tests import damage
from tests.families import FAMILIES_AND_HEADS

TOKENS = tiny_tokens(2, 11)


def swapped_logits(model: nn.Module) -> Tensor:
    """Logits of the model with every weight replaced by its dequantized one."""
    model_map = map_model(model)
    with torch.no_grad():
        for items in quantize_mixed(model_map).values():
            for item in items:
                model_map.view(item.matrix.name).copy_(item.packed.dequantize())
        logits: Tensor = model(TOKENS).logits
    return logits


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return save_packed(tiny_model("olmoe"), tmp_path / "packed")


@pytest.mark.parametrize(("family", "tied"), FAMILIES_AND_HEADS)
def test_packed_logits_equal_those_of_swapped_weights_exactly(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    path = save_packed(model, tmp_path / "packed")
    loaded = load(path)
    names = {name for name, m in loaded.named_modules() if isinstance(m, PackedLinear)}
    assert names == set(map_model(model).inventory.by_name)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        logits, expected = loaded(TOKENS).logits, swapped_logits(model)
    # gpt-oss computes x @ W with W [in, out], a packed matrix x @ W.T with W [out, in]: other
    # kernels, which may add in another order. 2 layers of fp32 rounding, 2^-24 each.
    tolerance = 1e-5 if family == "gpt_oss" else 0.0
    assert float((logits - expected).abs().max()) <= tolerance * float(expected.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_in_the_files_are_those_that_the_formats_count(family: str, tmp_path: Path) -> None:
    model_map = map_model(tiny_model(family))
    path = save_packed(model_map.model, tmp_path / "packed")
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
    kept = load_file(save_packed(model_map.model, tmp_path / "packed") / "model-kept.safetensors")
    assert set(kept) == {k.name for k in model_map.inventory.kept} and set(kept) <= set(source)
    for name, tensor in kept.items():
        assert tensor.dtype == source[name].dtype == torch.bfloat16, name
        assert torch.equal(tensor.view(torch.int16), source[name].view(torch.int16)), name


def test_a_kept_tensor_that_is_no_bfloat16_number_stays_float32(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3")
    path = save_packed(model, tmp_path / "packed")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    kept, original = load_file(path / "model-kept.safetensors")[name], model.state_dict()[name]
    assert kept.dtype == torch.float32 and torch.equal(kept, original)
    assert torch.equal(load(path).state_dict()[name], original)


def test_a_model_without_a_dtype_has_its_kept_tensors_dtype_in_the_checkpoint(
    tmp_path: Path,
) -> None:
    model = tiny_model("olmoe")
    model.config.dtype = None
    path = save_packed(model, tmp_path / "packed")
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(path / "model-kept.safetensors").values()} == {
        torch.bfloat16
    }


def test_a_loaded_model_names_the_dtype_of_the_checkpoint_not_of_the_memory(packed: Path) -> None:
    model = load(packed)
    assert model.config.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_loaded_checkpoint_generates(packed: Path) -> None:
    model = load(packed)
    made = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 16)


def test_the_head_is_not_given_a_slice_of_a_prompt(packed: Path) -> None:
    """Of a slice, torch copies a weight without gradients in bfloat16."""
    model, strides = load(packed, dtype="bfloat16"), []
    model.lm_head.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    width = model.config.hidden_size
    made = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert made.shape[1] == TOKENS.shape[1] + 3
    assert strides == [(width, width, 1)] * 3


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


def remove_index(path: Path) -> None:
    (path / "model.safetensors.index.json").unlink()


def garble_index(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text("{")


def widen_scales(path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.scales"
    damage.edit(path / damage.SECOND, lambda t: t.update({name: t[name].to(torch.float32)}))


@pytest.mark.parametrize(
    "spoil",
    [
        damage.cut_a_shard,
        damage.remove_a_shard,
        remove_index,
        garble_index,
        damage.drop_a_router,
        damage.drop_codes,
        damage.add_a_tensor,
        damage.shorten_codes,
        widen_scales,
        damage.drop_a_format,
        damage.misspell_a_format,
        damage.drop_formats,
        damage.add_an_entry,
        damage.raise_version,
        damage.drop_version,
    ],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(
    spoil: Callable[[Path], None], packed: Path
) -> None:
    spoil(packed)
    with pytest.raises(StoreError) as error:
        load(packed)
    assert str(packed) in str(error.value) and "\n" not in str(error.value)


def test_a_lost_buffer_is_seen_too(tmp_path: Path) -> None:
    path = save_packed(tiny_model("deepseek_v3"), tmp_path / "packed")
    tensors = load_file(path / "model-kept.safetensors")
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, path / "model-kept.safetensors")
    with pytest.raises(StoreError, match="e_score_correction_bias"):
        load(path)


def test_others_can_read_every_file(packed: Path) -> None:
    for file in packed.iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, file.name


ACTIVATIONS = {
    "model.layers.0.self_attn.q_proj": parse_format("int8-row"),
    "model.layers.1.mlp.experts.2.down_proj": parse_format("mxfp8"),
    "model.layers.1.mlp.experts.0.gate_proj": parse_format("fp8-e4m3-row"),
}


def save_with_activations(folder: Path, activations: Mapping[str, Format]) -> Path:
    model_map = map_model(tiny_model("olmoe"))
    assignment = mixed_assignment(model_map)
    settings = QuantSettings(method="rtn")
    job = PackingJob(model_map, assignment, settings, activations=activations)
    return quantize_to_checkpoint(job, folder, facts={}).path


@torch.no_grad()
def test_inputs_of_named_matrices_are_rounded_and_only_theirs(tmp_path: Path) -> None:
    plain = load(save_with_activations(tmp_path / "plain", {}))
    rounded = load(save_with_activations(tmp_path / "rounded", ACTIVATIONS))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for name, module in rounded.named_modules():
        if isinstance(module, PackedLinear):
            given = x[:, : module.cols]
            before = plain.get_submodule(name)
            fmt = ACTIVATIONS.get(name)
            expected = before(given if fmt is None else fake_quantize(given, fmt))
            assert torch.equal(module(given), expected), name
            assert (fmt is None) == torch.equal(expected, before(given)), name
    tokens = tiny_tokens(1, 9)
    assert not torch.equal(plain(tokens).logits, rounded(tokens).logits)


def test_activations_are_in_the_configuration_and_the_report(tmp_path: Path) -> None:
    folder = save_with_activations(tmp_path / "rounded", ACTIVATIONS)
    names = {name: fmt.name for name, fmt in ACTIVATIONS.items()}
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["activations"] == names
    assert json.loads((folder / "quantize_report.json").read_text())["activations"] == names
    load(folder).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again").get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(again, PackedLinear) and again.activation.name == "int8-row"


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ({"lm_head": "int8-row"}, "activations of lm_head"),
        (["int8"], "activations"),
        ({"x": "int9"}, "int9"),
    ],
)
def test_damaged_activations_are_refused(
    activations: object, message: str, tmp_path: Path
) -> None:
    folder = save_with_activations(tmp_path / "packed", {})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activations"] = activations
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=message):
        load(folder)


@torch.no_grad()
def test_another_dtype_later_does_not_touch_the_scales(tmp_path: Path) -> None:
    """PyTorch casts float16 scales with everything else, which would change the weights."""
    model = load(save_with_activations(tmp_path / "packed", {}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            for part, tensor in module.packed().tensors.items():
                stored = before[f"{name}.{part}"]
                assert tensor.dtype == stored.dtype
                assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8)), name
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert bool(torch.isfinite(model(tiny_tokens(1, 5)).logits).all())


def test_a_dtype_of_torch_is_taken_and_a_missing_device_is_one_sentence(packed: Path) -> None:
    model = load(packed, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="cuda:1 was asked for, and torch finds no CUDA"):
            load(packed, device="cuda:1")
