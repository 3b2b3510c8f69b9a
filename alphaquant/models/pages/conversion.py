"""transformers' own loading, for the tensors of one layer at a time.

transformers loads a model in one call: it makes the modules without weights, renames and merges
the checkpoint's tensors into parameters, fills the modules, and then ties weights, makes what no
file holds and writes its report. Here only the filling is done in another way. `paged_auto` gives
the auto class under which `from_pretrained` does all of that and hands the filling to us, and
`convert` runs transformers' renaming and merging on the tensors of a few parameters.

Source: transformers 5.23, `PreTrainedModel._load_pretrained_model` and
`convert_and_load_state_dict_in_model`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.models.pages.private_maps import Place

Fill = Callable[["Unfilled"], Any]
"""Fills a model; gives transformers' `LoadStateDictInfo`, or None to leave it to transformers."""


@dataclass(frozen=True)
class Unfilled:
    """A model of transformers without weights, with what is needed to fill it.

    Attributes:
        model: on the meta device.
        files: of the checkpoint, in order.
        config: transformers' `LoadStateDictConfig`: dtypes, renamings, dequantizer.
    """

    model: Any
    files: Sequence[str]
    config: Any

    @property
    def is_quantized(self) -> bool:
        """Whether transformers dequantizes the checkpoint."""
        return self.config.hf_quantizer is not None

    @property
    def dequantizer(self) -> str:
        """How it does so; empty where it does not."""
        own = self.config.hf_quantizer
        return "" if own is None else f"{type(own).__name__} {own.quantization_config}"


@dataclass(frozen=True)
class Target:
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: of the first parameter that it becomes a part of; of none where the model lacks it.
        is_merged: whether anything but its name is changed.
    """

    name: str
    is_merged: bool


def paged_auto(auto: Any, fill: Fill) -> Any:
    """An auto class whose models are filled by `fill`; it is the given one in all else.

    Args:
        auto: an auto class of transformers.
        fill: called once per model. Models of a checkpoint's own code are not filled by it.
    """
    mapping = _PagedMapping(auto._model_mapping, fill)
    return type(auto.__name__, (auto,), {"_model_mapping": mapping})


def plain_class(model: nn.Module) -> None:
    """Make a model that came through `paged_auto` one of its ordinary class again."""
    own = type(model)
    if "_load_pretrained_model" in own.__dict__ and own.__dict__.get("_is_paged"):
        model.__class__ = own.__mro__[1]


def find_targets(unfilled: Unfilled, keys: Sequence[str]) -> dict[str, Target]:
    """Where the tensors of a checkpoint go, in the order in which transformers takes them.

    Args:
        unfilled: the model.
        keys: names of the tensors.
    """
    from transformers.core_model_loading import (
        WeightConverter,
        dot_natural_key,
        rename_source_key,
    )

    state = unfilled.model.state_dict()
    prefix = unfilled.model.base_model_prefix
    rules = copy.deepcopy(list(unfilled.config.weight_mapping or ()))  # they note what they met
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: Any = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        found[key] = Target(name, pattern is not None)
    return found


def convert(unfilled: Unfilled, tensors: Mapping[str, Any]) -> Any:
    """Rename, merge and cast some tensors of a checkpoint into the model's parameters.

    Args:
        unfilled: the model; its parameters are replaced.
        tensors: all tensors of some targets, by name in the checkpoint.

    Returns:
        `LoadStateDictInfo`; everything that these tensors do not fill is among its missing keys.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    if had_bars:  # one bar per call would be one per layer
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        info, _ = convert_and_load_state_dict_in_model(
            model=unfilled.model,
            state_dict=dict(tensors),
            load_config=unfilled.config,
            disk_offload_index=None,
        )
    finally:
        if had_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return info


def convert_unread(unfilled: Unfilled, places: Mapping[str, Place]) -> Any:
    """As `convert`, without reading: the parameters get their dtypes and shapes, no numbers."""
    return convert(unfilled, {key: _Unread(place) for key, place in places.items()})


def fill_from(unfilled: Unfilled, tensors: Mapping[str, Tensor], info: Any) -> None:
    """Make finished tensors the parameters and buffers of a model.

    Args:
        unfilled: the model.
        tensors: by name in the model.
        info: `LoadStateDictInfo`; they are taken from its missing keys.
    """
    from transformers.core_model_loading import set_param_for_module

    for name, tensor in tensors.items():
        set_param_for_module(unfilled.model, name, tensor, info, unfilled.config.hf_quantizer)


def empty_info(unfilled: Unfilled) -> Any:
    """`LoadStateDictInfo` of a model that nothing was loaded into."""
    from transformers.utils.loading_report import LoadStateDictInfo

    return LoadStateDictInfo(
        missing_keys=set(unfilled.model.state_dict()),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )


def take_filled(unfilled: Unfilled, before: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the state that were replaced since `before`; the model forgets their numbers.

    Args:
        unfilled: the model.
        before: its state with parameters as they are (`keep_vars`), at the time.
    """
    found = {}
    for name, tensor in unfilled.model.state_dict(keep_vars=True).items():
        if tensor is before.get(name) or not isinstance(tensor, Tensor) or tensor.is_meta:
            continue
        found[name] = tensor.detach()
        path, _, leaf = name.rpartition(".")
        module = unfilled.model.get_submodule(path)
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = leaf in module._parameters
        setattr(module, leaf, nn.Parameter(empty, requires_grad=False) if is_parameter else empty)
    return found


class _Unread:
    """Stands for a tensor in a file: transformers casts it, and gets one without numbers."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __getitem__(self, index: Any) -> "_Unread":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self._place.shape, dtype=dtype or self._place.dtype, device="meta")


class _PagedMapping:
    """Configuration class -> model classes that are filled by `fill`."""

    def __init__(self, mapping: Any, fill: Fill) -> None:
        self._mapping, self._fill = mapping, fill

    def __contains__(self, config_class: Any) -> bool:
        return config_class in self._mapping

    def __getitem__(self, config_class: Any) -> Any:
        found = self._mapping[config_class]
        if isinstance(found, list | tuple):
            return [_paged_class(one, self._fill) for one in found]
        return _paged_class(found, self._fill)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mapping, name)


def _paged_class(base: Any, fill: Fill) -> Any:
    """A subclass of a model class, of the same name, that `fill` fills."""

    def load(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *others: Any
    ) -> Any:
        files = list(checkpoint_files or ())
        is_readable = bool(files) and all(str(f).endswith(".safetensors") for f in files)
        if state_dict is None and is_readable and load_config.device_map is None:
            info = fill(Unfilled(model, files, load_config))
            if info is not None:
                return info, None
        return base._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *others
        )

    members = {
        "_load_pretrained_model": staticmethod(load),
        "_is_paged": True,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (base,), members)
