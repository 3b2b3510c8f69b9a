"""How vLLM loads and runs lm_head and embeddings that are packed, and layers that ask for that.

`get_quant_method` of the configuration decides which of the two methods a layer gets. Many model
classes of vLLM build embeddings, and some a head, without the configuration of a quantized model,
so that nobody is asked (Mixtral, GLM-4 MoE, Gemma 2): `ask_for_plain_ends` puts layers of this
file in the place of vLLM's, through its registry for that, which ask in any case.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from alphaquant.errors import ModelError
from alphaquant.models.quantization_config import QUANT_METHOD
from alphaquant.runtime.vllm.packed_vocabulary import PackedVocabulary


class PackedVocabularyMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is not there to be checked
    """Loads and runs embeddings, lm_head, or one matrix for both."""

    def __init__(self, matrix: PackedVocabulary) -> None:
        """Take the matrix."""
        super().__init__()
        self.matrix = matrix

    def create_weights(
        self, layer: nn.Module, *sizes: Any, params_dtype: torch.dtype, **extra: Any
    ) -> None:
        """Make room; the sizes are in the layer."""
        self.matrix.make_room(layer, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded, and order it; errors as of `PackedVocabulary.finish`."""
        self.matrix.finish(layer)

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., H]."""
        return self.matrix.look_up(layer, ids)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., words of this rank and padding]."""
        return self.matrix.product(layer, x, bias)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head that has a matrix of its own in the files keeps it."""
        return layer


class TiedHeadMethod(QuantizeMethodBase):  # type: ignore[misc]  # vLLM is not there to be checked
    """A head without weights of its own: it multiplies with packed embeddings."""

    def __init__(self, name: str) -> None:
        """Take the name of the embeddings, for messages."""
        super().__init__()
        self.name = name
        self.embeddings: Any = None

    def create_weights(self, layer: nn.Module, *sizes: Any, **extra: Any) -> None:
        """No weights."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Remember the embeddings; the head stays a layer of its own, for its bias."""
        self.embeddings = embed_tokens
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing is loaded here.

        Raises:
            ModelError: the model class of vLLM did not tie the head.
        """
        if self.embeddings is None:
            raise ModelError(
                f"{self.name} is packed and is lm_head too, but vLLM's class of this model does "
                "not tie them; search with --include none, which keeps both in bf16"
            )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., H] -> [..., words of this rank and padding]."""
        y: Tensor = self.embeddings.quant_method.apply(self.embeddings, x, bias=bias)
        return y


class AskingEmbedding(VocabParallelEmbedding):  # type: ignore[misc]  # vLLM is not there to be checked
    """vLLM's embeddings, with the configuration of a packed checkpoint where one is served."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        """Arguments as of vLLM's."""
        super().__init__(*sizes, **_with_config(sizes, options, VocabParallelEmbedding.__init__))


class AskingHead(ParallelLMHead):  # type: ignore[misc]  # vLLM is not there to be checked
    """vLLM's head, likewise."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        """Arguments as of vLLM's."""
        super().__init__(*sizes, **_with_config(sizes, options, ParallelLMHead.__init__))


def ask_for_plain_ends() -> None:
    """Put the layers of this file in the place of vLLM's; again, or beside others, is nothing.

    Where somebody else's layers are registered, embeddings that nobody asks for are refused when
    their tensors are loaded.
    """
    for base, layer in ((VocabParallelEmbedding, AskingEmbedding), (ParallelLMHead, AskingHead)):
        if base.__name__ not in op_registry_oot:
            PluggableLayer.register_oot(name=base.__name__)(layer)


def _with_config(
    sizes: tuple[Any, ...], options: Mapping[str, Any], init: Callable[..., None]
) -> dict[str, Any]:
    """Options of a layer, with the configuration of our checkpoint where there is none."""
    from vllm.config import get_current_vllm_config_or_none

    names = init.__code__.co_varnames[1 : 1 + len(sizes)]
    config = get_current_vllm_config_or_none()
    found = None if config is None else config.quant_config
    is_ours = found is not None and found.get_name() == QUANT_METHOD
    given = options.get("quant_config")
    if not is_ours or given is not None or "quant_config" in names:
        return dict(options)
    return {**options, "quant_config": found}
