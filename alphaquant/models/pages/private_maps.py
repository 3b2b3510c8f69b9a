"""Weights in private memory maps of files: read when touched, given back when told.

A map is `MAP_PRIVATE`. Its pages are those of the file until somebody writes one: then the process
has a copy of that page, and the file stays as it is. `/proc/self/pagemap` tells copies (bit 61
clear) from pages of the file, so pages that nobody changed can be given back at any time without
anybody seeing it, and changes can be undone by giving back all.

Worked example: a layer of 6 pages, of which one matrix of 2 pages was written. `release` gives
back 4 pages, and the matrix stays as written; `restore` gives back all 6, and the next reader
finds the file's bits again.

A file that is cut short while it is mapped ends the process (SIGBUS): nothing may write into it.
"""

import mmap
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_PAGEMAP = Path("/proc/self/pagemap")
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def can_map() -> bool:
    """Whether this system gives pages back as described above: Linux does."""
    return sys.platform == "linux"


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file, contiguous.

    Attributes:
        file: the file.
        offset: of its first byte; a multiple of the element size.
        shape: its shape.
        dtype: its dtype.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class _Map:
    """A private map of a part of a file.

    Attributes:
        start: offset of its first byte in the file, a multiple of the page size.
        memory: the map.
        address: of its first byte.
    """

    start: int
    memory: mmap.mmap
    address: int

    def changed(self) -> npt.NDArray[np.bool_] | None:
        """Which of its pages were written, [pages]; None where the system does not tell."""
        entries = self._entries()
        if entries is None:
            return None
        is_copy = (entries & _PRESENT != 0) & (entries & _OF_FILE == 0)
        found: npt.NDArray[np.bool_] = is_copy | (entries & _SWAPPED != 0)
        return found

    def n_present(self) -> int:
        """Its pages in memory; 0 where the system does not tell."""
        entries = self._entries()
        return 0 if entries is None else int(np.count_nonzero(entries & _PRESENT))

    def _entries(self) -> npt.NDArray[np.uint64] | None:
        """What the kernel says about each page, uint64 [pages]."""
        n_pages = -(-len(self.memory) // PAGE)
        try:
            with _PAGEMAP.open("rb", buffering=0) as file:
                file.seek(self.address // PAGE * 8)
                found = file.read(n_pages * 8)
        except OSError:
            return None
        return np.frombuffer(found, np.uint64) if len(found) == n_pages * 8 else None


@dataclass(frozen=True)
class LayerPages:
    """The weights of one decoder layer, or of what is beside the layers, in private maps.

    Attributes:
        tensors: by name in the model; they share memory with the maps and can be written.
    """

    tensors: Mapping[str, Tensor] = field(repr=False)
    _maps: tuple[_Map, ...] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Size of the maps."""
        return sum(len(m.memory) for m in self._maps)

    def resident_bytes(self) -> int:
        """What of them is in memory now; 0 where the system does not tell."""
        return sum(m.n_present() for m in self._maps) * PAGE

    def changed_bytes(self) -> int:
        """What of them was written, in whole pages; 0 where the system does not tell."""
        found = (m.changed() for m in self._maps)
        return sum(int(c.sum()) for c in found if c is not None) * PAGE

    def release(self) -> None:
        """Give back the pages that nobody changed; all values stay as they are.

        Nobody may write weights of the layer meanwhile. Where the system does not tell which pages
        were changed nothing happens: it takes pages of files back itself when memory is short.
        """
        for one in self._maps:
            changed = one.changed()
            if changed is None:
                continue
            if not changed.any():
                one.memory.madvise(mmap.MADV_DONTNEED)
                continue
            for first, end in _runs(~changed):
                start = first * PAGE
                n_bytes = min(end * PAGE, len(one.memory)) - start
                one.memory.madvise(mmap.MADV_DONTNEED, start, n_bytes)

    def is_changed(self) -> bool:
        """Whether a weight was written since the pages were read; True where nobody can tell."""
        found = [one.changed() for one in self._maps]
        return any(changed is None or bool(changed.any()) for changed in found)

    def restore(self) -> None:
        """Give back all pages: what was written is gone, the file's weights are there again."""
        for one in self._maps:
            one.memory.madvise(mmap.MADV_DONTNEED)

    def prefetch(self) -> None:
        """Let the system read the files ahead; nothing counts as memory of this process yet."""
        for one in self._maps:
            one.memory.madvise(mmap.MADV_WILLNEED)


@dataclass(frozen=True)
class ModelPages:
    """The weights of a model in private maps.

    Attributes:
        layers: by path of the decoder layer.
        rest: everything else: embeddings, the last norm, the head.
    """

    layers: Mapping[str, LayerPages]
    rest: LayerPages

    @property
    def n_bytes(self) -> int:
        """Size of the maps."""
        return self.rest.n_bytes + sum(pages.n_bytes for pages in self.layers.values())


def map_pages(places: Mapping[str, Place]) -> LayerPages:
    """Map the tensors of one layer, with a map of its own for each file that holds some.

    The map goes from the first to the last of these tensors, so two layers in one file have two
    maps, and giving back the pages of one leaves the other alone.

    Args:
        places: by name in the model.
    """
    by_file: dict[Path, dict[str, Place]] = defaultdict(dict)
    empty = {}
    for name, place in places.items():
        if place.n_bytes:
            by_file[place.file][name] = place
        else:
            empty[name] = torch.empty(place.shape, dtype=place.dtype)
    tensors: dict[str, Tensor] = dict(empty)
    maps = []
    for file, inside in by_file.items():
        one = _map_range(file, inside)
        maps.append(one)
        for name, place in inside.items():
            n_items = place.n_bytes // place.dtype.itemsize
            flat = torch.frombuffer(
                one.memory, dtype=place.dtype, count=n_items, offset=place.offset - one.start
            )
            tensors[name] = flat.view(place.shape)
    return LayerPages(tensors, tuple(maps))


def _map_range(file: Path, places: Mapping[str, Place]) -> _Map:
    start = min(p.offset for p in places.values()) // PAGE * PAGE
    end = max(p.offset + p.n_bytes for p in places.values())
    with file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return _Map(start, memory, address)


def _runs(flags: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """First and end of each run of true flags: [1, 0, 1, 1] gives (0, 1) and (2, 4)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
