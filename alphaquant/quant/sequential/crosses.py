"""What the original and the quantized model give a layer, summed against each other.

The sums C that `correction.py` needs, over the calibration text, while the quantized model is
walked in the sequential mode. Both passes run the layer's original weights, and an expert's tokens
are those that the quantized model sends to it.

Letters: x what the original model gives a module, x' what the quantized one gives it;
C = sum_j w_j (x_j - x'_j) x'_j', [K, K]; m tokens; K columns of a matrix; I expert width.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.dtypes import rough_products
from alphaquant.models.routing import ExpertTokens
from alphaquant.models.sites import ExpertsSite, LayerSite, LinearSite
from alphaquant.models.walk import LayerCall, LayerStep, hidden_of, observe_layer, shared_state
from alphaquant.quant.hessian import ExpertSums, LayerHessians
from alphaquant.specs.quantizer import QuantSettings


@dataclass
class OriginalStates:
    """Hidden states of the original model while those of the quantized one are walked.

    Attributes:
        hidden: what goes into the next layer, [B, T, H] by batch; None before the first.
    """

    hidden: list[Tensor] | None = None

    def calls(self, step: LayerStep) -> list[LayerCall]:
        """How the original model calls the layer, by batch.

        Raises:
            ModelError: layers hand on more than hidden states.
        """
        if any(shared_state(call.kwargs) for call in step.calls):
            raise _handed_on(step.layer)
        if self.hidden is None:
            self.hidden = [call.hidden for call in step.calls]
        return [
            call.with_hidden(hidden) for call, hidden in zip(step.calls, self.hidden, strict=True)
        ]

    def run(self, step: LayerStep) -> None:
        """Take the original model through a layer that has its own weights.

        Raises:
            ModelError: the layer hands on more than hidden states.
        """
        self.hidden = [_alone(call.run(step.layer), step.layer) for call in self.calls(step)]


def _alone(output: Any, layer: LayerSite) -> Tensor:
    """Hidden states that a layer gave, and nothing beside."""
    if isinstance(output, tuple) and any(x is not None for x in output[1:]):
        raise _handed_on(layer)
    return hidden_of(output)


def _handed_on(layer: LayerSite) -> ModelError:
    return ModelError(
        f"{layer.name} hands on more than hidden states, so the original model cannot be walked "
        "beside the quantized one; use --correction 0"
    )


class _Captured:
    """Keeps what every module of a layer is given."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """See `LayerObserver`."""
        self.inputs[site.matrix.name] = inputs

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """See `LayerObserver`."""
        self.inputs[site.name] = inputs


@dataclass
class CrossSums(LayerHessians):
    """Observer of the quantized model's inputs that sums C beside the Hessians.

    Attributes:
        given: what the original model gives the modules in the batch that comes next, by name.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    _cross: dict[str, Tensor] = field(default_factory=dict)

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """Add a batch."""
        super().on_linear(site, inputs)
        name = site.matrix.name
        if self._leader[name] != name:
            return
        if name not in self._cross:
            self._cross[name] = torch.zeros_like(self._linear[name])
        own = inputs.flatten(0, -2)
        lost = self.given[name].flatten(0, -2) - own
        _add_cross(self._cross[name], lost, own, self._gate_weights(site, inputs))

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """Add a batch of routed tokens."""
        sums = self._sums_of(site, inputs.device)
        assert isinstance(sums, _ExpertCrosses)
        sums.given = self.given[site.name]
        super().on_experts(site, inputs, expert_ids, weights)

    def crosses(self, layer: LayerSite) -> dict[str, Tensor]:
        """C of every matrix, float32 [K, K]; experts' are pooled in place, so ask once."""
        found = {
            matrix.name: self._cross[leader]
            for leader, matrices in self._shared.items()
            for matrix in matrices
        }
        for site in layer.experts:
            sums = self._experts[site.name]
            assert isinstance(sums, _ExpertCrosses)
            found |= sums.crosses(self.pooled_tokens)
        return found

    def _new_sums(self, site: ExpertsSite, device: torch.device, n_held: int) -> ExpertSums:
        return _ExpertCrosses(site, device, n_held)


class _ExpertCrosses(ExpertSums):
    """Sums of one experts module with C of its matrices."""

    def __init__(self, site: ExpertsSite, device: torch.device, n_held: int) -> None:
        super().__init__(site, device, n_held)
        self.given = torch.empty(0)
        self._cross13, self._cross2 = torch.zeros_like(self.w13), torch.zeros_like(self.w2)

    def add_more(self, tokens: ExpertTokens, x: Tensor, features: Tensor, power: Tensor) -> None:
        """Add C of one expert's tokens."""
        e = tokens.expert
        original, _ = self.site.given(self.given, tokens)
        _add_cross(self._cross13[e], original - x, x, power)
        inner = self.site.apply_gate(self.site.gate_up(e, original))
        _add_cross(self._cross2[e], inner - features, features, power)

    def crosses(self, pooled_tokens: int) -> dict[str, Tensor]:
        """C by matrix name; pooled in place as Hessians are, so ask once.

        Those of gate and up have that of all experts beside their own; of down projections only
        the diagonal is pooled, which a C has no part in.
        """
        total = int(self.n_tokens.sum())
        if pooled_tokens and total:
            self._cross13 += pooled_tokens / total * self._cross13.sum(0)
        found: dict[str, Tensor] = {}
        for e in range(self.site.n_experts):
            found |= {matrix.name: self._cross13[e] for matrix in self.site.inner(e)}
            found[self.site.down[e].name] = self._cross2[e]
        return found


def observe_both(
    step: LayerStep, original: OriginalStates, settings: QuantSettings
) -> tuple[CrossSums, dict[str, Tensor]]:
    """Sum Hessians of what the quantized model gives a layer, and C of what the original gives.

    Args:
        step: of the quantized model's walk; the layer has its original weights.
        original: goes on to the next layer.
        settings: of the quantizer.

    Returns:
        The observer, and C by matrix name.
    """
    holds_back = settings.method == "gptq" and settings.shrinkage
    sums = CrossSums(settings.route_exponent, settings.pooled_tokens, holds_back)
    went = []
    with rough_products(step.layer.matrices()) if step.is_rough else nullcontext():
        for call, own in zip(original.calls(step), step.calls, strict=True):
            captured = _Captured()
            with observe_layer(step.layer, captured):
                went.append(_alone(call.run(step.layer), step.layer))
            sums.given = captured.inputs
            with observe_layer(step.layer, sums):
                own.run(step.layer)
    original.hidden = went
    return sums, sums.crosses(step.layer)


def _add_cross(total: Tensor, lost: Tensor, inputs: Tensor, weights: Tensor | None) -> None:
    """Add sum_j w_j lost_j x_j' in place; [m, K] twice, weights [m] or None for ones."""
    left = lost.to(torch.float32)
    if weights is not None:
        left = left * weights.to(torch.float32).unsqueeze(-1)
    total.addmm_(left.T, inputs.to(torch.float32))
