"""Tiny models with a bank, for tests of what quantizing their matrices costs.

case = make_cost_case(folder, "mixtral")
case.costs(n_draws=2).products
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.costs.fisher import CostSettings, CostTable, measure_costs
from alphaquant.costs.labels import NO_LABEL, Labels
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ExpertsSite, ModelMap
from alphaquant.quant.bank import Bank, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens

COST_FORMATS = ("int3-g32-asym", "int8-g32")
COST_TOKENS = tiny_tokens(6, 10)
COST_FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2", "nemotron_h", "llama4_text")
"""Routed experts alone; a shared expert behind a gate; latent attention, a dense layer; experts
without gate in a smaller space; experts whose inputs are weighted."""
_CHANGES: Mapping[str, Mapping[str, Any]] = {"nemotron_h": {"moe_latent_size": 24}}


@dataclass(frozen=True)
class CostCase:
    """A tiny model with its bank, rounded to nearest in `COST_FORMATS`."""

    map: ModelMap
    bank: Bank

    def costs(
        self,
        tokens: Tensor = COST_TOKENS,
        formats: Sequence[str] = COST_FORMATS,
        *,
        with_gemq: bool = False,
        **settings: Any,
    ) -> CostTable:
        """The table; settings as in `CostSettings`."""
        asked = CostSettings(**settings)
        return measure_costs(self.map, self.bank, tokens, formats, asked, with_gemq=with_gemq)

    def weight_error(self, name: str, format_name: str) -> Tensor:
        """Q - W of a matrix, with the W that the model has now."""
        quantized = self.bank.read(self.map.inventory.by_name[name], format_name).dequantize()
        return quantized - self.map.view(name)

    def experts(self) -> Iterator[tuple[int, ExpertsSite]]:
        """Layer and site of every experts module."""
        for layer in self.map.layers:
            for site in layer.experts:
                yield layer.index, site

    def stored(self) -> list[Path]:
        """Files of stored costs."""
        return sorted((self.bank.path / "costs").rglob("*.safetensors"))


def make_cost_case(root: Path, family: str, **changes: Any) -> CostCase:
    """A model of hidden size 32; banks of equal models are shared by nobody.

    Args:
        root: folder for the bank.
        family: one of the families of `tiny_model`.
        changes: to the model's configuration.
    """
    own = {"hidden_size": 32, **_CHANGES.get(family, {}), **changes}
    model_map = map_model(tiny_model(family, **own))
    bank = open_bank(root, "bank", model_map.inventory, {})
    fill_bank(bank, model_map, COST_TOKENS, BankRequest(COST_FORMATS, QuantSettings(method="rtn")))
    return CostCase(model_map, bank)


def totals_of(labels: Labels, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
    """Log-likelihoods of labels, one scalar per draw, for autograd.

    Args:
        labels: what is differentiated.
        log_probs: of the model, float32 [B, T, V], with a graph.
        batch: int64 [B, T].
        first: index of the batch's first sequence among all.
    """
    totals = [log_probs.new_zeros(()) for _ in range(labels.n_draws)]
    for i, (own, tokens) in enumerate(zip(log_probs, batch, strict=True)):
        drawn = labels.draw(own.detach().exp(), tokens, first + i, slice(0, len(tokens)))
        for d, label in enumerate(drawn):
            at = label.clamp_min(0).unsqueeze(-1)
            found = own.gather(-1, at).squeeze(-1)
            totals[d] = totals[d] + torch.where(label == NO_LABEL, 0.0, found).sum()
    return totals
