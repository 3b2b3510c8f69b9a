"""Packed checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(DIR)`.

transformers picks a quantizer by the `quant_method` in config.json. Ours replaces the modules of
the empty model by packed ones, checks the files before a weight is read, and keeps transformers
from renaming, fusing or casting what is packed. The model saves with `save_pretrained`.

`alphaquant/__init__.py` has `register` called when transformers is imported. That can be in the
middle of an import of ours that begins with `import transformers`, so what needs torch and our
models is imported inside the methods: at the top it could meet a half-imported module.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from alphaquant.models.quantization_config import QUANT_METHOD, read_formats
from alphaquant.spaces.formats import Format

_ALIGNMENT_BYTES = 64
"""Of torch's memory on a CPU."""


class AlphaQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; its attributes are the entries of the file.

    Nothing is checked here: the quantizer does, once it knows the name of the checkpoint.
    """

    def __init__(self, **entries: Any) -> None:
        """Take all entries.

        Args:
            entries: those of config.json.
        """
        self.__dict__.update(entries)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own


class AlphaQuantizer(HfQuantizer):
    """Loads and saves packed checkpoints; it does not quantize, `aq-quantize` does."""

    requires_calibration = True
    is_trainable = False

    def __init__(self, quantization_config: AlphaQuantConfig, **kwargs: Any) -> None:
        """Take the configuration.

        Args:
            quantization_config: of the checkpoint.
            kwargs: of `HfQuantizer`.
        """
        super().__init__(quantization_config, **kwargs)
        self._packed_names: frozenset[str] = frozenset()
        self._formats: Mapping[str, Format] = {}
        self._files: tuple[str, ...] = ()
        self._can_compile = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        """Make the model (on the meta device) one with packed modules, and check the files.

        Raises:
            StoreError: the checkpoint is of another version, of other matrices, incomplete or
                damaged.
            ModelError: no files are given, or the model's layout is not supported.
        """
        from alphaquant.runtime.checkpoint import check_files, make_packed

        config: Any = model.config
        source = str(config.name_or_path)
        formats = read_formats(self.quantization_config.to_dict(), source)
        self._formats, self._files = formats.weights, tuple(checkpoint_files or ())
        self._packed_names = make_packed(model, formats, source)
        check_files(model, self._packed_names, self._files, source, formats.carried)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Align parameters, and let kernels run what they can.

        Parameters that lie in a mapped file move to memory of the allocator's alignment. Matrix
        products on a CPU add in another order for other alignments: without it the same
        numbers saved into files of another layout can give other last bits of the logits. Packed
        tensors may stay in the file; they are dequantized into new memory anyway.

        Raises:
            StoreError: scales or other numbers are NaN, infinite, or of a wrong sign.
        """
        self._check_numbers(model)
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT_BYTES:
                parameter.data = parameter.data.clone()
        self._choose_kernels(model)
        return model

    def _check_numbers(self, model: nn.Module) -> None:
        from alphaquant.runtime.checkpoint_files import file_of
        from alphaquant.runtime.integrity import bad_span, numbers_error, span_of

        state = ((name, t) for name, t in model.state_dict().items() if not t.is_meta)
        spans = (span_of(name, tensor, self._formats) for name, tensor in state)
        bad = bad_span(span for span in spans if span is not None)
        if bad is not None:
            raise numbers_error(*bad, file_of(bad[0], self._files))

    def _choose_kernels(self, model: nn.Module) -> None:
        """Let kernels run the model, as `experts_implementation` says.

        `alphaquant` asks for them, `eager` for plain torch; transformers' own default leaves the
        choice to the device.
        """
        from alphaquant.runtime.kernel_use import (
            IMPLEMENTATION,
            can_compile,
            use_kernels,
            use_kernels_where_possible,
        )

        config: Any = model.config
        if config._experts_implementation == IMPLEMENTATION:
            use_kernels(model)
        elif config._experts_implementation != "eager":
            use_kernels_where_possible(model)
        self._can_compile = can_compile(model)

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model (on GPUs, with the static cache)."""
        return self._can_compile

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """No conversion at all: the names in the files are those of the packed model."""
        return []

    def get_new_dtype(
        self, converter: Any, param: Any, dtype: torch.dtype | None
    ) -> torch.dtype | None:
        """None (as stored) for what is packed, else the dtype that the model asks for.

        A model that keeps modules in float32 by a part of their name ("gate") would have the
        scales of matrices of that name widened.
        """
        if converter.target_patterns[0] in self._packed_names:
            return None
        asked: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return asked

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the packed tensors as they are."""
        return True


def register() -> None:
    """Make `quant_method: alphaquant` known to transformers; again is nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(AlphaQuantConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(AlphaQuantizer)
    ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, refuse_unpacked)


def refuse_unpacked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What runs a model's own experts under the name of our kernels: nothing does.

    Raises:
        ModelError: always; experts of a packed checkpoint are modules of ours.
    """
    from alphaquant.errors import ModelError

    raise ModelError(
        f"experts_implementation {QUANT_METHOD!r} runs packed checkpoints of aq-quantize, and "
        f"{type(module).__name__} is not packed: load such a checkpoint, or choose another"
    )
