"""What a checkpoint's files hold beside the model is carried; what is wrong is in tests/corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import alphaquant
from alphaquant.commands.quantize import dry_run, quantize
from alphaquant.models.loading import load_skeleton
from alphaquant.models.mapping import map_model
from alphaquant.models.source_files import with_source
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.testing.checkpoints import save_tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    spec = QuantizeSpec.of(model=str(source), config=config, out=tmp_path / "out", method="rtn")
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
