"""Aligned safetensors: the numbers of the header's example, and what safetensors reads of them."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alphaquant.errors import ModelError
from alphaquant.models.pages.tensor_files import DTYPES, read_places, write_aligned


def test_the_example_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.ones(3).bfloat16(), "b": torch.randn(64).bfloat16()}
    digest = write_aligned(path, tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    places = read_places(path)
    assert [places[n].offset for n in ("b", "a")] == [4096, 4224]  # type: ignore[union-attr]
    assert path.stat().st_size == 4230
    found = load_file(path)
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    write_aligned(path, {"x": tensor.T})  # not contiguous
    assert load_file(path)["x"].dtype == dtype
    assert torch.equal(load_file(path)["x"].to(torch.float32), tensor.T.to(torch.float32))
    place = read_places(path)["x"]
    assert place is not None and (place.dtype, place.shape) == (dtype, (3, 2))


def test_a_file_that_was_cut_is_never_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_aligned(path, {"x": torch.ones(5000)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="damaged or incomplete"):
        read_places(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{nope"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged or incomplete .*; fetch or copy it again"):
        read_places(path)
