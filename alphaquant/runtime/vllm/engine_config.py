"""The quantization that vLLM finds in config.json, and which of its layers run how.

Order of calls, of vLLM 0.32 and 0.33: `from_config` (the entry of config.json),
`maybe_update_config` (the folder and the model's type), `apply_vllm_mapper` (names of the model
class), `get_quant_method` for every layer while the model is built, `get_checkpoint_weight_mapper`
before tensors are read. Between processes the configuration is pickled.

What is not packed stays vLLM's: routers, norms, and layers whose matrices are all bf16, which its
own kernels run.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from alphaquant.errors import ModelError
from alphaquant.models.quantization_config import QUANT_METHOD, PackedFormats, read_formats
from alphaquant.runtime.vllm.engine_names import (
    RENAMED,
    Ends,
    check_formats,
    check_served,
    find_ends,
    formats_of,
    rename_matrices,
    shard_names,
    substituted,
)
from alphaquant.spaces.formats import Format

VERSIONS = ("0.32", "0.33")
"""Of vLLM, whose interfaces for layers of experts are internal and change."""


def check_version(version: str) -> None:
    """Refuse a vLLM that the plug-in was not made for.

    Raises:
        ModelError: another version than `VERSIONS`.
    """
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise ModelError(
            f"vLLM {version} is installed, and packed checkpoints are served by vLLM "
            f"{' and '.join(VERSIONS)}; install one of these"
        )


class PackedConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not there to be checked
    """`quantization_config` of a packed checkpoint.

    Attributes:
        formats: of the matrices, by the names that vLLM uses.
        model_type: of the model, as in config.json.
        ends: what is packed beside the layers.
        checked: formats whose kernels were compared in this process.
        served: matrices that a layer of vLLM was built for, in this process.
    """

    def __init__(self, formats: PackedFormats) -> None:
        """Take the formats.

        Args:
            formats: as config.json has them.

        Raises:
            ModelError: something in it is not served here.
        """
        super().__init__()
        check_formats(formats)
        self.formats: Mapping[str, Format] = formats.weights
        self.model_type = ""
        self.ends = Ends(None, None)
        self.checked: set[tuple[str, Format]] = set()
        self.served: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process of vLLM."""
        self.__dict__.update(state)
        self._ask_for_ends()

    @property
    def packed(self) -> frozenset[str]:
        """Matrices that are not bf16."""
        return frozenset(name for name, fmt in self.formats.items() if fmt.is_quantized)

    def _ask_for_ends(self) -> None:
        """Let vLLM ask for embeddings and heads where these are packed."""
        if self.ends.head is not None or self.ends.embeddings is not None:
            from alphaquant.runtime.vllm.vocabulary_method import ask_for_plain_ends

            ask_for_plain_ends()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PackedConfig":
        """Read the entry of config.json.

        Raises:
            StoreError: it is of another version, or damaged.
            ModelError: of vLLM's version, or as in `__init__`.
        """
        import vllm

        check_version(vllm.__version__)
        return cls(read_formats(config, "the model"))

    def get_name(self) -> str:
        """`alphaquant`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Every dtype that vLLM computes in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least that vLLM itself runs on; older GPUs than 8.0 compute in plain torch."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: everything is in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the files of a local checkpoint, and use vLLM's names.

        Raises:
            StoreError: a file or tensor is missing or damaged.
        """
        from alphaquant.runtime.vllm.stored_files import check_stored

        if Path(model_name).is_dir():
            check_stored(Path(model_name), self.formats)
        self.model_type = getattr(hf_config, "model_type", "")
        self.formats = rename_matrices(self.formats, lambda n: substituted(n, self.model_type))
        self.ends = find_ends(self.packed, hf_config)
        self._ask_for_ends()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename matrices as the model class renames tensors."""
        self.formats = rename_matrices(self.formats, hf_to_vllm_mapper.map_name)
        found = find_ends(self.packed, None)
        self.ends = replace(self.ends, head=found.head, embeddings=found.embeddings)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Renames tensors that are read, before the model class does; see `engine_names`.

        Raises:
            ModelError: the model was built without a layer for some packed matrix.
        """
        from vllm.distributed import get_pp_group
        from vllm.model_executor.models.utils import WeightsMapper

        if get_pp_group().world_size == 1:
            check_served(self.packed, self.served)
        return WeightsMapper(orig_to_new_substr=dict(RENAMED.get(self.model_type, {})))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer is loaded and run; None leaves it to vLLM.

        Raises:
            ModelError: the layer cannot be served as it is packed.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        if isinstance(layer, RoutedExperts):
            return self._of_experts(layer)
        if isinstance(layer, LinearBase):
            return self._of_linear(prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            is_head = isinstance(layer, ParallelLMHead)
            return self._of_vocabulary(layer.org_vocab_size, prefix, is_head=is_head)
        fmt = self.formats.get(prefix)
        if fmt is not None and fmt.is_quantized:
            raise ModelError(
                f"{prefix} is packed as {fmt.name} and is a "
                f"{type(layer).__name__} of vLLM, where the plug-in serves linears, experts, "
                "lm_head and embeddings; give it bf16 and quantize again"
            )
        return None

    def _of_linear(self, prefix: str) -> Any:
        from alphaquant.runtime.vllm.linear_method import PackedLinearMethod

        names = shard_names(prefix, self.packed_modules_mapping)
        formats = formats_of(names, self.formats, prefix)
        if formats is None or not any(fmt.is_quantized for fmt in formats):
            return None
        self.served.update(names)
        return PackedLinearMethod(dict(zip(names, formats, strict=True)), self.checked)

    def _of_experts(self, layer: Any) -> Any:
        from alphaquant.runtime.vllm.experts_method import (
            PackedExpertsMethod,
            check_servable,
            expert_names,
        )

        names = expert_names(layer)
        formats = formats_of(names, self.formats, layer.layer_name)
        if formats is None or not any(fmt.is_quantized for fmt in formats):
            return None
        check_servable(layer)
        self.served.update(names)
        known = dict(zip(names, formats, strict=True))
        return PackedExpertsMethod(layer.moe_config, known, self.checked)

    def _of_vocabulary(self, n_words: int, prefix: str, *, is_head: bool) -> Any:
        """How a layer with a row per word is loaded and run."""
        from alphaquant.runtime.vllm.packed_vocabulary import PackedVocabulary
        from alphaquant.runtime.vllm.vocabulary_method import (
            PackedVocabularyMethod,
            TiedHeadMethod,
        )

        if is_head and self.ends.is_tied_head(n_words):
            return TiedHeadMethod(str(self.ends.embeddings))
        name = self.ends.matrix_of(prefix, n_words, is_head=is_head)
        if name is None:
            return None
        self.served.add(name)
        matrix = PackedVocabulary(
            name,
            self.formats[name],
            self.checked,
            is_looked_up=not is_head,
            is_multiplied=is_head or self.ends.is_tied,
        )
        return PackedVocabularyMethod(matrix)
