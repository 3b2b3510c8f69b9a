"""Costs of one layer's matrices from what was traced there; no model is run but for one layer.

With p_t = g_t' D x_t, where x_t is a token's input of the matrix, D = Q - W its error in a format
and g_t the gradient of a total at its output, all of the following comes from one product D x_t:
sums of p_t over a sequence (the inner product of D with the sequence's gradient) and sums of
p_t^2. For an expert's down projection g_t carries the routing weight, or the inputs do where the
model weighs those (Llama 4).

Outputs changed by a matrix alone, weighted by 1 (`error`) or by the squared gradient of the text's
cross-entropy (`gemq`), are measured on at most `_ERROR_TOKENS` tokens of an expert and on the
first `_ERROR_SEQUENCES` sequences of a linear.

Letters: F formats, D totals with gradients, S sequences, T tokens per sequence, N rows and K
columns of a matrix; in an experts module H hidden size, I expert width, m tokens of one expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from alphaquant.costs.gradients import ExpertsTrace, LayerTrace
from alphaquant.errors import ModelError
from alphaquant.models.routing import ExpertTokens, tokens_by_expert
from alphaquant.models.sites import ExpertsSite, LinearSite
from alphaquant.models.walk import hidden_of
from alphaquant.quant.bank import BankLayer
from alphaquant.spaces.units import Matrix

_ERROR_SEQUENCES = 2
_ERROR_TOKENS = 128
_CHUNK_NUMBERS = 2**24
"""Changed outputs in memory at once, 64 MiB."""

_Seen = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]
"""Inputs, gradients and output error of a matrix; see `MatrixTrace`."""


@dataclass(frozen=True)
class MatrixTrace:
    """What one matrix saw.

    Attributes:
        matrix: the matrix.
        weight: its weight in the model, [N, K].
        inputs: x_t, [m, K].
        gradients: g_t, [D, m, N].
        sequence: int64 [m], the sequence of each token.
        routing_weight: sum of its tokens' routing weights per token of the layer; 1 outside
            routed experts.
        active_share: its tokens per token of the layer; 1 outside routed experts.
        output_error: gives error and gemq, float64 [2, F], of errors D [F, N, K].
    """

    matrix: Matrix
    weight: Tensor
    inputs: Tensor
    gradients: Tensor
    sequence: Tensor
    routing_weight: float
    active_share: float
    output_error: Callable[[Tensor], Tensor]

    @property
    def n_tokens(self) -> int:
        """How many tokens reached it: m."""
        return len(self.inputs)


@dataclass(frozen=True)
class TokenSums:
    """Sums of p_t.

    Attributes:
        products: over the tokens of each sequence, float64 [F, D, S].
        squares: of p_t^2 over all tokens, float64 [F, D].
    """

    products: Tensor
    squares: Tensor


def weight_errors(readers: Sequence[BankLayer], matrix: Matrix, weight: Tensor) -> Tensor:
    """Q - W for every format, float32 [F, N, K], with Q in the dtype in which a model holds it."""
    original = weight.float()
    quantized = [r.read(matrix).dequantize().to(weight) for r in readers]
    return torch.stack([q.float() - original for q in quantized])


def token_sums(errors: Tensor, trace: MatrixTrace, n_sequences: int) -> TokenSums:
    """Sums of p_t for errors D [F, N, K]; F * m * N * K multiplications for any number of totals.

    With one format, D = [[2, 0]], inputs (1, 5) and (3, 5) of one sequence and gradients 1 and -1:
    p = (2, -6), products -4, squares 40.
    """
    n_formats, n_rows, _ = errors.shape
    shape, device = (n_formats, len(trace.gradients)), errors.device
    products = torch.zeros(*shape, n_sequences, dtype=torch.float64, device=device)
    squares = torch.zeros(*shape, dtype=torch.float64, device=device)
    flat = errors.flatten(0, 1)  # [F * N, K]
    chunk = max(1, _CHUNK_NUMBERS // len(flat))
    for start in range(0, trace.n_tokens, chunk):
        tokens = slice(start, start + chunk)
        changes = trace.inputs[tokens].float() @ flat.T  # [c, F * N]
        changes = changes.view(-1, n_formats, n_rows)
        gradients = trace.gradients[:, tokens].float()  # [D, c, N]
        p = torch.einsum("cfn,dcn->fdc", changes, gradients).double()
        products.index_add_(-1, trace.sequence[tokens], p)
        squares += p.square().sum(-1)
    return TokenSums(products, squares)


def trace_matrices(trace: LayerTrace) -> Iterator[MatrixTrace]:
    """What each matrix of a layer saw, in inventory order."""
    for linear in trace.layer.linears:
        yield _trace_linear(trace, linear)
    of_text = torch.cat(trace.at_output, 1).flatten(1, 2)  # [D', S * T, H]
    for site in trace.layer.experts:
        seen = trace.experts[site.name]
        seq_len = trace.hidden[0].shape[1]
        routed = tokens_by_expert(seen.expert_ids, seen.weights, site.n_experts)
        reached = {t.expert: t for t in routed}
        for e in range(site.n_experts):
            if e in reached:
                yield from _trace_expert(site, seen, reached[e], of_text, seq_len)
            else:
                yield from _trace_unseen(site, e, seen)


def _trace_linear(trace: LayerTrace, site: LinearSite) -> MatrixTrace:
    linear = trace.linears[site.matrix.name]
    n_sequences, seq_len = linear.inputs.shape[:2]
    sequences = torch.arange(n_sequences, device=linear.inputs.device)
    return MatrixTrace(
        matrix=site.matrix,
        weight=site.view(),
        inputs=linear.inputs.flatten(0, 1),
        gradients=linear.gradients.flatten(1, 2),
        sequence=sequences.repeat_interleave(seq_len),
        routing_weight=1.0,
        active_share=1.0,
        output_error=partial(_layer_output_error, trace, site),
    )


def _layer_output_error(trace: LayerTrace, site: LinearSite, errors: Tensor) -> Tensor:
    """Change of the layer's output when one linear is quantized, per token, [2, F]."""
    calls, n_left = [], _ERROR_SEQUENCES
    for call in trace.calls:
        if n_left:
            calls.append(call.first(n_left))
            n_left -= len(calls[-1].hidden)
    of_text = _first_sequences([g[0] for g in trace.at_output]).float()  # [S, T, H]

    def run() -> Tensor:
        return torch.cat([hidden_of(call.run(trace.layer)).float() for call in calls])

    reference = run()
    weight = site.view()
    original = weight.clone()
    found = []
    try:
        for delta in errors:
            weight.copy_(original.float() + delta)
            found.append(_squares(run() - reference, of_text))
    finally:
        weight.copy_(original)
    return torch.stack(found, -1) / reference[..., 0].numel()


