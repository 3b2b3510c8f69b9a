"""Packed checkpoints: a directory with a transformers configuration, packed weights and a report.

Layout::

    config.json                      the model's own, with quantization_config
                                     {quant_method, version, formats}
    model-layer-003.safetensors      packed matrices of a layer,
                                     <matrix>.<codes|scales|zeros|global_scale|weight>
    model-kept.safetensors           everything else, in the original checkpoint's dtype
    model.safetensors.index.json     tensor name -> file, total bytes
    quantize_report.json             one row per matrix, provenance
    tokenizer files, generation_config.json

A directory is written under another name and renamed when it is complete. What transformers'
`save_pretrained` writes from a loaded one is a packed checkpoint too: the same tensors in files of
its own naming, without the report. It reads both through `alphaquant.quant.transformers_plugin`.
"""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.quant.dequant_cache import parse_cache_size
from alphaquant.quant.engine import QuantizedMatrix
from alphaquant.quant.kernel_use import IMPLEMENTATION
from alphaquant.quant.loading import model_problem, named_dtype, register_architectures
from alphaquant.quant.models import checkpoint_dtype, kept_state, map_model, stored_dtype
from alphaquant.quant.modules import PackedLinear, cache_dequantized, install_packed_modules
from alphaquant.quant.quantization_config import (
    QUANT_METHOD,
    PackedFormats,
    make_quantization_config,
)
from alphaquant.quant.sites import ModelMap
from alphaquant.spaces.formats import Format

_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"

_DTYPE_NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""How safetensors calls the dtypes of packed tensors."""


_IMPLEMENTATIONS: dict[bool | None, dict[str, str]] = {
    None: {},
    True: {"experts_implementation": IMPLEMENTATION},
    False: {"experts_implementation": "eager"},
}
"""How transformers is told whether kernels run the model."""


class StoredTensor(NamedTuple):
    """A tensor as the header of a file describes it.

    Attributes:
        shape: its shape.
        dtype: its dtype, as safetensors calls it.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass
