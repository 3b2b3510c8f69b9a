"""What a `mixed_precision` file means for a model: which matrix comes from where.

Made from config.json and the headers of files: nothing is loaded.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.mapping import map_model
from alphaquant.models.quantized.byte_forms import ByteForm
from alphaquant.models.quantized.compressed import Form, PlainForm
from alphaquant.models.quantized.ct_forms import NaiveForm, PackedIntForm
from alphaquant.models.quantized.foreign_files import ForeignCheckpoint, Found, open_foreign
from alphaquant.models.quantized.word_forms import AwqForm, GptqForm
from alphaquant.models.sites import ModelMap
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.spaces.units import Matrix

_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<part>w13_weight|w2_weight)")


class Planned(NamedTuple):
    """A matrix that is taken from a checkpoint.

    Attributes:
        matrix: of the model.
        source: the checkpoint.
        found: where it is in there.
    """

    matrix: Matrix
    source: ForeignCheckpoint
    found: Found


@dataclass(frozen=True)
class MixedPlan:
    """What is to be loaded.

    Attributes:
        weights: the matrices of every weight of the file that was found, by its name.
        precisions: of these weights.
        problems: why other weights were not found, by name.
    """

    weights: Mapping[str, tuple[Planned, ...]]
    precisions: Mapping[str, str]
    problems: Mapping[str, str]

    @property
    def by_matrix(self) -> dict[str, Planned]:
        """What is planned, by the matrix's name in the model."""
        return {one.matrix.name: one for parts in self.weights.values() for one in parts}


def make_plan(config: MixedPrecisionConfig, model: nn.Module) -> MixedPlan:
    """Find every weight of a file in its checkpoint.

    Args:
        config: the file.
        model: without weights, or with them.

    Raises:
        ConfigError: one matrix is named twice.
        ModelError: a checkpoint cannot be opened, or the model has no matrices.
    """
    model_map, named = map_model(model), dict(model.named_modules())
    sources = {name: open_foreign(config.sources[name]) for name in _used(config)}
    weights: dict[str, tuple[Planned, ...]] = {}
    problems: dict[str, str] = {}
    seen: dict[str, str] = {}
    for weight, precision in config.weight_mapping.items():
        source = sources[precision]
        try:
            matrices = _matrices_of(weight, model_map, named)
            weights[weight] = tuple(_planned(m, source, precision) for m in matrices)
        except ModelError as error:
            problems[weight] = str(error)
            continue
        for matrix in matrices:
            other = seen.setdefault(matrix.name, weight)
            if other != weight:
                raise ConfigError(
                    f"weight_mapping names {matrix.name} twice, as {other} and as {weight}; keep "
                    "one of them"
                )
    found = {weight: config.weight_mapping[weight] for weight in weights}
    return MixedPlan(weights, found, problems)


def _used(config: MixedPrecisionConfig) -> list[str]:
    return sorted(set(config.weight_mapping.values()))


def _matrices_of(
    weight: str, model_map: ModelMap, named: Mapping[str, nn.Module]
) -> tuple[Matrix, ...]:
    """The matrices that the name of a weight means.

    Raises:
        ModelError: the model has none of this name.
    """
    known = {name: m for m in model_map.inventory.matrices for name in (m.name, *m.aliases)}
    expert = _EXPERT.fullmatch(weight)
    if expert is not None:
        return tuple(_expert_matrices(model_map, weight, expert))
    name = weight.removesuffix(".weight")
    module = named.get(name)
    if name in known and name != weight:
        return (known[name],)
    if type(module) is nn.Linear and name != weight:  # beside the decoder layers: a head
        rows, cols = module.weight.shape
        return (Matrix(name, rows, cols, "dense", layer=-1),)
    raise ModelError(
        f"{type(model_map.model).__name__} has no linear or expert called {weight}; names are "
        f"such as {model_map.inventory.matrices[0].name}.weight, and of experts "
        "...experts.0.w13_weight and ...experts.0.w2_weight"
    )


def _expert_matrices(model_map: ModelMap, weight: str, expert: re.Match[str]) -> Iterator[Matrix]:
    """Gate and up, or down, of an expert.

    Raises:
        ModelError: there is no such expert.
    """
    for layer in model_map.layers:
        for site in layer.experts:
            number = int(expert["number"])
            own = {m.name.rsplit(".", 2)[0] for m in site.matrices(0)}
            own |= {name.rsplit(".", 2)[0] for m in site.matrices(0) for name in m.aliases}
            if expert["experts"] not in own:
                continue
            if number >= site.n_experts:
                raise ModelError(
                    f"{weight}: {site.name} has experts 0 to {site.n_experts - 1}; correct the "
                    "number"
                )
            yield from (
                site.inner(number) if expert["part"] == "w13_weight" else [site.down[number]]
            )
            return
    raise ModelError(
        f"{type(model_map.model).__name__} has no experts called {expert['experts']}; they are "
        f"{', '.join(s.name for layer in model_map.layers for s in layer.experts) or 'none'}"
    )


def _planned(matrix: Matrix, source: ForeignCheckpoint, precision: str) -> Planned:
    """Where a matrix is, of the kind that its precision says.

    Raises:
        ModelError: it is not there, or is of another kind.
    """
    found = source.find(matrix)
    if not _is_of(found.form, precision):
        raise ModelError(
            f"{source.directory} keeps {found.module} as {found.form.name}, which is not "
            f"{precision}: map it to another precision, or correct {precision}_path"
        )
    return Planned(matrix, source, found)


def _is_of(form: Form, precision: str) -> bool:
    """Whether a form is of the kind that the name of a precision promises."""
    element: Any = getattr(form, "element", None)
    match precision:
        case "fp16":
            return isinstance(form, PlainForm)
        case "fp8":
            return isinstance(form, ByteForm | NaiveForm) and element == "e4m3"
        case "gptq_int4":
            return isinstance(form, GptqForm) and form.bits == 4
        case "awq_int4":
            return isinstance(form, AwqForm)
        case "int8" | "int4":
            is_int = isinstance(form, GptqForm | AwqForm | PackedIntForm) or element == "int"
            return is_int and form.code_bits() == int(precision[3:])
    return True
