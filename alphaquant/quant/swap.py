"""Putting an assignment's weights into a model, from the bank; only what changed is written.

Either into the whole model, which follows one assignment after the other (`Swapper`), or into one
layer at a time, for any number of assignments, after which it has its own weights again
(`swapped_layer`). A file of the bank is opened once per layer and format. What is read goes to the
model's device packed, and becomes weights there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.bank import BankLayer
from alphaquant.spaces.assignment import Assignment

OpenLayer = Callable[[str, int], BankLayer]
"""Opens the file of a format and a layer: `Bank.layer`."""


class Swapper:
    """A model whose weights follow assignments.

    The model's own weights are overwritten; everything that needs the original (Hessians, costs,
    teacher) comes before the first swap.
    """

    def __init__(self, model_map: ModelMap, open_layer: OpenLayer) -> None:
        """Start from the original weights.

        Args:
            model_map: the model; `apply` writes its weights.
            open_layer: opens the packed matrices (`Bank.layer`).
        """
        self._map = model_map
        self._open_layer = open_layer
        self._current: dict[str, str] = {}

    @property
    def map(self) -> ModelMap:
        """The model and where its matrices are."""
        return self._map

    @property
    def open_layer(self) -> OpenLayer:
        """What opens the packed matrices."""
        return self._open_layer

    @property
    def model(self) -> nn.Module:
        """The model, with the weights of the last assignment."""
        return self._map.model

    @torch.no_grad()
    def apply(self, assignment: Assignment) -> int:
        """Write the matrices whose format differs from the current one.

        Returns:
            How many were written.
        """
        return sum(self._apply(part, assignment.formats) for part in self._map.parts)

    def _apply(self, layer: LayerSite, formats: Mapping[str, str]) -> int:
        """The same in one layer."""
        changed = [m for m in layer.matrices() if self._current.get(m.name) != formats[m.name]]
        reader = _LayerReader(layer, self._open_layer)
        for matrix in changed:
            view = self._map.view(matrix.name)
            view.copy_(reader.weight(matrix.name, formats[matrix.name], view))
            self._current[matrix.name] = formats[matrix.name]
        return len(changed)


class LayerWeights:
    """One layer's weights while several assignments are tried on it; see `swapped_layer`."""

    def __init__(self, layer: LayerSite, open_layer: OpenLayer, most_bytes: int) -> None:
        """Keep the layer's own weights, unless they are in a file and come back from there.

        Args:
            layer: whose weights are written.
            open_layer: opens the packed matrices.
            most_bytes: of weights that are kept for the next assignment that has them.
        """
        self._views = dict(layer.views())
        self._pages = layer.fresh_pages  # what somebody swapped in for longer is in no file
        kept = self._views if self._pages is None else {}
        self._own = {name: view.clone() for name, view in kept.items()}
        self._reader = _LayerReader(layer, open_layer)
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._bytes_left = most_bytes
        self._current: dict[str, str] = {}

    def write(self, formats: Mapping[str, str]) -> None:
        """Give the layer the weights of formats by matrix name, of the whole model or the layer.

        Raises:
            StoreError: a file of the bank is damaged.
        """
        for name, view in self._views.items():
            if self._current.get(name) != formats[name]:
                view.copy_(self._weight(name, formats[name], view))
                self._current[name] = formats[name]

    def restore(self) -> None:
        """Give the layer its own weights."""
        if self._pages is not None and self._current:
            self._pages.restore()
        for name in self._own.keys() & self._current.keys():
            self._views[name].copy_(self._own[name])
        self._current = {}

    def _weight(self, name: str, format_name: str, like: Tensor) -> Tensor:
        found = self._kept.get((name, format_name))
        if found is None:
            found = self._reader.weight(name, format_name, like)
            n_bytes = found.numel() * found.element_size()
            if n_bytes <= self._bytes_left:
                self._kept[name, format_name] = found
                self._bytes_left -= n_bytes
        return found


@contextmanager
def swapped_layer(
    layer: LayerSite, open_layer: OpenLayer, most_bytes: int = 0
) -> Iterator[LayerWeights]:
    """A layer whose weights can be written, and that has its own ones again on leaving.

    Args:
        layer: of the model.
        open_layer: opens the packed matrices (`Bank.layer`).
        most_bytes: of weights in memory, so that what several assignments have is dequantized
            once.
    """
    with torch.no_grad():
        weights = LayerWeights(layer, open_layer, most_bytes)
        try:
            yield weights
        finally:
            weights.restore()


class _LayerReader:
    """The packed matrices of one layer; a file is opened when the first of its format is read."""

    def __init__(self, layer: LayerSite, open_layer: OpenLayer) -> None:
        self._matrices = {matrix.name: matrix for matrix in layer.matrices()}
        self._index, self._open_layer = layer.index, open_layer
        self._files: dict[str, BankLayer] = {}

    def weight(self, name: str, format_name: str, like: Tensor) -> Tensor:
        """A matrix's weights in a format, on the device and in the dtype of `like`."""
        if format_name not in self._files:
            self._files[format_name] = self._open_layer(format_name, self._index)
        packed = self._files[format_name].read(self._matrices[name])
        return packed.to(like.device).dequantize().to(like.dtype)
