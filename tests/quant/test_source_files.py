"""What a checkpoint's files lack, hold beside the model, or get wrong, in one line each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import alphaquant
from alphaquant.errors import ModelError
from alphaquant.quant.loading import load_model, load_skeleton
from alphaquant.quant.models import map_model
from alphaquant.quant.source_files import with_source
from alphaquant.studies.quantize import QuantizeSpec, dry_run, quantize
from alphaquant.studies.sources import load_source
from alphaquant.testing.checkpoints import save_tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


def change_config(source: Path, **fields: Any) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(source: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})


def without_expert(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "layers.1.mlp.experts.3." in n]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), rf"1 tensors that config\.json promises .* {QUERY}"),
        (
            lambda t: t.pop("model.norm.weight"),
            r"model\.norm\.weight; they would be random",
        ),
        (without_expert, r"2 tensors have other shapes .* \[3, 32, 32\] instead of \[4, 32, 32\]"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), r"model\.norm\.weight holds NaN"),
    ],
    ids=["a matrix", "a norm", "an expert", "nan"],
)
def test_a_model_that_would_be_random_or_broken_is_refused(
    source: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    change_tensors(source, change)
    with pytest.raises(ModelError, match=message):
        load_source(str(source), "cpu", "auto")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"tensors that config\.json promises .* model\.layers\.2\."),
        ({"vocab_size": 5000}, r"2 tensors have other shapes .* instead of \[5000, 32\]"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": 0}, "cannot load model"),
        ({"hidden_act": "nonesuch"}, "nonesuch"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok is 0; with 4 experts it is 1 to 4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; with 4 experts it is 1 to 4"),
        ({"quantization_config": "awq"}, r"quantization_config is 'awq'; it is an object"),
        ({"quantization_config": {"bits": 4}}, r"quantized already \(its .* has bits\)"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"\(quant_method gptq\)"),
    ],
)
def test_a_configuration_of_another_model_is_one_line(
    source: Path, fields: dict[str, Any], message: str
) -> None:
    change_config(source, **fields)
    with pytest.raises(ModelError, match=message) as error:
        load_model(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["null", "[1]", '"x"', "{", "[" * 5000])
def test_a_config_json_that_is_no_object_is_refused(source: Path, content: str) -> None:
    (source / "config.json").write_text(content)
    for load in (load_model, load_skeleton):
        with pytest.raises(ModelError, match=r"config\.json cannot be read"):
            load(source)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "holds a list"),
        ({"weight_map": []}, "weight_map must be an object"),
        ({"weight_map": {"a": 5}}, "weight_map must be an object"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors, which is not there"),
        ({"weight_map": {"a": "../x.safetensors"}}, "outside .*; nothing outside is read"),
    ],
)
def test_an_index_that_leads_astray_is_refused(source: Path, index: Any, message: str) -> None:
    (source / WEIGHTS).rename(source / "other.safetensors")
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load_model(source)


def test_a_file_that_was_cut_short_is_named(source: Path) -> None:
    content = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged .*; fetch or copy it"):
        load_model(source)


def test_quantization_config_null_is_none(source: Path) -> None:
    change_config(source, quantization_config=None)
    load_model(source)


def test_tensors_that_the_model_does_not_load_are_carried_byte_for_byte(
    source: Path, tmp_path: Path
) -> None:
    head = {"model.layers.2.eh_proj.weight": torch.randn(4, 6, dtype=torch.bfloat16)}
    change_tensors(source, lambda tensors: tensors.update(head))
    change_config(source, num_nextn_predict_layers=1, some_key_of_the_source=[1, 2])
    skeleton = with_source(map_model(load_skeleton(source)), source)
    assert [c.name for c in skeleton.carried] == list(head)
    assert skeleton.inventory.kept[-1].n_bytes == 48
    config = tmp_path / "int4.json"
    config.write_text('{"default": {"wq": "int4", "group_size": 32}}')
    spec = QuantizeSpec(str(source), config, tmp_path / "out", {"method": "rtn"})
    assert dry_run(spec).counts.checkpoint_bytes == quantize(spec).checkpoint_bytes
    stored = load_file(tmp_path / "out" / "model-carried.safetensors")
    assert torch.equal(stored[next(iter(head))], head[next(iter(head))])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 1
    assert written["some_key_of_the_source"] == [1, 2]
    assert written["architectures"] == ["OlmoeForCausalLM"]
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert report["carried"] == list(head)
    assert "1 tensors (48 bytes)" in report["warnings"][-1]
    model: Any = alphaquant.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")  # without what it never loaded
    alphaquant.load(tmp_path / "again")
