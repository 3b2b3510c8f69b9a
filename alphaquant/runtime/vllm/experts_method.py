"""Routed experts of vLLM with a format per expert and projection.

vLLM routes tokens, runs shared experts and adds ranks up; this method loads the experts of this
rank and gives the weighted sum of their outputs. Under expert parallelism a rank holds whole
experts, which must follow one another; else it holds a part of every expert.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation

from alphaquant.errors import ModelError
from alphaquant.runtime.vllm.dequantized_products import dequantized_experts
from alphaquant.runtime.vllm.matrix_bank import MatrixBank
from alphaquant.runtime.vllm.ordered_layers import (
    VARIABLE,
    Checked,
    OrderedExperts,
    order_experts,
    wants_kernels,
    why_no_kernels,
)
from alphaquant.runtime.vllm.packed_layers import (
    MEMORY,
    add_placeholders,
    give_up,
    make_room,
    take_matrices,
)
from alphaquant.runtime.vllm.slices import Slice, part_of
from alphaquant.spaces.formats import Format

_PROJECTIONS = {"w1": 0, "w3": 1, "w2": 2}
"""Gate, up and down, as vLLM calls them."""


def expert_names(layer: Any) -> list[str]:
    """The matrices of all experts: gate, up and down of expert 0, then those of expert 1."""
    parts = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
    n_experts = layer.moe_config.num_logical_experts
    return [f"{layer.layer_name}.{e}.{part}" for e in range(n_experts) for part in parts]


def check_servable(layer: Any) -> None:
    """Refuse experts that are not silu(gate) * up, then down, one after the other.

    Raises:
        ModelError: biases, another gating function, redundant or scattered experts.
    """
    config = layer.moe_config
    limits = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    asked = {
        "experts with biases": config.has_bias,
        f"{layer.activation} as gating function": layer.activation != MoEActivation.SILU,
        "a limited gating function": any(value is not None for value in limits),
        "routing weights on inputs": layer.apply_router_weight_on_input,
        "experts without a gate": not config.is_act_and_mul,
        "expert load balancing (EPLB)": config.moe_parallel_config.enable_eplb
        or config.num_experts != config.num_logical_experts,
        "scattered experts": layer.expert_placement_strategy != "linear",
    }
    refused = [what for what, is_so in asked.items() if is_so]
    if refused:
        raise ModelError(
            f"{layer.layer_name} needs {', '.join(refused)}, and packed experts are silu(gate) * "
            "up then down, placed linearly: leave out --enable-eplb and "
            "--expert-placement-strategy, or run such a model with alphaquant.load"
        )


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]  # vLLM is not there to be checked
    """Loads and runs the routed experts of one layer."""

    def __init__(self, moe: Any, formats: Mapping[str, Format], checked: Checked) -> None:
        """Take the formats.

        Args:
            moe: vLLM's configuration of the layer.
            formats: of all experts' matrices, by name, in the order of `expert_names`.
            checked: of `order_experts`.
        """
        super().__init__(moe)
        self.formats, self.checked = list(formats.items()), checked
        self.bank, self.facts = MatrixBank({}), ""
        self.first_expert = 0
        self.n_experts = 0
        self.ordered: OrderedExperts | None = None
        self.dtype = torch.bfloat16

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make room for this rank's experts, or its part of each; sizes are those of vLLM."""
        self.dtype, self.n_experts = params_dtype, num_experts
        config = layer.moe_config
        local = [_local(layer, e) for e in range(config.num_logical_experts)]
        self.first_expert = local.index(0) if num_experts else 0
        width = intermediate_size_per_partition * config.tp_size
        own = part_of(width, config.tp_rank, config.tp_size)
        all_inputs = range(hidden_size)
        slices = {}
        for number in range(self.first_expert, self.first_expert + num_experts):
            gate, up, down = self.formats[3 * number : 3 * number + 3]
            for name, fmt in (gate, up):
                slices[name] = Slice(fmt, width, hidden_size, own, all_inputs)
            slices[down[0]] = Slice(down[1], hidden_size, width, all_inputs, own)
        self.bank = MatrixBank(slices)
        self.facts = self.bank.facts
        make_room(layer, self.bank)
        for prefix in ("w13_", "w2_"):
            add_placeholders(layer, prefix, self._loader(layer), {})

    def _loader(self, layer: Any) -> Any:
        """`weight_loader` of the layer's placeholders."""

        def load(
            param: Any,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = 0,
            return_success: bool = False,
        ) -> bool:
            """Load one tensor; false for experts of other ranks."""
            index = _local(layer, expert_id)
            if index < 0:
                return False
            index = 3 * index + _PROJECTIONS[shard_id]
            self.bank.load(layer.get_buffer(MEMORY), index, param.part, loaded_weight)
            return True

        return load

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM runs these experts."""
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded; put it into kernel order where kernels run.

        Raises:
            StoreError: a tensor is missing, or holds numbers that cannot be used.
            ModelError: kernels were asked for and cannot run, or give other numbers; or they
                cannot run on a GPU, and CUDA graphs are to be captured.
        """
        matrices = take_matrices(layer, self.bank, layer.layer_name)
        device = layer.get_buffer(MEMORY).device
        if not matrices:
            return
        reason = why_no_kernels([(m.format, m.cols) for m in matrices], device)
        if wants_kernels(device) and reason is None:
            experts = list(zip(matrices[::3], matrices[1::3], matrices[2::3], strict=True))
            first, checked = self.first_expert, self.checked
            self.ordered = order_experts(layer, experts, first, self.dtype, checked)
            give_up(layer)
        elif device.type == "cuda":
            _check_eager(layer.layer_name, reason or f"{VARIABLE}, or the GPU, rules them out")

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Weighted sum of this rank's experts, [n, H] -> [n, H]; vLLM runs shared experts."""
        if not self.n_experts:
            return torch.zeros_like(x)
        if self.ordered is not None:
            return self.ordered.product(layer, x, topk_ids, topk_weights)
        memory, first = layer.packed_bytes, self.first_expert
        y: Tensor = dequantized_experts(x, topk_ids, topk_weights, memory, self.facts, first)
        return y


def _local(layer: Any, expert: int) -> int:
    """Number of an expert on this rank, -1 for experts of others."""
    return int(layer._map_global_expert_id_to_local_expert_id(expert))


def _check_eager(layer: str, reason: str) -> None:
    """Refuse what cannot be captured in CUDA graphs.

    Raises:
        ModelError: vLLM is to capture them.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None or not config.model_config.enforce_eager:
        raise ModelError(
            f"{layer}: no kernel runs these experts ({reason}), and torch cannot be captured in "
            "CUDA graphs; start vLLM with --enforce-eager, or choose formats that have kernels"
        )
