"""Models and tokenizers from a directory or the hub, through transformers."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaquant.errors import AlphaQuantError, ModelError
from alphaquant.models.dtypes import named_dtype
from alphaquant.models.layouts.padded import pad_experts
from alphaquant.models.mapping import map_model
from alphaquant.models.pages.memory import GIB, total_memory
from alphaquant.models.quantization_config import QUANT_METHOD
from alphaquant.models.quantized.foreign_files import open_foreign
from alphaquant.models.source_files import check_blocks, check_source, locate
from alphaquant.models.zero_rows import read_missing_rows

COMFORTABLE = 4
"""Float32 weights of more than one 4th of the memory leave too little for the work with them."""

logger = logging.getLogger(__name__)


def register_architectures() -> None:
    """Make transformers know the models that it lacks and the project defines."""
    from alphaquant.models.deepseek_moe import register

    register()


def load_model(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    trust_remote_code: bool = False,
    quantized: bool = False,
    through: Callable[[Any, torch.dtype], Any] | None = None,
) -> nn.Module:
    """Load a causal language model with transformers, in evaluation mode, gradients off.

    Args:
        name: a local directory or a hub id.
        device: `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`; `auto` as in `working_dtype`.
        trust_remote_code: run code that comes with the checkpoint.
        quantized: load checkpoints of other quantizers too, as transformers does, to run them.
        through: makes another auto class of transformers' and the dtype of the computation, which
            loads the model instead; for the CPU only.

    Raises:
        ModelError: the model cannot be found or read, or is quantized already.
    """
    from transformers import AutoConfig

    register_architectures()
    if dtype != "auto":
        named_dtype(dtype)  # a wrong name is told before files are looked for
    if Path(name).is_dir():
        check_source(Path(name))
    try:
        config = AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
        dequantizing = _dequantizing(config, name, refuse=not quantized)
        _check_experts(config, Path(name))
        wanted = working_dtype(name, config, device, dtype)
        auto = auto_class(config)
        if through is not None and isinstance(wanted, torch.dtype):
            auto = through(auto, wanted)
        model, report = auto.from_pretrained(
            str(name),
            dtype=wanted,
            trust_remote_code=trust_remote_code,
            # None would leave what another tool quantized packed, and its weights random.
            **({} if dequantizing is None else {"quantization_config": dequantizing}),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
        )
    except (AlphaQuantError, MemoryError):
        raise
    except Exception as error:  # a damaged configuration fails anywhere in transformers
        raise ModelError(model_problem(name, error)) from error
    _check_complete(name, model, report, can_read=dequantizing is None)
    if dequantizing is not None and isinstance(wanted, torch.dtype):
        model.to(wanted)  # transformers dequantizes fp8 to bfloat16, whatever was asked
    return _settled(model, config, device)


def _settled(model: Any, config: Any, device: str) -> nn.Module:
    """A loaded model on its device, in evaluation mode, with the dtype of its checkpoint."""
    if config.dtype is not None:
        # transformers overwrites this with the dtype in memory, but kept tensors are counted and
        # saved in the checkpoint's own.
        model.config.dtype = config.dtype
    loaded: nn.Module = model.to(device)
    freeze(loaded)
    pad_experts(loaded)
    return loaded.eval()


def freeze(model: nn.Module) -> None:
    """Let no weight have gradients, and its head not suffer from that.

    `generate` asks for the last position, a slice of one window. Where the weight has no gradient,
    torch 2.13 copies it for such a slice in bfloat16 on a CPU (`findings/`), so the slice is
    copied before.

    Args:
        model: of transformers.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_own_tensor)


