"""Safetensors whose tensors can be mapped: where each one is, and files in which all are aligned.

A safetensors file is 8 bytes with the length of its header, the header (JSON, padded by spaces),
and the tensors one after the other (https://github.com/huggingface/safetensors). Here the header
is padded so that the first tensor starts on a page, and tensors whose size is a multiple of
`ALIGNMENT` come first; so these are aligned, and the others at least to their element size.

Worked example: two bf16 tensors, `a` of 3 numbers and `b` of 64. The header is padded to 4088
bytes, `b` starts at byte 4096 and `a` at 4224; the file has 4230 bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.pages.private_maps import PAGE, Place

ALIGNMENT = 64
"""Bytes of a cache line: products of matrices load whole ones."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_places(file: Path) -> dict[str, Place | None]:
    """Where the tensors of a safetensors file are, by name; None for dtypes that torch lacks.

    Raises:
        ModelError: it is damaged.
    """
    try:
        with safe_open(file, framework="pt"):  # its own checks: header, sizes, length of the file
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{file} is damaged or incomplete ({error}); fetch or copy it again"
        ) from error
    header.pop("__metadata__", None)
    found: dict[str, Place | None] = {}
    for name, entry in header.items():
        dtype, start = DTYPES.get(entry["dtype"]), 8 + length + entry["data_offsets"][0]
        found[name] = None if dtype is None else Place(file, start, tuple(entry["shape"]), dtype)
    return found


def write_aligned(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, see above.

    Args:
        path: the file.
        tensors: on the CPU.

    Returns:
        sha256 of the file, in hexadecimal digits.
    """
    ordered = sorted(
        tensors.items(),
        key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].itemsize, item[0]),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        dtype, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(_bytes(t) for _, t in ordered)):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
