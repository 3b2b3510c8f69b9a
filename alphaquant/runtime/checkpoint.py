"""Packed checkpoints: a directory with a transformers configuration, packed weights and a report.

Layout::

    config.json                      the model's own, with quantization_config
                                     {quant_method, version, formats}
    model-layer-003.safetensors      packed matrices of a layer,
                                     <matrix>.<codes|scales|super_scales|zeros|global_scale|weight>
    model-ends.safetensors           packed lm_head and embeddings, where these are quantized
    model-kept.safetensors           everything else, in the original checkpoint's dtype
    model-carried.safetensors        tensors of the original that the model does not load, as is
    model.safetensors.index.json     tensor name -> file, total bytes
    quantize_report.json             one row per matrix, provenance, how a first run went
    SHA256SUMS                       of every other file, see `alphaquant.runtime.integrity`
    tokenizer files, generation_config.json

A directory is written under another name and renamed when it is complete (see
`alphaquant.runtime.parts`). What transformers' `save_pretrained` writes from a loaded one is a
packed checkpoint too: the same tensors in files of its own naming, without the report and
SHA256SUMS. It reads both through `alphaquant.runtime.transformers_plugin`.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import ModelError, StoreError
from alphaquant.files import sha256_of, whole_file, writing
from alphaquant.models.dtypes import named_dtype
from alphaquant.models.ends import ends_named
from alphaquant.models.loading import (
    auto_class,
    check_device,
    freeze,
    model_problem,
    register_architectures,
)
from alphaquant.models.mapping import checkpoint_dtype, kept_state, map_model, stored_dtype
from alphaquant.models.quantization_config import (
    PackedFormats,
    is_packed,
    make_quantization_config,
)
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.models.source_files import read_carried
from alphaquant.quant.matrix import PackedMatrix, packed_shapes
from alphaquant.quant.stacks import QuantizedMatrix
from alphaquant.runtime.checkpoint_files import (
    INDEX,
    damaged,
    is_inside,
    read_headers,
    read_tensors,
    tensor_files,
)
from alphaquant.runtime.dequant_cache import parse_cache_size
from alphaquant.runtime.kernel_use import IMPLEMENTATION
from alphaquant.runtime.modules import PackedWeight, cache_dequantized, install_packed_modules
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.spaces.json_files import read_object
from alphaquant.spaces.units import ENDS

_KEPT_FILE = "model-kept.safetensors"
_CARRIED_FILE = "model-carried.safetensors"
_ENDS_FILE = "model-ends.safetensors"

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


@dataclass(frozen=True)
class LayerFile:
    """A layer's packed matrices on disk.

    Attributes:
        file: name of the file.
        sha256: of its content.
        formats: of the matrices, by name.
        tensors: names of the tensors.
        n_bytes: of the tensors.
    """

    file: str
    sha256: str
    formats: Mapping[str, str]
    tensors: tuple[str, ...]
    n_bytes: int


@dataclass
class CheckpointWriter:
    """Writes a packed checkpoint layer by layer into a directory that is there.

    Attributes:
        folder: the directory; `alphaquant.runtime.parts` moves it to its target.
        activations: what the inputs of matrices are rounded to, by matrix name.
        layers: the layers so far, by number, those of an earlier run too.
    """

    folder: Path
    activations: Mapping[str, Format] = field(default_factory=dict)
    layers: dict[int, LayerFile] = field(default_factory=dict)

    @property
    def quantized_bytes(self) -> int:
        """Of the packed matrices so far."""
        return sum(layer.n_bytes for layer in self.layers.values())

    def add_layer(self, index: int, items: list[QuantizedMatrix]) -> LayerFile:
        """Write one layer's packed matrices.

        Raises:
            StoreError: the disk is full, or the directory cannot be written.
        """
        is_beside = items[0].matrix.kind in ENDS.values()
        file = _ENDS_FILE if is_beside else f"model-layer-{index:03d}.safetensors"
        return self._write_layer(index, file, {item.matrix.name: item.packed for item in items})

    def write_layer(self, index: int, packed: Mapping[str, PackedMatrix]) -> LayerFile:
        """Write a layer's packed matrices, by name, in the place of those that it has.

        Raises:
            StoreError: the disk is full, or the directory cannot be written.
        """
        return self._write_layer(index, self.layers[index].file, packed)

    def _write_layer(self, index: int, file: str, packed: Mapping[str, PackedMatrix]) -> LayerFile:
        formats = {name: matrix.format.name for name, matrix in packed.items()}
        tensors = {
            f"{name}.{k}": t.cpu().contiguous()
            for name, matrix in packed.items()
            for k, t in matrix.tensors.items()
        }
        n_bytes = self._save(file, tensors)
        sha256 = sha256_of(self.folder / file)
        self.layers[index] = LayerFile(file, sha256, formats, tuple(tensors), n_bytes)
        return self.layers[index]

    def finish(self, model_map: ModelMap, tokenizer: Any = None) -> None:
        """Write everything but the report.

        Args:
            model_map: the original model.
            tokenizer: saved beside the weights, if given.

        Raises:
            StoreError: the disk is full, or the directory cannot be written.
        """
        model: Any = model_map.model
        dtype = checkpoint_dtype(model)
        kept = {
            k: t.to("cpu", stored_dtype(t, dtype)).contiguous().clone()
            for k, t in kept_state(model, model_map.parts).items()
        }
        layers = [self.layers[index] for index in sorted(self.layers)]
        total = self._save(_KEPT_FILE, kept) + self.quantized_bytes
        files = dict.fromkeys(kept, _KEPT_FILE)
        carried = read_carried(model_map)
        if carried:
            total += self._save(_CARRIED_FILE, carried)
            files |= dict.fromkeys(carried, _CARRIED_FILE)
        for layer in layers:
            files |= dict.fromkeys(layer.tensors, layer.file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        self.write_json(INDEX, index)
        formats = {name: parse_format(f) for layer in layers for name, f in layer.formats.items()}
        config = json.loads(model.config.to_json_string(use_diff=False))
        if model_map.source is not None:  # every field of the source, whatever transformers keeps
            config |= read_object(model_map.source / "config.json")
            _copy_processors(model_map.source, self.folder)
        # transformers would take the dtype of the first tensor for that of a model without one.
        config["dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = make_quantization_config(
            PackedFormats(formats, self.activations, tuple(sorted(carried)))
        )
        self.write_json("config.json", config)
        with writing(self.folder / "tokenizer"):
            if tokenizer is not None:
                tokenizer.save_pretrained(self.folder)
            if model.can_generate():
                model.generation_config.save_pretrained(self.folder)

    def write_json(self, file: str, content: Mapping[str, Any]) -> None:
        """Write a file of text, whole or not at all."""
        text = json.dumps(content, indent=1) + "\n"
        with (
            writing(self.folder / file, len(text)),
            whole_file(self.folder / file, len(text)) as part,
        ):
            part.write_text(text)

    def _save(self, file: str, tensors: Mapping[str, Tensor]) -> int:
        """Write tensors; their bytes."""
        n_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        with writing(self.folder / file, n_bytes), whole_file(self.folder / file, n_bytes) as part:
            save_file(dict(tensors), part, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read; others serve a checkpoint.
            part.chmod(0o644)
        return n_bytes


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
            0 keeps none. See `alphaquant.runtime.modules.cache_dequantized`. What kernels run
            keeps none.
        kernels: whether Triton kernels run it, see `alphaquant.runtime.kernel_use`; by default
            where they can, on NVIDIA GPUs with triton installed.

    Returns:
        The transformers model, in evaluation mode, gradients off.

    Raises:
        ConfigError: the size of the cache cannot be read.
        StoreError: the directory is incomplete or damaged.
        ModelError: it is no packed checkpoint, kernels were asked for and cannot run here, or a
            kernel gives other numbers than torch.
    """
    from transformers import AutoConfig

    directory, cache_bytes = _checked(path, device), parse_cache_size(dequant_cache)
    wanted: str | torch.dtype = dtype if dtype == "auto" else named_dtype(dtype)
    if dtype == "auto" and device == "cpu":
        wanted = torch.float32
    register_architectures()
    tensor_files(directory)
    try:
        config = AutoConfig.from_pretrained(directory)
        stated = config.dtype
        model: Any = auto_class(config).from_pretrained(
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
    freeze(loaded)
    if cache_bytes:
        cache_dequantized(loaded, cache_bytes)
    return loaded.eval()


def _checked(path: str | Path, device: str) -> Path:
    """The directory of a packed checkpoint, on a device that is there.

    Raises:
        ModelError: it is none, or the device is not there.
    """
    if not isinstance(path, str | os.PathLike):
        raise ModelError(f"load is given {path!r}; give the directory of a packed checkpoint")
    if not is_packed(Path(path)):
        raise ModelError(
            f"{path} is no packed checkpoint of aq-quantize; give the directory named by its --out"
        )
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for, and torch finds no CUDA here; use cpu")
    check_device(device)
    return Path(path)


def read_layer(directory: Path, file: LayerFile, layer: LayerSite) -> dict[str, PackedMatrix]:
    """A layer's packed matrices, by name.

    Raises:
        StoreError: the file is missing or damaged.
    """
    try:
        tensors = load_file(directory / file.file)
        found = {}
        for matrix in layer.matrices():
            fmt = parse_format(file.formats[matrix.name])
            parts = packed_shapes(fmt, matrix.rows, matrix.cols)
            own = {part: tensors[f"{matrix.name}.{part}"] for part in parts}
            found[matrix.name] = PackedMatrix(fmt, matrix.rows, matrix.cols, own)
    except (OSError, SafetensorError, KeyError) as error:
        raise damaged(directory / file.file, error) from error
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
    model_map = map_model(model, include=ends_named(model, formats.weights))
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
        if isinstance(module, PackedWeight)
        for name, _ in module.named_buffers(recurse=False)
    )


