"""What quantizing a matrix costs: two additive estimates of the divergence, for every matrix in every format, from one pass.

`fisher`, the second-order term of KL(original || quantized). With labels drawn from the model itself, and a_s the inner product of
the weight error with the gradient of sequence s's log-likelihood, S = 1/2 mean_s a_s^2 / T nats per token. At the original
weights the first-order term is zero. The a_s are kept, so that coupled matrices add before they are squared.

`error`, the squared error of the block's output that the matrix alone causes, per token of the layer: for an expert
c^2 |E(x; Q) - E(x; W)|^2 over its tokens (all tokens count in the mean, so rare experts weigh as rarely as they are used), for
every other matrix the error of the decoder layer's output.

No token is sent to an expert that the router did not choose. Derivations: docs/algorithms.md.

Letters: M matrices, F formats, S sequences (times draws), T tokens per sequence, N rows, K columns of a matrix.
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
from alphaquant.quant.gradients import ExpertsTrace, LayerTrace, LinearTrace, trace_layers
from alphaquant.quant.models import ExpertsSite, LinearSite, ModelMap
from alphaquant.quant.routing import ExpertTokens, tokens_by_expert
from alphaquant.quant.walk import batches_of, run_layer
from alphaquant.spaces.units import Matrix, Unit

_ERROR_SEQUENCES = 2
_ERROR_TOKENS = 128


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
        products: float32 [M, F, S], inner products of weight error and sequence gradients.
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
    """Costs of U units in F formats: `fisher` float64 [U, F] in nats per token, `error` [U, F], `n_tokens` [U]."""

    fisher: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.float64]


def unit_costs(table: CostTable, units: Sequence[Unit]) -> UnitCosts:
    """Add the costs of each unit's matrices: products before squaring, errors as they are, the smallest token count."""
    row = {name: i for i, name in enumerate(table.matrices)}
    fisher, error, n_tokens = [], [], []
    for unit in units:
        rows = [row[m.name] for m in unit.matrices]
        products = table.products[rows].astype(np.float64).sum(0)  # [F, S]
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

    Layers are written to the bank's `costs` folder as they finish; a run that was killed measures only what is missing.

    Args:
        model_map: the original model.
        bank: holds every format.
        tokens: calibration windows, int64 [S, T].
        formats: canonical names.
        settings: how.
        progress: called with ("costs", layers done, layers).
    """
    folder = bank.path / "costs" / _costs_key(tokens, formats, settings)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"layer-{layer.index:03d}.safetensors" for layer in model_map.layers]
    n_layers = len(files)
    missing = [i for i, file in enumerate(files) if not file.exists()]
    if missing:
        batches = batches_of(tokens, settings.batch_size)
        for done, trace in enumerate(trace_layers(model_map, batches, settings.n_draws, settings.seed)):
            progress("costs", done, n_layers)
            file = files[trace.layer.index]
            if not file.exists():
                _write(file, _layer_costs(trace, bank, formats))
            if trace.layer.index == missing[0]:
                break
        progress("costs", n_layers, n_layers)
    parts = [_read(file) for file in files]
    return CostTable(
        tuple(m.name for m in bank.inventory.matrices),
        tuple(formats),
        np.concatenate([p["products"] for p in parts]),
        np.concatenate([p["error"] for p in parts]).astype(np.float64),
        np.concatenate([p["n_tokens"] for p in parts]).astype(np.float64),
        tokens.shape[1],
        settings,
    )


@torch.no_grad()
def _layer_costs(trace: LayerTrace, bank: Bank, formats: Sequence[str]) -> dict[str, npt.NDArray[np.float32]]:
    """products [m, F, S], error [m, F] and n_tokens [m] of one layer's matrices, in inventory order."""
    rows: dict[str, _Row] = {}
    readers = [bank.layer(name, trace.layer.index) for name in formats]
    for site in trace.layer.linears:
        errors = _weight_errors(readers, site.matrix, site.view())
        linear = trace.linears[site.matrix.name]
        products = _sequence_products(errors, linear)
        error = _layer_output_error(trace, site, errors)
        rows[site.matrix.name] = _Row(products, error, linear.inputs.shape[0] * linear.inputs.shape[1])
    for experts in trace.layer.experts:
        for matrix, row in _experts_rows(trace, experts, readers):
            rows[matrix.name] = row
    ordered = [rows[m.name] for m in trace.layer.matrices()]
    return {
        "products": np.stack([r.products.cpu().numpy() for r in ordered]).astype(np.float32),
        "error": np.stack([r.error.cpu().numpy() for r in ordered]).astype(np.float32),
        "n_tokens": np.array([r.n_tokens for r in ordered], dtype=np.float32),
    }


@dataclass(frozen=True)
class _Row:
    products: Tensor  # [F, S]
    error: Tensor  # [F]
    n_tokens: int


def _weight_errors(readers: Sequence[BankLayer], matrix: Matrix, weight: Tensor) -> Tensor:
    """Q - W for every format, float32 [F, N, K]."""
    original = weight.to(torch.float32)
    return torch.stack([r.read(matrix).dequantize().to(original.device) - original for r in readers])


def _sequence_products(errors: Tensor, linear: LinearTrace) -> Tensor:
    """<error, sum_t g_t x_t'> for every format and sequence, [F, D * S]."""
    flat = errors.flatten(1)  # [F, N * K]
    products = []
    for gradients in linear.gradients:  # one draw: [S, T, N]
        for g, x in zip(gradients.split(16), linear.inputs.split(16), strict=True):
            outer = torch.einsum("stn,stk->snk", g.float(), x.float())
            products.append(flat @ outer.flatten(1).T)
    return torch.cat(products, -1)


