"""Costs of what is beside the decoder layers: measured for the head, Fisher terms for embeddings.

Nothing comes after the head, so its quantization changes the predictions and nothing else. The
divergence itself is measured, on at least `_LEAST_TOKENS` calibration tokens, by running what
comes after the last layer with the head in each format; softcaps and scales of logits are in it.

An error D of the embeddings changes what a token of the vocabulary is given by its own row, so
p_t = g_t' D_v with the gradient g_t where the embeddings give token t, whose number is v; what the
module does to a row is done to D_v as well. The Fisher terms are made of p_t as those of every
matrix (`fisher.py`).

Tied weights cost the sum of both. `error`, which compares matrices with each other, is the cost
itself here: there is no other matrix like these.

Letters: F formats, D draws of labels, B sequences of a batch, S of all, T tokens per sequence, H
hidden size, V words, R rows of the embeddings that the text reads.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphaquant.costs.cost_store import Arrays, LayerCosts, by_format
from alphaquant.costs.gradients import EndTrace
from alphaquant.costs.partial import Wanted, held_in, want_all
from alphaquant.costs.shelf import Shelf, Shelved
from alphaquant.models.ends import look_up
from alphaquant.models.sites import EmbeddingSite, ModelMap
from alphaquant.models.walk import end_logits, positions_at_once
from alphaquant.quant.bank import Bank, BankLayer
from alphaquant.quant.layerwise import written
from alphaquant.spaces.units import Matrix

_LEAST_TOKENS = 4096


@torch.no_grad()
def end_costs(
    model_map: ModelMap,
    trace: EndTrace,
    bank: Bank,
    formats: Sequence[str],
    wanted: Wanted = want_all,
) -> LayerCosts:
    """Costs of the head and the embeddings in some formats, perhaps none.

    Args:
        model_map: the model, with `ends`; it has its own weights afterwards.
        trace: of the calibration text.
        bank: holds what is measured.
        formats: names.
        wanted: what of the bank counts.
    """
    ends = model_map.ends
    assert ends is not None
    tables = {site.matrix.name: site for site in ends.embeddings}
    held, found, shares = held_in(bank, ends.index, formats, wanted), [], []
    for matrix in ends.matrices():
        table = tables.get(matrix.name)
        shares.append(float(table is None or table.head is not None))
        if formats:
            kl = np.zeros(len(held.of(matrix)))
            if table is None or table.head is not None:
                kl = _head_kl(model_map, trace, matrix, held.of(matrix), bank.path / "costs")
            arrays = _arrays(trace, table, kl, held.of(matrix))
            arrays["weight_error"] = _weight_errors(model_map, matrix, held.of(matrix))
            found.append(held.spread(arrays, matrix))
    n_tokens = sum(batch.numel() for batch in trace.batches)
    shared = {
        "n_tokens": np.full(len(shares), float(n_tokens)),
        "routing_weight": np.ones(len(shares)),
        "active_share": np.array(shares),
    }
    return LayerCosts(shared, by_format(found, formats))


def _arrays(
    trace: EndTrace,
    table: EmbeddingSite | None,
    kl: npt.NDArray[np.float64],
    readers: Sequence[BankLayer],
) -> Arrays:
    """Arrays [F, ...] of one matrix.

    Args:
        trace: of the calibration text.
        table: the site of embeddings; None for a head of its own.
        kl: divergence that it causes as a head, [F].
        readers: the formats it is in.
    """
    seq_len = trace.batches[0].shape[1]
    if table is None:
        n_sequences = sum(len(batch) for batch in trace.batches)
        products, token_fisher = np.zeros((len(readers), trace.n_totals * n_sequences)), kl
    else:
        products, looked_up = _row_products(trace, table, readers)
        token_fisher = looked_up + kl
    # Half the mean square per token is the sum of both.
    products = np.copysign(np.sqrt(products**2 + 2 * seq_len * kl[:, None]), products)
    return {
        "products": products.astype(np.float32),
        "token_fisher": token_fisher,
        "error": 0.5 * np.square(products).mean(-1) / seq_len,
    }


def _head_kl(
    model_map: ModelMap,
    trace: EndTrace,
    matrix: Matrix,
    readers: Sequence[BankLayer],
    folder: Path,
) -> npt.NDArray[np.float64]:
    """Mean divergence per token that the head in each format causes, nats, [F].

    The original's predictions wait on a shelf, so that a format is dequantized once.
    """
    shelf, vocabulary = Shelf(folder), model_map.view(matrix.name).shape[0]
    pieces: list[tuple[int, slice, Shelved]] = []
    for number in _sampled(trace.batches):
        batch = trace.batches[number]
        step = max(1, positions_at_once(vocabulary) // len(batch))
        for start in range(0, batch.shape[1], step):
            positions = slice(start, start + step)
            original = _log_probs(model_map, trace, number, positions)
            pieces.append((number, positions, shelf.put(original)))
    n_tokens = sum(math.prod(kept.shape[:-1]) for _, _, kept in pieces)
    totals = []
    for reader in readers:
        with written(model_map, {matrix.name: reader.read(matrix)}):
            total = 0.0
            for number, positions, kept in pieces:
                original = kept.read()
                found = _log_probs(model_map, trace, number, positions)
                total += float((original.exp() * (original - found)).sum(dtype=torch.float64))
        totals.append(max(total / n_tokens, 0.0))  # an exact format gives rounding of either sign
    return np.array(totals)


def _log_probs(model_map: ModelMap, trace: EndTrace, number: int, positions: slice) -> Tensor:
    """Predictions at some positions of a batch."""
    batch, output = trace.batches[number], trace.outputs[number]
    return torch.log_softmax(end_logits(model_map, batch, output, positions).float(), -1)


def _sampled(batches: Sequence[Tensor]) -> Sequence[int]:
    """Batches of at least `_LEAST_TOKENS` tokens, evenly spaced; all of a shorter text."""
    n_wanted = min(len(batches), -(-_LEAST_TOKENS // batches[0].numel()))
    return [index * len(batches) // n_wanted for index in range(n_wanted)]


def _row_products(
    trace: EndTrace, table: EmbeddingSite, readers: Sequence[BankLayer]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of p_t over each sequence, [F, D * S], and half the mean of p_t^2 per token, [F]."""
    weight = table.view()
    ids = torch.unique(torch.cat([batch.flatten() for batch in trace.batches]))  # [R]
    places = torch.zeros(len(weight), dtype=torch.int64)
    places[ids] = torch.arange(len(ids))
    n_tokens = sum(batch.numel() for batch in trace.batches)
    sums, squares = [], []
    for reader in readers:
        rows = reader.read(table.matrix).rows_at(ids).to(weight)
        error = rows.float() - weight[ids.to(weight.device)].float()  # [R, H]
        by_batch, square = [], 0.0
        for batch, g in zip(trace.batches, trace.at_embeddings, strict=True):
            changed = look_up(table.module, error, places[batch].to(error.device))  # [B, T, H]
            p = torch.einsum("bth,dbth->dbt", changed, g.to(changed)).double()
            by_batch.append(p.sum(-1))  # [D, B]
            square += float(p.square().sum()) / len(p)
        sums.append(torch.cat(by_batch, 1).flatten())  # all sequences of the first draw first
        squares.append(0.5 * square / n_tokens)
    return torch.stack(sums).cpu().numpy(), np.array(squares)


def _weight_errors(
    model_map: ModelMap, matrix: Matrix, readers: Sequence[BankLayer]
) -> npt.NDArray[np.float64]:
    """Squared error of the weights, [F]."""
    weight = model_map.view(matrix.name)
    found = []
    for reader in readers:
        quantized = reader.read(matrix).to(weight.device).dequantize().to(weight)
        found.append(float(torch.linalg.vector_norm(quantized.float() - weight.float())) ** 2)
    return np.array(found)
