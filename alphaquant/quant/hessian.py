"""Hessians of the layer-wise quantization error, weighted by routing.

For an expert with tokens x_j and routing weights c_j the squared error of its weighted output is
sum_j c_j^2 |(W - Q) x_j|^2 = tr((W - Q) H (W - Q)') with H = sum_j c_j^2 x_j x_j' (derivation in
docs/algorithms.md). The exponent is a parameter: 0 is plain GPTQ, 1 is MoEQuant (arXiv 2505.03804,
AGQ), 2 is exact and the default. Where routing weights multiply the inputs of experts (Llama 4),
x_j holds its weight already and c_j is 1. A shared expert behind a sigmoid gate (Qwen2-MoE) is
weighted by that gate in the same way; everything else that every token passes through (attention,
dense MLPs, other shared experts) has weight 1.

An expert that few tokens reach gets its Hessian mixed with the mean of its layer's experts, as if
it had seen `pooled_tokens` more of their tokens. The mean is taken over the layer's experts for
gate and up, whose inputs live in the same space; for down, whose inputs are each expert's own
features, only the mean diagonal is shared.

A part of the tokens, the last quarter of every batch, is summed apart as well (`held`), so that
`shrinkage.py` can ask how well a Hessian of the others speaks for them.

Beside the layers, the head's inputs are the hidden states behind the last norm, so its Hessian is
that of any linear. A token's embedding is looked up by itself: its inputs are one-hot, and the
error of what a row gives is the row's own, so the Hessian over the columns is the identity,
whatever tokens are read. Tied weights do both, and get the sum of both, each with a mean diagonal
of 1.

Letters: B windows in a batch, T tokens of each, E experts, K inputs, n tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from alphaquant.models.ends import head_of
from alphaquant.models.mapping import device_of
from alphaquant.models.routing import ExpertTokens, tokens_by_expert
from alphaquant.models.sites import ExpertsSite, LayerSite, LinearSite, ModelMap
from alphaquant.models.walk import layers_skipped, watch_head
from alphaquant.quant.two_sided.output_hessian import OutputBlocks, OutputHessians
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings

_BLOCK, _LEAST_WIDTH, _LEAST_TOKENS = 256, 1024, 512
"""Rows of a sum that are computed at once where it is computed up to its diagonal, and the inputs
and tokens from which that pays. One thread of an AVX-512 CPU, 2048 tokens, time of a whole product
over that of half of one and a copy: 1.02 at 512 inputs, 1.34 at 1024, 1.47 at 2048, 1.51 at 4096;
with 256 tokens 1.00 at 2048."""

_LEAST_MEAN = 1e-30

_HELD_EXPERTS = 4
"""Experts of a module, at least, for which held-back tokens are summed apart."""


@dataclass(frozen=True)
class HessianBatch:
    """Hessians of matrices that are quantized together.

    Attributes:
        stacks: B groups of matrices; those of one group share their input and are stacked along
            their rows (q, k, v; gate, up).
        hessian: float32 [B, K, K], sums over tokens.
        n_tokens: tokens that each group saw, [B].
        source: how each Hessian was made, [B]: `plain`, `routing_weighted` (shared experts behind
            a gate included), `routing_weighted+pooled`, `pooled`, `identity` of embeddings,
            `plain+identity` of tied ones.
        n_pooled: tokens' worth of the mean that each Hessian was mixed with.
        held: of some groups, by index, the part of the sum that comes from held-back tokens,
            float32 [K, K].
        outputs: output Hessians of all matrices, or nothing where these are not used.
    """

    stacks: tuple[tuple[Matrix, ...], ...]
    hessian: Tensor
    n_tokens: tuple[int, ...]
    source: tuple[str, ...]
    n_pooled: int = 0
    held: Mapping[int, Tensor] = field(default_factory=dict)
    outputs: OutputBlocks = field(default_factory=dict)

    def tokens_per_input(self, index: int) -> float:
        """Tokens that a group saw, pooled ones included, per input."""
        return (self.n_tokens[index] + self.n_pooled) / self.hessian.shape[-1]

    @cached_property
    def has_data(self) -> list[bool]:
        """Whether each Hessian is more than zeros."""
        return [bool(h) for h in (self.hessian.diagonal(dim1=-2, dim2=-1).sum(-1) > 0).tolist()]


def with_outputs(
    batches: Sequence[HessianBatch], layer: LayerSite, outputs: OutputHessians | None
) -> list[HessianBatch]:
    """The same with the output Hessians of the layer's matrices.

    Args:
        batches: of a layer.
        layer: which.
        outputs: of the model; None for none.

    Raises:
        StoreError: a file of them is missing or damaged.
    """
    if outputs is None:
        return list(batches)
    blocks = outputs.read(layer)
    return [replace(batch, outputs=blocks) for batch in batches]


def accumulate(total: Tensor, inputs: Tensor, weights: Tensor | None = None) -> None:
    """Add sum_j w_j x_j x_j' to a Hessian in place.

    Args:
        total: float32 [K, K], symmetric.
        inputs: [..., K], any float dtype.
        weights: float [n], one per token; None for ones.
    """
    flat = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
    weighted = flat if weights is None else flat * weights.to(torch.float32).unsqueeze(-1)
    if len(flat) < _LEAST_TOKENS or flat.shape[-1] < _LEAST_WIDTH or flat.is_cuda:
        total.addmm_(weighted.T, flat)
        return
    starts = range(0, flat.shape[-1], _BLOCK)
    for start in starts:  # rows of the sum up to the diagonal; the other half is their mirror
        rows, columns = slice(start, start + _BLOCK), slice(start + _BLOCK)
        total[rows, columns].addmm_(weighted[:, rows].T, flat[:, columns])
    for start in starts:
        rows = slice(start, start + _BLOCK)
        total[:start, rows] = total[rows, :start].T


def observer_of(settings: QuantSettings) -> "LayerHessians":
    """What sums a layer's Hessians for a quantizer with these settings."""
    holds_back = settings.method == "gptq" and settings.shrinkage
    return LayerHessians(settings.route_exponent, settings.pooled_tokens, holds_back)


