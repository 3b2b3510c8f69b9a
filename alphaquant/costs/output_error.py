"""How much a matrix alone changes what its block gives, in every format at once.

For an expert the change of its weighted output, for every other matrix that of the decoder
layer's output. Both are measured on some of the tokens: at most `_EXPERT_TOKENS` of an expert,
drawn in proportion to the squares of what goes into the matrix times the routing weight
(`alphaquant.costs.sampling`), and the first window or two of a linear, `_LINEAR_TOKENS` in all
where that is a window or more. On the demo's last layer (int3-g128, experts of 1024 tokens or
more) the root mean square of the error against all tokens is 5.7 % for gate and up and 2.2 % for
down; the first 128 tokens of an expert, all of the first windows' domain, are up to a factor of
ten off. No weight is written: the layer runs once on as many copies of the windows as there are
formats, and the linear gives each copy what its format would.

Where gradients at the layer's output were traced, every channel of every token is multiplied by
its gradient before squaring (GEMQ, arXiv 2605.23078).

Letters: F formats, S sequences, T tokens per sequence, N rows and K columns of a matrix; in an
experts module H hidden size, I expert width, m tokens of one expert, n of them in use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

from alphaquant.costs.gradients import ExpertsTrace, LayerTrace
from alphaquant.costs.sampling import draw_tokens, squared_norms
from alphaquant.errors import ModelError
from alphaquant.models.routing import ExpertTokens
from alphaquant.models.sites import ExpertsSite, LinearSite, Weighted
from alphaquant.models.walk import LayerCall, hidden_of

_LINEAR_WINDOWS = 2
_LINEAR_TOKENS = 512
_EXPERT_TOKENS = 128

OutputError = Callable[[Tensor], Tensor]
"""Squared change of the output per token of the layer, float64 [F], of errors D [F, N, K]."""


def layer_output_error(trace: LayerTrace, site: LinearSite, errors: Tensor) -> Tensor:
    """Change of the layer's output when one linear is quantized, see `OutputError`.

    Args:
        trace: of the layer.
        site: the linear.
        errors: D, float32 [F, N, K].
    """
    n_left = max(1, min(_LINEAR_WINDOWS, _LINEAR_TOKENS // trace.hidden[0].shape[1]))
    squares, n_tokens = torch.zeros(len(errors), dtype=torch.float64, device=errors.device), 0
    for call, at_output in zip(trace.calls, trace.at_output, strict=True):
        if not n_left:
            break
        first = call.first(n_left)
        n_left -= len(first.hidden)
        n_tokens += first.hidden[..., 0].numel()
        given = _outputs(trace, site, first, errors)  # [1 + F, B, T, H]
        importance = at_output[:, : given.shape[1]].to(given.device)
        squares += _squares(given[1:] - given[0], importance).flatten(1).sum(-1)
    return squares / n_tokens


def _outputs(trace: LayerTrace, site: LinearSite, call: LayerCall, errors: Tensor) -> Tensor:
    """What the layer gives as it is and in every format, float32 [1 + F, B, T, H]."""
    n_copies = 1 + len(errors)
    with _per_copy(site, errors):
        hidden = hidden_of(_copied(call, n_copies).run(trace.layer)).float()
    return hidden.view(n_copies, -1, *hidden.shape[1:])


@contextmanager
def _per_copy(site: LinearSite, errors: Tensor) -> Iterator[None]:
    """Let a linear give every part but the first of 1 + F equal ones what it would in a format."""

    def hook(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        copies = args[0].reshape(1 + len(errors), -1, args[0].shape[-1])
        changed = output.reshape(*copies.shape[:-1], output.shape[-1]).clone()
        for x, y, delta in zip(copies[1:], changed[1:], errors, strict=True):
            weight = (site.view().float() + delta).to(x.dtype)
            y.copy_(linear(x, weight, module.bias))
        return changed.reshape(output.shape)

    handle = site.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _copied(call: LayerCall, n_copies: int) -> LayerCall:
    """The same call for copies of the batch, one behind the other."""
    n_batch = len(call.hidden)

    def copy(x: Any) -> Any:
        is_batched = isinstance(x, Tensor) and x.dim() > 1 and len(x) == n_batch
        return x.repeat(n_copies, *(1 for _ in x.shape[1:])) if is_batched else x

    args, kwargs = tree_map(copy, (call.args, dict(call.kwargs)))
    return LayerCall(args, kwargs)


def _squares(change: Tensor, importance: Tensor) -> Tensor:
    """Sums over the channels of the squares of changes [F, ..., H], float64 [F, ...].

    Args:
        change: of the outputs.
        importance: by which they are multiplied before, [1, ..., H]; none where it is empty.
    """
    if len(importance):
        change = change * importance.float()
    return squared_norms(change)


@dataclass(frozen=True)
class ExpertError:
    """Output errors of one expert's matrices.

    Attributes:
        trace: of the layer.
        site: the experts.
        tokens: of the expert, m.
        input_squares: |x|^2 of each, [m].
        feature_squares: of the inputs of the down projection, [m].
    """

    trace: LayerTrace
    site: ExpertsSite
    tokens: ExpertTokens
    input_squares: Tensor
    feature_squares: Tensor

    def inner(self, own: slice, errors: Tensor) -> Tensor:
        """Of gate or up, see `OutputError`.

        Args:
            own: its columns in the outputs of both.
            errors: D, float32 [F, I, H].
        """
        used = self._draw(self.input_squares)
        n_formats, n_rows, _ = errors.shape
        gate_up = self.site.gate_up(self.tokens.expert, used.inputs).float()  # [n, 2I]
        changed = gate_up.repeat(n_formats, 1, 1)  # [F, n, 2I]
        moved = (used.inputs @ errors.flatten(0, 1).to(used.inputs).T).float()  # [n, F * I]
        changed[..., own] += moved.view(-1, n_formats, n_rows).transpose(0, 1)
        features = self.site.apply_gate(changed) - self.site.apply_gate(gate_up)  # [F, n, I]
        down = self.site.views(self.tokens.expert).down.to(used.inputs)  # [H, I]
        return self._error(features.to(down) @ self._seen_outside(down).T, used)

    def down(self, errors: Tensor) -> Tensor:
        """Of the down projection, see `OutputError`; errors are float32 [F, H, I]."""
        used = self._draw(self.feature_squares)
        gate_up = self.site.gate_up(self.tokens.expert, used.inputs)
        features = self.site.apply_gate(gate_up)  # [n, I]
        return self._error(features @ self._seen_outside(errors.to(features)).mT, used)

    def _draw(self, squares: Tensor) -> "_UsedTokens":
        """Tokens in proportion to c^2 times these [m]."""
        tokens = self.tokens
        drawn = draw_tokens(squares * tokens.weights.double().square(), _EXPERT_TOKENS)
        rows = drawn.rows.to(tokens.rows.device)
        few = ExpertTokens(tokens.expert, tokens.rows[rows], tokens.weights[rows])
        given = tokens_given(self.trace.experts[self.site.name], self.site, few)
        weights = given.weights.float().unsqueeze(-1)
        importance = _importance(self.trace.at_output, few.rows).to(weights)
        inputs = given.inputs if given.inputs.dtype == torch.bfloat16 else given.inputs.float()
        return _UsedTokens(drawn.counts.to(rows.device), inputs, weights, importance)

    def _seen_outside(self, down: Tensor) -> Tensor:
        """Down projections [..., I] as the block's output sees them."""
        found = outward(self.site, self.trace.hidden[0].shape[-1])
        return down if found is None else found.to(down) @ down

    def _error(self, change: Tensor, used: "_UsedTokens") -> Tensor:
        """Of changes of the expert's outputs, [F, n, H]."""
        n_total = sum(hidden[..., 0].numel() for hidden in self.trace.hidden)
        weighted = used.weights * change.float()
        return _squares(weighted, used.importance) @ used.counts / n_total