def _first_sequences(batches: Sequence[Tensor]) -> Tensor:
    """The first sequences of batches [B, T, H]."""
    first = [batch[:_ERROR_SEQUENCES] for batch in batches[:_ERROR_SEQUENCES]]
    return torch.cat(first)[:_ERROR_SEQUENCES]


def _squares(change: Tensor, importance: Tensor) -> Tensor:
    """Sums of change^2 and of (importance * change)^2, float64 [2]."""
    return torch.stack([x.double().square().sum() for x in (change, importance * change)])


@dataclass(frozen=True)
class _Expert:
    """What one expert saw, float32.

    Attributes:
        site: the experts.
        expert: its index.
        n_total: tokens of the layer, S * T.
        inputs: x, [m, H].
        weights: c, by which the output of each token is multiplied, [m, 1].
        gate_up: outputs of gate and up, [m, 2I]; of up alone without gate, [m, I].
        features: inputs of the down projection, [m, I].
        of_text: gradients of the text's cross-entropy at the layer's output, [D', n, H], of the
            first n = min(m, `_ERROR_TOKENS`) tokens.
        outward: what takes the experts' outputs to the block's, see `_outward`.
    """

    site: ExpertsSite
    expert: int
    n_total: int
    inputs: Tensor
    weights: Tensor
    gate_up: Tensor
    features: Tensor
    of_text: Tensor
    outward: Tensor | None

    def seen_outside(self, down: Tensor) -> Tensor:
        """Down projections [..., I] as the block's output sees them."""
        return down if self.outward is None else self.outward @ down

    def inner_error(self, own: slice, errors: Tensor) -> Tensor:
        """Change of the expert's weighted output per token of the layer, [2, F].

        Scaled up from at most `_ERROR_TOKENS` tokens; `own` are the columns of gate or up in
        `gate_up`.
        """
        used = slice(0, _ERROR_TOKENS)
        x, z, c = self.inputs[used], self.gate_up[used], self.weights[used]
        w2 = self.seen_outside(self.site.views(self.expert).down.float())
        reference = self.site.apply_gate(z)
        found = []
        for delta in errors:
            changed = z.clone()
            changed[:, own] += x @ delta.T
            difference = c * ((self.site.apply_gate(changed) - reference) @ w2.T)
            found.append(_squares(difference, self.of_text[0]))
        return torch.stack(found, -1) * (len(self.inputs) / len(x) / self.n_total)

    def down_error(self, errors: Tensor) -> Tensor:
        """The same for the down projection, whose error is tr(D G D') with G = sum c^2 f f'."""
        errors = self.seen_outside(errors)
        weighted = self.weights * self.features  # [m, I]
        gram = weighted.T @ weighted
        error = ((errors @ gram) * errors).sum((-1, -2)).double()
        used = weighted[:_ERROR_TOKENS]
        gemq = torch.stack([_squares(used @ d.T, self.of_text[0])[1] for d in errors])
        return torch.stack([error, gemq * (len(weighted) / len(used))]) / self.n_total


