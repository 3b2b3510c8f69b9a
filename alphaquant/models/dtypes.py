"""Names of floating-point dtypes."""

import torch

from alphaquant.errors import ModelError


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of a name such as `bfloat16`, or a dtype itself.

    Raises:
        ModelError: there is none.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return dtype
