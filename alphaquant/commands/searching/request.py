"""What is asked of a search: names found and places looked at, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

from alphaquant.errors import ConfigError
from alphaquant.evaluators.scores import check_scores
from alphaquant.models.dtypes import named_dtype
from alphaquant.quant.ggml.library import check_formats
from alphaquant.search.groups import check_grouping
from alphaquant.search.sampler import make_sampler
from alphaquant.spaces.budget import Budget, parse_budget
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import Profile, find_profile, included
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import needed
from alphaquant.studies.inputs import cache_dir, find_device
from alphaquant.studies.shared.staffing import check_workers
from alphaquant.studies.store.artifacts import check_artifacts
from alphaquant.studies.store.folder import check_folder, check_place
from alphaquant.studies.store.urls import check_storage
from alphaquant.studies.trials import check_allocators, check_constrained
from alphaquant.texts.windows import check_sources


@dataclass(frozen=True)
class Request:
    """A specification whose names were all found.

    Attributes:
        budget: parsed.
        profile: what the engine allows.
        menu: names of formats.
        device: as torch names it.
        include: what is searched beside the decoder layers.
    """

    budget: Budget
    profile: Profile
    menu: tuple[str, ...]
    device: str
    include: tuple[str, ...]


def found_request(spec: SearchSpec) -> Request:
    """Find every name in a specification, before anything is loaded.

    Raises:
        AlphaQuantError: a name or number that does not exist.
    """
    budget = parse_budget(spec.limits.budget)
    profile = find_profile(spec.limits.profile, spec.limits.kernels)
    menu = menu_of(spec.limits.formats, profile)
    check_formats(menu)
    make_sampler(spec.proposals.sampler, spec.proposals.seed, 0)
    check_grouping(spec.proposals.grouping)
    _check_rotation(spec)
    _check_recipes(spec)
    check_allocators(spec)
    check_constrained(spec)
    check_scores(spec.scores)
    check_sources(spec.texts.sources, spec.texts.bos)
    device = find_device(spec.checkpoint.device)
    check_workers(spec.run.workers, spec.run.cluster, device)
    if spec.checkpoint.dtype != "auto":
        named_dtype(spec.checkpoint.dtype)
    include = () if spec.limits.candidate_names else included(spec.limits.include, budget, profile)
    _check_allocators_of(spec, include)
    return Request(budget, profile, menu, device, include)


def _check_rotation(spec: SearchSpec) -> None:
    """Refuse a rotation of what others quantized.

    Raises:
        ConfigError: candidates are of the model as it is.
    """
    if spec.checkpoint.rotate is not None and spec.limits.candidate_names:
        raise ConfigError(
            f"--rotate {spec.checkpoint.rotate} with --candidates: their matrices are of the "
            "model as it is, which a rotated one cannot take; leave one of the two out"
        )


def _check_recipes(spec: SearchSpec) -> None:
    """Refuse recipes where there is nothing to choose.

    Raises:
        ConfigError: matrices are rounded to nearest, or others quantized them.
    """
    if not spec.run.recipes:
        return
    if spec.limits.candidate_names:
        raise ConfigError(
            f"--recipes {spec.run.recipes} with --candidates: others quantized those; leave one "
            "of the two out"
        )
    if spec.quantizer.method != "gptq":
        raise ConfigError(
            f"--recipes {spec.run.recipes} with --method {spec.quantizer.method}, which has "
            "nothing to choose; use --method gptq, or leave --recipes out"
        )


_OF_LAYERS = frozenset({"gemq", "alpha", "alpha_plain", "variance"})
"""Costs and features that only matrices of decoder layers have."""


def _check_allocators_of(spec: SearchSpec, include: Sequence[str]) -> None:
    """Refuse allocators that need what is measured of decoder layers alone.

    Raises:
        ConfigError: saying which.
    """
    lacking = sorted(needed(spec) & _OF_LAYERS)
    if include and lacking:
        raise ConfigError(
            f"{', '.join(include)} searched with allocators that need "
            f"{', '.join(lacking)}, which only matrices of decoder layers have; use "
            "--include none, or other --allocators"
        )


def check_places(spec: SearchSpec) -> None:
    """Look where a search would write.

    Raises:
        AlphaQuantError: a place that cannot be written to, or an `out` that is taken.
    """
    if spec.run.storage is not None:
        check_storage(spec.run.storage)
    if spec.run.artifacts is not None:
        check_artifacts(spec.run.artifacts)
    check_place(spec.run.out, "--out")
    check_place(cache_dir(spec.run.cache), "--cache")
    if spec.run.scratch is not None:
        check_place(spec.run.scratch, "--scratch")
    facts = spec.facts()
    if spec.run.time_limit is not None:  # the effort is found when the model is known
        facts.pop("effort")
    check_folder(spec.run.out, facts, overwrite=spec.run.overwrite)
