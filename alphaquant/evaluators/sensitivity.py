"""What quantizing a matrix costs: two additive estimates of the divergence, from one pass.

Both for every matrix in every format.

`fisher`, the second-order term of KL(original || quantized). With labels drawn from the model
itself, and a_s the inner product of the weight error with the gradient of sequence s's
log-likelihood, 1/2 mean_s a_s^2 / T nats per token. At the original weights the first-order term
is zero. The a_s are kept, so that coupled matrices add before they are squared.

`error`, the squared error of the block's output that the matrix alone causes, per token of the
layer: for an expert c^2 |E(x; Q) - E(x; W)|^2 over its tokens (all tokens count in the mean, so
rare experts weigh as rarely as they are used), for every other matrix the error of the decoder
layer's output. Gate and up of an expert are measured on its first `_ERROR_TOKENS` tokens and
scaled up, linears on the first `_ERROR_SEQUENCES` sequences.

No token is sent to an expert that the router did not choose. Derivations: docs/algorithms.md.

Letters: M matrices, U units, F formats, D draws of labels, S sequences, T tokens per sequence, N
rows and K columns of a matrix; in an experts module E experts, H hidden size, I expert width, m
tokens of one expert.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.quant.bank import Bank, BankLayer, Progress
from alphaquant.quant.files import whole_file
from alphaquant.quant.gradients import ExpertsTrace, LayerTrace, LinearTrace, trace_layers
from alphaquant.quant.routing import ExpertTokens, tokens_by_expert
from alphaquant.quant.sites import ExpertsSite, LinearSite, ModelMap
from alphaquant.quant.walk import batches_of, run_layer
from alphaquant.spaces.units import Matrix, Unit

COSTS_VERSION = 2
"""Part of the key of stored costs; another number measures them anew."""

_ERROR_SEQUENCES = 2
_ERROR_TOKENS = 128
_OUTER_SEQUENCES = 16
"""Sequences whose gradients [N, K] are in memory at once."""


@dataclass(frozen=True)
class CostSettings:
    """How costs are measured.

    Attributes:
        seed: of the drawn labels.
        n_draws: labels drawn per position.
        batch_size: sequences per forward and backward pass.
    """

    seed: int = 0
    n_draws: int = 1
    batch_size: int = 8


@dataclass(frozen=True)
class CostTable:
    """Costs of M matrices in F formats.

    Attributes:
        matrices: M names, in inventory order.
        formats: F canonical names.
        products: float32 [M, F, D * S], inner products of weight error and sequence gradients, all
            sequences of the first draw first.
        error: float64 [M, F], squared block-output error per token.
        n_tokens: float64 [M], calibration tokens that reached the matrix.
        seq_len: T.
        settings: how it was measured.
    """

    matrices: tuple[str, ...]
    formats: tuple[str, ...]
    products: npt.NDArray[np.float32]
    error: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.float64]
    seq_len: int
    settings: CostSettings


@dataclass(frozen=True)
class UnitCosts:
    """Costs of U units in F formats.

    Attributes:
        fisher: float64 [U, F], nats per token.
        error: float64 [U, F], squared block-output error per token.
        n_tokens: float64 [U], calibration tokens that reached the unit's least used matrix.
    """

    fisher: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.float64]


def unit_costs(table: CostTable, units: Sequence[Unit]) -> UnitCosts:
    """Add the costs of each unit's matrices.

    Products are added before they are squared: two matrices with products (1, -1) and (2, 4) over
    two sequences of one token cost 1/2 (3^2 + 3^2) / 2 = 4.5 together, 0.5 and 5 apart. Errors are
    added as they are, of token counts the smallest is taken.

    Args:
        table: of all matrices.
        units: U units of those matrices.
    """
    row = {name: i for i, name in enumerate(table.matrices)}
    fisher, error, n_tokens = [], [], []
    for unit in units:
        rows = [row[m.name] for m in unit.matrices]
        products = table.products[rows].astype(np.float64).sum(0)  # [F, D * S]
        fisher.append(0.5 * np.square(products).mean(-1) / table.seq_len)
        error.append(table.error[rows].sum(0))
        n_tokens.append(table.n_tokens[rows].min())
    return UnitCosts(np.array(fisher), np.array(error), np.array(n_tokens))


def measure_costs(
    model_map: ModelMap,
    bank: Bank,
    tokens: Tensor,
    formats: Sequence[str],
    settings: CostSettings,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> CostTable:
    """Measure, or read back, the costs of every matrix in every format.

    Layers are written to the bank's `costs` folder as they finish; a run that was killed measures
    only what is missing. The model's weights are the same afterwards as before.

    Args:
        model_map: the original model.
        bank: holds every format.
        tokens: calibration windows, int64 [S, T].
        formats: canonical names.
        settings: how.
        progress: called with ("costs", layers done, layers).

    Raises:
        StoreError: a file of the bank or of stored costs is damaged.
    """
    folder = bank.path / "costs" / _costs_key(tokens, formats, settings)
    files = [folder / f"layer-{layer.index:03d}.safetensors" for layer in model_map.layers]
    if not all(file.exists() for file in files):
        batches = batches_of(tokens, settings.batch_size)
        traces = trace_layers(model_map, batches, settings.n_draws, settings.seed)
        _measure_missing(traces, files, bank, formats, progress)
    n_products = settings.n_draws * tokens.shape[0]
    parts = []
    for layer, file in zip(model_map.layers, files, strict=True):
        parts.append(_read(file, (len(list(layer.matrices())), len(formats), n_products)))
    return CostTable(
        matrices=tuple(m.name for m in bank.inventory.matrices),
        formats=tuple(formats),
        products=np.concatenate([p["products"] for p in parts]),
        error=np.concatenate([p["error"] for p in parts]).astype(np.float64),
        n_tokens=np.concatenate([p["n_tokens"] for p in parts]).astype(np.float64),
        seq_len=tokens.shape[1],
        settings=settings,
    )


def _measure_missing(
    traces: Iterator[LayerTrace],
    files: Sequence[Path],
    bank: Bank,
    formats: Sequence[str],
    progress: Progress,
) -> None:
    """Write the files that are missing; traces come from the last layer to the first."""
    missing = {i for i, file in enumerate(files) if not file.exists()}
    for done, trace in enumerate(traces):
        progress("costs", done, len(files))
        index = trace.layer.index
        if index in missing:
            _write(files[index], _layer_costs(trace, bank, formats))
        if index == min(missing):
            break
    progress("costs", len(files), len(files))


@dataclass(frozen=True)
class _Row:
    """Costs of one matrix: products [F, D * S], error [F]."""

    products: Tensor
    error: Tensor
    n_tokens: int


@torch.no_grad()
def _layer_costs(
    trace: LayerTrace, bank: Bank, formats: Sequence[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of one layer's m matrices, in inventory order.

    products [m, F, D * S], error [m, F], n_tokens [m].
    """
    readers = [bank.layer(name, trace.layer.index) for name in formats]
    rows = {s.matrix.name: _linear_row(trace, s, readers) for s in trace.layer.linears}
    for experts in trace.layer.experts:
        for matrix, row in _experts_rows(trace, experts, readers):
            rows[matrix.name] = row
    ordered = [rows[m.name] for m in trace.layer.matrices()]
    return {
        "products": np.stack([r.products.cpu().numpy() for r in ordered]).astype(np.float32),
        "error": np.stack([r.error.cpu().numpy() for r in ordered]).astype(np.float32),
        "n_tokens": np.array([r.n_tokens for r in ordered], dtype=np.float32),
    }


