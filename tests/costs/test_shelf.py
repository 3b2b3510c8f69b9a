"""Tensors in files: their bits, views that are private, disks that are full, and what is left."""

import os
from pathlib import Path

import pytest
import torch

from alphaquant.costs.shelf import Shelf
from alphaquant.errors import StoreError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (700, 9)])
def test_a_tensor_comes_back_as_it_was(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    shelf = Shelf(tmp_path)
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    kept = [shelf.put(x) for x in tensors]
    for one, x in zip(kept, tensors, strict=True):
        assert one.read().dtype == dtype
        assert torch.equal(one.read(), x)


def test_parts_are_written_into_reserved_room(tmp_path: Path) -> None:
    kept = Shelf(tmp_path).reserve((2, 3), torch.zeros(1))
    assert torch.equal(kept.read(), torch.zeros(2, 3))
    kept.write(3, torch.ones(3))
    assert kept.read().tolist() == [[0.0] * 3, [1.0] * 3]


def test_writing_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    kept = Shelf(tmp_path).put(torch.ones(4))
    kept.read().fill_(7)
    assert kept.read().tolist() == [1.0] * 4


def test_a_transposed_tensor_keeps_its_shape(tmp_path: Path) -> None:
    x = torch.arange(6.0).view(2, 3).T
    assert torch.equal(Shelf(tmp_path).put(x).read(), x)


def test_nothing_is_seen_in_the_folder_and_the_file_goes_with_the_last_tensor(
    tmp_path: Path,
) -> None:
    shelf = Shelf(tmp_path / "new")
    number, kept = shelf.number, shelf.put(torch.ones(4))
    read = kept.read()
    assert list((tmp_path / "new").iterdir()) == []
    del shelf
    assert kept.read().tolist() == [1.0] * 4
    del kept
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert read.tolist() == [1.0] * 4


def test_a_full_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    shelf = Shelf(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left on device.*it needs 4096 bytes"):
        shelf.put(torch.zeros(1024))
