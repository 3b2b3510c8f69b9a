"""One model from several checkpoints: the base model, and weights of others in its place.

    config = MixedPrecisionConfig.from_yaml("mix.yaml")
    model, statistics = load_mixed_precision(config)

or step by step, in either order of the last two lines::

    loader = TrueMixedPrecisionLoader(model.config, config)
    model, n_replaced = replace_all_with_mixed_precision(model, loader)
    statistics = loader.load_model_weights(model)

Weights stay as their checkpoints keep them (`compressed_modules`). Replacing goes layer by layer:
the base model's weights of a layer are let go of when its modules are replaced, and its experts
that the file does not name are copied first, so at most one layer is in memory twice.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.layouts.standard import ListedExperts
from alphaquant.models.loading import auto_class, load_model, register_architectures
from alphaquant.models.mapping import find_layers, known_layouts, map_layer
from alphaquant.models.pages.memory import trim_heap
from alphaquant.models.quantized.compressed import CompressedWeight
from alphaquant.models.quantized.foreign_files import PLAIN
from alphaquant.models.sites import ExpertsSite
from alphaquant.runtime.mixed.compressed_modules import CompressedExperts, CompressedLinear
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.runtime.mixed.planned import MixedPlan, Planned, make_plan
from alphaquant.runtime.modules import cache_dequantized
from alphaquant.spaces.units import Matrix

CACHE_SIZE = "512MiB"
"""Of dequantized weights, where a model keeps some between calls."""

_BF16_BYTES = 2

logger = logging.getLogger(__name__)


class MixedStatistics(TypedDict):
    """What was loaded.

    Attributes:
        loaded: weights of the file that are in the model.
        total: weights of the file.
        failed: why others are not, by name; empty without `allow_missing`.
        memory_saved_mb: what they would take in bfloat16 less what they take, in MiB.
        stored_bytes: what they take: codes, scales, zero points, order of inputs.
        bf16_bytes: what they would take in bfloat16.
        forms: how many matrices are kept in which form.
        notes: what stands beside weights in their files and was left there.
    """

    loaded: int
    total: int
    failed: dict[str, str]
    memory_saved_mb: float
    stored_bytes: int
    bf16_bytes: int
    forms: dict[str, int]
    notes: list[str]


class Replaced(NamedTuple):
    """A model and how many of its modules were replaced now."""

    model: nn.Module
    n_replaced: int


class MixedModel(NamedTuple):
    """A loaded model with its statistics."""

    model: nn.Module
    statistics: MixedStatistics


class TrueMixedPrecisionLoader:
    """Puts the weights of a `mixed_precision` file into a model.

    Attributes:
        plan: where every weight is; made from headers, before anything is loaded.
    """

    plan: MixedPlan

    def __init__(
        self,
        model_config: Any,
        mixed_precision_config: MixedPrecisionConfig,
        *,
        allow_missing: bool = False,
    ) -> None:
        """Find every weight; no tensor is read.

        Args:
            model_config: of the base model, of transformers.
            mixed_precision_config: the file.
            allow_missing: leave weights that are not found as the base model has them, with a
                warning; otherwise they are an error.

        Raises:
            ConfigError: one matrix is named twice.
            ModelError: a weight is not in its checkpoint, or a checkpoint cannot be read.
        """
        register_architectures()
        with torch.device("meta"):
            skeleton: nn.Module = auto_class(model_config).from_config(model_config)
        self.plan = make_plan(mixed_precision_config, skeleton)
        self.model_class = type(skeleton).__name__
        problems = self.plan.problems
        total = len(self.plan.weights) + len(problems)
        if problems and not allow_missing:
            name, reason = next(iter(problems.items()))
            raise ModelError(
                f"{len(problems)} of {total} weights of the mixed_precision file cannot be "
                f"loaded: {name}: {reason}{_others(list(problems)[1:])}; correct the file, or "
                "allow missing ones, which stay as in the base model"
            )
        for name, reason in problems.items():
            logger.warning("%s stays as in the base model: %s", name, reason)

    def load_model_weights(self, model: nn.Module) -> MixedStatistics:
        """Read every weight into a model; modules that were not replaced yet are replaced.

        Args:
            model: the base model with its weights.

        Raises:
            ModelError: a file is damaged, or the model is another one.
        """
        replace_modules(model, self)
        notes: set[str] = set()
        forms: dict[str, int] = {}
        stored = weights = 0
        for one in self.plan.by_matrix.values():
            module = model.get_submodule(one.matrix.name)
            assert isinstance(module, CompressedLinear)
            weight = one.source.read(one.found)
            module.fill(weight)
            forms[weight.form.name] = forms.get(weight.form.name, 0) + 1
            stored, weights = stored + weight.n_bytes, weights + one.matrix.n_weights
            notes |= {f"{end} is not used: it changes no weight" for end in one.found.ignored}
        for note in sorted(notes):
            logger.info("%s", note)
        full = _BF16_BYTES * weights
        return MixedStatistics(
            loaded=len(self.plan.weights),
            total=len(self.plan.weights) + len(self.plan.problems),
            failed=dict(self.plan.problems),
            memory_saved_mb=(full - stored) / 2**20,
            stored_bytes=stored,
            bf16_bytes=full,
            forms=forms,
            notes=sorted(notes),
        )


def load_mixed_precision(
    config: MixedPrecisionConfig | Path | str,
    device: str = "cpu",
    dtype: str = "auto",
    *,
    allow_missing: bool = False,
    use_cache: bool = False,
) -> MixedModel:
    """The model of a `mixed_precision` file.

    Args:
        config: the file or its content.
        device: `cpu`, `cuda`, ...
        dtype: of the computation, as in `alphaquant.models.loading.load_model`.
        allow_missing: see `TrueMixedPrecisionLoader`.
        use_cache: see `replace_all_with_mixed_precision`.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: a checkpoint cannot be read, or a weight is not in it.
    """
    from transformers import AutoConfig

    read = config if isinstance(config, MixedPrecisionConfig) else None
    stated = read or MixedPrecisionConfig.from_yaml(Path(str(config)))
    register_architectures()
    try:
        model_config = AutoConfig.from_pretrained(str(stated.base_model_path))
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"base_model_path {stated.base_model_path} is no model of transformers ({said}); "
            "give the folder of the unquantized model"
        ) from error
    loader = TrueMixedPrecisionLoader(model_config, stated, allow_missing=allow_missing)
    model = load_model(stated.base_model_path, device, dtype)
    replaced, _ = replace_all_with_mixed_precision(model, loader, use_cache=use_cache)
    return MixedModel(replaced, loader.load_model_weights(replaced))


def replace_all_with_mixed_precision(
    model: nn.Module, loader: TrueMixedPrecisionLoader, use_cache: bool = True
) -> Replaced:
    """Put modules for compressed weights in the place of a model's; once, however often called.

    Experts come first, then linears. Weights that the loader does not name keep the base model's
    numbers. Before or after `load_model_weights`.

    Args:
        model: the base model.
        loader: what is to be replaced.
        use_cache: keep up to `CACHE_SIZE` of dequantized weights between calls; outputs stay
            exactly the same.

    Returns:
        The model, and the modules that were replaced now: 0 when all were.

    Raises:
        ModelError: the model is another one than the loader was made for.
    """
    n_replaced = replace_modules(model, loader)
    cache_dequantized(model, CACHE_SIZE if use_cache else 0)
    return Replaced(model, n_replaced)


def replace_modules(model: nn.Module, loader: TrueMixedPrecisionLoader) -> int:
    """Replace what is not replaced yet; how many modules that were.

    Raises:
        ModelError: the model is another one than the loader was made for.
    """
    if type(model).__name__ != loader.model_class:
        raise ModelError(
            f"the loader was made for {loader.model_class} and got {type(model).__name__}; make "
            "one with this model's configuration"
        )
    planned = loader.plan.by_matrix
    n_replaced = 0
    for index, (name, layer) in enumerate(find_layers(model)):
        of_layer = {k: p for k, p in planned.items() if k.startswith(f"{name}.")}
        if of_layer and not _is_replaced(model, of_layer):
            for site in map_layer(index, name, layer, known_layouts()).experts:
                if not isinstance(site, ListedExperts) and _is_planned(site, of_layer):
                    model.set_submodule(site.name, _experts(site, of_layer))
                    n_replaced += 1
            trim_heap()
    for name, one in planned.items():
        linear = model.get_submodule(name)
        if type(linear) is nn.Linear:
            made = CompressedLinear(one.found.form, one.matrix, linear.weight, linear.bias)
            model.set_submodule(name, made)
            n_replaced += 1
    return n_replaced


def _is_replaced(model: nn.Module, planned: Mapping[str, Planned]) -> bool:
    """Whether the modules of all planned matrices of a layer are in place."""
    try:
        return all(isinstance(model.get_submodule(name), CompressedLinear) for name in planned)
    except AttributeError:  # experts that are still in one tensor have no modules
        return False


def _is_planned(site: ExpertsSite, planned: Mapping[str, Planned]) -> bool:
    """Whether a matrix of some experts is taken from a checkpoint."""
    return any(m.name in planned for e in range(site.n_experts) for m in site.matrices(e))


def _experts(site: ExpertsSite, planned: Mapping[str, Planned]) -> CompressedExperts:
    """Experts of a layer; those that are not planned keep the base model's weights."""
    views: dict[str, Tensor] = {}
    for e in range(site.n_experts):
        views |= dict(zip((m.name for m in site.matrices(e)), site.weights(e), strict=True))

    def linear_of(matrix: Matrix) -> CompressedLinear:
        view = views[matrix.name]
        if matrix.name in planned:
            return CompressedLinear(planned[matrix.name].found.form, matrix, view)
        linear = CompressedLinear(PLAIN, matrix, view)
        own = view.clone(memory_format=torch.contiguous_format)  # a view would keep all experts
        linear.fill(CompressedWeight(PLAIN, matrix.rows, matrix.cols, {"weight": own}))
        return linear

    made = CompressedExperts(site, linear_of)
    site.module.to("meta")  # the site stays, its weights go
    return made


def _others(names: list[str]) -> str:
    """Further names, a few of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (and {', '.join(names[:3])}{more})" if names else ""
