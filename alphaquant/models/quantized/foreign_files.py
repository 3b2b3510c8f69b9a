"""The files of a checkpoint that another tool quantized: what is there, checked, then read.

Opening one reads config.json and the headers of its safetensors and no tensor. `find` says where
the tensors of a matrix are and compares shapes and dtypes with its form, so a missing scale or a
tensor of another kind is an error before anything is read; `read` reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.quantized.compressed import (
    FLOATS,
    CompressedWeight,
    Form,
    Part,
    PlainForm,
)
from alphaquant.models.quantized.stated import Stated, read_stated
from alphaquant.models.source_files import weight_files
from alphaquant.spaces.units import Matrix

PLAIN = PlainForm()

IGNORED = frozenset(("bias", "qweight_scale", "input_scale", "input_global_scale"))
"""Parts that may stand beside a weight and do not change it: rounding of inputs, a field that some
documents give AWQ and no file has, and the bias, which is the base model's."""


class Header(NamedTuple):
    """A tensor as a file describes it.

    Attributes:
        file: that holds it.
        shape: its shape.
        dtype: its dtype, as safetensors calls it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Found:
    """Where a matrix is in a checkpoint.

    Attributes:
        module: its name there.
        form: how it is kept.
        rows: outputs.
        cols: inputs.
        parts: ends of the names of its tensors that are there.
        ignored: parts beside them that do not change it.
    """

    module: str
    form: Form
    rows: int
    cols: int
    parts: tuple[str, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForeignCheckpoint:
    """An opened checkpoint.

    Attributes:
        directory: where it is.
        stated: what it says of its matrices; None where it is not quantized.
        headers: of its tensors, by name.
    """

    directory: Path
    stated: Stated | None
    headers: Mapping[str, Header] = field(repr=False)

    def has(self, matrix: Matrix) -> bool:
        """Whether a module of this name is there."""
        return any(name in self._ends for name in (matrix.name, *matrix.aliases))

    def find(self, matrix: Matrix) -> Found:
        """Where a matrix is, with its shapes and dtypes checked.

        Raises:
            ModelError: it is not there, a tensor of it is missing, or one has another shape or
                dtype than its form.
        """
        module = self._module_of(matrix)
        held = {end: self.headers[f"{module}.{end}"] for end in self._ends[module]}
        form = self._form_of(module, matrix, held)
        wanted = form.parts(matrix.rows, matrix.cols)
        self._check_names(module, form, wanted, held)
        present = tuple(end for end in wanted if end in held)
        for end in present:
            self._check_header(f"{module}.{end}", wanted[end], held[end], form)
        ignored = tuple(sorted((held.keys() & IGNORED) - {"bias"}))
        return Found(module, form, matrix.rows, matrix.cols, present, ignored)

    def read(self, found: Found) -> CompressedWeight:
        """The tensors of a matrix.

        Raises:
            ModelError: a file is damaged, or a number in it cannot be.
        """
        tensors = {end: self.tensor(f"{found.module}.{end}") for end in found.parts}
        self._check_shape(found, tensors)
        self._check_groups(found, tensors)
        return CompressedWeight(found.form, found.rows, found.cols, tensors)

    @cached_property
    def _ends(self) -> dict[str, tuple[str, ...]]:
        """Ends of the names of every module's tensors."""
        ends: dict[str, tuple[str, ...]] = {}
        for name in self.headers:
            module, _, end = name.rpartition(".")
            ends[module] = (*ends.get(module, ()), end)
        return ends

    def _module_of(self, matrix: Matrix) -> str:
        """The name under which a matrix is in the files."""
        names = (matrix.name, *matrix.aliases)
        for name in names:
            if name in self._ends:
                return name
        raise ModelError(
            f"{self.directory} has no weight of {' or '.join(names)}; map it to a checkpoint that "
            "has it"
        )

    def _form_of(self, module: str, matrix: Matrix, held: Mapping[str, Header]) -> Form:
        """How a module is kept: as stated, or plain where its files hold plain numbers."""
        form = None if self.stated is None else self.stated.form_of(module)
        if form is None:
            return PLAIN
        needed = {e for e, p in form.parts(matrix.rows, matrix.cols).items() if p.is_required}
        is_plain = "weight" in held and held["weight"].dtype in FLOATS
        return PLAIN if is_plain and not (needed - {"weight"}) & held.keys() else form

    def _check_names(
        self, module: str, form: Form, wanted: Mapping[str, Part], held: Mapping[str, Header]
    ) -> None:
        """Refuse a matrix that lacks a tensor, or has one that nobody knows."""
        needed = [end for end, part in wanted.items() if part.is_required]
        missing = [end for end in needed if end not in held]
        if missing:
            raise ModelError(
                f"{self.directory}: {module} lacks {', '.join(missing)}; {form.name} needs "
                f"{', '.join(needed)}, and there are {', '.join(sorted(held))}: fetch the files "
                "again, or correct config.json"
            )
        unknown = sorted(held.keys() - wanted.keys() - IGNORED)
        if unknown:
            raise ModelError(
                f"{self.directory}: {module} has {', '.join(unknown)}, and {form.name} has "
                f"{', '.join(wanted)} only; its numbers could be others: correct config.json"
            )

    def _check_header(self, name: str, wanted: Part, header: Header, form: Form) -> None:
        if header.shape not in wanted.shapes or header.dtype not in wanted.dtypes:
            shapes = " or ".join(str(list(shape)) for shape in wanted.shapes)
            why = wanted.other_layouts.get(
                header.shape,
                "the files and config.json do not belong together, or are of another layout",
            )
            raise ModelError(
                f"{self.directory}: {name} is {header.dtype} {list(header.shape)}; {form.name} "
                f"has {' or '.join(sorted(wanted.dtypes))} {shapes} there: {why}"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor by its full name.

        Raises:
            ModelError: its file is damaged.
        """
        header = self.headers[name]
        try:
            with safe_open(header.file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{header.file} is damaged ({error}); fetch it again") from error
        return tensor

    def _check_shape(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a stated shape that is not the model's: the last word may hide it."""
        own = [found.rows, found.cols]
        stated = tensors["weight_shape"].tolist() if "weight_shape" in tensors else own
        if stated != own:
            raise ModelError(
                f"{self.directory}: {found.module}.weight_shape is {stated}, and the model has "
                f"{own}; give a checkpoint of this model"
            )

    def _check_groups(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Refuse groups of inputs that have no scales."""
        for end, scales, dim in (("g_idx", "scales", 0), ("weight_g_idx", "weight_scale", 1)):
            if end not in tensors:
                continue
            n_groups = tensors[scales].shape[dim]
            low, high = int(tensors[end].min()), int(tensors[end].max())
            if low < 0 or high >= n_groups:
                raise ModelError(
                    f"{self.directory}: {found.module}.{end} names groups {low} to {high} of "
                    f"{n_groups}; fetch the files again"
                )


def open_foreign(directory: Path) -> ForeignCheckpoint:
    """Open a checkpoint: what it says of itself and what its files hold; no tensor is read.

    Raises:
        ModelError: it is no checkpoint, of an unknown method, or damaged.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory} is no directory; give one with config.json and safetensors")
    stated, files = read_stated(directory), weight_files(directory)
    if not files:
        raise ModelError(f"{directory} has no model.safetensors nor an index of several; add them")
    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    part = opened.get_slice(name)
                    headers[name] = Header(file, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged ({error}); fetch it again") from error
    return ForeignCheckpoint(directory, stated, headers)