def first_held(n_tokens: int) -> int:
    """The first token of a batch that is held back; those of its last quarter are."""
    return n_tokens - n_tokens // 4


@dataclass
class LayerHessians:
    """Observer that sums one layer's Hessians; hand it to `observe_layer`, then call `batches`.

    Attributes:
        route_exponent: 0, 1 or 2; power of the routing weight.
        pooled_tokens: tokens' worth of the layer's mean that each expert's Hessian is mixed with;
            0 turns it off.
        holds_back: sum held-back tokens apart as well.
    """

    route_exponent: int = 2
    pooled_tokens: int = 512
    holds_back: bool = True
    _linear: dict[str, Tensor] = field(default_factory=dict)
    _held: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)
    _shared: dict[str, list[Matrix]] = field(default_factory=dict)
    _leader: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, Tensor] | None = None
    _gates: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    _experts: dict[str, "ExpertSums"] = field(default_factory=dict)

    def on_linear(self, site: LinearSite, inputs: Tensor) -> None:
        """Add a batch; linears that receive the same tensor as the one before share a Hessian."""
        name = site.matrix.name
        if name not in self._leader:
            same = self._last is not None and self._last[1] is inputs
            leader = self._leader[self._last[0]] if same and self._last else name
            self._leader[name] = leader
            self._shared.setdefault(leader, []).append(site.matrix)
        self._last = (name, inputs)
        if self._leader[name] != name:
            return
        if name not in self._linear:
            n_cols = site.matrix.cols
            self._linear[name] = torch.zeros(n_cols, n_cols, device=inputs.device)
            if self.holds_back:
                self._held[name] = torch.zeros(n_cols, n_cols, device=inputs.device)
            self._tokens[name] = 0
        flat, weights = inputs.flatten(0, -2), self._gate_weights(site, inputs)
        accumulate(self._linear[name], flat, weights)
        if self.holds_back:
            held = slice(first_held(len(flat)), None)
            accumulate(self._held[name], flat[held], None if weights is None else weights[held])
        self._tokens[name] += len(flat)

    def on_experts(
        self, site: ExpertsSite, inputs: Tensor, expert_ids: Tensor, weights: Tensor
    ) -> None:
        """Add a batch of routed tokens."""
        sums = self._sums_of(site, inputs.device)
        sums.add(inputs, expert_ids, weights, self.route_exponent)

    def utilization(self) -> dict[str, list[int]]:
        """Tokens that each routed expert received, by experts module.

        Sums to tokens x top-k, less those of experts without weights.
        """
        return {
            name: sums.n_tokens.tolist()
            for name, sums in self._experts.items()
            if sums.site.is_routed
        }

    def batches(self, layer: LayerSite) -> list[HessianBatch]:
        """The layer's Hessians, linears first; experts' sums are pooled in place, so ask once."""
        result = []
        for leader, matrices in self._shared.items():
            hessian = self._linear[leader].unsqueeze(0)
            gated = self.route_exponent > 0 and leader.rpartition(".")[0] in self._gates
            source = "routing_weighted" if gated else "plain"
            n_tokens = (self._tokens[leader],)
            held = {0: self._held[leader]} if leader in self._held else {}
            result.append(
                HessianBatch((tuple(matrices),), hessian, n_tokens, (source,), held=held)
            )
        for site in layer.experts:
            result += self._experts[site.name].batches(self.pooled_tokens, self.route_exponent)
        return result

    def _sums_of(self, site: ExpertsSite, device: torch.device) -> "ExpertSums":
        """The sums of an experts module, empty ones at first."""
        if site.name not in self._experts:
            n_held = _HELD_EXPERTS if self.holds_back else 0
            self._experts[site.name] = self._new_sums(site, device, n_held)
        return self._experts[site.name]

    def _new_sums(self, site: ExpertsSite, device: torch.device, n_held: int) -> "ExpertSums":
        return ExpertSums(site, device, n_held)

    def _gate_weights(self, site: LinearSite, inputs: Tensor) -> Tensor | None:
        """Weights of a gated shared expert's tokens, [n]; None for everything else.

        The gate sees what the shared expert sees: the inputs of the linear that is called first.
        """
        if site.gate is None:
            return None
        name = site.matrix.name
        parent = name.rpartition(".")[0]
        if parent not in self._gates or self._gates[parent][0] == name:
            gate = torch.sigmoid(site.gate(inputs).to(torch.float32)).flatten()
            self._gates[parent] = (name, gate**self.route_exponent)
        return self._gates[parent][1]


