"""Models and tokenizers from a directory or the hub, through transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaquant.errors import ModelError


def register_architectures() -> None:
    """Make transformers know the models that it lacks and the project defines."""
    from alphaquant.quant.deepseek_moe import register

    register()


def load_model(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    quantized: bool = False,
) -> nn.Module:
    """Load a causal language model with transformers, in evaluation mode, gradients off.

    Args:
        name: a local directory or a hub id.
        device: `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`; `auto` is float32 on the CPU (bfloat16 is slow
            there) and the checkpoint's own elsewhere.
        trust_remote_code: run code that comes with the checkpoint.
        quantized: load checkpoints of other quantizers too, as transformers does, to run them.

    Raises:
        ModelError: the model cannot be found or read, or is quantized already.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_architectures()
    wanted: str | torch.dtype = "auto" if dtype == "auto" else named_dtype(dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
        dequantizing = _dequantizing(config, name, refuse=not quantized)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(name),
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            quantization_config=dequantizing,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(name, error)) from error
    if config.dtype is not None:
        # transformers overwrites this with the dtype in memory, but kept tensors are counted and
        # saved in the checkpoint's own.
        model.config.dtype = config.dtype
    loaded: nn.Module = model.to(device)
    if dequantizing is not None and isinstance(wanted, torch.dtype):
        loaded.to(wanted)  # transformers dequantizes fp8 to bfloat16, whatever was asked
    loaded.requires_grad_(False)
    return loaded.eval()


def _dequantizing(config: Any, name: str | Path, *, refuse: bool) -> Any:
    """What makes transformers dequantize a published checkpoint; None for unquantized ones.

    gpt-oss is published in mxfp4 only, DeepSeek-V3 in fp8 blocks only.

    Raises:
        ModelError: the checkpoint is quantized in another way, and `refuse` is on.
    """
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    method = str(stated.get("quant_method"))
    if method == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if method == "fp8":
        return FineGrainedFP8Config(dequantize=True)
    if not refuse:
        return None
    raise ModelError(
        f"{name} is quantized already (quant_method {method}); quantizing starts from the "
        "original weights, or from published mxfp4 or fp8 ones: give those"
    )


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating-point dtype of a name such as `bfloat16`, or a dtype itself.

    Raises:
        ModelError: there is none.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; use auto, float32, bfloat16 or float16")
    return dtype


def load_skeleton(name: str | Path) -> nn.Module:
    """The model without weights (meta device): enough for its inventory.

    Raises:
        ModelError: no configuration can be found or read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_architectures()
    try:
        config = AutoConfig.from_pretrained(str(name))
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(name, error)) from error
    return model


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer that belongs to a model, None where its directory has none.

    Weights can be quantized without one. For a directory without its files transformers makes
    tokenizers that know nothing but special tokens; those count as none.

    Raises:
        ModelError: none can be found or read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name))
    except Exception as error:  # of a file of another form tokenizers says no more than that
        if _lacks_tokenizer(Path(name)):
            return None
        raise ModelError(model_problem(name, error)) from error
    return tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def _lacks_tokenizer(directory: Path) -> bool:
    """Whether a model's directory holds no file that a tokenizer is read from."""
    patterns = ("*token*", "*vocab*", "*merges*", "*.model", "*.tiktoken", "*tekken*", "*spiece*")
    settings = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    found = {file.name for pattern in patterns for file in directory.glob(pattern)}
    return (directory / "config.json").is_file() and not found - settings


def tokenizer_missing(name: str | Path) -> str:
    """What is said where a text is to be read and the model has no tokenizer."""
    return (
        f"{name} has no tokenizer, which is needed to read texts and token ids; copy the "
        "tokenizer's files of the original model into it: tokenizer.json and "
        "tokenizer_config.json, or tokenizer.model"
    )


def model_problem(name: str | Path, error: Exception) -> str:
    """One line that says why a model could not be loaded and what to give instead."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    where = (
        f"{name} is a directory, but"
        if Path(name).is_dir()
        else f"{name} is no directory here and"
    )
    return (
        f"cannot load model {str(name)!r}: {where} transformers says: {first_line}; give 'demo', "
        "a directory with config.json, safetensors and tokenizer, or a hub id that this machine "
        "can reach"
    )
