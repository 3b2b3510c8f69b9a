"""Private maps: what is written stays when pages are released, and is gone when restored."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from alphaquant.models.pages.private_maps import PAGE, LayerPages, Place, can_map, map_pages
from alphaquant.models.pages.tensor_files import read_places, write_aligned

pytestmark = pytest.mark.skipif(not can_map(), reason="needs Linux")

N_PAGES = 64
COUNT = N_PAGES * PAGE // 4
"""Float32 numbers in a tensor of `N_PAGES` pages."""


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(COUNT) for name in ("a", "b", "c")}


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    path = tmp_path / "layer.safetensors"
    write_aligned(path, tensors)
    return path


def mapped(file: Path, *names: str) -> LayerPages:
    places = read_places(file)
    return map_pages({n: p for n, p in places.items() if p is not None and n in names})


def test_pages_come_when_read_and_go_when_released(file: Path, tensors: dict[str, Tensor]) -> None:
    pages = mapped(file, "a", "b", "c")
    assert pages.resident_bytes() <= PAGE  # looking for its address touches one
    for name, tensor in tensors.items():
        assert torch.equal(pages.tensors[name], tensor)
    assert pages.n_bytes == pages.resident_bytes() == 3 * N_PAGES * PAGE
    pages.release()
    assert pages.resident_bytes() == 0
    assert torch.equal(pages.tensors["b"], tensors["b"])


def test_what_was_written_survives_a_release_and_not_a_restore(
    file: Path, tensors: dict[str, Tensor]
) -> None:
    pages = mapped(file, "a", "b", "c")
    before = file.read_bytes()
    for one in pages.tensors.values():
        float(one.sum())
    pages.tensors["b"].fill_(7)
    pages.tensors["c"][5] = 3.5
    assert pages.changed_bytes() == (N_PAGES + 1) * PAGE
    pages.release()
    assert pages.resident_bytes() == pages.changed_bytes() == (N_PAGES + 1) * PAGE
    assert torch.equal(pages.tensors["a"], tensors["a"])
    assert bool((pages.tensors["b"] == 7).all())
    assert pages.tensors["c"][4:7].tolist() == [tensors["c"][4], 3.5, tensors["c"][6]]
    pages.restore()
    assert pages.resident_bytes() == 0
    for name, tensor in tensors.items():
        assert torch.equal(pages.tensors[name], tensor)
    assert file.read_bytes() == before


def test_parts_of_one_file_have_pages_of_their_own(file: Path, tensors: dict[str, Tensor]) -> None:
    first, second = mapped(file, "a", "c"), mapped(file, "b")
    first.tensors["a"].zero_()
    second.tensors["b"].zero_()
    second.restore()
    assert not bool(first.tensors["a"].any())
    assert torch.equal(second.tensors["b"], tensors["b"])


def test_without_word_of_the_kernel_nothing_is_released(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = mapped(file, "a")
    pages.tensors["a"].fill_(2)
    with monkeypatch.context() as patch:
        patch.setattr("alphaquant.models.pages.private_maps._PAGEMAP", tmp_path / "none")
        pages.release()
        assert pages.resident_bytes() == pages.changed_bytes() == 0
    assert pages.resident_bytes() == N_PAGES * PAGE
    assert bool((pages.tensors["a"] == 2).all())


def test_tensors_of_no_size_and_of_no_dimension_are_mapped(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_aligned(path, {"none": torch.empty(0, 3), "one": torch.tensor(5), "b": torch.ones(3)})
    pages = map_pages({n: p for n, p in read_places(path).items() if p is not None})
    assert pages.tensors["none"].shape == (0, 3)
    assert pages.tensors["one"].item() == 5 and pages.tensors["one"].dtype == torch.int64
    assert pages.tensors["b"].tolist() == [1, 1, 1]


def test_an_offset_of_no_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    numbers = torch.arange(PAGE, dtype=torch.int16)
    path.write_bytes(b"\0" * (PAGE + 6) + numbers.numpy().tobytes())
    pages = map_pages({"x": Place(path, PAGE + 6, (2, PAGE // 2), torch.int16)})
    assert torch.equal(pages.tensors["x"].reshape(-1), numbers)