class CheckpointWriter:
    """Writes a packed checkpoint layer by layer; nothing appears at the target before `finish`.

    Attributes:
        target: the directory to make.
        overwrite: replace an existing one.
        activations: what the inputs of matrices are rounded to, by matrix name.
        quantized_bytes: of the packed matrices so far.
    """

    target: Path
    overwrite: bool = False
    activations: Mapping[str, Format] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)
    _formats: dict[str, Format] = field(default_factory=dict)
    _n_bytes: int = 0
    quantized_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse an existing target early, before hours are spent.

        Raises:
            StoreError: the target exists and `overwrite` is off.
        """
        if self.target.exists() and not self.overwrite:
            raise StoreError(
                f"{self.target} exists already; give another --out, or --overwrite to replace it"
            )
        shutil.rmtree(self._part, ignore_errors=True)
        self._part.mkdir(parents=True)

    @property
    def _part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    def add_layer(self, index: int, items: list[QuantizedMatrix]) -> None:
        """Write one layer's packed matrices."""
        tensors: dict[str, Tensor] = {}
        for item in items:
            self._formats[item.matrix.name] = item.packed.format
            self.quantized_bytes += item.packed.n_bytes
            tensors |= {
                f"{item.matrix.name}.{k}": t.cpu().contiguous()
                for k, t in item.packed.tensors.items()
            }
        self._save(f"model-layer-{index:03d}.safetensors", tensors)

    def finish(
        self, model_map: ModelMap, report: Mapping[str, Any], tokenizer: Any = None
    ) -> Path:
        """Write everything else and move the directory to its target.

        Args:
            model_map: the original model.
            report: content of `quantize_report.json`.
            tokenizer: saved beside the weights, if given.

        Returns:
            The target.
        """
        dtype = checkpoint_dtype(model_map.model)
        kept = {
            k: t.to("cpu", stored_dtype(t, dtype))
            for k, t in kept_state(model_map.model, model_map.layers).items()
        }
        self._save("model-kept.safetensors", {k: t.contiguous().clone() for k, t in kept.items()})
        index = {
            "metadata": {"total_size": self._n_bytes},
            "weight_map": dict(sorted(self._files.items())),
        }
        self._write_json(_INDEX, index)
        config = json.loads(model_map.model.config.to_json_string(use_diff=False))  # type: ignore[union-attr,operator]
        # transformers would take the dtype of the first tensor for that of a model without one.
        config["dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = make_quantization_config(
            PackedFormats(self._formats, self.activations)
        )
        self._write_json("config.json", config)
        self._write_json("quantize_report.json", report)
        if tokenizer is not None:
            tokenizer.save_pretrained(self._part)
        if model_map.model.can_generate():  # type: ignore[operator]
            model_map.model.generation_config.save_pretrained(self._part)  # type: ignore[union-attr,operator]
        if self.target.exists():
            shutil.rmtree(self.target)
        self._part.rename(self.target)
        return self.target

    def discard(self) -> None:
        """Remove what was written, after a failure."""
        shutil.rmtree(self._part, ignore_errors=True)

    def _save(self, file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, self._part / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; a checkpoint is served by others.
        (self._part / file).chmod(0o644)
        self._files |= dict.fromkeys(tensors, file)
        self._n_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def _write_json(self, file: str, content: Mapping[str, Any]) -> None:
        (self._part / file).write_text(json.dumps(content, indent=1) + "\n")


def is_packed(path: str | Path) -> bool:
    """Whether a directory is a packed checkpoint of ours."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("quantization_config", {}).get("quant_method") == QUANT_METHOD)


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    dequant_cache: str | int = 0,
    kernels: bool | None = None,
) -> nn.Module:
    """Load a packed checkpoint; weights stay packed and are dequantized in the forward pass.

    Args:
        path: directory that `aq-quantize` wrote.
        device: where the tensors go.
        dtype: of activations and kept tensors; `auto` is float32 on the CPU, else the
            checkpoint's.
        dequant_cache: most bytes of dequantized weights to keep between calls, such as `512MiB`;
            0 keeps none. See `alphaquant.quant.modules.cache_dequantized`. What kernels run
            keeps none.
        kernels: whether Triton kernels run it, see `alphaquant.quant.kernel_use`; by default where
            they can, on NVIDIA GPUs with triton installed.

    Returns:
        The transformers model, in evaluation mode, gradients off.

    Raises:
        ConfigError: the size of the cache cannot be read.
        StoreError: the directory is incomplete or damaged.
        ModelError: it is no packed checkpoint, kernels were asked for and cannot run here, or a
            kernel gives other numbers than torch.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory, cache_bytes = Path(path), parse_cache_size(dequant_cache)
    if not is_packed(directory):
        raise ModelError(
            f"{path} is no packed checkpoint of aq-quantize; give the directory named by its --out"
        )
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for, and torch finds no CUDA here; use cpu")
    wanted: str | torch.dtype = dtype if dtype == "auto" else named_dtype(dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32
    register_architectures()
    tensor_files(directory)
    try:
        stated = AutoConfig.from_pretrained(directory).dtype
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=wanted,
            device_map=None if device == "cpu" else {"": device},
            **_IMPLEMENTATIONS[kernels],
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(directory, error)) from error
    # transformers overwrites this with the dtype in memory, but kept tensors are counted in the
    # checkpoint's own.
    model.config.dtype = stated
    loaded: nn.Module = model
    loaded.requires_grad_(False)
    if cache_bytes:
        cache_dequantized(loaded, cache_bytes)
    return loaded.eval()


def tensor_files(directory: Path) -> list[Path]:
    """The files with the tensors of a packed checkpoint, sorted.

    Raises:
        StoreError: one is missing, or their index is missing or damaged.
    """
    single = directory / _SINGLE_FILE
    if single.exists():
        return [single]
    try:
        index = json.loads((directory / _INDEX).read_text())
        files = sorted({directory / file for file in index["weight_map"].values()})
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(directory, error) from error
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise _damaged(directory, f"{', '.join(missing[:3])} missing")
    return files


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a packed checkpoint.

    Raises:
        StoreError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(directory):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise _damaged(directory, error) from error
    return tensors


def read_headers(files: Iterable[str | Path], source: str) -> dict[str, StoredTensor]:
    """Shape and dtype of every tensor in some files; no tensor is read.

    Args:
        files: safetensors.
        source: the checkpoint, for messages.

    Raises:
        StoreError: a file is missing or damaged.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    part = opened.get_slice(name)
                    found[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise _damaged(source, error) from error
    return found


def quantized_bytes(directory: Path) -> int:
    """Bytes of the packed matrices in a checkpoint's files, as the tensors in them say."""
    quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
    names = set(quantization["formats"])
    n_bytes = 0
    for key, tensor in read_tensors(directory).items():
        name, _, part = key.rpartition(".")
        if name in names and part != "bias":  # a bias is kept, beside the packed weight
            n_bytes += tensor.numel() * tensor.element_size()
    return n_bytes


def make_packed(model: nn.Module, formats: PackedFormats, source: str) -> frozenset[str]:
    """Replace the quantizable modules of an empty model by packed ones.

    Args:
        model: a causal language model on the meta device.
        formats: of every matrix and its inputs, as the checkpoint says.
        source: the checkpoint, for messages.

    Returns:
        Names of the packed tensors in the model's state.

    Raises:
        StoreError: the formats are of other matrices than the model has.
        ModelError: the layout of the model is not supported.
    """
    model_map = map_model(model)
    if set(formats.weights) != set(model_map.inventory.by_name):
        raise StoreError(
            f"{source}: config.json names formats for {len(formats.weights)} matrices that are "
            f"not the {len(model_map.inventory.matrices)} of {type(model).__name__}; load it as a "
            "causal language model; if it is one, the file is damaged or belongs to another "
            "version of transformers: quantize again"
        )
    install_packed_modules(model_map, formats)
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for name, _ in module.named_buffers(recurse=False)
    )


