"""Whether the files of a packed checkpoint hold what was written, and numbers that can be used.

`SHA256SUMS` has a line for every other file, as `sha256sum` writes it; `sha256sum -c` checks it
too. What `save_pretrained` writes has none, and is checked for its numbers only.

Scales must be finite. Those of nvfp4 are above zero; those of integers may be negative (the
element of largest magnitude maps to the most negative code), and zero where a group of signs is
all zeros, or under a table. Inside super-blocks every multiple can be used. An E8M0 byte of 255 is
NaN (OCP MX v1.0, 5.4.1).
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaquant.errors import ModelError, StoreError
from alphaquant.files import sha256_of, whole_file, writing
from alphaquant.models.quantization_config import is_packed, read_formats
from alphaquant.runtime.checkpoint_files import is_inside, tensor_files
from alphaquant.spaces.formats import Format

CHECKSUMS = "SHA256SUMS"

_SCALES = ("scales", "global_scale", "super_scales")
_E8M0_NAN = 255.0


@dataclass(frozen=True)
class Verified:
    """What was checked of a packed checkpoint, and found right.

    Attributes:
        path: its directory.
        n_files: compared with their sha256; 0 where there is no `SHA256SUMS` of these files.
        n_bytes: in these files.
        n_scales: tensors of scales, all of usable numbers.
        n_kept: other tensors of floating-point numbers, all finite.
        seconds: wall time.
    """

    path: str
    n_files: int
    n_bytes: int
    n_scales: int
    n_kept: int
    seconds: float


@dataclass(frozen=True)
class Span:
    """The least and the largest number of a tensor that must be usable; NaN if it holds one.

    Attributes:
        name: of the tensor.
        scale_of: the format that it has scales of, None for other tensors.
        ends: [2], on the tensor's device.
    """

    name: str
    scale_of: Format | None
    ends: Tensor


def span_of(name: str, tensor: Tensor, formats: Mapping[str, Format]) -> Span | None:
    """What `bad_span` looks at; None for codes, zero points and integers.

    Args:
        name: of the tensor in the checkpoint.
        tensor: not on the meta device.
        formats: of the packed matrices.
    """
    matrix, _, part = name.rpartition(".")
    fmt = formats.get(matrix)
    is_scale = fmt is not None and fmt.is_quantized and part in _SCALES
    if fmt is not None and fmt.super_size:
        is_scale = part == "super_scales"
    if not tensor.numel() or not (is_scale or tensor.is_floating_point()):
        return None
    # One pass without a copy, and no wait for the device; small floats have no aminmax.
    wide = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
    ends = torch.stack(tuple(wide.aminmax())).to(torch.float32)
    return Span(name, fmt if is_scale else None, ends)


def bad_span(spans: Iterable[Span]) -> tuple[str, str] | None:
    """Name of the first tensor with a number that cannot be used, and what it is."""
    by_device: dict[torch.device, list[Span]] = {}
    for span in spans:
        by_device.setdefault(span.ends.device, []).append(span)
    for group in by_device.values():
        numbers = torch.stack([span.ends for span in group]).tolist()
        for span, (low, high) in zip(group, numbers, strict=True):
            reason = _reason(span.scale_of, low, high)
            if reason:
                return span.name, reason
    return None


def numbers_error(name: str, reason: str, file: str | Path) -> StoreError:
    """What is raised where a file holds numbers that cannot be used."""
    return StoreError(
        f"{file}: {name} holds {reason} numbers; the file is damaged, or was made by another "
        "program: copy it again, or quantize again"
    )


def write_checksums(directory: Path) -> None:
    """Write `SHA256SUMS` of every file in a directory.

    Raises:
        StoreError: it cannot be written.
    """
    names = sorted(p.name for p in directory.iterdir() if p.is_file() and p.name != CHECKSUMS)
    text = "".join(f"{sha256_of(directory / name)}  {name}\n" for name in names)
    with (
        writing(directory / CHECKSUMS, len(text)),
        whole_file(directory / CHECKSUMS, len(text)) as part,
    ):
        part.write_text(text)


def verify_checksums(directory: Path) -> list[Path]:
    """Compare every file of a packed checkpoint with its sha256.

    Args:
        directory: the checkpoint.

    Returns:
        The files; none where nothing is known of the checkpoint's tensor files, because it has no
        `SHA256SUMS`, or `save_pretrained` wrote others beside it.

    Raises:
        StoreError: a file is missing or was changed.
    """
    sums = _read_checksums(directory / CHECKSUMS)
    try:
        names = {file.name for file in tensor_files(directory)}
    except StoreError:
        names = set(sums)  # one of the files is to blame, and its sha256 says which
    if not sums.keys() & names:
        return []
    for name, digest in sums.items():
        file = directory / name
        if not file.is_file():
            raise StoreError(f"{file} is missing, {CHECKSUMS} names it; copy it again")
        if sha256_of(file) != digest:
            raise StoreError(
                f"{file} is not what aq-quantize wrote (its sha256 differs from {CHECKSUMS}); "
                "copy it again, or quantize again; if you changed it on purpose, remove its line "
                f"from {CHECKSUMS}"
            )
    return [directory / name for name in sums]


def verify_checkpoint(path: Path) -> Verified:
    """Check every file and every scale of a packed checkpoint.

    Raises:
        ModelError: it is no packed checkpoint.
        StoreError: a file is missing, damaged or changed, or holds numbers that cannot be used.
    """
    started = time.perf_counter()
    files = verify_checksums(path)  # before config.json is believed
    if not is_packed(path):
        raise ModelError(
            f"{path} is no packed checkpoint of aq-quantize; give the directory named by its --out"
        )
    entry = json.loads((path / "config.json").read_text())["quantization_config"]
    formats = read_formats(entry, str(path)).weights
    spans = [span for file in tensor_files(path) for span in _spans_of(file, formats)]
    n_scales = sum(span.scale_of is not None for span in spans)
    return Verified(
        str(path),
        len(files),
        sum(file.stat().st_size for file in files),
        n_scales,
        len(spans) - n_scales,
        time.perf_counter() - started,
    )


def _spans_of(file: Path, formats: Mapping[str, Format]) -> list[Span]:
    try:
        with safe_open(file, framework="pt") as opened:
            found = (span_of(n, opened.get_tensor(n), formats) for n in opened.keys())  # noqa: SIM118
            spans = [span for span in found if span is not None]
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{file} is incomplete or damaged ({error}); copy it again, or quantize again"
        ) from error
    bad = bad_span(spans)
    if bad is not None:
        raise numbers_error(*bad, file)
    return spans


def _reason(scale_of: Format | None, low: float, high: float) -> str | None:
    """What is wrong with numbers from `low` to `high`, in one word; None if nothing is."""
    if scale_of is not None and scale_of.shared.scale == "e8m0":
        return "NaN" if high == _E8M0_NAN else None
    if math.isnan(low) or math.isnan(high):
        return "NaN"
    if math.isinf(low) or math.isinf(high):
        return "infinite"
    is_positive = scale_of is not None and scale_of.shared.scale == "e4m3"
    return "negative or zero" if is_positive and low <= 0 else None


def _read_checksums(path: Path) -> dict[str, str]:
    """File name -> sha256; empty where there are none."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}); copy it again") from error
    sums = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not is_inside(name):
            raise StoreError(
                f"{path}: {line[:100]!r} is no line 'sha256  file'; copy it again, or remove it"
            )
        sums[name] = digest
    if not sums:
        raise StoreError(f"{path} is empty; copy it again, or remove it")
    return sums
