"""Modules of kernels for the device at hand: compiled on a GPU, interpreted without one."""

import importlib
import os
from types import ModuleType
from unittest import mock

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_kernels(name: str) -> ModuleType:
    """A module of `alphaquant.kernels`: `import_kernels("moe.launch_triton")`."""
    interpreted = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        module = importlib.import_module(f"alphaquant.kernels.{name}")
    assert (DEVICE == "cpu") == module.IS_INTERPRETED
    return module
