"""`cache`: what the folder of all caches holds, whether it is whole, and what may go.

========  =====================================================  =======================
kind      what an entry is                                       its checksums
========  =====================================================  =======================
weights   a checkpoint in the form in which it is computed with  sha256 in `form.json`
teachers  the original's predictions on one text                 inside the file
banks     matrices of one model, text and quantizer, with what   sha256 beside each file
          was measured of assignments
costs     what the formats of one bank cost                      inside each file
spectra   of the weights of one model                            inside the file
outputs   output Hessians of one model on one text               inside each file
states    hidden states and gradients that workers share; gone   none
          when the search that made them has its bank and costs
recipes   matrices that a search quantized by other recipes;     none
          gone when they are measured
rotated   a checkpoint with its residual stream rotated          none
written   text that one model wrote itself                       none
gguf      a GGUF file as a checkpoint                            none
========  =====================================================  =======================

Everything is named by a digest of what it depends on, so whatever is removed is made anew by the
next command that needs it, and nothing else changes. An entry was last used when it was last
opened or written by a command of this program. What a live process may use stays: entries that
somebody writes have a claim (`alphaquant.lease`), and searches say that they use the cache as long
as they run, so that whatever was used since the first of them began is left alone.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from alphaquant.checksums import SUM, content_sum
from alphaquant.errors import ConfigError, StoreError
from alphaquant.evaluators.teacher import open_teacher
from alphaquant.files import FolderBoard, sha256_of
from alphaquant.models.pages.prepared import FORM, READ
from alphaquant.quant.bank import LOCK_FILE
from alphaquant.spaces.budget import parse_byte_budget
from alphaquant.spaces.json_files import JsonError, read_object
from alphaquant.studies.inputs import USERS

KINDS = (
    *("weights", "teachers", "banks", "costs", "spectra"),
    *("outputs", "states", "recipes", "rotated", "written", "gguf"),
)

_UNITS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_UNKNOWN = "-"


@dataclass(frozen=True)
class Entry:
    """Something in the cache that is made, used and removed as one.

    Attributes:
        kind: of `KINDS`.
        path: its folder or file.
        model: the model that it belongs to, `-` where that is not written anywhere.
        n_bytes: of its files; those of a bank without its costs.
        used: when it was last used, seconds since 1970.
    """

    kind: str
    path: Path
    model: str
    n_bytes: int
    used: float


@dataclass(frozen=True)
class Checked:
    """What was verified of an entry.

    Attributes:
        entry: the entry.
        n_files: files whose content is that of their checksum.
        damaged: what is wrong with the others.
    """

    entry: Entry
    n_files: int
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Pruned:
    """What went, or would go, and what stays because somebody uses it."""

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]


def list_cache(root: Path) -> list[Entry]:
    """Everything in a cache, by kind and then by when it was last used.

    Raises:
        StoreError: there is no such folder.
    """
    if not root.is_dir():
        raise StoreError(
            f"there is no cache in {root}; give the --cache of a search, or set $ALPHAQUANT_CACHE"
        )
    banks = {path: _facts(path / "bank.json") for path in _folders(root / "banks")}
    models = {
        str(facts["model_digest"])[:16]: str(facts["model"])
        for facts in banks.values()
        if "model_digest" in facts and "model" in facts
    }
    found = [_entry("weights", path, _model_of_weights(path, models)) for path in _weights(root)]
    for file in sorted((root / "teachers").glob("*.safetensors")):
        found.append(_entry("teachers", file, models.get(file.name.split("-")[0], _UNKNOWN)))
    for path, facts in banks.items():
        model = str(facts.get("model", _UNKNOWN))
        found.append(_entry("banks", path, model, without="costs"))
        found += [_entry("costs", folder, model) for folder in _folders(path / "costs")]
    for kind in ("spectra", "written"):
        files = sorted((root / kind).glob("*.safetensors"))
        found += [_entry(kind, file, _UNKNOWN) for file in files]
    for kind in ("outputs", "states", "recipes", "rotated"):
        folders = [folder for folder in _folders(root / kind) if folder.name != READ]
        found += [_entry(kind, folder, _UNKNOWN) for folder in folders]
    for above in _folders(root / "gguf"):
        origins = [str(_facts(f / "gguf.json").get("file", _UNKNOWN)) for f in _folders(above)]
        found.append(_entry("gguf", above, next(iter(origins), _UNKNOWN)))
    return sorted(found, key=lambda e: (KINDS.index(e.kind), e.used))


def verify_cache(entries: Sequence[Entry]) -> Iterator[Checked]:
    """Compare every file of these entries with its checksum, where it has one."""
    for entry in entries:
        n_files, damaged = 0, []
        for problem in _problems(entry):
            n_files += problem is None
            damaged += [] if problem is None else [problem]
        yield Checked(entry, n_files, tuple(damaged))


def prune_cache(
    root: Path,
    entries: Sequence[Entry],
    *,
    older_than: str | None = None,
    keep: str | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove entries, those first that were not used for longest.

    Args:
        root: the cache.
        entries: those that may go.
        older_than: only those not used for so long: `12h`, `30d`, `4w`.
        keep: only until those that are left take no more than this: `50GiB`.
        dry_run: remove nothing.

    Raises:
        ConfigError: a duration or a size that cannot be read.
        StoreError: an entry cannot be removed.
    """
    since = time.time() - (0.0 if older_than is None else age_seconds(older_than))
    most = None if keep is None else parse_byte_budget(keep, "size to keep")
    left = sum(entry.n_bytes for entry in entries)
    removed: list[Entry] = []
    used: list[Entry] = []
    for entry in sorted(entries, key=lambda e: e.used):
        if entry.used > since or (most is not None and left <= most):
            continue
        if _is_used(root, entry):
            used.append(entry)
            continue
        if not dry_run:
            _remove(entry)
        removed.append(entry)
        left -= entry.n_bytes
    return Pruned(tuple(removed), tuple(used))


