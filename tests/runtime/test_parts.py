"""The folder of an unfinished checkpoint: whose it is, what stays, how it becomes the target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphaquant.errors import StoreError
from alphaquant.files import sha256_of
from alphaquant.runtime.parts import Part, check_target, open_part


def finish_a_layer(part: Part) -> None:
    file = part.checkpoint / "layer"
    file.write_text("codes")
    part.add_layer(0, {"file": "layer", "sha256": sha256_of(file)})


def packed_config() -> str:
    return json.dumps({"quantization_config": {"quant_method": "alphaquant"}})


@pytest.mark.parametrize(
    "content", [["precious"], ["checkpoint"], ["layers", "lock"], ["job.json"]]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_never_touched(
    content: list[str], overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / "q.part").mkdir()
    for name in content:
        (tmp_path / "q.part" / name).write_text("[]")
    with (
        pytest.raises(StoreError, match=r"q\.part is in the way"),
        open_part(tmp_path / "q", overwrite),
    ):
        pass
    assert sorted(p.name for p in (tmp_path / "q.part").iterdir()) == sorted(content)


def test_an_empty_folder_file_and_link_in_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "q.part").mkdir()
    with open_part(tmp_path / "q"):
        pass
    (tmp_path / "q.part").write_text("mine")
    (tmp_path / "r.part").symlink_to(tmp_path)
    for name in ("q", "r"):
        with pytest.raises(StoreError, match="is in the way"):
            check_target(tmp_path / name)


def test_two_at_once_and_the_second_changes_nothing(tmp_path: Path) -> None:
    with open_part(tmp_path / "q") as part:
        finish_a_layer(part)
        for overwrite in (False, True):
            with (
                pytest.raises(StoreError, match=f"q is in use: process {os.getpid()} on"),
                open_part(tmp_path / "q", overwrite, {"other": 1}),
            ):
                pass
        assert part.finished()
    assert (tmp_path / "q.part" / "layers" / "000.json").exists()


def test_what_is_made_above_goes_again_when_nothing_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with open_part(tmp_path / "a" / "b" / "c"):
        assert (tmp_path / "a" / "b" / "c.part").exists()
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_was_killed_while_it_moved_loses_neither_checkpoint(
    moved: bool, tmp_path: Path
) -> None:
    """`moved`: after the new one was moved too, before the folder was cleaned."""
    target = tmp_path / "q"
    target.mkdir()
    (target / "config.json").write_text(packed_config())
    with open_part(target, True) as part:
        finish_a_layer(part)
        (part.checkpoint / "config.json").write_text(packed_config() + " ")
    target.rename(part.folder / "replaced")
    if moved:
        part.checkpoint.rename(target)
    with open_part(target, True) as again:
        assert list(again.finished()) == ([] if moved else [0])
        again.clear()
    assert (target / "config.json").read_text() == packed_config() + (" " if moved else "")
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_a_target_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match="exists and is no packed"),
        open_part(tmp_path / "q") as p,
    ):
        finish_a_layer(p)
        (tmp_path / "q").mkdir()
        (tmp_path / "q" / "mine").write_text("x")
        p.place()
    assert (tmp_path / "q" / "mine").exists() and (p.checkpoint / "layer").exists()


def test_a_move_that_fails_keeps_both_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_text(packed_config())
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "checkpoint":
            raise PermissionError("not allowed")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    message = r"complete in .*q\.part/checkpoint and cannot be moved to .*q \(not allowed\)"
    with pytest.raises(StoreError, match=message), open_part(tmp_path / "q", True) as part:
        finish_a_layer(part)
        part.place()
    assert (tmp_path / "q" / "config.json").exists() and (part.checkpoint / "layer").exists()


def test_a_full_disk_is_told_with_the_file_and_the_bytes(tmp_path: Path) -> None:
    """A limit of the system on the size of files stands for the disk."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from alphaquant.runtime.parts import open_part\n"
        "with open_part(Path(sys.argv[1])) as part:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    part.add_layer(0, {'file': 'x' * 5000})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "q")], capture_output=True, text=True
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "StoreError: cannot write" in last and "layers/000.json" in last
    assert "it needs 50" in last and "the same command" in last
    assert not list(tmp_path.iterdir())
