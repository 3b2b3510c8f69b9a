"""A bounded store of dequantized weights, for packed models that run more than once.

A packed model dequantizes every matrix at every call. `DequantCache` keeps some of the results, at
most `max_bytes` of them, and gives back exactly what dequantizing again would give. It belongs to
one model; `alphaquant.runtime.modules.cache_dequantized` makes one.

Which ones it keeps: a decoder uses its matrices in the same order at every token, so the least
recently used one is the next that is needed, and dropping it would make a store that is smaller
than one token's matrices useless. So the least used goes, and a newcomer replaces it only if it
was used at least two times more (equals would take turns). Share of the bytes that would be found,
from the recorded uses of a packed demo (24.25 MiB in float32; a prompt of 64 tokens, then 64 new
ones one by one):

    MiB                    1      4      8     12     16     24
    least recently used    0      0      0  0.639  0.753  0.959
    least used         0.095  0.369  0.599  0.758  0.863  0.965

Counts are halved when one reaches `_MAX_USES`, so that what was popular long ago makes room.

Changes are seen by identity and by torch's version counters: tensors that were replaced, moved or
written to are dequantized again. What writes through `.data` is not counted: call `clear`.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphaquant.errors import BudgetError, ConfigError
from alphaquant.spaces.budget import parse_budget

_MAX_USES = 256


class StoredWeight(Protocol):
    """A weight in few bits: a `PackedMatrix`, or the `CompressedWeight` of another tool."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What it is made from."""

    def dequantize(self) -> Tensor:
        """The weight, float32 [rows, cols]."""


@dataclass(frozen=True)
class _Entry:
    """A kept weight and what it was made from."""

    weight: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes that the weight keeps in memory."""
        return self.weight.untyped_storage().nbytes()

    def is_of(self, packed: StoredWeight, dtype: torch.dtype) -> bool:
        """Whether the weight is what `packed` gives in a dtype now."""
        sources = tuple(packed.tensors.values())
        return (
            self.weight.dtype == dtype
            and len(sources) == len(self.sources)
            and all(now is then for now, then in zip(sources, self.sources, strict=True))
            and _versions(sources) == self.versions
        )


class DequantCache:
    """Dequantized weights by key, at most `max_bytes` of them; threads may share it.

    Copies and pickles of it are empty.

    Attributes:
        max_bytes: what the kept weights may take; the weight in use comes on top.
        n_bytes: what they take now.
        n_found: how often a weight was there.
        n_made: how often it was dequantized.
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty one."""
        self.max_bytes = max_bytes
        self.n_bytes = self.n_found = self.n_made = 0
        self._entries: dict[int, _Entry] = {}
        self._uses: dict[int, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["DequantCache"], tuple[int]]:
        return DequantCache, (self.max_bytes,)

    def weight(self, key: int, packed: StoredWeight, dtype: torch.dtype) -> Tensor:
        """`packed.dequantize()` in a dtype, kept from before or made now.

        Args:
            key: of the matrix, the same at every call; no two matrices share one.
            packed: the matrix as stored.
            dtype: of the result.

        Returns:
            [rows, cols] on the device of the packed tensors; not to be written to.
        """
        with self._lock:
            self._count_use(key)
            entry = self._entries.get(key)
            if entry is not None and entry.is_of(packed, dtype):
                self.n_found += 1
                return entry.weight
            self._drop(key)
            self.n_made += 1
        sources = tuple(packed.tensors.values())
        if any(tensor.is_inference() for tensor in sources):
            return packed.dequantize().to(dtype)  # torch does not count changes of these
        versions = _versions(sources)
        # A weight made in inference mode could not be used outside it later.
        with torch.inference_mode(False), torch.no_grad():
            made = _Entry(packed.dequantize().to(dtype), sources, versions)
        with self._lock:
            self._keep(key, made)
        return made.weight

    def drop(self, key: int) -> None:
        """Forget the weight of a key, if there is one."""
        with self._lock:
            self._drop(key)

    def clear(self) -> None:
        """Forget all weights and counts of use."""
        with self._lock:
            self._entries.clear()
            self._uses.clear()
            self.n_bytes = 0

    def _count_use(self, key: int) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        if self._uses[key] >= _MAX_USES:
            self._uses = {k: n // 2 for k, n in self._uses.items()}

    def _keep(self, key: int, made: _Entry) -> None:
        """Store a weight, in place of less used ones if room is needed, or leave it."""
        self._drop(key)  # another thread may have made it at the same time
        excess = self.n_bytes + made.n_bytes - self.max_bytes
        leaving: list[int] = []
        for other in sorted(self._entries, key=lambda k: self._uses.get(k, 0)):
            if excess <= 0 or self._uses.get(other, 0) + 1 >= self._uses.get(key, 0):
                break
            leaving.append(other)
            excess -= self._entries[other].n_bytes
        if excess > 0:
            return
        for other in leaving:
            self._drop(other)
        self._entries[key] = made
        self.n_bytes += made.n_bytes

    def _drop(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry.n_bytes


def parse_cache_size(size: str | int) -> int:
    """Bytes of a size such as `512MiB`, `2GiB`, `500MB` or an integer; 0 is no cache.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(size, int) and size >= 0:
        return size
    try:
        budget = parse_budget(str(size))
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise ConfigError(
            f"cannot read {size!r} as the size of a dequantization cache; write 512MiB, 2GiB or "
            "500MB (also K, T, bytes) or an integer of bytes; the integer 0 turns it off"
        )
    return int(budget.value)


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """How often each tensor was written to; of tensors made in inference mode, zeros."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
