"""Files appear whole or not at all, writers do not touch each other's parts, locks keep out."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from alphaquant.errors import StoreError
from alphaquant.files import locked, whole_file


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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_with_what_is_needed_where(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "a.safetensors"
    for n_bytes, needed in ((None, "it needs more than 4 bytes"), (99, "it needs 99 bytes")):
        with pytest.raises(StoreError) as caught, whole_file(path, n_bytes) as part:
            part.write_text("half")
            raise error
        message = str(caught.value)
        assert message.startswith(f"cannot write {path} (")
        assert f"{needed}, {1 << 39} are free in {tmp_path}; free space there" in message
        assert "\n" not in message
    assert names(tmp_path) == []


def test_other_errors_of_what_is_written_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        (tmp_path / "nothing").read_text()


HOLD = """
import sys
from pathlib import Path
from alphaquant.files import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_is_free_when_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreError) as caught, locked(path, "--out q"):
            pass
        message = str(caught.value)
        assert message.startswith(f"--out q is in use: process {holder.pid} on ")
        assert f"on {socket.gethostname()} since 20" in message
        holder.send_signal(signal.SIGKILL)
    assert path.exists()
    with locked(path, "--out q"):
        (claim,) = path.iterdir()
        assert json.loads(claim.read_text())["process"] == os.getpid()
    assert names(path.parent) == []


def test_a_lock_holds_inside_one_process_too_and_what_moved_away_stays(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    with locked(path, "a"):
        with pytest.raises(StoreError, match="a is in use"), locked(path, "a"):
            pass
        assert path.exists()
        path.parent.rename(tmp_path / "b")
        with locked(path, "a"):
            assert path.exists()
    assert names(tmp_path / "b") == ["lock"]
