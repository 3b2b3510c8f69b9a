"""The prepared form of a checkpoint: every parameter as its module has it, where it can be mapped.

A checkpoint that has this form already, because all of its tensors are whole parameters in the
dtype of the computation, is used in place. Of any other one a copy is made once, in a folder of
the cache whose name is a digest of all that the copy depends on:

    layer-000.safetensors, ...     parameters of a decoder layer
    rest.safetensors               everything else: embeddings, the last norm, the head
    form.json                      sha256 of these files, and what transformers reported
    weights-DIGEST.json            digest of the weights, see `remembered`

The folder gets its name when it is complete; a process that is killed leaves a `.part` that the
next one removes. Files are compared with their sha256 when they were changed since they were last
read (`alphaquant.models.pages.file_digests`); a copy that is damaged is made anew.

Making the copy takes the memory of one layer: its tensors in the source, and merged.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.files import locked, mark_used, whole_file, writing
from alphaquant.models.pages.conversion import (
    Target,
    Unfilled,
    convert,
    convert_unread,
    empty_info,
    find_targets,
    take_filled,
)
from alphaquant.models.pages.file_digests import file_digests
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.pages.private_maps import Place, map_pages
from alphaquant.models.pages.tensor_files import read_places, write_aligned
from alphaquant.progress import Progress, Stage

FORM_VERSION = 1
FORM = "form.json"
REST = "rest.safetensors"
READ = "read"
"""Folder beside the copies: sha256 of the checkpoints' files."""

logger = logging.getLogger(__name__)

