"""What quantizing a matrix costs: additive estimates of the divergence, from one pass.

All of them for every matrix in every format.

`fisher`, the second-order term of KL(original || quantized). With labels drawn from the model
itself, and a_s the inner product of the weight error with the gradient of sequence s's
log-likelihood, 1/2 mean_s a_s^2 / T nats per token. At the original weights the first-order term
is zero. The a_s are kept, so that coupled matrices add before they are squared.

`token_fisher`, the same term without products of different tokens: a_s is a sum over the
sequence's tokens, and 1/2 mean_s sum_t a_st^2 / T does not see that errors of many tokens act
together, through attention, on one prediction. It has less noise where many tokens reach a matrix:
on the demo model one draw is within 3.9 % of eight for the median matrix of 1024 tokens or more,
`fisher` within 10.2 %; below 64 tokens both are a factor of two off. Where many tokens reach a
matrix it is measured on some of them, see `matrix_costs`.

`error`, the squared error of the block's output that the matrix alone causes, per token of the
layer: for an expert c^2 |E(x; Q) - E(x; W)|^2 over its tokens (all tokens count in the mean, so
rare experts weigh as rarely as they are used), for every other matrix the error of the decoder
layer's output. Measured on some of the tokens and scaled up, see `output_error`.

`gemq`, that error with each channel of each token multiplied by the gradient of the text's
cross-entropy at the layer's output before squaring (GEMQ, arXiv 2605.23078). It takes passes of
its own and is measured where it is asked for.

What is beside the layers, the head and the embeddings, is in `end_costs.py`.

No token is sent to an expert that the router did not choose. Derivations: docs/algorithms.md.

Letters: M matrices, U units, F formats, D draws of labels, S sequences, T tokens per sequence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphaquant.costs.cost_store import (
    Arrays,
    CostStore,
    LayerCosts,
    TableShape,
    by_format,
    costs_key,
)
from alphaquant.costs.end_costs import end_costs
from alphaquant.costs.gradients import LayerTrace, trace_layers
from alphaquant.costs.labels import SampledLabels, TextLabels
from alphaquant.costs.matrix_costs import TokenSums, token_sums, trace_matrices, weight_errors
from alphaquant.costs.partial import HeldLayer, Wanted, held_in, parts_held, want_all
from alphaquant.errors import ModelError
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import batches_of
from alphaquant.progress import Progress, Stage
from alphaquant.quant.bank import Bank
from alphaquant.spaces.units import Unit

COSTS_VERSION = 7
"""Part of the key of stored costs; another number measures them anew."""

_SHARED = ("n_tokens", "routing_weight", "active_share")
_PER_FORMAT: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("token_fisher", "error", "weight_error"), ()
)
"""Stored arrays: what formats share [m], and shapes without [m] of one number per format."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostSettings:
    """How costs are measured.

    Attributes:
        seed: of the drawn labels, and of the tokens that are drawn where not all are used.
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
            sequences of the first draw first; NaN, as in what follows, where the bank lacks a
            matrix in a format.
        token_fisher: float64 [M, F], nats per token.
        error: float64 [M, F], squared block-output error per token.
        gemq: float64 [M, F], the same weighted by squared gradients, nats^2 per token; None where
            it was not measured.
        weight_error: float64 [M, F], squared error of the weights; 0 where a format is exact.
        n_tokens: float64 [M], calibration tokens that reached the matrix.
        routing_weight: float64 [M], sum of their routing weights per token of the layer; 1 outside
            routed experts.
        active_share: float64 [M], `n_tokens` per token of the layer; 1 outside routed experts.
        seq_len: T.
        settings: how it was measured.
    """

    matrices: tuple[str, ...]
    formats: tuple[str, ...]
    products: npt.NDArray[np.float32]
    token_fisher: Floats
    error: Floats
    weight_error: Floats
    n_tokens: Floats
    routing_weight: Floats
    active_share: Floats
    seq_len: int
    settings: CostSettings
    gemq: Floats | None = None


@dataclass(frozen=True)
class UnitCosts:
    """Costs of U units in F formats.

    Attributes:
        fisher: float64 [U, F], nats per token.
        token_fisher: float64 [U, F], nats per token.
        error: float64 [U, F], squared block-output error per token.
        gemq: float64 [U, F], the same weighted by squared gradients, nats^2 per token; None where
            it was not measured.
        n_tokens: float64 [U], calibration tokens that reached the unit, mean over its matrices.
        routing_weight: float64 [U], mean over the unit's matrices.
        active_share: float64 [U], mean over the unit's matrices.
    """

    fisher: Floats
    token_fisher: Floats
    error: Floats
    n_tokens: Floats
    routing_weight: Floats
    active_share: Floats
    gemq: Floats | None = None


