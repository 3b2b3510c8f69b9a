"""Loading a model without its weights in memory: they stay in files and come when read."""

import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.loading import load_model
from alphaquant.models.mapping import find_layers
from alphaquant.models.pages.conversion import Unfilled, fill_from, paged_auto, plain_class
from alphaquant.models.pages.file_digests import file_digests
from alphaquant.models.pages.prepared import READ, Asked, Form, find_form
from alphaquant.models.pages.private_maps import ModelPages, Place, can_map, map_pages
from alphaquant.models.pages.scratch import Scratch
from alphaquant.progress import Progress, no_progress


@dataclass(frozen=True)
class Opened:
    """A model, and where its weights are.

    Attributes:
        model: in evaluation mode, gradients off.
        pages: its weights in private maps of files; None where they are in memory.
        folder: where what belongs to these files is kept; None where `pages` is.
        is_in_place: whether the maps are of the checkpoint's own files.
    """

    model: nn.Module
    pages: ModelPages | None = None
    folder: Path | None = None
    is_in_place: bool = False


class _Filler:
    """Fills one model from the prepared form of its checkpoint."""

    def __init__(
        self, root: Path, wanted: torch.dtype, progress: Progress, scratch: Scratch | None
    ) -> None:
        self._root, self._wanted, self._progress = root, wanted, progress
        self._scratch = scratch
        self.pages: ModelPages | None = None
        self.folder: Path | None = None
        self.is_in_place = False

    def forget(self) -> None:
        """Remove the copy of a checkpoint that turned out to be incomplete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, unfilled: Unfilled) -> Any:
        """See `Fill`."""
        cast = self._wanted if unfilled.is_quantized else None
        paths = [path for path, _ in find_layers(unfilled.model)]
        asked = Asked(unfilled, paths, cast, self._root, self._progress)
        found = find_form(asked)
        if found is None:
            return None
        form, self.folder = found
        form = form if self._scratch is None else _near(form, self.folder, self._scratch)
        self.pages, self.is_in_place = _map_form(form, asked), form.is_in_place
        info = form.info(unfilled)
        for part in (*self.pages.layers.values(), self.pages.rest):
            fill_from(unfilled, part.tensors, info)
        return info


def open_weights(
    name: str | Path,
    dtype: str,
    root: Path,
    progress: Progress = no_progress,
    scratch: Scratch | None = None,
) -> Opened:
    """Load a model for the CPU with its weights mapped from files.

    Reading them takes memory that the system, or whoever holds the pages, can have back; writing
    them takes memory and changes no file.

    Args:
        name: a local directory or a hub id.
        dtype: of the computation, see `load_model`.
        root: folder of prepared checkpoints; a copy is made there unless the checkpoint's own
            files will do.
        progress: told how far the copy is, in files, as the stage `prepare`.
        scratch: copies of the files on this machine, which are mapped instead; None for none.

    Raises:
        ModelError: the model cannot be found or read, or is quantized already.
        StoreError: the copy cannot be written.
    """
    if not can_map():
        return Opened(load_model(name, "cpu", dtype))
    fillers: list[_Filler] = []

    def through(auto: Any, wanted: torch.dtype) -> Any:
        fillers.append(_Filler(root, wanted, progress, scratch))
        return paged_auto(auto, fillers[-1].fill)

    try:
        model = load_model(name, "cpu", dtype, through=through)
    except ModelError:
        for filler in fillers:
            filler.forget()
        raise
    plain_class(model)
    filler = fillers[-1]
    if filler.pages is None:
        return Opened(model)
    return Opened(model, filler.pages, filler.folder, filler.is_in_place)


def _near(form: Form, folder: Path, scratch: Scratch) -> Form:
    """The same form with its places in copies on this machine, where there are such."""
    files = sorted({place.file for place in form.places.values()})
    digests = file_digests(files, folder.parent / READ / f"near-{folder.name}.json")
    near = {file: scratch.local(file, partial(digests.__getitem__, file)) for file in files}
    moved = {name: replace(place, file=near[place.file]) for name, place in form.places.items()}
    return replace(form, places=moved)


def _map_form(form: Form, asked: Asked) -> ModelPages:
    by_owner: dict[str | None, dict[str, Place]] = defaultdict(dict)
    for name, place in form.places.items():
        by_owner[asked.owner(name)][name] = place
    layers = {path: map_pages(by_owner[path]) for path in asked.layers}
    return ModelPages(layers, map_pages(by_owner[None]))
