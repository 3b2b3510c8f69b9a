"""Hidden states of all batches on disk, one layer's at a time, when memory would not hold them.

Each tensor goes into a file of its own that has no name, and comes back as a shared map of it: the
system writes it out when memory is short, and the file is gone with the tensor. So a tensor that a
model keeps for later layers stays what it was. Files are in `$TMPDIR`, or `/tmp`; where that is
itself memory nothing is gained.
"""

import mmap
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from alphaquant.files import writing
from alphaquant.models.pages.memory import free_memory

SHARE = 8
"""Hidden states of more than one 8th of the free memory go to disk: two layers' are held at once,
and a layer's own work needs room."""


def fits(n_bytes: int) -> bool:
    """Whether hidden states of this size may stay in memory."""
    return n_bytes * SHARE <= free_memory()


class DiskStates:
    """Puts hidden states on disk.

    What is kept is read again by whoever uses it, and `drop` gives its pages back.
    """

    def __init__(self) -> None:
        self._maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers in a file.

        Args:
            tensor: any shape and dtype; one with gradients, on another device or kept already is
                given back as it is.

        Raises:
            StoreError: the disk is full.
        """
        is_plain = tensor.device.type == "cpu" and not tensor.requires_grad and tensor.numel()
        if not is_plain or tensor.data_ptr() in self._maps:
            return tensor
        place = Path(tempfile.gettempdir()) / "hidden states"
        with writing(place, tensor.nbytes), tempfile.TemporaryFile() as file:
            # Written, not mapped and copied: a full disk is an error and no signal, and these
            # pages are none of this process.
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            memory = mmap.mmap(file.fileno(), tensor.nbytes)
        kept = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
        self._maps[kept.data_ptr()] = memory
        return kept

    def keep_hidden(self, output: Any) -> Any:
        """What a layer gave, with its hidden states in a file: a tensor, or first of a tuple."""
        if isinstance(output, tuple):
            return (self.keep_hidden(output[0]), *output[1:])
        return self.keep(output) if isinstance(output, Tensor) else output

    def drop(self, tensor: Tensor) -> None:
        """Give the pages of a kept tensor back; whoever reads it again reads the file."""
        memory = self._maps.get(tensor.data_ptr())
        if memory is not None:
            memory.madvise(mmap.MADV_DONTNEED)

    def kept_outputs(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose outputs are kept."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return self.keep_hidden(forward(*args, **kwargs))

        return run
