# mypy: disable-error-code="no-untyped-call"
"""DeepSeek-MoE v1 (`model_type` "deepseek"), which transformers does not define.

A thin definition from parts of transformers: Llama's decoder with the feed-forward network of all
but the first layers replaced by routed experts beside shared ones (Dai et al. 2024, arXiv
2401.06066, section 3): softmax router, top-k, weights renormalized only if `norm_topk_prob` says
so, shared experts always on with weight 1. Tensors have the names of published checkpoints once
transformers has fused the experts, as it does for Qwen2-MoE.

It is for quantization and inference: no auxiliary loss.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeExperts,
    Qwen2MoeMLP,
    Qwen2MoeTopKRouter,
)

MODEL_TYPE = "deepseek"


class DeepseekConfig(LlamaConfig):
    """Configuration; the defaults are those of deepseek-moe-16b."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0


class DeepseekMoe(nn.Module):
    """Routed experts beside shared ones."""

    def __init__(self, config: DeepseekConfig) -> None:
        """Make an empty block."""
        super().__init__()
        self.gate = Qwen2MoeTopKRouter(config)
        self.experts = Qwen2MoeExperts(config)
        width = config.moe_intermediate_size * (config.n_shared_experts or 0)
        self.shared_experts = Qwen2MoeMLP(config, intermediate_size=width) if width else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [B, T, H] -> [B, T, H]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, expert_ids = self.gate(flat)
        output: Tensor = self.experts(flat, expert_ids, weights).view_as(hidden_states)
        return (
            output if self.shared_experts is None else output + self.shared_experts(hidden_states)
        )


class DeepseekModel(LlamaModel):
    """The decoder."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        """Make a Llama and put the sparse blocks into it.

        Raises:
            ValueError: the router is of another kind than that of the published checkpoints.
        """
        if config.scoring_func != "softmax":
            raise ValueError(
                f"scoring_func {config.scoring_func!r} is not supported for {MODEL_TYPE}; "
                "published checkpoints use softmax"
            )
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            if config.is_sparse(index):
                layer.mlp = DeepseekMoe(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Qwen2MoeExperts | Qwen2MoeTopKRouter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class DeepseekForCausalLM(LlamaForCausalLM):
    """The language model."""

    config_class = DeepseekConfig

    def __init__(self, config: DeepseekConfig) -> None:
        """Make a Llama with this decoder."""
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.post_init()


def register() -> None:
    """Make transformers' auto classes know this model; doing it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, DeepseekConfig, exist_ok=True)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
    fusing: Any = get_checkpoint_conversion_mapping("qwen2_moe")
    register_checkpoint_conversion_mapping(MODEL_TYPE, fusing, overwrite=True)
