"""Tensors that wait in a file until they are needed again.

Hidden states of all layers and traces of a layer are larger than the layer itself; here they take
disk and page cache, which the system gives back when it needs the memory. The file has no name:
the disk is freed when the last tensor on it is dropped, and when the process ends, however it
ends. Nothing is compressed or converted: what a model computes in bfloat16 waits in bfloat16.
"""

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alphaquant.files import writing


class Shelf:
    """A file for tensors.

    Args:
        folder: where the file is; None for the system's folder of temporary files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._size = 0
        weakref.finalize(self, self._file.close)

    @property
    def number(self) -> int:
        """The file's descriptor."""
        return self._file.fileno()

    def reserve(self, shape: Sequence[int], like: Tensor) -> "Shelved":
        """Room for a tensor of zeros.

        Args:
            shape: its shape.
            like: has its dtype, and the device that it comes back to.

        Raises:
            StoreError: the disk is full; a file without room would end the process later.
        """
        n_bytes = math.prod(shape) * like.element_size()
        place, step = self._size, mmap.ALLOCATIONGRANULARITY
        if n_bytes:
            with writing(self._folder / "temporary file", n_bytes):
                os.posix_fallocate(self.number, place, n_bytes)
            self._size += -(-n_bytes // step) * step
        return Shelved(self, place, tuple(shape), like.dtype, like.device)

    def put(self, tensor: Tensor) -> "Shelved":
        """Write a tensor."""
        kept = self.reserve(tensor.shape, tensor)
        kept.write(0, tensor)
        return kept


@dataclass(frozen=True, eq=False)
class Shelved:
    """A tensor on a shelf.

    Attributes:
        shelf: the file.
        place: where it begins there, bytes.
        shape: its shape.
        dtype: its dtype.
        device: of the tensor that was put there.
    """

    shelf: Shelf
    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def write(self, first: int, tensor: Tensor) -> None:
        """Write numbers from number `first` on, in the order of the tensor's elements.

        By the file, not by its memory: 0.054 s for 100 MiB instead of 0.113, because no page of a
        mapping is touched for the first time.

        Raises:
            OSError: the disk failed; room for the tensor is there.
        """
        plain = tensor.detach().to("cpu", self.dtype).contiguous().flatten()
        content = plain.view(torch.uint8).numpy().data
        place = self.place + first * self.dtype.itemsize
        while content:
            n_written = os.pwrite(self.shelf.number, content, place)
            content, place = content[n_written:], place + n_written

    def open(self) -> Tensor:
        """The file's memory, on the CPU; writing it writes the file."""
        return self._mapped(mmap.ACCESS_WRITE)

    def read(self) -> Tensor:
        """The tensor; on the CPU it is memory-mapped, and writing it does not change the file."""
        return self._mapped(mmap.ACCESS_COPY).to(self.device)

    def _mapped(self, access: int) -> Tensor:
        n_numbers = math.prod(self.shape)
        if not n_numbers:
            return torch.empty(self.shape, dtype=self.dtype)
        n_bytes = n_numbers * self.dtype.itemsize
        content = mmap.mmap(self.shelf.number, n_bytes, access=access, offset=self.place)
        return torch.frombuffer(content, dtype=self.dtype).view(self.shape)