Misfit = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a parameter, its shape in the files, its shape in the model."""


@dataclass(frozen=True)
class Form:
    """A checkpoint in prepared form.

    Attributes:
        places: where each tensor of the model's state is.
        unexpected: tensors of the checkpoint that the model lacks.
        misfits: parameters that are of another shape in the files; they have no place.
        is_in_place: whether the places are in the checkpoint's own files.
        error: problems of transformers while merging, by parameter; empty in a form that is kept.
    """

    places: Mapping[str, Place]
    unexpected: tuple[str, ...]
    misfits: tuple[Misfit, ...]
    is_in_place: bool
    error: Mapping[str, str]

    def info(self, unfilled: Unfilled) -> Any:
        """`LoadStateDictInfo` as transformers would have it, before anything is filled in."""
        info = empty_info(unfilled)
        info.unexpected_keys |= set(self.unexpected)
        info.mismatched_keys |= {
            (n, torch.Size(found), torch.Size(wanted)) for n, found, wanted in self.misfits
        }
        info.missing_keys -= {name for name, _, _ in self.misfits}
        info.conversion_errors |= self.error
        return info


@dataclass(frozen=True)
class Asked:
    """What is to be prepared.

    Attributes:
        unfilled: the model.
        layers: paths of its decoder layers, in order.
        cast: dtype of all floating-point tensors, whatever transformers makes; None to leave them.
        root: folder of prepared checkpoints.
        progress: told how far the copy is, in files.
    """

    unfilled: Unfilled
    layers: Sequence[str]
    cast: torch.dtype | None
    root: Path
    progress: Progress

    def owner(self, name: str) -> str | None:
        """The decoder layer that a tensor of the state belongs to; None for the rest."""
        return next((path for path in self.layers if name.startswith(f"{path}.")), None)

    def key(self) -> str:
        """Digest of all that the prepared form depends on."""
        files = [Path(file) for file in self.unfilled.files]
        folder = hashlib.sha256(str(files[0].resolve().parent).encode()).hexdigest()[:16]
        digests = file_digests(files, self.root / READ / f"{folder}.json")
        state = self.unfilled.model.state_dict()
        facts = {
            "form": FORM_VERSION,
            "transformers": version("transformers"),
            "files": [digests[file] for file in files],
            "cast": str(self.cast),
            "dtype": str(self.unfilled.config.dtype),
            "kept_in": sorted((k, str(v)) for k, v in self.unfilled.config.dtype_plan.items()),
            "dequantizer": self.unfilled.dequantizer,
            "class": type(self.unfilled.model).__name__,
            "rules": [repr(rule) for rule in self.unfilled.config.weight_mapping or ()],
            "layers": list(self.layers),
            "state": [(n, list(t.shape), str(t.dtype)) for n, t in state.items()],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find_form(asked: Asked) -> tuple[Form, Path] | None:
    """The prepared form of a checkpoint, made if there is none, and its folder in the cache.

    Returns:
        None where a tensor has a dtype that torch lacks.

    Raises:
        ModelError: a file of the checkpoint is damaged.
        StoreError: the copy cannot be written.
    """
    _make_root(asked.root)
    sources: dict[str, Place | None] = {}
    for file in asked.unfilled.files:
        sources |= read_places(Path(file))
    places = {name: place for name, place in sources.items() if place is not None}
    if len(places) < len(sources):
        return None
    folder = asked.root / asked.key()
    found = _read_form(folder)
    if found is not None:
        return found, folder
    targets = find_targets(asked.unfilled, list(places))
    in_place = _form_in_place(asked, places, targets)
    if in_place is not None:
        return in_place, folder
    with locked(asked.root / f"{folder.name}.lock", f"the copy {folder}", "--cache", waits=True):
        found = _read_form(folder)  # whoever had the lock before made it
        if found is None:
            found = _make_form(asked, folder, places, targets)
    return found, folder


def remembered(folder: Path, name: str, find: Callable[[], str]) -> str:
    """A text that depends on a prepared form alone, found once and kept beside it.

    Args:
        folder: of the form.
        name: digest of what else it depends on.
        find: finds it.
    """
    file = folder / f"weights-{name[:16]}.json"
    try:
        kept: str = json.loads(file.read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        kept = find()
        with writing(folder), whole_file(file) as part:
            part.write_text(json.dumps({"sha256": kept}))
    return kept


def _form_in_place(
    asked: Asked, sources: Mapping[str, Place], targets: Mapping[str, Target]
) -> Form | None:
    """The form of a checkpoint whose tensors are whole parameters; None where some are not."""
    unfilled = asked.unfilled
    if unfilled.is_quantized or any(target.is_merged for target in targets.values()):
        return None
    info = convert_unread(unfilled, sources)
    misfits = _misfits(info)
    state = unfilled.model.state_dict()
    places = {}
    for key, target in targets.items():
        tensor, place = state.get(target.name), sources[key]
        if tensor is None or target.name in {name for name, _, _ in misfits}:
            continue
        is_same = tensor.dtype == place.dtype and tuple(tensor.shape) == place.shape
        if not is_same or place.offset % place.dtype.itemsize or target.name in places:
            return None
        places[target.name] = place
    return Form(places, tuple(sorted(info.unexpected_keys)), misfits, True, info.conversion_errors)


def _misfits(info: Any) -> tuple[Misfit, ...]:
    return tuple((n, tuple(a), tuple(b)) for n, a, b in sorted(info.mismatched_keys))


def _make_form(
    asked: Asked, folder: Path, sources: Mapping[str, Place], targets: Mapping[str, Target]
) -> Form:
    """Merge and write file by file, then give the folder its name.

    Raises:
        StoreError: there is no room, or it cannot be written.
    """
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    needed = sum(t.nbytes for t in asked.unfilled.model.state_dict().values())
    _check_room(asked.root, needed)
    try:
        with writing(part, needed):
            part.mkdir(parents=True)
            made = _write_files(asked, part, sources, targets)
            if made.info.conversion_errors:  # transformers says which, and refuses the model
                unexpected = tuple(sorted(made.info.unexpected_keys))
                misfits, errors = _misfits(made.info), made.info.conversion_errors
                return Form({}, unexpected, misfits, False, errors)
            (part / FORM).write_text(json.dumps(made.facts(), indent=1))
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    found = _read_form(folder, is_new=True)
    assert found is not None
    return found


@dataclass(frozen=True)
class _Made:
    """Files of a copy: their sha256 by name, and what transformers reported of all of them."""

    digests: Mapping[str, str]
    info: Any

    def facts(self) -> dict[str, Any]:
        """For `form.json`."""
        return {
            "version": FORM_VERSION,
            "files": self.digests,
            "unexpected": sorted(self.info.unexpected_keys),
            "misfits": _misfits(self.info),
        }


def _write_files(
    asked: Asked, folder: Path, sources: Mapping[str, Place], targets: Mapping[str, Target]
) -> _Made:
    groups, total = _groups(asked, targets), empty_info(asked.unfilled)
    digests = {}
    for done, (name, keys) in enumerate(groups.items()):
        asked.progress(Stage.PREPARE, done, len(groups))
        digests[name], info = _write_file(asked, folder / name, {k: sources[k] for k in keys})
        total.unexpected_keys |= info.unexpected_keys
        total.mismatched_keys |= info.mismatched_keys
        total.conversion_errors |= info.conversion_errors
        trim_heap()
    asked.progress(Stage.PREPARE, len(groups), len(groups))
    return _Made(digests, total)


def _write_file(asked: Asked, file: Path, sources: Mapping[str, Place]) -> tuple[str, Any]:
    """Merge and write what some tensors of the checkpoint become; nothing of it stays in memory.

    Returns:
        sha256 of the file, and what transformers reports.
    """
    before = asked.unfilled.model.state_dict(keep_vars=True)
    info = convert(asked.unfilled, map_pages(sources).tensors)
    filled = take_filled(asked.unfilled, before)
    return write_aligned(file, _cast(filled, asked.cast)), info


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def _groups(asked: Asked, targets: Mapping[str, Target]) -> dict[str, list[str]]:
    """File of the copy -> the checkpoint's tensors that go into it, in order."""
    names = {path: f"layer-{i:03d}.safetensors" for i, path in enumerate(asked.layers)}
    groups: dict[str, list[str]] = {name: [] for name in names.values()}
    groups[REST] = []
    for key, target in targets.items():
        owner = asked.owner(target.name)
        groups[REST if owner is None else names[owner]].append(key)
    return groups


