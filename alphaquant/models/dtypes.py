"""Names of floating-point dtypes, and what products of float32 are computed in."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from alphaquant.errors import ModelError
from alphaquant.provenance import multiplies_bfloat16
from alphaquant.spaces.units import Matrix

_ROUGH_COLUMNS = 512
"""Inputs of the widest matrix from which products in bfloat16 pay."""


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of a name such as `bfloat16`, or a dtype itself.

    Raises:
        ModelError: there is none.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return dtype


@contextmanager
def rough_products(matrices: Iterable[Matrix]) -> Iterator[None]:
    """Let a CPU with AMX multiply float32 matrices in bfloat16, with sums in float32.

    For what is counted over calibration text: hidden states, Hessians, gradients. A number's
    rounding, 2^-9 of it at most, is nothing beside what another text would give, and averages
    out; nothing is compared with the original that was computed so. One thread, 2048 tokens times
    [1536, 576]: 606 GFLOP/s, in float32 177; x' x with 1536 inputs takes 0.49 of the time.

    oneDNN's setting is the process's, so nothing else may multiply meanwhile. Small matrices,
    whose products are cheap, and other devices are left alone.

    Args:
        matrices: of what computes.
    """
    is_large = max((m.cols for m in matrices), default=0) >= _ROUGH_COLUMNS
    if not is_large or not multiplies_bfloat16():
        yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
