"""How much memory this process may use: of the machine, or of its control group if that is less.

Linux tells both; elsewhere the machine's memory is known and half of it counts as free.
"""

import ctypes
import os
import sys
from pathlib import Path

GIB = 2**30

_MEMINFO = Path("/proc/meminfo")
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and use of control groups, version 2 and 1."""


def total_memory() -> int:
    """Bytes of memory that this process could have at most."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Bytes that this process can take now, caches of files counted as free."""
    free = [max(0, limit - used) for limit, used in _limits()]
    return min([_machine_free(), *free])


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Tensors of up to 32 MiB come from its heap, which keeps what was freed: after the copy of a
    7B model of 16 MiB experts 1.3 GiB, after their Hessians 2 GiB more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _machine_free() -> int:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return total_memory() // 2
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    # Such as "MemAvailable:   20445444 kB".
    return int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024


def _limits() -> list[tuple[int, int]]:
    """Limit and use in bytes of the control groups that limit anything."""
    found = []
    for limit, used in _GROUPS:
        try:
            found.append((int(limit.read_text()), int(used.read_text())))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return found
