# mypy: ignore-errors
"""A kernel that does nothing: what a launch costs."""

import triton


@triton.jit
def empty_kernel():
    """Nothing. Grid: any."""
