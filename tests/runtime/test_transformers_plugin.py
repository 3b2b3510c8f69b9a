"""Packed checkpoints through transformers: loading, saving, dtypes, and what is refused."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from alphaquant.errors import ModelError, StoreError
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.runtime.modules import PackedLinear
from alphaquant.runtime.transformers_plugin import AlphaQuantConfig, AlphaQuantizer, register
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens
from alphaquant.testing.packed import mixed_assignment, save_packed
from tests import damage
from tests.families import FAMILIES_AND_HEADS

TOKENS = tiny_tokens(2, 11)

# Families that transformers itself does not know: a fresh process would have to register them.
OWN_FAMILIES = {"deepseek", "listed_moe"}


def from_pretrained(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(TOKENS).logits
    return made


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for name, tensor in module.named_buffers(recurse=False)
    }


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Everything that two equal tensors share, NaN and signs of zeros included."""
    data = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), data.numpy().tobytes()


def raw_state(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: raw(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tiny_model("olmoe"), tmp_path_factory.mktemp("plugin") / "packed")


@pytest.fixture
def own_copy(packed: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(("family", "tied"), FAMILIES_AND_HEADS)
def test_logits_survive_loading_and_saving_bit_for_bit(
    family: str, tied: bool, tmp_path: Path
) -> None:
    path = save_packed(tiny_model(family, tie_word_embeddings=tied), tmp_path / "packed")
    expected = logits(load(path))
    model = from_pretrained(path, dtype=torch.float32)
    assert torch.equal(logits(model), expected)
    # Small files: several, and tensors at other places in them than before.
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) >= 2
    for reloaded in (from_pretrained(tmp_path / "again"), load(tmp_path / "again")):
        assert torch.equal(logits(reloaded), expected)
        assert raw_state(packed_state(reloaded)) == raw_state(packed_state(model))


def test_the_mix_of_the_tests_has_every_kind_of_packed_tensor(packed: Path) -> None:
    formats = set(
        json.loads((packed / "config.json").read_text())["quantization_config"]["formats"].values()
    )
    assert {"int1-g64", "int3-g256-asym", "mxfp4", "nvfp4", "fp8-e4m3-g128", "bf16"} <= formats
    dtypes = {t.dtype for t in packed_state(from_pretrained(packed)).values()}
    assert dtypes == {
        torch.uint8,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float8_e4m3fn,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_dtype_is_of_kept_tensors_and_never_of_packed_ones(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = save_packed(tiny_model(family), tmp_path / "packed")
    model = from_pretrained(path, dtype=dtype)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    strict = [*(plain._keep_in_fp32_modules_strict or [])]
    strict += [*(plain._keep_in_fp32_modules or [])] if dtype == torch.float16 else []
    for name, parameter in model.named_parameters():
        kept_wide = any(part in name for part in strict)
        assert parameter.dtype == (torch.float32 if kept_wide else dtype), name
    stored = read_tensors(path)
    packed_tensors = packed_state(model)
    assert raw_state(packed_tensors) == {n: raw(stored[n]) for n in packed_tensors}
    assert logits(model).dtype == dtype


def test_default_dtype_is_the_checkpoints(packed: Path) -> None:
    model = from_pretrained(packed)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16


def test_a_model_that_keeps_modules_wide_does_not_widen_packed_ones_of_that_name(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(tiny_model("olmoe"))
    monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", {"gate", "gate_proj"})
    model = from_pretrained(packed, dtype=torch.bfloat16)
    stored = read_tensors(packed)
    assert raw_state(packed_state(model)) == {n: raw(stored[n]) for n in packed_state(model)}
    assert model.get_parameter("model.layers.0.mlp.gate.weight").dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_norms_and_embeddings_are_the_originals_byte_by_byte(
    family: str, tmp_path: Path
) -> None:
    original = tiny_model(family)
    path = save_packed(original, tmp_path / "packed")
    from_pretrained(path).save_pretrained(tmp_path / "again")
    kept = {k.name for k in map_model(original).inventory.kept}
    assert any("embed" in n for n in kept) and any("norm" in n for n in kept)
    state = original.state_dict()
    for folder in (path, tmp_path / "again"):
        tensors = read_tensors(folder)
        assert kept <= set(tensors)
        for name in kept:
            expected = state[name].to(tensors[name].dtype)
            assert raw(tensors[name]) == raw(expected), name
            # Exact in the checkpoint's dtype, so that nothing was rounded on the way.
            assert torch.equal(expected.to(state[name].dtype), state[name]), name


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_a_saved_again_checkpoint_is_a_packed_checkpoint(
    shard_size: str, packed: Path, tmp_path: Path
) -> None:
    from_pretrained(packed).save_pretrained(tmp_path / "again", max_shard_size=shard_size)
    assert raw_state(read_tensors(tmp_path / "again")) == raw_state(read_tensors(packed))
    assert quantized_bytes(tmp_path / "again") == quantized_bytes(packed)
    entry, again = (
        json.loads((p / "config.json").read_text())["quantization_config"]
        for p in (packed, tmp_path / "again")
    )
    assert entry == again


def test_a_model_of_alphaquant_load_saves_too(packed: Path, tmp_path: Path) -> None:
    model: Any = load(packed)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_a_loaded_model_generates(packed: Path) -> None:
    made = from_pretrained(packed).generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 16)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_nothing(device_map: Any, packed: Path) -> None:
    model = from_pretrained(packed, device_map=device_map)
    assert torch.equal(logits(model), logits(from_pretrained(packed)))


def test_parameters_lie_at_the_allocators_alignment(packed: Path, tmp_path: Path) -> None:
    from_pretrained(packed).save_pretrained(tmp_path / "again")
    for parameter in from_pretrained(tmp_path / "again").parameters():
        assert parameter.data_ptr() % 64 == 0


def test_names_in_the_files_are_taken_as_they_are(packed: Path) -> None:
    # A renaming onto a name that exists too, as transformers' own mappings have them.
    renaming = {"input_layernorm": "post_attention_layernorm"}
    model = from_pretrained(packed, key_mapping=renaming)
    assert torch.equal(logits(model), logits(from_pretrained(packed)))
    assert model._weight_conversions == []


def test_the_model_says_that_it_is_quantized_and_not_for_training(packed: Path) -> None:
    model = from_pretrained(packed)
    quantizer = model.hf_quantizer
    assert isinstance(quantizer, AlphaQuantizer) and quantizer.pre_quantized
    assert quantizer.is_serializable() and not quantizer.is_trainable
    assert not quantizer.is_qat_trainable and not quantizer.is_compileable
    assert model.is_quantized and model.config.quantization_config.quant_method == "alphaquant"


def test_nothing_is_reported_missing_or_extra(packed: Path) -> None:
    _, report = from_pretrained(packed, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


LOAD = """
import hashlib, sys, torch
{imports}
from alphaquant.testing.models import tiny_tokens
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tiny_tokens(2, 11)).logits
    print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""

OURS_FIRST = "import alphaquant\nfrom transformers import AutoModelForCausalLM"
ORDERS = {
    "ours first": OURS_FIRST,
    "transformers first": "from transformers import AutoModelForCausalLM\nimport alphaquant",
    "after its models": (
        "import transformers.modeling_utils\nfrom transformers import AutoModelForCausalLM\n"
        "import alphaquant"
    ),
}


def digests_in_a_fresh_process(imports: str, paths: list[Path]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(imports=imports), *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "order",
    [
        "ours first",
        pytest.param("transformers first", marks=pytest.mark.slow),  # the hook of the first row
        pytest.param("after its models", marks=pytest.mark.slow),  # no hook, see its own tests
    ],
)
def test_transformers_may_be_imported_first_or_last(order: str, packed: Path) -> None:
    assert digests_in_a_fresh_process(ORDERS[order], [packed]) == [digest(logits(load(packed)))]


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits_for_every_family(tmp_path: Path) -> None:
    families = [family for family in FAMILIES if family not in OWN_FAMILIES]
    paths = [save_packed(tiny_model(family), tmp_path / family) for family in families]
    found = digests_in_a_fresh_process(OURS_FIRST, paths)
    assert found == [digest(logits(load(path))) for path in paths]


def test_registering_again_changes_nothing() -> None:
    before = dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    register()
    assert before == (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    assert auto.AUTO_QUANTIZER_MAPPING["alphaquant"] is AlphaQuantizer


def add_a_tensor_that_transformers_would_ignore(path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    damage.edit(path / damage.KEPT, lambda t: t.update({name: torch.ones(2)}))


def narrow_a_norm(path: Path) -> None:
    damage.edit(path / damage.KEPT, lambda t: t.update({"model.norm.weight": torch.ones(3)}))


def round_scales(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        found = (n for n, t in tensors.items() if n.endswith(".scales") and t.dtype == torch.half)
        name = next(found)
        tensors[name] = tensors[name].to(torch.bfloat16)

    damage.edit(path / damage.SECOND, change)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage.drop_a_router, "1 places stay empty, e.g. model.layers.1.mlp.gate.weight"),
        (
            damage.drop_codes,
            "1 places stay empty, e.g. model.layers.1.mlp.experts.3.down_proj.codes",
        ),
        (damage.add_a_tensor, "1 tensors have no place in the model"),
        (add_a_tensor_that_transformers_would_ignore, "1 tensors have no place in the model"),
        (damage.shorten_codes, "q_proj.codes is U8 .*, expected U8"),
        (narrow_a_norm, r"model.norm.weight is F32 \[3\], expected F32 \[40\]"),
        (round_scales, r"scales is BF16 .*, expected F16 \["),
        (damage.cut_a_shard, "is incomplete or damaged"),
        (damage.remove_a_shard, "No such file .*model-layer-000.safetensors"),
        (damage.raise_version, "has format version 2, this program reads 1; update it"),
        (damage.drop_version, "has format version None"),
        (damage.drop_a_format, "config.json names formats for .* matrices that are not the"),
        (damage.misspell_a_format, "config.json is damaged .*int99"),
        (damage.drop_formats, "it must have quant_method, version and formats"),
        (damage.add_an_entry, "quantization_config in config.json has .*rotation"),
    ],
)
def test_a_damaged_checkpoint_is_our_error_and_never_random_weights(
    spoil: Callable[[Path], None], said: str, own_copy: Path
) -> None:
    spoil(own_copy)
    with pytest.raises(StoreError, match=said) as error:
        from_pretrained(own_copy)
    assert str(own_copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("index", [None, "{"], ids=["missing", "garbled"])
def test_a_broken_index_is_an_error_of_transformers(index: str | None, own_copy: Path) -> None:
    file = own_copy / "model.safetensors.index.json"
    file.unlink()
    if index is not None:
        file.write_text(index)
    with pytest.raises((OSError, ValueError), match=r"no file named|Expecting property name"):
        from_pretrained(own_copy)


def test_a_model_without_its_head_is_refused(packed: Path) -> None:
    with pytest.raises(StoreError, match="OlmoeModel; load it as a causal language model"):
        AutoModel.from_pretrained(packed)


def test_a_state_dict_without_files_is_refused(packed: Path) -> None:
    kind: Any = type(tiny_model("olmoe"))
    with pytest.raises(ModelError, match="loaded from its files, not from a state_dict"):
        kind.from_pretrained(
            None, config=AutoConfig.from_pretrained(packed), state_dict=read_tensors(packed)
        )


def test_transformers_does_not_quantize_with_it(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path / "plain")
    entry = AlphaQuantConfig(version=1, formats={})
    with pytest.raises(ValueError, match="alphaquant does require the model to be pre-quantized"):
        from_pretrained(tmp_path / "plain", quantization_config=entry)


def test_formats_of_the_checkpoint_are_those_of_the_assignment(packed: Path) -> None:
    model = from_pretrained(packed)
    found = {n: m.format.name for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert found == dict(mixed_assignment(map_model(tiny_model("olmoe"))).formats)
