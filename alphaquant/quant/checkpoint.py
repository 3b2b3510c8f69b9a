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

A directory is written under another name and renamed when it is complete.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.quant.engine import QuantizedMatrix
from alphaquant.quant.models import (
    ModelMap,
    checkpoint_dtype,
    kept_state,
    map_model,
    model_problem,
    named_dtype,
    stored_dtype,
)
from alphaquant.quant.modules import install_packed_modules
from alphaquant.spaces.formats import parse_format

CHECKPOINT_VERSION = 1
QUANT_METHOD = "alphaquant"
_INDEX = "model.safetensors.index.json"


@dataclass
class CheckpointWriter:
    """Writes a packed checkpoint layer by layer; nothing appears at the target before `finish`.

    Attributes:
        target: the directory to make.
        overwrite: replace an existing one.
    """

    target: Path
    overwrite: bool = False
    _files: dict[str, str] = field(default_factory=dict)
    _formats: dict[str, str] = field(default_factory=dict)
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
            self._formats[item.matrix.name] = item.packed.format.name
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
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "version": CHECKPOINT_VERSION,
            "formats": self._formats,
        }
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


def load(path: str | Path, device: str = "cpu", dtype: str = "auto") -> nn.Module:
    """Load a packed checkpoint; weights stay packed and are dequantized in the forward pass.

    Args:
        path: directory that `aq-quantize` wrote.
        device: where the tensors go.
        dtype: of activations and kept tensors; `auto` is float32 on the CPU, else the
            checkpoint's.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        StoreError: the directory is incomplete or damaged.
        ModelError: it is no packed checkpoint.
    """
    directory = Path(path)
    if not is_packed(directory):
        raise ModelError(
            f"{path} is no packed checkpoint of aq-quantize; give the directory named by its --out"
        )
    model = _empty_model(directory)
    _fill(model, read_tensors(directory), _compute_dtype(dtype, device, model), str(path))
    model.requires_grad_(False)
    return model.to(device).eval()


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a packed checkpoint.

    Raises:
        StoreError: a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    try:
        index = json.loads((directory / _INDEX).read_text())
        for file in sorted(set(index["weight_map"].values())):
            tensors |= load_file(directory / file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StoreError(
            f"{directory} is incomplete or damaged ({error}); quantize again"
        ) from error
    return tensors


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


def _empty_model(directory: Path) -> nn.Module:
    """The model of a packed checkpoint, with packed modules on the meta device.

    Raises:
        StoreError: `quantization_config` is of another version or of other matrices.
        ModelError: transformers cannot build the model.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory)
        quantization = config.quantization_config
        del config.quantization_config
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(model_problem(directory, error)) from error
    if quantization.get("version") != CHECKPOINT_VERSION:
        raise StoreError(
            f"{directory} has format version {quantization.get('version')}, this program reads "
            f"{CHECKPOINT_VERSION}; update it"
        )
    model_map = map_model(model)
    formats = {name: parse_format(f) for name, f in quantization.get("formats", {}).items()}
    if set(formats) != set(model_map.inventory.by_name):
        raise StoreError(
            f"{directory}: config.json names formats for {len(formats)} matrices that are not the "
            f"{len(model_map.inventory.matrices)} of the model; the file is damaged or belongs to "
            "another version of transformers: quantize again"
        )
    install_packed_modules(model_map, formats)
    return model


def _compute_dtype(dtype: str, device: str, model: nn.Module) -> torch.dtype:
    if dtype != "auto":
        return named_dtype(dtype)
    return torch.float32 if device == "cpu" else checkpoint_dtype(model)


def _fill(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, source: str) -> None:
    """Give every parameter and buffer its tensor; tied parameters follow.

    Raises:
        StoreError: a tensor has no place or another shape, or a place gets none.
    """
    parameters = dict(model.named_parameters())
    state = {
        k: t.to(dtype) if k in parameters and t.is_floating_point() else t
        for k, t in tensors.items()
    }
    try:
        found = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise StoreError(f"{source} is damaged ({reason}); quantize again") from error
    model.tie_weights()  # type: ignore[operator]
    # A buffer is not on the meta device and would keep its initial values.
    filled = {k for k, t in model.state_dict().items() if not t.is_meta}
    lost = [k for k in found.missing_keys if k not in filled or k not in parameters]
    if found.unexpected_keys or lost:
        examples = (found.unexpected_keys + lost)[:3]
        raise StoreError(
            f"{source}: {len(found.unexpected_keys)} tensors have no place in the model and "
            f"{len(lost)} places stay empty, e.g. {', '.join(examples)}; the checkpoint is "
            "damaged or belongs to another version of transformers: quantize again"
        )
