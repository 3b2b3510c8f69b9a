"""A checkpoint without one of its files or tensors is refused before an engine reads it."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from alphaquant.errors import StoreError
from alphaquant.models.quantization_config import read_formats
from alphaquant.runtime.vllm.stored_files import check_stored
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import save_packed

O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_packed(tiny_model("llama"), tmp_path / "packed")


def drop(file: Path, name: str) -> None:
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)


def test_a_whole_checkpoint_is_accepted(checkpoint: Path) -> None:
    entry = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    check_stored(checkpoint, read_formats(entry, "checkpoint").weights)


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model-layer-001.safetensors", f"{O_PROJ}.codes"),
        ("model-kept.safetensors", "model.norm.weight"),  # in the index, not packed
    ],
)
def test_a_tensor_that_is_not_in_its_file_is_named(
    file: str, tensor: str, checkpoint: Path
) -> None:
    drop(checkpoint / file, tensor)
    with pytest.raises(StoreError, match=rf"1 tensors are missing, e\.g\. {tensor}"):
        check_stored(checkpoint, {})


def test_a_tensor_that_a_format_needs_is_named(checkpoint: Path) -> None:
    with pytest.raises(StoreError, match=r"2 tensors are missing, e\.g\. a\.codes, a\.scales"):
        check_stored(checkpoint, {"a": parse_format("int4-g32")})


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-kept.safetensors").unlink()
    with pytest.raises(StoreError, match=r"model-kept\.safetensors missing"):
        check_stored(checkpoint, {})