def _weight_errors(readers: Sequence[BankLayer], matrix: Matrix, weight: Tensor) -> Tensor:
    """Q - W for every format, float32 [F, N, K]."""
    original = weight.to(torch.float32)
    return torch.stack(
        [r.read(matrix).dequantize().to(original.device) - original for r in readers]
    )


def _sequence_products(errors: Tensor, linear: LinearTrace) -> Tensor:
    """<error, sum_t g_t x_t'> for every format and sequence, [F, D * S]."""
    flat = errors.flatten(1)  # [F, N * K]
    inputs = batches_of(linear.inputs, _OUTER_SEQUENCES)
    products = []
    for gradients in linear.gradients:  # one draw: [S, T, N]
        for g, x in zip(batches_of(gradients, _OUTER_SEQUENCES), inputs, strict=True):
            outer = torch.einsum("stn,stk->snk", g.float(), x.float())
            products.append(flat @ outer.flatten(1).T)
    return torch.cat(products, -1)


def _linear_row(trace: LayerTrace, site: LinearSite, readers: Sequence[BankLayer]) -> _Row:
    errors = _weight_errors(readers, site.matrix, site.view())
    linear = trace.linears[site.matrix.name]
    n_sequences, seq_len = linear.inputs.shape[:2]
    products = _sequence_products(errors, linear)
    return _Row(products, _layer_output_error(trace, site, errors), n_sequences * seq_len)


