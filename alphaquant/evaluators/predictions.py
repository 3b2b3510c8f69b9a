"""Log-probabilities of the next token, never more than a bounded amount at once.

Logits are the largest thing that a forward pass makes: 8 windows of 1024 tokens over 151 936 are
4.6 GiB. So the layers run on a whole batch, and the head on parts of it (`positions_at_once`):
some windows, or where one is larger, some of its positions. The model's own code
makes the logits of every part; its body, run once, hands it that part of its hidden states.

Letters: B windows in a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaquant.models.mapping import device_of
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import (
    layers_skipped,
    part_of_hidden,
    positions_at_once,
    replaced_forwards,
    row_chunks,
    walk,
)

Cut = tuple[slice, slice]
"""Windows of a batch and positions in them."""


@dataclass(frozen=True)
class Piece:
    """Predictions of a part of a batch.

    Attributes:
        windows: which of the batch.
        positions: which in these windows.
        log_probs: float32 [windows, positions, V], on the model's device.
    """

    windows: slice
    positions: slice
    log_probs: Tensor


@torch.no_grad()
def predict(model: nn.Module, batch: Tensor) -> Tensor:
    """Log-probabilities of the next token at every position of a batch, all at once.

    Args:
        model: a causal language model.
        batch: int64 [B, T], on any device.

    Returns:
        float32 [B, T, V], on the model's device.
    """
    logits: Tensor = model(batch.to(device_of(model)), use_cache=False).logits
    return _log_softmax(logits.float())


@torch.no_grad()
def predict_pieces(model: nn.Module, batch: Tensor) -> Iterator[Piece]:
    """The same part by part, each window's positions in order.

    Args:
        model: a causal language model. One whose body cannot be told from its head, or that has no
            configuration with its vocabulary, predicts all at once.
        batch: int64 [B, T], on any device.
    """
    body = getattr(model, "base_model", model)
    n_windows, seq_len = batch.shape
    everything = (slice(0, n_windows), slice(0, seq_len))
    cuts = [everything] if body is model else _cuts(vocabulary_of(model), n_windows, seq_len)
    outputs: list[Any] = []
    for windows, positions in cuts:
        if len(cuts) == 1:
            log_probs = predict(model, batch)
        else:
            with _body_once(body, outputs, (windows, positions)):
                log_probs = predict(model, batch)
        if log_probs.shape[:2] == batch.shape:  # also where the body's outputs have no known form
            yield Piece(everything[0], everything[1], log_probs)
            return
        yield Piece(windows, positions, log_probs)


@torch.no_grad()
def predict_walked(
    model_map: ModelMap,
    batches: Sequence[Tensor],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Iterator[Piece]]:
    """The same of many batches, with the layers walked once: weights are read once for all.

    Args:
        model_map: the model.
        batches: int64 [B, T] each.
        tell: told how many layers are done, of how many.
    """
    outputs: list[Any] = []
    n_layers = len(model_map.layers)
    for step in walk(model_map, batches):
        tell(step.layer.index, n_layers)
        step.run()
        outputs = step.outputs
    for batch, output in zip(batches, outputs, strict=True):
        with layers_skipped(model_map, output):
            yield predict_pieces(model_map.model, batch)


def most_likely(log_probs: Tensor) -> Tensor:
    """The first of the largest numbers of each row, [..., V] -> int64 [...].

    On the CPU by numpy: 3.8 ms for [2048, 4096], and 21 ms by torch, with the same result.
    """
    if log_probs.device.type != "cpu" or log_probs.dtype != torch.float32:
        return log_probs.argmax(-1)
    return torch.from_numpy(np.asarray(log_probs.numpy().argmax(-1)))


def largest(log_probs: Tensor, k: int) -> Tensor:
    """The k largest of each row, by their place in it: [n, V] -> int32 [n, k].

    On the CPU by numpy's partition: 0.17 ms for a row of 49 152 and k of 4096, 0.63 ms by torch's
    topk (one thread).
    """
    if log_probs.device.type != "cpu" or log_probs.dtype != torch.float32:
        return log_probs.topk(k, -1).indices.sort(-1).values.to(torch.int32)
    n_others = log_probs.shape[-1] - k
    found = np.argpartition(log_probs.numpy(), n_others, axis=-1)[:, n_others:].astype(np.int32)
    found.sort(axis=-1)
    return torch.from_numpy(found)


def _log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in the place of logits, [..., V], with the numbers of `log_softmax`."""
    rows = logits.view(-1, logits.shape[-1])
    for chunk in row_chunks(rows):
        rows[chunk] = torch.log_softmax(rows[chunk], -1)
    return logits


def _cuts(vocabulary: int | None, n_windows: int, seq_len: int) -> list[Cut]:
    """Parts of a batch of `positions_at_once`.

    Of 1024 positions at once: 4 windows of 256 tokens, or half of one of 2048.
    """
    all_positions = slice(0, seq_len)
    n_positions = positions_at_once(vocabulary) if vocabulary else n_windows * seq_len
    if n_positions >= seq_len:
        step = n_positions // seq_len
        starts = range(0, n_windows, step)
        return [(slice(s, min(s + step, n_windows)), all_positions) for s in starts]
    return [
        (slice(window, window + 1), slice(start, min(start + n_positions, seq_len)))
        for window in range(n_windows)
        for start in range(0, seq_len, n_positions)
    ]


def vocabulary_of(model: nn.Module) -> int | None:
    """V by the model's configuration, None where it does not say."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    found = getattr(config.get_text_config(), "vocab_size", None)
    return found if isinstance(found, int) else None


@contextmanager
def _body_once(body: nn.Module, outputs: list[Any], cut: Cut) -> Iterator[None]:
    """Let a model's body give a part of its hidden states; it runs where `outputs` is empty."""

    def once(_: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not outputs:
                outputs.append(forward(*args, **kwargs))
            whole: Any = outputs[0]
            hidden = getattr(whole, "last_hidden_state", None)
            if hidden is None or not is_dataclass(type(whole)):
                return whole
            return replace(whole, last_hidden_state=part_of_hidden(hidden, *cut))

        return run

    with replaced_forwards([body], once):
        yield