def _trace_expert(
    site: ExpertsSite, seen: ExpertsTrace, tokens: ExpertTokens, of_text: Tensor, seq_len: int
) -> Iterator[MatrixTrace]:
    """Run one expert on its tokens, forward and backward: gate if it has one, up, down."""
    e, n_total = tokens.expert, len(seen.inputs)
    given = site.given(seen.inputs, tokens)
    x, c = given.inputs.float(), given.weights.float().unsqueeze(-1)  # [m, H], [m, 1]
    weights = site.weights(e)
    w2 = weights[-1].float()
    at_down = c * seen.gradients[:, tokens.rows].float()  # [D, m, H]
    with torch.enable_grad():
        z = site.gate_up(e, x).requires_grad_(True)  # [m, 2I]
        features = site.apply_gate(z)  # [m, I]
        at_gate_up = torch.stack(
            [torch.autograd.grad(features, z, g @ w2, retain_graph=True)[0] for g in at_down]
        )
    z, f = z.detach(), features.detach()
    of_text = of_text[:, tokens.rows[:_ERROR_TOKENS]].float()  # [D', n, H]
    outward = _outward(site, of_text.shape[-1])
    expert = _Expert(site, e, n_total, x, c, z, f, of_text, outward)
    seen_by: list[_Seen] = [
        (x, at_gate_up[..., own], partial(expert.inner_error, own)) for own in _rows(site, e)
    ]
    seen_by.append((f, at_down, expert.down_error))
    for matrix, weight, (inputs, gradients, error) in zip(
        site.matrices(e), weights, seen_by, strict=True
    ):
        yield MatrixTrace(
            matrix=matrix,
            weight=weight,
            inputs=inputs,
            gradients=gradients,
            sequence=tokens.rows // seq_len,
            routing_weight=float(tokens.weights.double().sum()) / n_total,
            active_share=len(x) / n_total,
            output_error=error,
        )


def _outward(site: ExpertsSite, hidden: int) -> Tensor | None:
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


def _rows(site: ExpertsSite, expert: int) -> Iterator[slice]:
    """Where the outputs of gate and up are among both."""
    start = 0
    for matrix in site.inner(expert):
        yield slice(start, start + matrix.rows)
        start += matrix.rows


def _trace_unseen(site: ExpertsSite, expert: int, seen: ExpertsTrace) -> Iterator[MatrixTrace]:
    """Matrices of an expert that no token chose: nothing was seen, so nothing costs."""
    x, n_totals = seen.inputs, len(seen.gradients)
    for matrix, weight in zip(site.matrices(expert), site.weights(expert), strict=True):
        yield MatrixTrace(
            matrix=matrix,
            weight=weight,
            inputs=x.new_zeros(0, matrix.cols),
            gradients=x.new_zeros(n_totals, 0, matrix.rows),
            sequence=torch.zeros(0, dtype=torch.int64, device=x.device),
            routing_weight=0.0,
            active_share=0.0,
            output_error=lambda errors: errors.new_zeros(2, len(errors), dtype=torch.float64),
        )
