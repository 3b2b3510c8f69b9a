"""GPTQ on one matrix by hand: feed it the inputs of an expert, then quantize it in place.

What it sums is H = sum_j p_j x_j x_j', with p_j the routing weight of token j (the exponent is a
parameter, see `alphaquant.quant.hessian`; 1 here, as in MoEQuant, arXiv 2505.03804). Weighting
the inputs by the square root of p gives the same H. Rounding is `quantize_layer`'s, as everywhere.

Inputs of an expert come in one of two forms, told apart by their number of rows:

    the layer's tokens     as many rows as `selected_experts`; those of the expert are picked
    the expert's tokens    as many rows as tokens chose the expert, in the order of the tokens

Where every token chose the expert both are the same. Example: three tokens, top-2, experts
[[0, 1], [2, 1], [0, 2]], scores [[.6, .4], [.7, .3], [.5, .5]]. Expert 0 has tokens 0 and 2 with
weights .6 and .5, so its inputs are rows 0, 1, 2 of the layer, or its own two rows.

Letters: n tokens, k experts per token, K inputs, m tokens of the expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import DataError, ModelError
from alphaquant.gptq.config import GPTQConfig, choose_formats, read_layer_config
from alphaquant.models.routing import tokens_by_expert
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import HessianBatch, accumulate
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.spaces.formats import FORMAT_KINDS, Format, parse_format
from alphaquant.spaces.units import Inventory, Matrix

Batches = Tensor | Sequence[Tensor]
"""One tensor [..., width], or one per batch; both are read as rows in order."""

Quantizer = Format | str | Mapping[str, Any]
"""A format, its name (`int4-g64`), its kind (`int4`), or a scheme (`{"wq": "int4"}`)."""


class GPTQMoE:
    """One matrix with its Hessian.

    Attributes:
        expert_id: which expert it belongs to.
        H: float32 [K, K], the weighted sum over all tokens so far.
        nsamples: tokens in H.
        utilization_count: tokens that were routed to the expert, whatever their weight.
    """

    def __init__(
        self, layer: nn.Linear | Tensor, expert_id: int, *, route_exponent: int = 1
    ) -> None:
        """Start with an empty Hessian.

        Args:
            layer: a linear, or a weight [outputs, K]; of fused experts a view, such as
                `experts.down_proj[3]`.
            expert_id: which expert it is.
            route_exponent: power of the routing weight, 0, 1 or 2.

        Raises:
            ModelError: the layer has no weight [outputs, K], or the exponent is another.
        """
        weight = layer.weight if isinstance(layer, nn.Linear) else layer
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ModelError(
                f"expert {expert_id} was given as {found}; give an nn.Linear or a weight "
                "[outputs, inputs], e.g. experts.down_proj[3]"
            )
        if route_exponent not in (0, 1, 2):
            raise ModelError(f"route_exponent is {route_exponent}; use 0, 1 or 2")
        self._weight = weight.detach()
        self._exponent = route_exponent
        self._is_weighted = False
        self.expert_id = expert_id
        self.H = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        self.nsamples = 0
        self.utilization_count = 0

    @torch.no_grad()
    def add_batch(self, inp: Batches) -> None:
        """Add tokens with weight 1.

        Args:
            inp: [..., K].

        Raises:
            DataError: another width, NaN or infinity.
        """
        rows = self._inputs(inp)
        accumulate(self.H, rows)
        self.nsamples += len(rows)

    @torch.no_grad()
    def add_batch_with_routing(
        self,
        inp: Batches,
        routing_scores: Batches,
        selected_experts: Batches,
        expert_num: int,
        num_experts: int,
    ) -> None:
        """Add the tokens that chose the expert, each with its own routing weight.

        Args:
            inp: the layer's tokens [..., K] with n rows, or the expert's with m rows; see the file
                header.
            routing_scores: weights of the chosen experts, [..., k], as the block applies them.
            selected_experts: ids of the chosen experts, integers [..., k]; ids from `num_experts`
                on are padding.
            expert_num: this expert, the same as `expert_id`.
            num_experts: experts of the layer.

        Raises:
            DataError: shapes or values that do not go together.
        """
        rows = self._inputs(inp)
        scores, chosen = _rows_of(routing_scores), _rows_of(selected_experts)
        self._check_routing(scores, chosen, expert_num, num_experts)
        chosen, scores = chosen.to(rows.device, torch.int64), scores.to(rows.device)
        for tokens in tokens_by_expert(chosen, scores, num_experts):
            if tokens.expert == expert_num:
                self._add_routed(rows, tokens.rows, tokens.weights, len(chosen))
                return
        self._pick(rows, torch.zeros(0, dtype=torch.int64, device=rows.device), len(chosen))

    @torch.no_grad()
    def add_batch_shared_expert(self, inp: Batches, routing_scores: Batches | None = None) -> None:
        """Add tokens of an expert that all of them pass through.

        Args:
            inp: [..., K] with n rows.
            routing_scores: n weights, [...] or [..., 1], as the block applies them (Qwen2-MoE:
                sigmoid of the shared expert's gate); None for 1 (DeepSeek).

        Raises:
            DataError: shapes or values that do not go together.
        """
        rows = self._inputs(inp)
        if routing_scores is None:
            self.add_batch(rows)
            return
        parts = [routing_scores] if isinstance(routing_scores, Tensor) else list(routing_scores)
        scores = torch.cat([part.reshape(-1) for part in parts])
        if len(scores) != len(rows):
            raise DataError(
                f"{len(scores)} scores for {len(rows)} tokens of the shared expert; give one each"
            )
        _check_scores(scores)
        self._accumulate(rows, scores)

    @torch.no_grad()
    def fasterquant(
        self,
        quantizer: Quantizer,
        blocksize: int = 128,
        percdamp: float = 0.01,
        groupsize: int = -1,
        actorder: bool = False,
        static_groups: bool = False,
    ) -> QuantizedMatrix:
        """Quantize the weight in place; without tokens by rounding to nearest.

        Args:
            quantizer: a format (`parse_format("int4-g64")`), its name, or a scheme as in a
                configuration (`{"wq": "int4", "group_size": 64}`).
            blocksize: as the four that follow, see `GPTQConfig`.
            percdamp: damping.
            groupsize: where the quantizer is a kind (`int4`) or a scheme without one.
            actorder: most used inputs first.
            static_groups: scales from the original weights.

        Returns:
            The packed matrix and the record of how it was made (`fallback` is `no_tokens` where
            there were none).

        Raises:
            ConfigError: options or a scheme that are not valid.
            FormatError: an unknown format, or a weight that is NaN or infinite.
            ModelError: H cannot be factorized.
        """
        config = GPTQConfig(blocksize, percdamp, groupsize, actorder, static_groups)
        rows, cols = self._weight.shape
        matrix = Matrix(f"experts.{self.expert_id}", rows, cols, "expert", 0, self.expert_id)
        inventory = Inventory("expert", (matrix,))
        name = _format_name(quantizer, groupsize, inventory)
        source = "routing_weighted" if self._is_weighted else "plain"
        batch = HessianBatch(((matrix,),), self.H.unsqueeze(0), (self.nsamples,), (source,))
        # The engine takes weights from the map and Hessians from the batch; no layer is needed.
        nothing = nn.Identity()
        where = ModelMap(nothing, inventory, (), {matrix.name: self._weight})
        site = LayerSite(0, matrix.name, nothing, (), ())
        made = next(quantize_layer(where, site, [batch], [name], config.settings()))
        if made.packed.format.is_quantized:
            self._weight.copy_(made.packed.dequantize())
        return made

    def _inputs(self, inp: Batches) -> Tensor:
        """Rows [n, K] on the weight's device."""
        rows = _rows_of(inp)
        if rows.shape[-1] != len(self.H):
            raise DataError(
                f"inputs of {rows.shape[-1]} features for expert {self.expert_id}, whose weight "
                f"takes {len(self.H)}; give the inputs of this matrix (of down_proj the activated "
                "features, not the layer's tokens)"
            )
        if not bool(torch.isfinite(rows).all()):
            raise DataError(
                f"inputs of expert {self.expert_id} hold NaN or infinity; give finite ones"
            )
        return rows.to(self.H.device)

    def _check_routing(
        self, scores: Tensor, chosen: Tensor, expert_num: int, num_experts: int
    ) -> None:
        if scores.shape != chosen.shape or chosen.is_floating_point():
            raise DataError(
                f"routing_scores {tuple(scores.shape)} and selected_experts "
                f"{tuple(chosen.shape)} {chosen.dtype} do not go together; give the weights and "
                "integer ids of the chosen experts, both [tokens, experts per token]"
            )
        if expert_num != self.expert_id or not 0 <= expert_num < num_experts:
            raise DataError(
                f"expert_num is {expert_num} of {num_experts} experts, and this is expert "
                f"{self.expert_id}; give the same number, below num_experts"
            )
        if chosen.numel() and int(chosen.min()) < 0:
            raise DataError("selected_experts holds negative ids; number experts from 0")
        _check_scores(scores)

    def _pick(self, rows: Tensor, of_expert: Tensor, n_tokens: int) -> Tensor:
        """Inputs of the expert's tokens, [m, K], from either form."""
        if len(rows) == n_tokens:
            return rows[of_expert]
        if len(rows) == len(of_expert):
            return rows
        raise DataError(
            f"{len(rows)} rows of inputs for expert {self.expert_id}; the layer had {n_tokens} "
            f"tokens and {len(of_expert)} of them chose it: give all or exactly those, in token "
            "order"
        )

    def _add_routed(self, rows: Tensor, of_expert: Tensor, weights: Tensor, n_tokens: int) -> None:
        self._accumulate(self._pick(rows, of_expert, n_tokens), weights)
        self.utilization_count += len(of_expert)

    def _accumulate(self, rows: Tensor, weights: Tensor) -> None:
        self._is_weighted |= self._exponent > 0
        accumulate(self.H, rows, weights.to(rows.device, torch.float32) ** self._exponent)
        self.nsamples += len(rows)


def _rows_of(batches: Batches) -> Tensor:
    """[..., width] or several of them -> [n, width]."""
    parts = [batches] if isinstance(batches, Tensor) else list(batches)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _check_scores(scores: Tensor) -> None:
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise DataError(
            "routing scores hold negative numbers, NaN or infinity; give the weights after the "
            "softmax or sigmoid, not the logits"
        )


def _format_name(quantizer: Quantizer, groupsize: int, inventory: Inventory) -> str:
    if isinstance(quantizer, Format):
        return quantizer.name
    if isinstance(quantizer, str) and quantizer not in FORMAT_KINDS:
        return parse_format(quantizer).name
    scheme = {"wq": quantizer} if isinstance(quantizer, str) else quantizer
    config = read_layer_config({"default": dict(scheme)})
    return choose_formats(config, inventory, groupsize)[inventory.matrices[0].name]