def _layer_output_error(trace: LayerTrace, site: LinearSite, errors: Tensor) -> Tensor:
    """Mean squared change of the layer's output per token when one linear is quantized, [F]."""
    hidden = torch.cat(trace.hidden)[:_ERROR_SEQUENCES]
    arguments = dict(trace.arguments)
    reference = run_layer(trace.layer, hidden, arguments).float()
    weight = site.module.weight.data
    original = weight.clone()
    found = []
    try:
        for delta in errors:
            weight.copy_(original.float() + delta)
            changed = run_layer(trace.layer, hidden, arguments).float()
            found.append((changed - reference).square().sum(-1).mean())
    finally:
        weight.copy_(original)
    return torch.stack(found)


def _experts_rows(
    trace: LayerTrace, site: ExpertsSite, readers: Sequence[BankLayer]
) -> Iterator[tuple[Matrix, _Row]]:
    """Rows of all matrices of a fused experts module; an expert without tokens costs nothing that was seen."""
    seen = trace.experts[site.name]
    n_sequences, seq_len = sum(h.shape[0] for h in trace.hidden), trace.hidden[0].shape[1]
    reached = {t.expert: t for t in tokens_by_expert(seen.expert_ids, seen.weights, site.n_experts)}
    n_products = n_sequences * len(seen.gradients)
    for e in range(site.n_experts):
        if e not in reached:
            empty = _Row(torch.zeros(len(readers), n_products), torch.zeros(len(readers)), 0)
            yield from ((matrix, empty) for matrix in (site.gate[e], site.up[e], site.down[e]))
            continue
        yield from _expert_rows(site, seen, reached[e], readers, seq_len)


def _expert_rows(
    site: ExpertsSite, seen: ExpertsTrace, tokens: ExpertTokens, readers: Sequence[BankLayer], seq_len: int
) -> Iterator[tuple[Matrix, _Row]]:
    """Gate, up and down of one expert."""
    e, rows = tokens.expert, tokens.rows
    x = seen.inputs[rows].float()
    w13, w2 = site.w13(e).float(), site.w2(e).float()
    c = tokens.weights.float().unsqueeze(-1)
    with torch.enable_grad():
        z = (x @ w13.T).requires_grad_(True)  # [m, 2I]
        features = site.apply_gate(z)  # [m, I]
        at_down = c * seen.gradients[:, rows].float()  # [D, m, H]
        at_gate_up = torch.stack([torch.autograd.grad(features, z, g @ w2, retain_graph=True)[0] for g in at_down])
    features, z = features.detach(), z.detach()
    layout = _SequenceLayout.of(rows // seq_len, seen.inputs.shape[0] // seq_len)
    half, total = site.gate[e].rows, seen.inputs.shape[0]
    for matrix, view, columns in (
        (site.gate[e], w13[:half], slice(0, half)),
        (site.up[e], w13[half:], slice(half, None)),
    ):
        errors = _weight_errors(readers, matrix, view)
        products = _sequence_products(errors, LinearTrace(layout.pad(x), layout.pad(at_gate_up[..., columns])))
        error = _gated_error(site, z, x, w2, c, columns, errors) / total
        yield matrix, _Row(products, error, rows.numel())
    errors = _weight_errors(readers, site.down[e], w2)
    products = _sequence_products(errors, LinearTrace(layout.pad(features), layout.pad(at_down)))
    gram = (c * features).T @ (c * features)
    error = ((errors @ gram) * errors).sum((-1, -2)) / total
    yield site.down[e], _Row(products, error, rows.numel())


def _gated_error(
    site: ExpertsSite, z: Tensor, x: Tensor, w2: Tensor, c: Tensor, columns: slice, errors: Tensor
) -> Tensor:
    """Squared error of the expert's weighted output, summed over its tokens (scaled up from at most `_ERROR_TOKENS`), [F]."""
    used = slice(0, _ERROR_TOKENS)
    scale = len(x) / len(x[used])
    reference = site.apply_gate(z[used])
    found = []
    for delta in errors:
        changed = z[used].clone()
        changed[:, columns] += x[used] @ delta.T
        difference = (site.apply_gate(changed) - reference) @ w2.T
        found.append((c[used] * difference).square().sum() * scale)
    return torch.stack(found)


@dataclass(frozen=True)
class _SequenceLayout:
    """Where an expert's tokens go when they are padded to one row per sequence."""

    sequence: Tensor
    position: Tensor
    n_sequences: int
    width: int

    @staticmethod
    def of(sequence: Tensor, n_sequences: int) -> "_SequenceLayout":
        """Layout of tokens, sorted by sequence, given the sequence of each [m]."""
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


def _costs_key(tokens: Tensor, formats: Sequence[str], settings: CostSettings) -> str:
    digest = hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes())
    facts = {"formats": list(formats), "settings": asdict(settings), "shape": list(tokens.shape), "version": 1}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()[:24]


def _write(file: Path, tensors: dict[str, npt.NDArray[np.float32]]) -> None:
    part = file.with_suffix(".part")
    save_file(tensors, part)
    part.replace(file)


def _read(file: Path) -> dict[str, npt.NDArray[np.float32]]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file} is damaged ({error}); delete {file.parent} and run the same command again") from error