def _make_root(root: Path) -> None:
    """Make the folder of prepared checkpoints.

    Raises:
        StoreError: it cannot be made.
    """
    try:
        (root / READ).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot make {root}, where copies of weights go ({error}); give a folder that can be "
            "written with --cache or $ALPHAQUANT_CACHE"
        ) from error


def _check_room(root: Path, needed: int) -> None:
    """Refuse before the work what would not fit.

    Raises:
        StoreError: naming both numbers.
    """
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StoreError(
            f"the weights in the form in which they are computed with take {needed} bytes, and "
            f"{free} are free in {root}; free space there, or put the cache elsewhere with "
            "--cache or $ALPHAQUANT_CACHE"
        )


def _read_form(folder: Path, *, is_new: bool = False) -> Form | None:
    """The copy in a folder; None where there is none, or it is damaged.

    Args:
        folder: of the copy.
        is_new: it was made just now; its files are not read again.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / FORM).read_text())
        files = {folder / name: digest for name, digest in facts["files"].items()}
        unexpected, misfits = tuple(facts["unexpected"]), facts["misfits"]
        found = files if is_new else file_digests(list(files), folder / "read.json")
    except FileNotFoundError as error:
        if (folder / FORM).exists():
            logger.warning("%s is missing; the copy is made anew", error.filename)
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s); the copy is made anew", folder / FORM, error)
        return None
    for file, digest in files.items():
        if found[file] != digest:
            logger.warning("%s is damaged (its sha256 is another); the copy is made anew", file)
            return None
    mark_used(folder)
    places: dict[str, Place] = {}
    for file in files:
        places |= {name: place for name, place in read_places(file).items() if place is not None}
    rows = tuple((n, tuple(a), tuple(b)) for n, a, b in misfits)
    return Form(places, unexpected, rows, False, {})
