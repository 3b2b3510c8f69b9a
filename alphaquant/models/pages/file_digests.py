"""sha256 of large files, read once as long as nobody touches them.

What was found is kept with the size, the time of the last change and the inode under which it was
found. A file with another of these is read again, and so is one that was changed less than two
seconds before it was read: a second change could bear the same time.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphaquant.files import sha256_of, whole_file

_SETTLED_NS = 2_000_000_000


def file_digests(files: Sequence[Path], memory: Path) -> dict[Path, str]:
    """sha256 of each file, in hexadecimal digits.

    Args:
        files: the files.
        memory: JSON file in which the digests are kept; one that cannot be read counts for
            nothing.
    """
    known = _read(memory)
    found: dict[Path, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        path = file.resolve()
        stamp = _stamp(path)
        row = known.get(str(path), {})
        if row.get("stamp") != stamp or not row.get("is_settled"):
            is_settled = time.time_ns() - path.stat().st_mtime_ns > _SETTLED_NS
            row = {"stamp": stamp, "is_settled": is_settled, "sha256": sha256_of(path)}
        rows[str(path)], found[file] = row, row["sha256"]
    if rows != {name: known.get(name) for name in rows}:
        with whole_file(memory) as part:
            part.write_text(json.dumps({**known, **rows}, indent=1))
    return found


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read(memory: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
