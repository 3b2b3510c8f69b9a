"""Files that appear whole or not at all, also when several processes write the same one."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file under a name of its own and rename it when it is complete.

    A process that is killed leaves a `.part` behind that nobody reads. Two that write the same
    file at the same time write two parts; the later rename wins, and both contents are equal
    because names carry digests of what they hold.

    Args:
        path: the file; its folder is made if there is none.

    Yields:
        The path to write to, in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