def _own_tensor(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a linear, copied where one window of several positions is a slice."""
    x, *others = args
    is_slice = x.dim() == 3 and x.stride(0) != x.shape[1] * x.stride(1)
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not is_slice:
        return args
    return (x.clone(memory_format=torch.contiguous_format), *others)


def working_dtype(name: str | Path, config: Any, device: str, dtype: str) -> torch.dtype | str:
    """The dtype that a model computes with; `auto` where transformers is to choose.

    `auto` is the checkpoint's own on a GPU. On the CPU it is float32, which is exact, unless the
    checkpoint is in bfloat16 and its float32 weights would take more than a quarter of the memory:
    then it is bfloat16, and a line of the log says so.

    Args:
        name: of the model, for that line.
        config: of transformers.
        device: `cpu`, `cuda`, ...
        dtype: as asked for.

    Raises:
        ModelError: there is no such dtype.
    """
    if dtype != "auto":
        return named_dtype(dtype)
    if device != "cpu":
        return "auto"
    if config.dtype != torch.bfloat16:
        return torch.float32
    with torch.device("meta"):
        skeleton: nn.Module = auto_class(config).from_config(config)
    n_bytes, memory = 4 * sum(p.numel() for p in skeleton.parameters()), total_memory()
    if n_bytes * COMFORTABLE <= memory:
        return torch.float32
    logger.warning(
        "%s computes in bfloat16, in which it is stored: float32 weights would take %.1f GiB of "
        "%.1f GiB of memory, and at most a quarter is for them; --dtype float32 asks for it",
        name,
        n_bytes / GIB,
        memory / GIB,
    )
    return torch.bfloat16


def auto_class(config: Any) -> Any:
    """The auto class of transformers that loads a model whole: with its vision tower, if any.

    Args:
        config: of transformers.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    stated = next(iter(config.architectures or ()), None)
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    only_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names_whole = stated == with_images or (stated is None and only_text is None)
    if with_images is not None and names_whole:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _check_complete(
    name: str | Path, model: nn.Module, report: dict[str, Any], *, can_read: bool
) -> None:
    """Refuse a model that transformers filled up with random numbers.

    Args:
        name: where it was loaded from.
        model: as transformers loaded it; rows that no code reads may be filled here.
        report: of transformers.
        can_read: whether the files hold the weights as they are.

    Raises:
        ModelError: tensors are missing or of another shape than config.json says.
    """
    wrong, directory = sorted(report.get("mismatched_keys") or ()), locate(name)
    if wrong and directory is not None and can_read:
        wrong = read_missing_rows(model, directory, wrong)
    misfits = [f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in wrong]
    if misfits:
        raise ModelError(
            f"{name}: {len(misfits)} tensors have other shapes than config.json says: "
            f"{'; '.join(misfits[:3])}; give the configuration that belongs to these files"
        )
    missing = sorted(report.get("missing_keys") or ())
    broken = sorted(str(e) for e in report.get("error_msgs") or ())
    if missing or broken:
        raise ModelError(
            f"{name}: {len(missing) + len(broken)} tensors that config.json promises are not "
            f"whole in its safetensors, e.g. {', '.join([*missing, *broken][:3])}; they would be "
            "random numbers: fetch what is missing, or correct config.json"
        )


def _dequantizing(config: Any, name: str | Path, *, refuse: bool) -> Any:
    """What makes transformers dequantize a published checkpoint; None for unquantized ones.

    gpt-oss is published in mxfp4 only, DeepSeek-V3 in fp8 blocks only.

    Raises:
        ModelError: the checkpoint is quantized in another way, and `refuse` is on; or fp8 blocks
            do not divide its weights.
    """
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    method = stated.get("quant_method")
    if method == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if method == "fp8":
        if Path(name).is_dir() and stated.get("weight_block_size"):
            rows, cols = stated["weight_block_size"]
            check_blocks(Path(name), (rows, cols))
        return FineGrainedFP8Config(dequantize=True)
    if not refuse:
        return None
    raise ModelError(
        f"{name} is quantized already ({stated_text(stated)}); quantizing starts from the "
        "original weights, or from published mxfp4 or fp8 ones: give those"
    )


def _check_experts(config: Any, directory: Path) -> None:
    """Refuse experts of compressed-tensors that transformers would load wrongly without a word.

    transformers 5.23 (`CompressedTensorsDequantize`) stacks the experts of a layer from a list of
    codes and a list of scales: where one scale is missing, every later expert gets its
    neighbour's, and the last one is memory that nobody wrote. Words of another layout are read as
    if they were dense. Of linears it reports both.

    Raises:
        ModelError: naming one.
    """
    stated = getattr(config, "quantization_config", None) or {}
    if stated.get("quant_method") != "compressed-tensors" or not directory.is_dir():
        return
    with torch.device("meta"):
        skeleton: nn.Module = auto_class(config).from_config(config)
    experts = [m for m in map_model(skeleton).inventory.matrices if m.expert is not None]
    if not experts:
        return
    checkpoint = open_foreign(directory)
    for matrix in experts:
        if checkpoint.has(matrix):  # a whole expert that is missing is reported
            checkpoint.find(matrix)


def stated_text(stated: Any) -> str:
    """How a quantization_config says that a model is quantized."""
    method = stated.get("quant_method")
    fields = ", ".join(sorted(stated))
    return f"quant_method {method}" if method else f"its quantization_config has {fields}"


def check_device(name: str) -> None:
    """Refuse a device that does not exist or cannot hold numbers.

    Raises:
        ModelError: naming it.
    """
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # What follows the first sentence is a list of all of torch's backends.
        said = str(error).splitlines()[0].split(". ")[0].split(" of cpu,")[0]
        raise ModelError(
            f"device {name!r} cannot be used ({said}); use cpu, cuda or auto"
        ) from error


def load_skeleton(name: str | Path, *, quantized: bool = False) -> nn.Module:
    """The model without weights (meta device): enough for its inventory.

    Args:
        name: local directory or hub id.
        quantized: whether it may be quantized by another tool, as in `load_model`.

    Raises:
        ModelError: no configuration can be found or read, or it is quantized already.
    """
    from transformers import AutoConfig

    register_architectures()
    if Path(name).is_dir():
        check_source(Path(name))
    try:
        config = AutoConfig.from_pretrained(str(name))
        stated = getattr(config, "quantization_config", None) or {}
        is_own = stated.get("quant_method") == QUANT_METHOD
        _dequantizing(config, name, refuse=not quantized and not is_own)
        with torch.device("meta"):
            model: nn.Module = auto_class(config).from_config(config)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # a damaged configuration fails anywhere in transformers
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
    first_line = " ".join(str(error).split())[:300] or type(error).__name__
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