def _layer_output_error(trace: LayerTrace, site: LinearSite, errors: Tensor) -> Tensor:
    """Mean squared change of the layer's output per token when one linear is quantized, [F]."""
    first = [batch[:_ERROR_SEQUENCES] for batch in trace.hidden[:_ERROR_SEQUENCES]]
    hidden = torch.cat(first)[:_ERROR_SEQUENCES]
    reference = run_layer(trace.layer, hidden, trace.arguments).float()
    weight = site.view()
    original = weight.clone()
    found = []
    try:
        for delta in errors:
            weight.copy_(original.float() + delta)
            changed = run_layer(trace.layer, hidden, trace.arguments).float()
            found.append((changed - reference).square().sum(-1).mean())
    finally:
        weight.copy_(original)
    return torch.stack(found)


def _experts_rows(
    trace: LayerTrace, site: ExpertsSite, readers: Sequence[BankLayer]
) -> Iterator[tuple[Matrix, _Row]]:
    """Rows of all matrices of a layer's routed experts.

    An expert without tokens costs nothing that was seen.
    """
    seen = trace.experts[site.name]
    seq_len = trace.hidden[0].shape[1]
    n_products = len(seen.gradients) * (len(seen.inputs) // seq_len)
    unseen = _Row(torch.zeros(len(readers), n_products), torch.zeros(len(readers)), 0)
    reached = {
        t.expert: t for t in tokens_by_expert(seen.expert_ids, seen.weights, site.n_experts)
    }
    for e in range(site.n_experts):
        if e in reached:
            traced = _trace_expert(site, seen, reached[e], seq_len)
            yield from _gate_up_rows(site, traced, readers)
            yield site.down[e], _down_row(site, traced, readers)
        else:
            yield from ((matrix, unseen) for matrix in (site.gate[e], site.up[e], site.down[e]))


@dataclass(frozen=True)
class _SequenceLayout:
    """Where an expert's tokens go when they are padded to one row per sequence.

    Attributes:
        sequence: int64 [m], sequence of each token, ascending.
        position: int64 [m], place of each token among its sequence's.
        n_sequences: S.
        width: most tokens that a sequence has.
    """

    sequence: Tensor
    position: Tensor
    n_sequences: int
    width: int

    @staticmethod
    def of(sequence: Tensor, n_sequences: int) -> "_SequenceLayout":
        """Layout of tokens sorted by sequence: of (0, 0, 2), positions (0, 1, 0), width 2."""
        counts = torch.bincount(sequence, minlength=n_sequences)
        starts = counts.cumsum(0) - counts
        position = torch.arange(len(sequence), device=sequence.device) - starts[sequence]
        return _SequenceLayout(sequence, position, n_sequences, int(counts.max()))

    def pad(self, values: Tensor) -> Tensor:
        """[..., m, C] -> [..., S, width, C], zeros where a sequence has fewer tokens."""
        shape = (*values.shape[:-2], self.n_sequences, self.width, values.shape[-1])
        padded = torch.zeros(shape, dtype=values.dtype, device=values.device)
        padded[..., self.sequence, self.position, :] = values
        return padded


@dataclass(frozen=True)
class _ExpertTrace:
    """What one expert saw, float32.

    Attributes:
        expert: its index.
        n_total: tokens of the layer, S * T.
        inputs: x, [m, H].
        weights: routing weight c of each token, [m, 1].
        gate_up: outputs of gate and up, [m, 2I].
        features: inputs of the down projection, [m, I].
        at_gate_up: gradients at `gate_up`, [D, m, 2I].
        at_down: gradients at the down projection's output, [D, m, H].
        layout: of the tokens over the sequences.
    """

    expert: int
    n_total: int
    inputs: Tensor
    weights: Tensor
    gate_up: Tensor
    features: Tensor
    at_gate_up: Tensor
    at_down: Tensor
    layout: _SequenceLayout

    def linear(self, inputs: Tensor, gradients: Tensor) -> LinearTrace:
        """Inputs [m, K] and gradients [D, m, N] of one projection, by sequence."""
        return LinearTrace(self.layout.pad(inputs), self.layout.pad(gradients))


def _trace_expert(
    site: ExpertsSite, seen: ExpertsTrace, tokens: ExpertTokens, seq_len: int
) -> _ExpertTrace:
    """Run one expert on its tokens, forward and backward."""
    x = seen.inputs[tokens.rows].float()
    c = tokens.weights.float().unsqueeze(-1)  # [m, 1]
    w2 = site.views(tokens.expert).down.float()
    at_down = c * seen.gradients[:, tokens.rows].float()  # [D, m, H]
    with torch.enable_grad():
        z = site.gate_up(tokens.expert, x).requires_grad_(True)  # [m, 2I]
        features = site.apply_gate(z)  # [m, I]
        at_gate_up = torch.stack(
            [torch.autograd.grad(features, z, g @ w2, retain_graph=True)[0] for g in at_down]
        )
    return _ExpertTrace(
        expert=tokens.expert,
        n_total=len(seen.inputs),
        inputs=x,
        weights=c,
        gate_up=z.detach(),
        features=features.detach(),
        at_gate_up=at_gate_up,
        at_down=at_down,
        layout=_SequenceLayout.of(tokens.rows // seq_len, len(seen.inputs) // seq_len),
    )


def _gate_up_rows(
    site: ExpertsSite, traced: _ExpertTrace, readers: Sequence[BankLayer]
) -> Iterator[tuple[Matrix, _Row]]:
    """Gate and up of one expert: the first and the second half of `gate_up`'s columns."""
    gate, up = site.gate[traced.expert], site.up[traced.expert]
    weights = site.views(traced.expert)
    halves = (
        (gate, weights.gate, slice(0, gate.rows)),
        (up, weights.up, slice(gate.rows, None)),
    )
    for matrix, weight, half in halves:
        errors = _weight_errors(readers, matrix, weight)
        linear = traced.linear(traced.inputs, traced.at_gate_up[..., half])
        error = _gated_error(site, traced, half, errors) / traced.n_total
        yield matrix, _Row(_sequence_products(errors, linear), error, len(traced.inputs))


def _down_row(site: ExpertsSite, traced: _ExpertTrace, readers: Sequence[BankLayer]) -> _Row:
    """Down projection of one expert; its error is tr(D G D') with G = sum_t c_t^2 f_t f_t'."""
    errors = _weight_errors(readers, site.down[traced.expert], site.views(traced.expert).down)
    linear = traced.linear(traced.features, traced.at_down)
    weighted = traced.weights * traced.features  # [m, I]
    gram = weighted.T @ weighted
    error = ((errors @ gram) * errors).sum((-1, -2)) / traced.n_total
    return _Row(_sequence_products(errors, linear), error, len(traced.inputs))


def _gated_error(site: ExpertsSite, traced: _ExpertTrace, half: slice, errors: Tensor) -> Tensor:
    """Squared error of the expert's weighted output, summed over its tokens, [F].

    Scaled up from at most `_ERROR_TOKENS` tokens.
    """
    used = slice(0, _ERROR_TOKENS)
    x, z, c = traced.inputs[used], traced.gate_up[used], traced.weights[used]
    w2 = site.views(traced.expert).down.float()
    reference = site.apply_gate(z)
    found = []
    for delta in errors:
        changed = z.clone()
        changed[:, half] += x @ delta.T
        difference = (site.apply_gate(changed) - reference) @ w2.T
        found.append((c * difference).square().sum())
    return torch.stack(found) * (len(traced.inputs) / len(x))


def _costs_key(tokens: Tensor, formats: Sequence[str], settings: CostSettings) -> str:
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes())
    facts = {
        "formats": list(formats),
        "settings": asdict(settings),
        "shape": list(tokens.shape),
        "version": COSTS_VERSION,
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _write(file: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    with whole_file(file) as part:
        save_file(tensors, part)


def _read(file: Path, shape: tuple[int, int, int]) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors of one layer, whose products have this shape.

    Raises:
        StoreError: the file is damaged.
    """
    expected = {"products": shape, "error": shape[:2], "n_tokens": shape[:1]}
    try:
        tensors = load_file(file)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != expected:
            raise ValueError(f"it holds {shapes}, not {expected}")
    except (OSError, SafetensorError, ValueError) as error:
        raise StoreError(
            f"{file} is damaged ({error}); delete {file.parent} and run the same command again"
        ) from error
    return tensors