@dataclass(frozen=True)
class _UsedTokens:
    """Tokens of an expert that stand for all.

    Attributes:
        counts: how often each counts, float64 [n].
        inputs: x, [n, H], in bfloat16 where the model computes in that, else in float32.
        weights: c, by which their outputs are multiplied, float32 [n, 1].
        importance: gradients at the layer's output, float32 [1, n, H], or empty.
    """

    counts: Tensor
    inputs: Tensor
    weights: Tensor
    importance: Tensor


def tokens_given(seen: ExpertsTrace, site: ExpertsSite, tokens: ExpertTokens) -> Weighted:
    """What an expert is given of these tokens, on the device of `tokens`."""
    rows, device = tokens.rows, tokens.rows.device
    inputs = seen.inputs[rows.to(seen.inputs.device)].to(device)  # [m, H]
    own = torch.arange(len(rows), device=device)
    return site.given(inputs, ExpertTokens(tokens.expert, own, tokens.weights))


def _importance(batches: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Of gradients [D', B, T, H] by batch those of tokens, int64 [n] ascending, [D', n, H]."""
    found, first = [], 0
    for batch in batches:
        flat = batch.flatten(1, 2)
        own = rows[(rows >= first) & (rows < first + flat.shape[1])] - first
        found.append(flat[:, own.to(flat.device)])
        first += flat.shape[1]
    return torch.cat(found, 1)


def outward(site: ExpertsSite, hidden: int) -> Tensor | None:
    """The matrix [H, inner] behind experts that work in a smaller space; None where they do not.

    Args:
        site: the experts.
        hidden: H, of the layer.

    Raises:
        ModelError: it is not found.
    """
    inner = site.down[0].rows
    if inner == hidden:
        return None
    for child in site.block.children():
        if isinstance(child, nn.Linear) and child.weight.shape == (hidden, inner):
            return child.weight.data.float()
    raise ModelError(
        f"{site.name} gives {inner} features in a layer of {hidden}, and its block "
        f"{type(site.block).__name__} has no nn.Linear from these to those, so what its matrices "
        "cost the layer is unknown; report the architecture, or quantize it without a search"
    )
