"""A model that another program runs, in the form that evaluators measure.

An engine gives the logits of a window; `ServedModel` makes a module of it, so that divergence and
perplexity are computed of an engine's own numbers by the code that computes them in a search. What
looks into a model, such as routing, cannot be measured there.

Letters: T tokens of a window, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.evaluators.engines.llama_cpp import check_llama_cpp, open_llama_cpp
from alphaquant.evaluators.engines.protocol import Engine, EngineEntry, EngineRequest
from alphaquant.evaluators.engines.vllm_process import check_vllm, open_vllm

_MOST_BYTES = 1 << 28
"""Float32 logits that an engine is asked for at once."""


class ServedModel(nn.Module):
    """A causal language model whose logits come from an engine."""

    place: Tensor

    def __init__(self, engine: Engine, vocabulary: int) -> None:
        """Wrap an engine that has loaded its model.

        Args:
            engine: gives the logits.
            vocabulary: tokens that the original knows; an engine may pad them.
        """
        super().__init__()
        self._engine, self._vocabulary = engine, vocabulary
        self.register_buffer("place", torch.zeros(1))

    @property
    def facts(self) -> Mapping[str, Any]:
        """Name and version of the engine, and how it computes."""
        return self._engine.facts

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> "Answer":
        """Logits of a batch, int64 [B, T] -> float32 [B, T, V].

        Raises:
            ModelError: the engine failed, or has another vocabulary.
        """
        windows = [self._window(row) for row in input_ids.cpu().numpy()]
        return Answer(torch.from_numpy(np.stack(windows)))

    def _window(self, tokens: np.ndarray) -> np.ndarray:
        logits = self._engine.logits(tokens)
        if len(logits) != len(tokens) or logits.shape[1] < self._vocabulary:
            raise ModelError(
                f"{self._engine.facts['engine']} gave logits {list(logits.shape)} for a window of "
                f"{len(tokens)} tokens, and the original has {self._vocabulary} tokens; give the "
                "model that was made of this original"
            )
        return logits[:, : self._vocabulary]


@dataclass(frozen=True)
class Answer:
    """What a model returns.

    Attributes:
        logits: float32 [B, T, V].
    """

    logits: Tensor


ENGINES: Mapping[str, EngineEntry] = MappingProxyType(
    {
        "vllm": EngineEntry(open_vllm, check_vllm),
        "llama.cpp": EngineEntry(open_llama_cpp, check_llama_cpp),
    }
)
"""The engines beside transformers, by the name that `--engine` takes."""


@contextmanager
def serving(name: str, request: EngineRequest, vocabulary: int) -> Iterator[ServedModel]:
    """A model in an engine, ended when it is left.

    Args:
        name: key of `ENGINES`.
        request: what it loads and how.
        vocabulary: tokens that the original knows.

    Raises:
        ModelError: the engine is not installed or does not load the model.
    """
    with ENGINES[name].open(request) as engine:
        yield ServedModel(engine, vocabulary)


def windows_at_once(seq_len: int, vocabulary: int) -> int:
    """Windows whose logits are in memory at once, one at least."""
    return max(1, _MOST_BYTES // (4 * seq_len * max(1, vocabulary)))
