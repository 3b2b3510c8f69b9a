"""A GGUF file's tensors as a model of transformers, decoded to bfloat16.

transformers says what a configuration, a name and a layout of llama.cpp mean, gguf decodes the
numbers. What transformers' own loader passes over in silence is checked here: every tensor of the
file must have a place, every parameter must be filled, and keys of the metadata that change
numbers must be known.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.gguf.header import GgufHeader, GgufTensor
from alphaquant.models.loading import auto_class
from alphaquant.models.source_files import check_config
from alphaquant.progress import Progress, Stage, no_progress

ARCHITECTURES = (
    *("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe"),
    *("gemma2", "gemma3", "phi3", "starcoder2"),
)
"""What is read, as llama.cpp calls it: the architectures whose logits a test compares."""

_FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys that transformers' table lacks for some architectures, and its own names of them."""

_SAID_ELSEWHERE = ("attention.value_length", "rope.dimension_count", "vocab_size")
"""Keys that repeat what tensors or other keys say."""

_CHANGES_NUMBERS = ("rope.scaling.type", "rope.scale_linear", "expert_weights_scale")
"""Keys that change the model's numbers and that transformers does not read."""

_SPLIT, _GPT2_SPLITS = "tokenizer.ggml.pre", ("gpt-2", "default", "")

_N_NAMED = 3


def read_config(header: GgufHeader) -> Any:
    """The configuration of transformers that a file's metadata stands for.

    Raises:
        ModelError: the architecture is not supported, or the model does something that
            transformers does not read from GGUF files.
    """
    from transformers import AutoConfig

    if header.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{header.path} has the architecture {header.architecture}; GGUF files of "
            f"{', '.join(ARCHITECTURES)} are read: give the original checkpoint, or run the file "
            "with aq-eval --engine llama.cpp"
        )
    _check_numbers(header)
    place, name = str(header.path.parent), header.path.name
    try:
        config = AutoConfig.from_pretrained(place, gguf_file=name, dtype=torch.bfloat16)
        own = config.to_dict()
        for key, field in _FIELDS.items():
            value = header.metadata.get(f"{header.architecture}.{key}")
            if value is not None and field in own:
                setattr(config, field, value)
    except Exception as error:  # of damaged metadata transformers may say anything
        raise _unreadable(header, error) from error
    check_config(header.path, config.to_dict())
    return config


def unread_settings(header: GgufHeader) -> tuple[str, ...]:
    """What the metadata says of model and tokenizer and nobody reads: `llama.expert_count 8`."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    prefix = f"{header.architecture}."
    spelled = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
    known: Any = GGUF_CONFIG_MAPPING[spelled.get(header.architecture, header.architecture)]
    read = {*known, *_FIELDS, *_SAID_ELSEWHERE}
    keys = [key for key in header.metadata if key.startswith(prefix)]
    unread = sorted(key for key in keys if key.removeprefix(prefix) not in read)
    # Texts of any other byte-level vocabulary are split as GPT-2 splits them.
    is_bytes = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    split = header.metadata.get(_SPLIT, "gpt-2")
    if is_bytes and split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _GPT2_SPLITS:
        unread.append(_SPLIT)
    return tuple(f"{key} {header.metadata[key]}" for key in unread)


def decode(header: GgufHeader, config: Any, progress: Progress = no_progress) -> nn.Module:
    """The model with all weights in bfloat16, on the CPU.

    Experts pass through float32, so for a moment they take twice the model's memory.

    Args:
        header: of the file.
        config: from `read_config`.
        progress: called with ("convert", tensors done, tensors).

    Raises:
        ModelError: a tensor has no place, another shape or a type that gguf cannot decode, or a
            parameter is missing.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class(config).from_config(config)
    except Exception as error:  # sizes that do not fit each other fail anywhere in transformers
        raise _unreadable(header, error) from error
    tensors = _tensors(header, model, progress)
    _fill(header, model, tensors)
    return model