def unit_costs(table: CostTable, units: Sequence[Unit]) -> UnitCosts:
    """Add the costs of each unit's matrices.

    Products are added before they are squared: two matrices with products (1, -1) and (2, 4) over
    two sequences of one token cost 1/2 (3^2 + 3^2) / 2 = 4.5 together, 0.5 and 5 apart. The other
    costs are added as they are, of token counts the mean is taken: what all experts of a layer
    cost together is known, though one of them saw no token.

    Args:
        table: of all matrices.
        units: U units of those matrices.
    """
    rows = unit_rows(table.matrices, units)
    return UnitCosts(
        fisher=coupled_fisher(table.products, rows, table.seq_len),
        token_fisher=np.array([table.token_fisher[r].sum(0) for r in rows]),
        error=np.array([table.error[r].sum(0) for r in rows]),
        n_tokens=np.array([table.n_tokens[r].mean() for r in rows]),
        routing_weight=np.array([table.routing_weight[r].mean() for r in rows]),
        active_share=np.array([table.active_share[r].mean() for r in rows]),
        gemq=None if table.gemq is None else np.array([table.gemq[r].sum(0) for r in rows]),
    )


def unit_rows(matrices: Sequence[str], units: Sequence[Unit]) -> list[list[int]]:
    """Rows of each unit's matrices in a table of these matrices."""
    row = {name: i for i, name in enumerate(matrices)}
    return [[row[m.name] for m in unit.matrices] for unit in units]


def coupled_fisher(
    products: npt.NDArray[np.float32], rows: Sequence[Sequence[int]], seq_len: int
) -> Floats:
    """Fisher term of matrices that are quantized together, nats per token.

    Args:
        products: [M, F, D * S].
        rows: of the matrices of each of U units.
        seq_len: T.

    Returns:
        [U, F].
    """
    sums = (products[list(r)].astype(np.float64).sum(0) for r in rows)  # [F, D * S] each
    return np.array([0.5 * np.square(s).mean(-1) / seq_len for s in sums])


def rare_matrices(table: CostTable, least_tokens: int) -> tuple[str, ...]:
    """Names of the matrices that fewer calibration tokens reached, in inventory order."""
    return tuple(
        name
        for name, n_tokens in zip(table.matrices, table.n_tokens, strict=True)
        if n_tokens < least_tokens
    )


def measure_costs(
    model_map: ModelMap,
    bank: Bank,
    tokens: Tensor,
    formats: Sequence[str],
    settings: CostSettings,
    *,
    with_gemq: bool = False,
    wanted: Wanted = want_all,
    progress: Progress = lambda stage, done, total: None,
) -> CostTable:
    """Measure, or read back, the costs of every matrix in every format.

    Each layer in each format is written to the bank's `costs` folder when it is measured; a run
    that was killed, or asks for more formats, measures only what is missing. The model's weights
    are not touched.

    Args:
        model_map: the original model.
        bank: holds every format.
        tokens: calibration windows, int64 [S, T].
        formats: canonical names.
        settings: how.
        with_gemq: measure `gemq` too.
        wanted: which matrices in which formats count, of those that the bank holds.
        progress: called with ("costs", layers done, layers).

    Raises:
        StoreError: a file of the bank or of stored costs is damaged, or the disk is full.
        ModelError: calibration did not reach a matrix, or no format changes what it computes.
    """
    folder = bank.path / "costs"
    store, shape = cost_files(bank, tokens, formats, settings, wanted)
    labels = SampledLabels(settings.n_draws, settings.seed)
    batches = batches_of(tokens, settings.batch_size)

    def measure(trace: LayerTrace, names: Sequence[str]) -> LayerCosts:
        if trace.ends is not None:
            return end_costs(model_map, trace.ends, bank, names, wanted)
        held = held_in(bank, trace.layer.index, names, wanted)
        return layer_costs(trace, held, names, settings.seed)

    store.fill(
        shape,
        lambda: trace_layers(model_map, batches, [labels], folder=folder),
        measure,
        lambda done, total: progress(Stage.COSTS, done, total),
    )
    gemq = None
    if with_gemq:
        gemq = _measure_gemq(model_map, bank, batches, formats, wanted, progress)
    table = CostTable(
        matrices=tuple(m.name for m in bank.inventory.matrices),
        formats=tuple(formats),
        seq_len=tokens.shape[1],
        settings=settings,
        gemq=gemq,
        **store.read(shape),
    )
    check_coverage(table)
    return table


def cost_files(
    bank: Bank, tokens: Tensor, formats: Sequence[str], settings: CostSettings, wanted: Wanted
) -> tuple[CostStore, TableShape]:
    """Where costs are stored, and what must be there; arguments as of `measure_costs`."""
    store = CostStore(bank.path / "costs" / gradients_key(tokens, settings))
    trailing = {**_PER_FORMAT, "products": (settings.n_draws * len(tokens),)}
    parts = parts_held(bank, formats, wanted)
    include = bank.inventory.include  # searches of a bank may differ in it
    labels = {bank.inventory.n_parts - 1: "-".join(include)} if include else {}
    return store, TableShape(_sizes(bank), tuple(formats), _SHARED, trailing, parts, labels)


