"""Files appear whole or not at all, and two writers do not touch each other's parts."""

from pathlib import Path

import pytest

from alphaquant.quant.files import whole_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_it_is_complete_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    with whole_file(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["a.safetensors"]


def test_two_writers_of_one_file_have_parts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with whole_file(path) as first:
        first.write_text("fir")
        with whole_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "fir"
        first.write_text("first")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_no_part(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.safetensors"]
