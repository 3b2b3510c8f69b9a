# mypy: disable-error-code="no-untyped-call"
"""A model whose experts sit in a ModuleList, as older transformers and remote code have them.

OLMoE's attention and norms; the block is Mixtral's of transformers 4: the router is an
`nn.Linear`, experts are called one by one with their tokens, and are named w1, w2, w3. A shared
expert is added to their sum, so that measuring the routing has something to be disturbed by.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

MODEL_TYPE = "listed_moe"


class ListedConfig(OlmoeConfig):
    """Configuration."""

    model_type = MODEL_TYPE


class ListedExpert(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, hidden: int, width: int) -> None:
        """Make an empty one."""
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """[m, H] -> [m, H]."""
        outputs: Tensor = self.w2(self.act_fn(self.w1(inputs)) * self.w3(inputs))
        return outputs


class ListedBlock(nn.Module):
    """Router, experts and a shared expert."""

    def __init__(self, config: ListedConfig) -> None:
        """Make an empty one."""
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(hidden, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            ListedExpert(hidden, width) for _ in range(config.num_experts)
        )
        self.shared_expert = ListedExpert(hidden, width)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, H] -> [B, T, H], and the router's logits."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = self.gate(flat)
        weights, chosen = torch.softmax(logits, -1).topk(self.top_k, -1)
        output = self.shared_expert(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token):
                output = output.index_add(
                    0, token, expert(flat[token]) * weights[token, slot, None]
                )
        return output.view_as(hidden_states), logits


class _Sparse(nn.Module):
    """What OLMoE's layer expects: the block's first output."""

    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.block_sparse_moe = ListedBlock(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.block_sparse_moe(hidden_states)[0]
        return output


class ListedForCausalLM(OlmoeForCausalLM):
    """The language model."""

    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        """Make an OLMoE and replace its sparse blocks."""
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _Sparse(config)
        self.post_init()


def register() -> None:
    """Make transformers' auto classes know this model; doing it again changes nothing."""
    AutoConfig.register(MODEL_TYPE, ListedConfig, exist_ok=True)
    AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM, exist_ok=True)