def age_seconds(text: str) -> float:
    """Seconds of an age such as `12h`, `30d` or `4w`.

    Raises:
        ConfigError: it is none.
    """
    number, unit = text.strip()[:-1], text.strip()[-1:]
    try:
        return float(number) * _UNITS[unit]
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"--older-than is {text!r}; give hours, days or weeks, such as 12h, 30d or 4w"
        ) from error


def cache_text(entries: Sequence[Entry]) -> str:
    """A table of entries, and the sum of each kind."""
    rows = [("kind", "size", "last used", "model", "where")]
    rows += [
        (e.kind, size_text(e.n_bytes), _time_text(e.used), e.model, str(e.path)) for e in entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), row[1].rjust(widths[1])]
            + [row[i].ljust(widths[i]) for i in (2, 3)]
            + [row[4]]
        )
        for row in rows
    ]
    sums = []
    for kind in KINDS:
        sizes = [entry.n_bytes for entry in entries if entry.kind == kind]
        if sizes:
            sums.append(f"{kind}: {len(sizes)}, {size_text(sum(sizes))}")
    total = size_text(sum(entry.n_bytes for entry in entries))
    return "\n".join([*lines, "", *sums, f"all: {len(entries)}, {total}"])


def cache_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "kind": e.kind,
            "model": e.model,
            "bytes": e.n_bytes,
            "last_used": _time_text(e.used),
            "path": str(e.path),
        }
        for e in entries
    ]