def _tensors(header: GgufHeader, model: nn.Module, progress: Progress) -> dict[str, Tensor]:
    """All tensors under transformers' names, bfloat16."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    typed: Any = model
    kind: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    processor = kind(config=typed.config.to_dict())
    name_places: Any = get_gguf_hf_weights_map  # has no types
    places: dict[str, str] = name_places(model, processor)
    made: dict[str, dict[str, Tensor]] = {"tensors": {}}
    homeless = []
    progress(Stage.CONVERT, 0, len(header.tensors))
    for n_done, tensor in enumerate(header.tensors, 1):
        values = _decoded(header, tensor)
        try:
            found = processor.process(
                weights=values,
                name=tensor.name,
                tensor_key_mapping=places,
                parsed_parameters=made,
            )
        except Exception as error:  # a shape or name that the processor does not expect
            raise _unreadable(header, f"{tensor.name}: {error}") from error
        if found.name in places:
            made["tensors"][places[found.name]] = _rounded(found.weights)
        elif found.name is not None:  # None: the processor has put it into a larger tensor
            homeless.append(tensor.name)
        progress(Stage.CONVERT, n_done, len(header.tensors))
    if homeless:
        raise ModelError(
            f"{header.path}: {len(homeless)} tensors have no place in transformers' "
            f"{type(model).__name__}: {_few(homeless)}; without them it would be another model: "
            "give the original checkpoint"
        )
    return {name: tensor.to(torch.bfloat16) for name, tensor in made["tensors"].items()}


def _decoded(header: GgufHeader, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """The values of a tensor, float32, in its shape."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    data = np.memmap(header.path, np.uint8, "r", tensor.start, (tensor.n_bytes,))
    n_rows = int(np.prod(tensor.shape[:-1]))
    try:
        found = dequantize(data.reshape(n_rows, -1), GGMLQuantizationType[tensor.type])
    except (NotImplementedError, KeyError) as error:
        raise ModelError(
            f"{header.path}: tensor {tensor.name} is of type {tensor.type}, which gguf cannot "
            "decode; give the original checkpoint"
        ) from error
    return np.asarray(found, np.float32).reshape(tensor.shape)


def _fill(header: GgufHeader, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model on the meta device.

    Raises:
        ModelError: one has another shape than its place, or a place stays empty.
    """
    typed: Any = model
    wanted = model.state_dict()
    misfits = [
        f"{name} {list(tensor.shape)} instead of {list(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if tensor.shape != wanted[name].shape
    ]
    if misfits:
        raise ModelError(
            f"{header.path}: {len(misfits)} tensors have other shapes than its metadata says: "
            f"{_few(misfits)}; fetch the file again, or give the original checkpoint"
        )
    model.load_state_dict(tensors, strict=False, assign=True)
    typed.tie_weights()
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{header.path}: {len(empty)} parameters of transformers' {type(model).__name__} are "
            f"not in the file: {_few(empty)}; fetch it again, or give the original checkpoint"
        )


def _check_numbers(header: GgufHeader) -> None:
    """Refuse what would be left out of the model in silence, and numbers that no model has."""
    counts = (("block_count", "num_hidden_layers"), ("expert_count", "num_experts"))
    stated = {f: header.metadata.get(f"{header.architecture}.{key}") for key, f in counts}
    check_config(header.path, stated)  # transformers makes lists as long as these numbers
    for key in _CHANGES_NUMBERS:
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value not in (None, "none", 1.0, 0.0):
            raise ModelError(
                f"{header.path} has {header.architecture}.{key} {value}, which transformers does "
                "not read from GGUF files; give the original checkpoint"
            )


def _rounded(values: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.array(values)).to(torch.bfloat16)  # a copy: files are read-only


def _few(names: list[str]) -> str:
    return ", ".join(names[:_N_NAMED]) + (", ..." if len(names) > _N_NAMED else "")


def _unreadable(header: GgufHeader, error: object) -> ModelError:
    said = " ".join(str(error).split())[:300]
    return ModelError(
        f"{header.path} cannot be read: transformers says {said}; the file is damaged, or of a "
        "model that it does not read: fetch it again, or give the original checkpoint"
    )