def check_files(
    model: nn.Module,
    packed_names: frozenset[str],
    files: Sequence[str] | None,
    source: str,
    carried: Sequence[str] = (),
) -> None:
    """Check that files hold exactly the tensors of a packed model; only their headers are read.

    Args:
        model: on the meta device, with packed modules.
        packed_names: what `make_packed` gave; these must have their dtype too.
        files: safetensors.
        source: the checkpoint, for messages.
        carried: tensors that may be there and belong to no module.

    Raises:
        StoreError: a file is damaged, a tensor is missing, extra or of another shape or dtype.
        ModelError: there are no files.
    """
    if not files:
        raise ModelError(
            f"{source}: a packed checkpoint is loaded from its files, not from a state_dict; give "
            "its directory to from_pretrained"
        )
    for file in files:
        # transformers follows an index out of the directory.
        if Path(source).is_dir() and not is_inside(os.path.relpath(file, source)):
            raise damaged(source, f"{file}, which {INDEX} names, is outside the checkpoint")
    found = {n: t for n, t in read_headers(files, source).items() if n not in carried}
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
            raise damaged(
                source,
                f"{name} is {dtype} {list(shape)}, expected {expected} {list(tensor.shape)}",
            )


def _copy_processors(source: Path, folder: Path) -> None:
    """Copy what turns images and chats into tokens, where the tokenizer does not write it."""
    for pattern in ("*processor_config.json", "chat_template*", "*.jinja"):
        for file in source.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)
