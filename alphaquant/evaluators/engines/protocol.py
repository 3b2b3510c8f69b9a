"""What an engine is asked for and what it answers.

Letters: T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is started with.

    Attributes:
        model: directory or file that it loads.
        dtype: of its activations: auto for its own choice.
        seq_len: tokens of the longest window.
        python: interpreter of the environment that it is installed in; None for this one.
    """

    model: Path
    dtype: str
    seq_len: int
    python: Path | None = None


class Engine(Protocol):
    """A program that has loaded a model."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and version, and how it computes, ready for JSON."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Of the next token at every position of a window, int64 [T] -> float32 [T, V].

        Raises:
            ModelError: the program failed; the message has its last words.
        """


class Opening(Protocol):
    """How an engine is started."""

    def __call__(self, request: EngineRequest) -> AbstractContextManager[Engine]:
        """An engine with its model loaded, ended when it is left.

        Raises:
            ModelError: it is not installed, or does not load the model.
        """


@dataclass(frozen=True)
class EngineEntry:
    """An engine that can be asked for.

    Attributes:
        open: starts it.
        check: refuses at once what `open` would refuse after the original was measured; takes
            `EngineRequest.model` and `EngineRequest.python`.
    """

    open: Opening
    check: Callable[[Path, Path | None], None]
