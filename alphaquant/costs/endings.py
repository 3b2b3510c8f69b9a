"""How a model's batches end in the gradient pass: at what its head is given, part by part.

Logits are the largest thing that a pass makes, and their gradients are as large again: of 8
windows of 512 tokens over 49 152 in float32 1.6 GB. So the head is run on some positions of a
window at a time (`positions_at_once`), by the model's own code with its layers skipped, so that
scales and softcaps behind the head are as they are; the gradients are taken to what the head was
given, and the model goes on with nothing.

Where the model's head is no linear, or is given something else than [B, T, H], gradients are
taken from all logits of a batch at once.

Letters: B sequences of a batch, T tokens each, H hidden size, V vocabulary, D totals that are
traced, D' others.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphaquant.costs.labels import Labels, label_gradients, n_totals
from alphaquant.costs.shelf import Shelf
from alphaquant.costs.tape import Tape
from alphaquant.errors import ModelError
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import (
    layers_skipped,
    part_of_hidden,
    positions_at_once,
    replaced_forwards,
)

_Forward = Callable[..., Any]


class Endings:
    """Ends batches one after the other, in their order, on their tapes.

    Attributes:
        outputs: what the last layer gave, by batch; set before the model goes on behind it.
    """

    def __init__(
        self,
        model_map: ModelMap,
        batches: Sequence[Tensor],
        labels: tuple[Sequence[Labels], Sequence[Labels]],
        tapes: Sequence[Tape],
        shelf: Shelf,
        n_before: int = 0,
    ) -> None:
        """Nothing has ended yet.

        Args:
            model_map: the model.
            batches: token ids, int64 [B, T] each.
            labels: those that are traced, and the others.
            tapes: of the batches.
            shelf: for gradients at what the last layer gave.
            n_before: sequences of the text before these batches.
        """
        self.outputs: list[Any] = []
        self._map, self._batches, self._tapes, self._shelf = model_map, batches, tapes, shelf
        self._labels, self._n_traced = [*labels[0], *labels[1]], n_totals(labels[0])
        self._first = list(accumulate((len(batch) for batch in batches), initial=n_before))
        self._n_ended, self._is_nested, self._is_ended = 0, False, False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """End what the model predicts meanwhile."""
        model: Any = self._map.model
        head = model.get_output_embeddings()
        embeddings = () if self._map.ends is None else self._map.ends.embeddings
        with ExitStack() as stack:
            stack.callback(model.register_forward_hook(self._end_at_logits).remove)
            if isinstance(head, nn.Linear):
                stack.enter_context(replaced_forwards([head], self._ending_at_head))
            for site in embeddings:
                stack.enter_context(replaced_forwards([site.module], self._catching_embeddings))
            yield

    def _ending_at_head(self, _: nn.Module, forward: _Forward) -> _Forward:
        def run(inputs: Tensor) -> Tensor:
            batch = self._batches[min(self._n_ended, len(self._batches) - 1)]
            if self._is_nested or inputs.shape[:-1] != batch.shape:
                found: Tensor = forward(inputs)
                return found
            if self._is_ended:
                raise ModelError(
                    "the model calls its head more than once, so gradients cannot be traced: use "
                    "--method rtn or report the architecture"
                )
            self._start(inputs, self._at_head(inputs, batch.to(inputs.device), forward))
            self._is_ended = True
            return inputs.new_empty(*inputs.shape[:-1], 0)

        return run

    def _end_at_logits(self, _: nn.Module, args: object, output: Any) -> Any:
        """The hook on the model: take from the logits what the head has not ended."""
        if self._is_nested:
            return None
        if not self._is_ended:
            batch, first = self._batches[self._n_ended], self._first[self._n_ended]
            tokens, everything = batch.to(output.logits.device), slice(0, batch.shape[1])
            found = [
                label_gradients(logits, of_one, first + i, everything, self._labels)
                for i, (logits, of_one) in enumerate(zip(output.logits, tokens, strict=True))
            ]
            self._start(output.logits, torch.stack(found, 1))
        self._is_ended, self._n_ended = False, self._n_ended + 1
        return ()

    def _start(self, made: Tensor, gradients: Tensor) -> None:
        """Gradients [D + D', ...] at what the model made go on the batch's tape."""
        parts = (gradients[: self._n_traced], gradients[self._n_traced :])
        self._tapes[self._n_ended].start(made, parts, self._shelf)

    def _at_head(self, inputs: Tensor, batch: Tensor, forward: _Forward) -> Tensor:
        """Gradients at what the head is given, [D + D', B, T, H]."""
        gradients = inputs.new_empty(n_totals(self._labels), *inputs.shape)
        head: Any = self._map.model.get_output_embeddings()  # type: ignore[operator]
        step = positions_at_once(len(head.weight))
        first, seq_len = self._first[self._n_ended], batch.shape[1]
        for i, tokens in enumerate(batch):
            for start in range(0, seq_len, step):
                positions = slice(start, min(start + step, seq_len))
                part = part_of_hidden(inputs.detach(), slice(i, i + 1), positions)
                given = part.requires_grad_(True)
                with torch.enable_grad():
                    logits = self._logits(given, i, positions, forward)
                at_logits = label_gradients(logits[0], tokens, first + i, positions, self._labels)
                for d, own in enumerate(at_logits):
                    is_last = d + 1 == len(at_logits)
                    found = torch.autograd.grad(logits, given, own[None], retain_graph=not is_last)
                    gradients[d, i, positions] = found[0][0]
        return gradients

    def _logits(self, given: Tensor, row: int, positions: slice, forward: _Forward) -> Tensor:
        """What the model predicts of what its head is given at positions of one sequence."""
        batch = self._batches[self._n_ended]

        def cut(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            is_batched = x.shape[:2] == batch.shape
            return x.detach()[row : row + 1, positions] if is_batched else x.detach()

        output = tree_map(cut, self.outputs[self._n_ended])
        model, tokens = self._map.model, batch[row : row + 1, positions].to(given.device)

        def own(_: nn.Module, __: _Forward) -> _Forward:
            return lambda inputs: forward(given)

        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._is_nested = True
        try:
            with layers_skipped(self._map, output), replaced_forwards([head], own):
                found: Tensor = model(tokens, use_cache=False).logits
        finally:
            self._is_nested = False
        return found

    def _catching_embeddings(self, _: nn.Module, forward: _Forward) -> _Forward:
        """Let what the embeddings give be a leaf of its batch's tape; batches come in order."""
        waiting = iter(self._tapes)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            if self._is_nested:
                found: Tensor = forward(*args, **kwargs)
                return found
            tape = next(waiting, None)
            if tape is None:
                raise ModelError(
                    "the model looks up its embeddings more than once, so what they cost cannot "
                    "be traced; leave embeddings out of --include"
                )
            return tape.start_with(forward(*args, **kwargs), self._shelf)

        return run