def check_files(
    model: nn.Module, packed_names: frozenset[str], files: Sequence[str] | None, source: str
) -> None:
    """Check that files hold exactly the tensors of a packed model; only their headers are read.

    Args:
        model: on the meta device, with packed modules.
        packed_names: what `make_packed` gave; these must have their dtype too.
        files: safetensors.
        source: the checkpoint, for messages.

    Raises:
        StoreError: a file is damaged, a tensor is missing, extra or of another shape or dtype.
        ModelError: there are no files.
    """
    if not files:
        raise ModelError(
            f"{source}: a packed checkpoint is loaded from its files, not from a state_dict; give "
            "its directory to from_pretrained"
        )
    found = read_headers(files, source)
    tied: Any = model.all_tied_weights_keys
    places = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    extra, lost = sorted(found.keys() - places.keys()), sorted(places.keys() - found.keys())
    if extra or lost:
        raise StoreError(
            f"{source}: {len(extra)} tensors have no place in the model and {len(lost)} places "
            f"stay empty, e.g. {', '.join((extra + lost)[:3])}; the checkpoint is damaged or "
            "belongs to another version of transformers: quantize again"
        )
    for name, tensor in places.items():
        shape, dtype = found[name]
        expected = _DTYPE_NAMES[tensor.dtype] if name in packed_names else dtype
        if (shape, dtype) != (tuple(tensor.shape), expected):
            raise _damaged(
                source,
                f"{name} is {dtype} {list(shape)}, expected {expected} {list(tensor.shape)}",
            )


def _damaged(source: str | Path, reason: object) -> StoreError:
    text = " ".join(str(reason).split())
    return StoreError(f"{source} is incomplete or damaged ({text}); quantize again")