def size_text(n_bytes: int) -> str:
    """`1.2 GiB`, `512 bytes`."""
    size, unit = float(n_bytes), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{n_bytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _time_text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _folders(path: Path) -> list[Path]:
    """Folders in a folder, but for claims and what is half-made."""
    if not path.is_dir():
        return []
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    return [f for f in found if not f.name.startswith(".") and f.suffix not in (".part", ".lock")]


def _weights(root: Path) -> list[Path]:
    return [path for path in _folders(root / "weights") if path.name != READ]


def _model_of_weights(folder: Path, models: dict[str, str]) -> str:
    digests = [str(_facts(file).get("sha256", ""))[:16] for file in folder.glob("weights-*.json")]
    return next((models[digest] for digest in digests if digest in models), _UNKNOWN)


def _facts(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, JsonError):
        return {}


def _entry(kind: str, path: Path, model: str, without: str | None = None) -> Entry:
    """An entry by its files."""
    inside = path.rglob("*") if path.is_dir() else iter(())
    skipped = None if without is None else path / without
    files = [f for f in (path, *inside) if skipped is None or skipped not in (f, *f.parents)]
    n_bytes, used = 0, 0.0
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:  # somebody else pruned it meanwhile
            continue
        n_bytes += stat.st_size if file.is_file() else 0
        used = max(used, stat.st_mtime)
    return Entry(kind, path, model, n_bytes, used)


def _problems(entry: Entry) -> Iterator[str | None]:
    """One item for each file that has a checksum: None, or what is wrong with it."""
    if entry.kind == "weights":
        digests = _facts(entry.path / FORM).get("files", {})
        for name, digest in digests.items():
            yield _compared(entry.path / name, digest)
    elif entry.kind == "banks":
        for sidecar in sorted(entry.path.glob("*/layer-*.json")):
            digest = _facts(sidecar).get("sha256")
            yield _compared(sidecar.with_suffix(".safetensors"), digest)
    elif entry.kind == "teachers":
        try:
            open_teacher(entry.path)
            yield None
        except StoreError as error:
            yield str(error)
    elif entry.kind in ("costs", "spectra", "outputs"):
        is_one = entry.path.is_file()
        for file in [entry.path] if is_one else sorted(entry.path.glob("*.safetensors")):
            yield _summed(file)


def _compared(file: Path, digest: Any) -> str | None:
    try:
        is_same = sha256_of(file) == digest
    except OSError as error:
        return f"{file}: {error.strerror or error}"
    return None if is_same else f"{file}: its sha256 differs from the one written with it"


def _summed(file: Path) -> str | None:
    """Whether a file has the checksum that it holds."""
    try:
        with safe_open(file, "np") as opened:
            stated = (opened.metadata() or {}).get(SUM)
            found = content_sum((name, opened.get_tensor(name)) for name in sorted(opened.keys()))
    except (OSError, SafetensorError) as error:
        return f"{file}: {error}"
    return None if found == stated else f"{file}: its sha256 differs from the one written with it"


def _is_used(root: Path, entry: Entry) -> bool:
    """Whether a live process writes an entry, or may have used it since it began."""
    if entry.kind in ("weights", "rotated", "states", "recipes"):
        locks = [entry.path.with_name(f"{entry.path.name}.lock")]
    else:
        holder = entry.path.parent.parent if entry.kind == "costs" else entry.path
        locks = [holder / LOCK_FILE]
    if any(claim.may_live for lock in locks for claim in FolderBoard(lock).read().values()):
        return True
    users = [c.since for c in FolderBoard(root / USERS).read().values() if c.may_live]
    return bool(users) and _entry(entry.kind, entry.path, entry.model).used >= min(users) - 1


def _remove(entry: Entry) -> None:
    """Take an entry away by its name first, so that nobody opens half of it.

    Raises:
        StoreError: it cannot be removed.
    """
    gone = entry.path.with_name(f".{entry.path.name}.pruned")
    try:
        if not entry.path.exists():
            return  # with the bank that it was of, or by somebody else
        entry.path.rename(gone)
        if gone.is_dir():
            shutil.rmtree(gone)
        else:
            gone.unlink()
    except OSError as error:
        raise StoreError(
            f"cannot remove {entry.path} ({error}); get the right to, or give another --cache"
        ) from error