class ExpertSums:
    """Sums of one experts module."""

    def __init__(self, site: ExpertsSite, device: torch.device, n_held: int) -> None:
        n_experts, hidden, width = site.n_experts, site.up[0].cols, site.down[0].cols
        self.site = site
        self.w13 = torch.zeros(n_experts, hidden, hidden, device=device)
        self.w2 = torch.zeros(n_experts, width, width, device=device)
        self.n_tokens = torch.zeros(n_experts, dtype=torch.int64)
        self.is_pooled = False
        sample = range(0, n_experts, max(1, n_experts // n_held)) if n_held else range(0)
        self.held13 = {e: torch.zeros(hidden, hidden, device=device) for e in sample}
        self.held2 = {e: torch.zeros(width, width, device=device) for e in sample}

    def add(self, inputs: Tensor, expert_ids: Tensor, weights: Tensor, exponent: int) -> None:
        """Add the tokens of a batch, each weighed by its routing weight to this power.

        Args:
            inputs: [m, K], of all experts.
            expert_ids: int64 [m, k].
            weights: float [m, k].
            exponent: 0 counts all tokens alike.
        """
        for tokens in tokens_by_expert(expert_ids, weights, self.site.n_experts):
            e = tokens.expert
            x, output_weights = self.site.given(inputs, tokens)
            features = self.site.apply_gate(self.site.gate_up(e, x))  # [m, I]
            power = output_weights.to(torch.float32) ** exponent
            accumulate(self.w13[e], x, power)
            accumulate(self.w2[e], features, power)
            if e in self.held13:
                held = tokens.rows >= first_held(len(inputs))
                accumulate(self.held13[e], x[held], power[held])
                accumulate(self.held2[e], features[held], power[held])
            self.add_more(tokens, x, features, power)
            self.n_tokens[e] += tokens.rows.numel()

    def add_more(self, tokens: ExpertTokens, x: Tensor, features: Tensor, power: Tensor) -> None:
        """What else is summed of one expert's tokens; nothing here.

        Args:
            tokens: m of the batch's.
            x: what the expert is given, [m, K].
            features: what its down projection is given, [m, I].
            power: what each token counts, float32 [m].
        """

    def batches(self, pooled_tokens: int, exponent: int) -> list[HessianBatch]:
        """The sums, of gate and up, then of down.

        Args:
            pooled_tokens: tokens of all experts that each one's Hessian has beside its own.
            exponent: see `add`.
        """
        counts = tuple(self.n_tokens.tolist())
        base = "routing_weighted" if exponent else "plain"
        source = tuple(
            base if not pooled_tokens else f"{base}+pooled" if n else "pooled" for n in counts
        )
        w13, w2 = self.w13, self.w2
        assert not self.is_pooled
        self.is_pooled = True
        if pooled_tokens and sum(counts):
            share = pooled_tokens / sum(counts)
            w13 += share * w13.sum(0)
            diagonal = w2.diagonal(dim1=-2, dim2=-1)  # a view: writing it writes w2
            diagonal += share * diagonal.sum(0).mean()
        inner = tuple(map(self.site.inner, range(self.site.n_experts)))
        down = tuple((m,) for m in self.site.down)
        return [
            HessianBatch(inner, w13, counts, source, pooled_tokens, self.held13),
            HessianBatch(down, w2, counts, source, held=self.held2),
        ]


@dataclass(frozen=True)
class EndStep:
    """A walk that has left the last layer.

    Attributes:
        model_map: the model, with `ends`.
        batches: token ids, int64 [B, T] each.
        outputs: what the last layer gave, by batch.
    """

    model_map: ModelMap
    batches: Sequence[Tensor]
    outputs: Sequence[Any]

    def run(self) -> None:
        """Nothing comes after it that needs to be run."""

    @torch.no_grad()
    def hessians(self, settings: QuantSettings) -> list[HessianBatch]:
        """Hessians of what is beside the layers, for a quantizer with these settings."""
        ends = self.model_map.ends
        assert ends is not None
        n_tokens = sum(batch.numel() for batch in self.batches)
        found = self._of_head(ends, settings)
        if not ends.embeddings:
            return found
        (site,) = ends.embeddings
        one = torch.eye(site.matrix.cols, device=device_of(self.model_map.model)).unsqueeze(0)
        if site.head is None:
            return [HessianBatch(((site.matrix,),), one, (n_tokens,), ("identity",)), *found]
        (inputs,) = found
        scale = 1 / inputs.hessian.diagonal(dim1=-2, dim2=-1).mean().clamp(min=_LEAST_MEAN)
        # Held-back tokens are a quarter of all, so they have a quarter of the identity too.
        held = {index: scale * part + one[0] / 4 for index, part in inputs.held.items()}
        summed = scale * inputs.hessian + one
        return [replace(inputs, hessian=summed, held=held, source=("plain+identity",))]

    def _of_head(self, ends: LayerSite, settings: QuantSettings) -> list[HessianBatch]:
        """Of what the head is given; nothing where it is not quantized."""
        head, model = head_of(ends), self.model_map.model
        if head is None:
            return []
        owner = ends.linears[0] if ends.linears else ends.embeddings[0]
        site, observer = LinearSite(owner.matrix, head), observer_of(settings)
        with watch_head(head, lambda inputs: observer.on_linear(site, inputs)):
            for batch, output in zip(self.batches, self.outputs, strict=True):
                with layers_skipped(self.model_map, output):
                    model(batch.to(device_of(model)), use_cache=False)
        return observer.batches(ends)
