"""Checksums and numbers of packed checkpoints: damage is found and named."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from alphaquant.errors import ModelError, StoreError
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.checkpoint_files import read_tensors
from alphaquant.runtime.integrity import verify_checkpoint, verify_checksums
from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import save_packed

KEPT = "model-kept.safetensors"
LAYER = "model-layer-000.safetensors"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    return save_packed(tiny_model("olmoe"), tmp_path / "packed")


def change(file: Path, name: str, edit: Callable[[Tensor], object]) -> None:
    tensors = load_file(file)
    edit(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def first(packed: Path, family: str, part: str) -> tuple[Path, str]:
    """A tensor of the first matrix in a format of a family, and its file."""
    formats = json.loads((packed / "config.json").read_text())["quantization_config"]["formats"]
    places = json.loads((packed / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(f"{n}.{part}" for n, fmt in formats.items() if fmt.startswith(family))
    return packed / places[name], name


def test_a_whole_checkpoint_is_verified_by_us_and_by_sha256sum(packed: Path) -> None:
    found = verify_checkpoint(packed)
    names = {file.name for file in packed.iterdir()} - {"SHA256SUMS"}
    tensors = read_tensors(packed)
    assert found.n_files == len(names) >= 5
    assert found.n_bytes == sum((packed / name).stat().st_size for name in names)
    # Of super-blocks the float16 numbers are scales; any multiple of theirs is as good as another.
    multiples = {name.replace("super_", "") for name in tensors if "super_scales" in name}
    scales = [n for n in tensors if n.endswith(("scales", "global_scale")) and n not in multiples]
    assert found.n_scales == len(scales) > len(multiples) > 0
    done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=packed)
    assert done.returncode == 0


@pytest.mark.parametrize("file", [LAYER, KEPT, "config.json", "model.safetensors.index.json"])
def test_a_flipped_bit_and_a_lost_file_are_named(file: str, packed: Path) -> None:
    content = bytearray((packed / file).read_bytes())
    content[-9] ^= 1
    (packed / file).write_bytes(content)
    with pytest.raises(StoreError, match=f"{file} is not what aq-quantize wrote"):
        verify_checkpoint(packed)
    (packed / file).unlink()
    with pytest.raises(StoreError, match=f"{file} is missing"):
        verify_checkpoint(packed)


def test_a_flipped_bit_is_told_with_what_to_do(packed: Path) -> None:
    change(packed / LAYER, first(packed, "int4", "codes")[1], lambda t: t.view(-1)[:1].add_(1))
    load(packed)  # files are not hashed on loading
    with pytest.raises(StoreError, match=f"{LAYER} is not what aq-quantize wrote.*copy it again"):
        verify_checksums(packed)


@pytest.mark.parametrize(
    ("family", "part", "edit", "word"),
    [
        ("int4", "scales", lambda t: t.view(-1)[3:4].fill_(float("nan")), "NaN"),
        ("int4", "scales", lambda t: t.view(-1)[:1].fill_(float("-inf")), "infinite"),
        ("fp8", "scales", lambda t: t.view(-1)[-1:].fill_(float("inf")), "infinite"),
        (
            "nl2-g32-s256",
            "super_scales",
            lambda t: t.view(-1)[-1:].fill_(float("inf")),
            "infinite",
        ),
        ("mxfp4", "scales", lambda t: t.view(-1)[-1:].fill_(255), "NaN"),
        ("nvfp4", "scales", lambda t: t.copy_(-t.float()), "negative or zero"),
        ("nvfp4", "scales", lambda t: t.view(torch.uint8)[:1].fill_(0x7F), "NaN"),
        ("nvfp4", "global_scale", lambda t: t.zero_(), "negative or zero"),
        ("bf16", "weight", lambda t: t[:1].fill_(float("nan")), "NaN"),
        (None, "model.norm.weight", lambda t: t[:1].fill_(float("nan")), "NaN"),
        (None, "model.embed_tokens.weight", lambda t: t[:1].fill_(float("inf")), "infinite"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused_by_loading_and_verifying(
    family: str | None, part: str, edit: Callable[[Tensor], object], word: str, packed: Path
) -> None:
    file, name = (packed / KEPT, part) if family is None else first(packed, family, part)
    change(file, name, edit)
    (packed / "SHA256SUMS").unlink()
    for read in (verify_checkpoint, load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(StoreError) as caught:
            read(packed)
        assert str(caught.value).startswith(f"{file}: {name} holds {word} numbers")


def test_what_our_codecs_write_is_usable(packed: Path) -> None:
    """Scales of symmetric integers are negative where the largest element is."""
    file, name = first(packed, "int4", "scales")
    change(file, name, lambda t: t.neg_())
    (packed / "SHA256SUMS").unlink()
    verify_checkpoint(packed)


def test_what_save_pretrained_writes_has_no_checksums_and_is_verified(packed: Path) -> None:
    load(packed).save_pretrained(packed.parent / "again")
    assert not (packed.parent / "again" / "SHA256SUMS").exists()
    assert verify_checkpoint(packed.parent / "again").n_files == 0
    load(packed).save_pretrained(packed)  # over the one it was loaded from
    assert verify_checkpoint(packed).n_files == 0
    load(packed)


def test_a_damaged_list_of_checksums_is_told(packed: Path) -> None:
    (packed / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(StoreError, match="SHA256SUMS: .* is no line"):
        verify_checksums(packed)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"weight_map": []},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/secret.safetensors"}},
        {},
    ],
)
def test_an_index_of_another_shape_or_out_of_the_folder_is_one_line(
    content: object, packed: Path
) -> None:
    (packed / "model.safetensors.index.json").write_text(json.dumps(content))
    (packed / "SHA256SUMS").unlink()
    for read in (verify_checkpoint, load):
        with pytest.raises(StoreError, match=r"model\.safetensors\.index\.json") as caught:
            read(packed)
        assert "\n" not in str(caught.value)


def test_transformers_does_not_follow_an_index_out_of_the_folder(packed: Path) -> None:
    path = packed / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    (packed / KEPT).rename(packed.parent / KEPT)
    places = {n: f"../{f}" if f == KEPT else f for n, f in index["weight_map"].items()}
    path.write_text(json.dumps({**index, "weight_map": places}))
    with pytest.raises(StoreError, match="is outside the checkpoint"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize("entry", [None, "awq", [], {"quant_method": "awq"}])
def test_another_quantization_config_is_no_packed_checkpoint(entry: object, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    (packed / "SHA256SUMS").unlink()
    for content in ({**config, "quantization_config": entry}, [config], None):
        (packed / "config.json").write_text(json.dumps(content))
        for read in (verify_checkpoint, load):
            with pytest.raises(ModelError, match="is no packed checkpoint"):
                read(packed)
