"""The files of a checkpoint that is to be quantized: what is in them, and what a model left out.

A checkpoint can hold tensors that transformers does not load: heads that predict further tokens
(MTP), layers beyond the configuration's number. They are carried: copied byte for byte into the
packed checkpoint, counted in its bytes, and named.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.loads import CHOSEN_FIELDS
from alphaquant.models.sites import Carried, ModelMap
from alphaquant.spaces.json_files import JsonError, read_object
from alphaquant.spaces.units import Kept

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations of transformers call their numbers of decoder layers and routed experts."""

_MOST_MODULES = 10_000
"""Layers, or experts of a layer; published models have less than a tenth of it."""

BLOCK_SCALES = "_scale_inv"
"""End of the name of the scales of fp8 blocks."""

_SCALES = (BLOCK_SCALES, "_blocks", "_scales")
"""Ends of names that belong to published mxfp4 and fp8 weights, which are dequantized."""


def locate(name: str | Path) -> Path | None:
    """The directory with a model's files: itself, or where the hub's cache keeps them."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(name), "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def check_source(directory: Path) -> dict[str, Any]:
    """Check the shape of a checkpoint's files before transformers reads them.

    Returns:
        The content of config.json.

    Raises:
        ModelError: naming the file and what is wrong in it.
    """
    config = _object(directory / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise ModelError(
            f"{directory / 'config.json'}: quantization_config is {quantization!r}; it is an "
            "object, or absent: correct or remove it"
        )
    check_config(directory / "config.json", config)
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{file} is damaged or incomplete ({error}); fetch or copy it again"
            ) from error
    return config


def check_config(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers that no model has, before one is made of them.

    Args:
        file: that says so, for messages.
        config: its content.

    Raises:
        ModelError: naming the number.
    """
    _check_counts(file, config)
    _check_chosen(file, config)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of a checkpoint; none where it keeps its weights in other files.

    Raises:
        ModelError: the index is damaged, names what is missing, or leaves the directory.
    """
    index = directory / INDEX
    single = directory / SINGLE_FILE
    if not index.exists():
        return [single] if single.exists() else []
    places = _object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise ModelError(
            f"{index}: weight_map must be an object, tensor -> name of a file; fetch the index "
            "again"
        )
    if single.exists():  # what transformers reads
        return [single]
    files = []
    for name in sorted(set(places.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(
                f"{index} names {name!r}, outside {directory}; nothing outside is read: correct "
                "the index"
            )
        if not (directory / name).is_file():
            raise ModelError(f"{index} names {name}, which is not there; fetch it, or the index")
        files.append(directory / name)
    return files


def check_blocks(directory: Path, block: tuple[int, int]) -> None:
    """Refuse weights in fp8 blocks that transformers would dequantize with other blocks.

    transformers 5.23 (`Fp8Dequantize`) divides a weight by the size of its grid of scales instead
    of by the block that the configuration states. Where the last block is short, as it is for 192
    rows in blocks of 128, that is an error at best and wrong numbers at worst: two blocks of 96.

    Args:
        directory: of the checkpoint.
        block: rows and columns that share a scale.

    Raises:
        ModelError: naming a weight, its shape and its grid.
    """
    shapes: dict[str, list[int]] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                shapes[name] = opened.get_slice(name).get_shape()
    for name, grid in shapes.items():
        shape = shapes.get(name.removesuffix(BLOCK_SCALES), [])
        if not name.endswith(BLOCK_SCALES) or len(shape) < 2 or len(grid) < 2:
            continue
        for n, n_blocks, size in zip(shape[-2:], grid[-2:], block, strict=True):
            if n_blocks > 1 and n != n_blocks * size:
                raise ModelError(
                    f"{directory}: {name.removesuffix(BLOCK_SCALES)} has {n} rows or columns in "
                    f"{n_blocks} blocks of {size}, the last one short, and transformers would "
                    "dequantize it with blocks of equal size; convert the checkpoint to bfloat16 "
                    "with its publisher's script, and give that"
                )


def with_source(model_map: ModelMap, name: str | Path) -> ModelMap:
    """The map of a model with the directory that it came from and what it left out there.

    Args:
        model_map: the model, with or without weights.
        name: the local directory or hub id that it came from.

    Raises:
        ModelError: a file is damaged.
    """
    directory = locate(name)
    if directory is None:
        return model_map
    # A model that was dequantized while it was loaded has forgotten that; the file has not.
    is_quantized = _object(directory / "config.json").get("quantization_config") is not None
    carried = _unread(model_map.model, weight_files(directory), is_quantized)
    kept = tuple(Kept(c.name, c.n_weights, c.n_bytes) for c in carried)
    inventory = replace(model_map.inventory, kept=(*model_map.inventory.kept, *kept))
    return replace(model_map, inventory=inventory, carried=carried, source=directory)


def carried_text(model_map: ModelMap) -> str | None:
    """One line about the tensors that are carried, None if there are none."""
    if not model_map.carried:
        return None
    names = sorted(c.name for c in model_map.carried)
    n_bytes = sum(c.n_bytes for c in model_map.carried)
    return (
        f"{len(names)} tensors ({n_bytes} bytes) of {model_map.source} are no part of "
        f"{type(model_map.model).__name__} as config.json describes it and are kept as they are: "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    )


def read_carried(model_map: ModelMap) -> dict[str, Tensor]:
    """The carried tensors, by name."""
    found: dict[str, Tensor] = {}
    for file in sorted({c.file for c in model_map.carried}):
        with safe_open(file, framework="pt") as opened:
            found |= {
                c.name: opened.get_tensor(c.name) for c in model_map.carried if c.file == file
            }
    return found


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except FileNotFoundError as error:
        raise ModelError(f"{file} is not there; give a directory that holds it") from error
    except (OSError, JsonError) as error:
        raise ModelError(f"{file} cannot be read: {error}; fetch or copy it again") from error


def _check_counts(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers of layers and experts that would take all memory, or leave no model.

    Modules are made before any tensor is looked at, so nothing else would stop them.
    """
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        for name in (*_LAYERS, *_EXPERTS):
            value = part.get(name)
            least = 1 if name in _LAYERS else 0
            if isinstance(value, int) and not least <= value <= _MOST_MODULES:
                raise ModelError(
                    f"{file}: {name} is {value}; models have {least} to {_MOST_MODULES}: correct "
                    "it, or fetch the file again"
                )


def _check_chosen(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse numbers of chosen experts that no router can choose."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        counts = [part[n] for n in _EXPERTS if isinstance(part.get(n), int)]
        for name in CHOSEN_FIELDS:
            chosen = part.get(name)
            most = max(counts, default=0)
            if most and isinstance(chosen, int) and not 1 <= chosen <= most:
                raise ModelError(
                    f"{file}: {name} is {chosen}; with {most} experts it is 1 to {most}: "
                    "correct it"
                )


def _unread(model: nn.Module, files: list[Path], is_quantized: bool) -> tuple[Carried, ...]:
    """Tensors of the files that have no place in a model; not blocks and scales of its weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    typed: Any = model
    transforms = get_model_conversion_mapping(typed)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: Any = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    found = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                if is_quantized and name.endswith(_SCALES):
                    continue
                place, _ = rename_source_key(
                    name, renamings, converters, typed.base_model_prefix, state
                )
                if place not in state and name not in state:
                    part = opened.get_tensor(name)
                    found.append(Carried(name, file, part.numel(), part.nbytes))
    return tuple(found)
