"""Costs of lm_head and embeddings against the divergence that they cause."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alphaquant.costs.fisher import CostSettings, CostTable, measure_costs
from alphaquant.costs.gradients import trace_layers
from alphaquant.costs.labels import SampledLabels
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import Bank, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.layerwise import written
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.cost_cases import totals_of
from alphaquant.testing.models import tiny_model, tiny_tokens

TOKENS = tiny_tokens(16, 12)
FORMATS = ("int4-g32", "int8-g32", "bf16")
SETTINGS = CostSettings(n_draws=8, batch_size=8)


def measured(family: str, path: Path) -> tuple[ModelMap, Bank, CostTable]:
    found = map_model(tiny_model(family), include=("head", "embeddings"))
    bank = open_bank(path, "key", found.inventory, {})
    fill_bank(bank, found, TOKENS, BankRequest(FORMATS, QuantSettings(method="rtn")))
    return found, bank, measure_costs(found, bank, TOKENS, FORMATS, SETTINGS)


def true_kl(found: ModelMap, bank: Bank, name: str, format_name: str) -> float:
    matrix = found.inventory.by_name[name]
    with torch.no_grad():
        original = torch.log_softmax(found.model(TOKENS).logits.double(), -1)
        with written(found, {name: bank.read(matrix, format_name)}):
            changed = torch.log_softmax(found.model(TOKENS).logits.double(), -1)
    return float((original.exp() * (original - changed)).sum(-1).mean())


def fisher(table: CostTable, row: int) -> np.ndarray:
    return 0.5 * np.square(table.products[row].astype(float)).mean(-1) / table.seq_len


@pytest.mark.parametrize(("family", "name"), [("olmoe", "lm_head"), ("glm4_moe", "lm_head")])
def test_the_head_costs_the_divergence_that_it_causes(
    family: str, name: str, tmp_path: Path
) -> None:
    found, bank, table = measured(family, tmp_path)
    row = table.matrices.index(name)
    expected = [true_kl(found, bank, name, f) for f in FORMATS]
    assert table.token_fisher[row] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert fisher(table, row) == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert table.error[row] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert table.active_share[row] == 1 and table.n_tokens[row] == TOKENS.numel()
    assert table.weight_error[row, 0] > table.weight_error[row, 1] > table.weight_error[row, 2]


def test_embeddings_cost_about_the_divergence_that_they_cause(tmp_path: Path) -> None:
    found, bank, table = measured("llama", tmp_path)  # no router, so no token changes its expert
    row, name = table.matrices.index("model.embed_tokens"), "model.embed_tokens"
    kl = true_kl(found, bank, name, "int8-g32")
    assert fisher(table, row)[1] == pytest.approx(kl, rel=0.5)
    assert fisher(table, row)[2] == table.token_fisher[row, 2] == 0
    assert table.active_share[row] == 0


def test_products_of_embeddings_are_those_of_gradients_and_errors(tmp_path: Path) -> None:
    found, bank, table = measured("olmoe", tmp_path)
    matrix = found.inventory.by_name["model.embed_tokens"]
    weight = found.model.model.embed_tokens.weight
    error = (bank.read(matrix, "int4-g32").dequantize() - weight).detach()
    labels = SampledLabels(SETTINGS.n_draws, SETTINGS.seed)
    weight.requires_grad_(True)
    expected = []
    for s in range(len(TOKENS)):
        logits = torch.log_softmax(found.model(TOKENS[s : s + 1]).logits.float(), -1)
        totals = totals_of(labels, logits, TOKENS[s : s + 1], s)
        (gradient,) = torch.autograd.grad(totals[0], weight)
        expected.append(float((gradient * error).sum()))
    weight.requires_grad_(False)
    row = table.matrices.index("model.embed_tokens")
    assert table.products[row, 0, : len(TOKENS)] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_tied_weights_cost_the_sum_of_both(tmp_path: Path) -> None:
    found, bank, table = measured("gemma2", tmp_path)
    row, name = table.matrices.index("model.embed_tokens"), "model.embed_tokens"
    assert table.matrices[-1] == name
    kl = true_kl(found, bank, name, "int8-g32")
    assert fisher(table, row)[1] == pytest.approx(kl, rel=0.5)
    assert table.active_share[row] == 1


def test_what_is_beside_the_layers_is_traced_last_and_only_where_it_is_included() -> None:
    found = map_model(tiny_model("olmoe"), include=("head",))
    traces = [t.layer.index for t in trace_layers(found, [TOKENS], [SampledLabels(1, 0)])]
    assert traces == [1, 0, 2]
    plain = map_model(found.model)
    assert [t.ends for t in trace_layers(plain, [TOKENS], [SampledLabels(1, 0)])] == [None, None]
