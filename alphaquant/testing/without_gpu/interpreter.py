"""Triton's interpreter, set up so that small kernels of many steps can be tested in seconds.

The interpreter replaces all of `triton.language` at every call of a device function and checks
every sum of integers for overflow; that is nine tenths of its time. Here it replaces each part
once, and does not check. Numbers behave as on a GPU: 0 / 0 and overflow are no warnings.
"""

import importlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np


def import_interpreted(name: str) -> ModuleType:
    """A module of kernels whose kernels are interpreted; if it was not imported before.

    Args:
        name: dotted.
    """
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        return importlib.import_module(name)


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Launches inside are interpreted with less ado."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    known: dict[tuple[str, ...], Any] = {}
    honest, builder = interpreter._patch_lang, interpreter.interpreter_builder
    language = (interpreter.tl, interpreter.tl.core)

    def patch_once(function: Any) -> "_Nothing":
        modules = filter(inspect.ismodule, function.__globals__.values())
        key = tuple(sorted(m.__name__ for m in modules if m in language))
        if key not in known:
            known[key] = honest(function)
        return _Nothing()

    options = replace(builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", patch_once),
        mock.patch.object(builder, "options", options),
        np.errstate(all="ignore"),
    ):
        try:
            yield
        finally:
            for scope in reversed(known.values()):
                scope.restore()


class _Nothing:
    """Stands for what was replaced: it is put back at the end."""

    def restore(self) -> None:
        """Nothing to do."""
