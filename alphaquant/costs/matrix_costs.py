"""Products of weight errors with gradients, from what was traced at one layer's matrices.

With p_t = g_t' D x_t, where x_t is a token's input of the matrix, D = Q - W its error in a format
and g_t the gradient of a total at its output, two sums are wanted: of p_t over each sequence, and
of p_t^2 over all tokens. For an expert's down projection g_t carries the routing weight, or the
inputs do where the model weighs those (Llama 4).

Sums over a sequence are the inner product of D with G_s = sum_{t in s} g_t x_t', which serves all
formats: (m + F s) N K multiplications for m tokens of s sequences instead of F m N K, and D x_t of
every token where that is less. Squares need every token's own product. Beyond `_SQUARED_TOKENS`
they are measured on a sample, drawn in proportion to |x_t|^2 |g_t|^2, which p_t^2 follows
(`alphaquant.costs.sampling`). Against all tokens, on the demo model (128 windows, the 175 matrices
of 1024 tokens or more, int2-g128 to int8-g128 rounded to nearest), root mean square of the
relative error and rank correlation over the matrices::

    tokens drawn           128            256            512            1024
    in proportion     0.110  0.9943  0.076  0.9970  0.048  0.9986  0.029  0.9994
    evenly spaced     0.509  0.9321  0.295  0.9667  0.249  0.9796  0.162  0.9900

512 are about as good as the labels, of which one draw is 3.9 % off, and cost 2 s of the demo's 45.

Letters: F formats, D totals with gradients, S sequences, T tokens per sequence, N rows and K
columns of a matrix; in an experts module H hidden size, I expert width, m tokens of one expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alphaquant.costs.gradients import ExpertsTrace, LayerTrace
from alphaquant.costs.output_error import (
    ExpertError,
    OutputError,
    layer_output_error,
    tokens_given,
)
from alphaquant.costs.sampling import draw_tokens, shift_of, squared_norms
from alphaquant.models.dtypes import rough_products
from alphaquant.models.routing import ExpertTokens, tokens_by_expert
from alphaquant.models.sites import ExpertsSite, LinearSite
from alphaquant.quant.bank import BankLayer
from alphaquant.spaces.units import Matrix

_SQUARED_TOKENS = 512
_CHUNK_NUMBERS = 2**22
"""Numbers of an intermediate result in memory at once, 16 MiB: from the heap of the C library,
where larger blocks come from the system page by page."""


@dataclass(frozen=True)
class MatrixTrace:
    """What one matrix saw.

    Attributes:
        matrix: the matrix.
        weight: its weight in the model, [N, K].
        inputs: x_t, [m, K].
        gradients: g_t, [D, m, N].
        sequence: int64 [m] on the CPU, the sequence of each token, ascending.
        routing_weight: sum of its tokens' routing weights per token of the layer; 1 outside
            routed experts.
        active_share: its tokens per token of the layer; 1 outside routed experts.
        output_error: what it changes, see `OutputError`.
    """

    matrix: Matrix
    weight: Tensor
    inputs: Tensor
    gradients: Tensor
    sequence: Tensor
    routing_weight: float
    active_share: float
    output_error: OutputError

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
    errors = original.new_empty(len(readers), *original.shape)
    for reader, error in zip(readers, errors, strict=True):
        quantized = reader.read(matrix).dequantize().to(weight)
        torch.sub(quantized.float(), original, out=error)
    return errors


def token_sums(errors: Tensor, trace: MatrixTrace, n_sequences: int, seed: int) -> TokenSums:
    """Sums of p_t for errors D [F, N, K].

    With one format, D = [[2, 0]], inputs (1, 5) and (3, 5) of one sequence and gradients 1 and -1:
    p = (2, -6), products -4, squares 40.

    Args:
        errors: D, float32.
        trace: of the matrix.
        n_sequences: S.
        seed: of the tokens whose squares are taken, where these are not all.
    """
    n_reached, n_formats = len(torch.unique(trace.sequence)), len(errors)
    if n_formats * trace.n_tokens <= trace.n_tokens + n_formats * n_reached:
        return sums_by_token(errors, trace, n_sequences)
    products = sums_by_sequence(errors, trace, n_sequences)
    return TokenSums(products, sampled_squares(errors, trace, seed))


def sums_by_token(errors: Tensor, trace: MatrixTrace, n_sequences: int) -> TokenSums:
    """Both sums from D x_t of every token; arguments as of `token_sums`."""
    shape = (len(errors), len(trace.gradients))
    products = torch.zeros(*shape, n_sequences, dtype=torch.float64, device=errors.device)
    squares = torch.zeros(*shape, dtype=torch.float64, device=errors.device)
    for start, p in _token_products(errors, trace.inputs, trace.gradients):
        sequence = trace.sequence[start : start + p.shape[-1]].to(p.device)
        products.index_add_(-1, sequence, p)
        squares += p.square().sum(-1)
    return TokenSums(products, squares)


def sums_by_sequence(errors: Tensor, trace: MatrixTrace, n_sequences: int) -> Tensor:
    """Sums of p_t over each sequence from G_s; arguments as of `token_sums`.

    Returns:
        float64 [F, D, S].
    """
    (n_formats, n_rows, n_cols), n_totals = errors.shape, len(trace.gradients)
    counts = torch.bincount(trace.sequence, minlength=n_sequences)
    ends = counts.cumsum(0).tolist()
    reached = counts.nonzero().flatten().tolist()
    products = torch.zeros(
        n_formats, n_totals, n_sequences, dtype=torch.float64, device=errors.device
    )
    flat = errors.flatten(1)  # [F, N * K]
    chunk = max(1, _CHUNK_NUMBERS // (max(1, n_totals) * n_rows * n_cols))
    for start in range(0, len(reached), chunk):
        sequences = reached[start : start + chunk]
        sums = errors.new_empty(n_totals, len(sequences), n_rows, n_cols)  # G_s
        with rough_products([trace.matrix]):
            for i, s in enumerate(sequences):
                tokens = slice(ends[s] - int(counts[s]), ends[s])
                x = trace.inputs[tokens].to(errors)
                for g, own in zip(trace.gradients[:, tokens], sums[:, i], strict=True):
                    torch.mm(g.to(errors).T, x, out=own)
        found = flat @ sums.flatten(2).flatten(0, 1).T  # [F, D * c]
        products[..., sequences] = found.view(n_formats, n_totals, -1).double()
    return products


def sampled_squares(errors: Tensor, trace: MatrixTrace, seed: int) -> Tensor:
    """Sum of p_t^2 over all tokens, estimated without bias from `_SQUARED_TOKENS` of them.

    Returns:
        float64 [F, D].
    """
    sizes = squared_norms(trace.inputs) * squared_norms(trace.gradients).sum(0)
    drawn = draw_tokens(sizes, _SQUARED_TOKENS, shift_of(seed, trace.matrix.name))
    rows = drawn.rows.to(trace.inputs.device)
    squares = torch.zeros(
        len(errors), len(trace.gradients), dtype=torch.float64, device=errors.device
    )
    for start, p in _token_products(errors, trace.inputs[rows], trace.gradients[:, rows]):
        squares += p.square() @ drawn.counts[start : start + p.shape[-1]].to(p)
    return squares


def _token_products(
    errors: Tensor, inputs: Tensor, gradients: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """p_t of tokens [m, K], [D, m, N], in chunks: the first token and float64 [F, D, c].

    Of tokens in bfloat16 the first product is in bfloat16 too, as the model's own are: the errors'
    rounding is 2^-9 of each at most and averages out.
    """
    n_formats, n_rows, _ = errors.shape
    flat = errors.flatten(0, 1)  # [F * N, K]
    if inputs.dtype == torch.bfloat16:
        flat = flat.to(torch.bfloat16)
    chunk = max(1, _CHUNK_NUMBERS // len(flat))
    for start in range(0, len(inputs), chunk):
        tokens = slice(start, start + chunk)
        changes = (inputs[tokens].to(flat) @ flat.T).to(errors)  # [c, F * N]
        changes = changes.view(-1, n_formats, n_rows)
        g = gradients[:, tokens].to(errors)  # [D, c, N]
        yield start, torch.einsum("cfn,dcn->fdc", changes, g).double()


def trace_matrices(trace: LayerTrace) -> Iterator[MatrixTrace]:
    """What each matrix of a layer saw, in inventory order."""
    for linear in trace.layer.linears:
        yield _trace_linear(trace, linear)
    for site in trace.layer.experts:
        seen = trace.experts[site.name]
        routed = tokens_by_expert(seen.expert_ids, seen.weights, site.n_experts)
        reached = {t.expert: t for t in routed}
        for e in range(site.n_experts):
            if e in reached:
                yield from _trace_expert(trace, site, reached[e])
            else:
                yield from _trace_unseen(site, e, seen)


def _trace_linear(trace: LayerTrace, site: LinearSite) -> MatrixTrace:
    linear = trace.linears[site.matrix.name]
    n_sequences, seq_len = linear.inputs.shape[:2]
    return MatrixTrace(
        matrix=site.matrix,
        weight=site.view(),
        inputs=linear.inputs.flatten(0, 1),
        gradients=linear.gradients.flatten(1, 2),
        sequence=torch.arange(n_sequences).repeat_interleave(seq_len),
        routing_weight=1.0,
        active_share=1.0,
        output_error=partial(layer_output_error, trace, site),
    )


def _trace_expert(
    trace: LayerTrace, site: ExpertsSite, tokens: ExpertTokens
) -> Iterator[MatrixTrace]:
    """Run one expert on its tokens, forward and backward: gate if it has one, up, down."""
    e, seen = tokens.expert, trace.experts[site.name]
    n_total, seq_len = len(seen.inputs), trace.hidden[0].shape[1]
    given = tokens_given(seen, site, tokens)
    x, weights = given.inputs, site.weights(e)  # [m, H]
    c = given.weights.to(x.dtype).unsqueeze(-1)
    rows = tokens.rows.to(seen.gradients.device)
    at_down = c * seen.gradients[:, rows].to(x.device)  # [D, m, H]
    with torch.enable_grad():
        z = site.gate_up(e, x).requires_grad_(True)  # [m, 2I]
        features = site.apply_gate(z)  # [m, I]
    at_gate_up = torch.empty(len(at_down), *z.shape, dtype=z.dtype, device=z.device)
    for own, g in zip(at_gate_up, at_down, strict=True):
        at_features = (g @ weights[-1].to(g.dtype)).to(features.dtype)
        own.copy_(torch.autograd.grad(features, z, at_features, retain_graph=True)[0])
    error = ExpertError(trace, site, tokens, squared_norms(x), squared_norms(features.detach()))
    seen_by: list[tuple[Tensor, Tensor, OutputError]] = [
        (x, at_gate_up[..., own], partial(error.inner, own)) for own in _rows(site, e)
    ]
    seen_by.append((features.detach(), at_down, error.down))
    for matrix, weight, (inputs, gradients, output_error) in zip(
        site.matrices(e), weights, seen_by, strict=True
    ):
        yield MatrixTrace(
            matrix=matrix,
            weight=weight,
            inputs=inputs,
            gradients=gradients,
            sequence=(tokens.rows // seq_len).cpu(),
            routing_weight=float(tokens.weights.double().sum()) / n_total,
            active_share=len(x) / n_total,
            output_error=output_error,
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
            sequence=torch.zeros(0, dtype=torch.int64),
            routing_weight=0.0,
            active_share=0.0,
            output_error=lambda errors: errors.new_zeros(len(errors), dtype=torch.float64),
        )