def gradients_key(tokens: Tensor, settings: CostSettings) -> str:
    """Digest that names gradients on windows [S, T], and what is measured with them."""
    return costs_key(tokens, {"settings": asdict(settings), "version": COSTS_VERSION})


def _sizes(bank: Bank) -> list[int]:
    """Matrices of each part."""
    counts = Counter(matrix.layer for matrix in bank.inventory.matrices)
    return [counts[part] for part in range(bank.inventory.n_parts)]


def _measure_gemq(
    model_map: ModelMap,
    bank: Bank,
    batches: list[Tensor],
    formats: Sequence[str],
    wanted: Wanted,
    progress: Progress,
) -> Floats:
    """The column `gemq`, stored beside the others in files of its own."""
    folder = bank.path / "costs"
    facts = {"cost": "gemq", "batch_size": len(batches[0]), "version": COSTS_VERSION}
    store = CostStore(folder / costs_key(torch.cat(batches), facts))
    parts = parts_held(bank, formats, wanted)
    shape = TableShape(_sizes(bank), tuple(formats), ("n_tokens",), {"gemq": ()}, parts)

    @torch.no_grad()
    def measure(trace: LayerTrace, names: Sequence[str]) -> LayerCosts:
        held, n_tokens, found = held_in(bank, trace.layer.index, names, wanted), [], []
        for matrix in trace_matrices(trace):
            n_tokens.append(matrix.n_tokens)
            readers = held.of(matrix.matrix)
            if readers:
                errors = weight_errors(readers, matrix.matrix, matrix.weight)
                gemq = {"gemq": matrix.output_error(errors).cpu().numpy()}
                found.append(held.spread(gemq, matrix.matrix))
            elif names:
                found.append(held.unknown({"gemq": ()}))
        shared = {"n_tokens": np.array(n_tokens, dtype=np.float64)}
        return LayerCosts(shared, by_format(found, names))

    store.fill(
        shape,
        lambda: trace_layers(model_map, batches, [], [TextLabels()], folder),
        measure,
        lambda done, total: progress(Stage.COSTS, done, total),
    )
    found: Floats = store.read(shape)["gemq"]
    return found


def check_coverage(table: CostTable) -> None:
    """Check that every matrix that tokens reached has a cost.

    A window of one token says nothing about queries and keys, so tables of those pass.

    Raises:
        ModelError: naming the first matrix whose errors changed nothing, in any format.
    """
    changed = (table.error > 0) | (np.nan_to_num(table.products) != 0).any(-1)  # [M, F]
    inexact = table.weight_error > 0
    blind = (table.n_tokens > 0) & inexact.any(-1) & ~(changed & inexact).any(-1)
    if blind.any() and table.seq_len > 1:
        names = [name for name, is_blind in zip(table.matrices, blind, strict=True) if is_blind]
        raise ModelError(
            f"{len(names)} matrices change no output in any of {', '.join(table.formats)}, e.g. "
            f"{names[0]}, though calibration tokens reached them; what they cost is unknown: "
            "calibrate on other text, or report the architecture"
        )


@torch.no_grad()
def layer_costs(
    trace: LayerTrace, held: HeldLayer, formats: Sequence[str], seed: int
) -> LayerCosts:
    """Costs of one layer.

    Args:
        trace: of the layer.
        held: what the bank holds of it.
        formats: names, perhaps none.
        seed: of the tokens that are drawn.
    """
    n_sequences = sum(len(h) for h in trace.hidden)
    n_total = n_sequences * trace.hidden[0].shape[1]
    shared, costs = [], []
    for matrix in trace_matrices(trace):
        shared.append([matrix.n_tokens, matrix.routing_weight, matrix.active_share])
        readers = held.of(matrix.matrix)
        if readers:
            errors = weight_errors(readers, matrix.matrix, matrix.weight)
            sums = token_sums(errors, matrix, n_sequences, seed)
            arrays = _arrays(errors, sums, matrix.output_error(errors), n_total)
            costs.append(held.spread(arrays, matrix.matrix))
        elif formats:
            n_totals = len(matrix.gradients)
            costs.append(held.unknown({**_PER_FORMAT, "products": (n_totals * n_sequences,)}))
    columns = np.array(shared, dtype=np.float64).T.copy()  # [3, m]
    return LayerCosts(dict(zip(_SHARED, columns, strict=True)), by_format(costs, formats))


def _arrays(errors: Tensor, sums: TokenSums, output_error: Tensor, n_total: int) -> Arrays:
    """Arrays [F, ...] of one matrix; `n_total` tokens of the layer."""
    found = {
        "products": sums.products.flatten(1).float(),  # [F, D * S]
        "token_fisher": 0.5 * sums.squares.mean(-1) / n_total,
        "error": output_error,
        "weight_error": torch.linalg.vector_norm(errors, dim=(-1, -2)).double().square(),
    }
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
