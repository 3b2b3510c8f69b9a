"""Ways to damage a file."""

from pathlib import Path


def truncate(path: Path) -> None:
    """Cut off its end."""
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    """Write something else."""
    path.write_bytes(b"\xff" * 64)


def flip_a_bit(path: Path) -> None:
    """Of the last number: a value that is only a little wrong."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
