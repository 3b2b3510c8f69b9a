"""A GGUF file as a checkpoint of transformers, converted once and kept in the cache.

    CACHE/gguf/SHA256/VERSIONS/    config.json, safetensors in bfloat16, tokenizer, gguf.json
    CACHE/gguf/SHA256/VERSIONS.part/    while it is made; removed by the next who makes it

SHA256 is the file's, VERSIONS are those of what converted it: another transformers or gguf makes
another folder. `gguf.json` says what the file was, see `GgufOrigin`.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alphaquant.errors import ModelError
from alphaquant.files import locked, mark_used, sha256_of, writing
from alphaquant.models.gguf.decoded import decode, read_config, unread_settings
from alphaquant.models.gguf.header import MAGIC, GgufHeader, read_header
from alphaquant.progress import Progress, no_progress
from alphaquant.spaces.json_files import JsonError, read_object

ORIGIN_FILE = "gguf.json"
SUFFIX = ".gguf"
_CONVERSION = 1
"""Raised when this file's own work changes."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_COMMON = 0.05
"""A type that holds less of the weights does not count for how coarse a file is."""


@dataclass(frozen=True)
class GgufOrigin:
    """What a converted checkpoint was made from.

    Attributes:
        file: name of the GGUF file.
        sha256: of its content.
        types: types that are no plain floats -> share of all weights; empty for a file of floats.
        bits_per_weight: of all its tensors.
        unread: settings of model and tokenizer in its metadata that nobody read.
    """

    file: str
    sha256: str
    types: Mapping[str, float]
    bits_per_weight: float
    unread: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What a reader of results must know, one sentence each."""
        found = []
        if self.types:
            shares = ", ".join(f"{100 * s:.1f} % {name}" for name, s in self.types.items())
            found.append(
                f"{self.file} is quantized already ({shares} of its weights); the original of "
                f"every comparison is what it decodes to, so results of {self._least_bits} bits "
                "and more compare with a quantized original"
            )
        if self.unread:
            found.append(
                f"transformers does not read {len(self.unread)} settings of {self.file}, and "
                f"goes on without: {', '.join(self.unread)}"
            )
        return found

    @property
    def _least_bits(self) -> int:
        """Bits of a code in its coarsest common type: 4 of Q4_K and IQ4_XS."""
        common = {n: s for n, s in self.types.items() if s >= _COMMON} or self.types
        return min(int(re.sub(r"\D*(\d).*", r"\1", name)) for name in common)


def find_gguf(name: str | Path) -> Path | None:
    """The GGUF file that a model's name stands for: itself, or the only weights of a folder.

    Args:
        name: as asked for; anything but a file and a folder stands for none.

    Raises:
        ModelError: there is no such file, or a folder holds several and no other weights.
    """
    path = Path(name)
    if path.is_dir():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if not files or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            return None
        if len(files) > 1:
            raise ModelError(
                f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:4])}"
                f"{', ...' if len(files) > 4 else ''}) and no safetensors; name one of them"
            )
        return files[0]
    if path.suffix == SUFFIX and not path.is_file():
        raise ModelError(f"{path} is not there; give a GGUF file, a directory or a hub id")
    return path if path.is_file() and (path.suffix == SUFFIX or _has_magic(path)) else None


def converted(file: Path, cache: Path, progress: Progress = no_progress) -> Path:
    """The checkpoint of a GGUF file: found in the cache, or made there.

    Args:
        file: the GGUF file.
        cache: the folder of all caches.
        progress: called with ("convert", tensors done, tensors) while it is made.

    Raises:
        ModelError: the file is damaged, or of a model or type that is not supported.
        StoreError: another process converts the same file, or the disk is full.
    """
    header = read_header(file)
    digest = sha256_of(file)
    above = cache / "gguf" / digest
    target = above / f"transformers-{version('transformers')}-gguf-{version('gguf')}-{_CONVERSION}"
    if origin_of(target) is None:
        config = read_config(header)
        made = [folder for folder in (above, above.parent, cache) if not folder.exists()]
        try:
            with locked(above / ".lock", f"the conversion of {file}", "cache ($ALPHAQUANT_CACHE)"):
                if origin_of(target) is None:  # nobody was quicker
                    shutil.rmtree(target, ignore_errors=True)
                    _convert(header, config, digest, target, progress)
        finally:
            with suppress(OSError):  # what holds something stays
                for folder in made:
                    folder.rmdir()
    mark_used(target)
    return target


def origin_of(directory: Path | None) -> GgufOrigin | None:
    """What a checkpoint was converted from; None for any other, or where it is unknown."""
    if directory is None:
        return None
    try:
        found = read_object(directory / ORIGIN_FILE)
        return GgufOrigin(**{**found, "unread": tuple(found["unread"])})
    except (OSError, JsonError, TypeError, KeyError):
        return None


def _convert(
    header: GgufHeader, config: Any, digest: str, target: Path, progress: Progress
) -> None:
    """Write the checkpoint under another name, `gguf.json` last, then rename it."""
    typed: Any = decode(header, config, progress)
    tokenizer = _tokenizer(header)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    n_bytes = sum(p.numel() * p.element_size() for p in typed.parameters())
    origin = GgufOrigin(
        header.path.name,
        digest,
        header.quantized_shares,
        header.bits_per_weight,
        unread_settings(header),
    )
    try:
        part.mkdir(parents=True)
        with writing(part, n_bytes):
            typed.save_pretrained(part)
            tokenizer.save_pretrained(part)
            (part / ORIGIN_FILE).write_text(json.dumps(asdict(origin), indent=1) + "\n")
            os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _tokenizer(header: GgufHeader) -> Any:
    """The tokenizer that the metadata holds.

    Raises:
        ModelError: it holds none, or one that transformers does not read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    except Exception as error:  # of a missing key or a damaged value it may say anything
        said = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{header.path}: its tokenizer cannot be read ({type(error).__name__}: {said}); give "
            "the original checkpoint"
        ) from error


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
