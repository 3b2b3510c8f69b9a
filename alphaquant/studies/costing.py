"""The bank of a search and what its contents cost.

Either every matrix in every format of the menu, or, for models where that takes most of the time,
every matrix in a few anchor formats and then in those that can win (`search/shortlist.py`), which
takes the costs two rounds. The first one, which only lists formats, reads a part of the windows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from alphaquant.costs.cost_tasks import measure_costs_by
from alphaquant.costs.fisher import (
    CostSettings,
    CostTable,
    UnitCosts,
    measure_costs,
    unit_costs,
)
from alphaquant.costs.output_gradients import (
    measure_output_hessians,
    measure_output_hessians_by,
    output_hessians_key,
)
from alphaquant.costs.partial import want_all
from alphaquant.errors import ConfigError, ModelError
from alphaquant.models.mapping import device_of
from alphaquant.progress import Progress, Stage, StageClock
from alphaquant.provenance import versions
from alphaquant.quant.bank import Bank, bank_key, open_bank
from alphaquant.quant.engine import Wanted
from alphaquant.quant.filling import BATCH_WINDOWS, BankRequest, fill_bank, fill_bank_by
from alphaquant.quant.foreign.candidates import Candidates, store_candidates
from alphaquant.quant.place import place_of
from alphaquant.quant.sequential.banked import fill_sequentially
from alphaquant.quant.two_sided.output_hessian import OutputHessians
from alphaquant.search.allocators import ALLOCATORS
from alphaquant.search.arrays import BoolArray
from alphaquant.search.shortlist import complete_costs, shortlist
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import BF16, parse_format
from alphaquant.spaces.menus import REFERENCE_FORMATS
from alphaquant.spaces.space import SearchSpace
from alphaquant.spaces.units import ENDS
from alphaquant.specs.quantizer import QuantSettings, settings_of
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import Source, cache_dir
from alphaquant.studies.sizing import effort_of
from alphaquant.studies.stages import Inputs
from alphaquant.studies.trials import ALL_ALLOCATORS
from alphaquant.texts.windows import TokenSet, sample_of
from alphaquant.work.walked import Text, folder_of_states


@dataclass(frozen=True)
class Costs:
    """Costs of units in the formats of the bank.

    Attributes:
        table: per matrix, as measured.
        units: per unit of the space.
    """

    table: CostTable
    units: UnitCosts

    @property
    def lacking(self) -> frozenset[str]:
        """Formats in which not every unit has a cost."""
        is_unknown: BoolArray = np.asarray(np.isnan(self.units.fisher).any(axis=0))  # [F]
        return frozenset(self.table.formats[i] for i in np.flatnonzero(is_unknown).tolist())

    def predict_kl(self, space: SearchSpace, assignment: Assignment) -> float:
        """Sum of the Fisher costs of an assignment, nats per token."""
        column = {name: i for i, name in enumerate(self.table.formats)}
        chosen = [column[assignment.formats[u.matrices[0].name]] for u in space.units]
        return float(self.units.fisher[np.arange(len(chosen)), chosen].sum())


_OUTPUTS = CostSettings()
"""How the gradients for output Hessians are taken."""
_SHORT_WEIGHTS = 10**8
"""Quantizable weights from which on a bank holds what can win only."""
_SAMPLED_UNITS = 64
"""Units that are measured in every format, at least."""
_LISTING_STEP, _LEAST_LISTING = 4, 8
"""Of how many windows one says which formats can win, and how many do at least."""


def fill_and_measure(
    spec: SearchSpec, inputs: Inputs, space: SearchSpace, clock: StageClock
) -> tuple[Bank, Costs]:
    """The bank of a search with its costs; `is_short` says what it holds.

    Raises:
        StoreError: a file of the bank or of the costs is damaged.
    """
    with _states_kept(spec, inputs):
        return _filled_and_measured(spec, inputs, space, clock)


@contextmanager
def _states_kept(spec: SearchSpec, inputs: Inputs) -> Iterator[None]:
    """What workers need of the calibration text's states stays till all of it is done."""
    if inputs.source.workers is None:
        yield
        return
    with folder_of_states(states_folder(inputs.source, inputs.calibration, spec.run.cache)):
        yield


def states_folder(source: Source, calibration: TokenSet, cache: Path | None) -> Path:
    """Where workers keep what layers give on a calibration text, till bank and costs are there."""
    facts = (source.digest[:16], calibration.digest[:16], source.runs_as)
    return cache_dir(cache) / "states" / "-".join(facts)


def _filled_and_measured(
    spec: SearchSpec, inputs: Inputs, space: SearchSpace, clock: StageClock
) -> tuple[Bank, Costs]:
    names = bank_formats(space)
    if inputs.candidates is not None:
        bank = open_candidate_bank(spec, inputs, inputs.candidates, clock)
        return bank, measure_unit_costs(spec, inputs, space, bank, clock)
    if not is_short(spec, space):
        bank = open_filled_bank(spec, inputs, names, clock)
        return bank, measure_unit_costs(spec, inputs, space, bank, clock)
    effort = effort_of(spec)
    anchors = anchors_of(space, names, effort.anchor_bits)
    first = _anchored(space, anchors, len(names))
    wanted = _pairs(space, names, first)
    bank = open_filled_bank(spec, inputs, names, clock, wanted)
    costs = _costs_for_listing(spec, inputs, space, bank, clock, wanted)
    listed = first | _winners(space, names, costs, anchors, effort.around)
    wanted = _pairs(space, names, listed)
    bank = open_filled_bank(spec, inputs, names, clock, wanted)
    return bank, measure_unit_costs(spec, inputs, space, bank, clock, wanted)


def _costs_for_listing(
    spec: SearchSpec,
    inputs: Inputs,
    space: SearchSpace,
    bank: Bank,
    clock: StageClock,
    wanted: Wanted,
) -> Costs:
    """Costs that say which formats can win; arguments as of `measure_unit_costs`."""
    step = listing_step(len(inputs.calibration.tokens))
    if step == 1:
        return measure_unit_costs(spec, inputs, space, bank, clock, wanted)
    sample = replace(inputs, calibration=sample_of(inputs.calibration, step))
    with _states_kept(spec, sample):
        return measure_unit_costs(spec, sample, space, bank, clock, wanted)


def listing_step(n_windows: int) -> int:
    """Of how many calibration windows one says which formats can win; 8 windows at least do."""
    return max(1, min(_LISTING_STEP, n_windows // _LEAST_LISTING))


def is_short(spec: SearchSpec, space: SearchSpace) -> bool:
    """Whether the bank of a search holds only what can win."""
    if space.held is not None:
        return False
    if spec.proposals.bank == "auto":
        return space.inventory.n_weights >= _SHORT_WEIGHTS and bool(_common(space))
    return spec.proposals.bank == "short"


def check_bank(spec: SearchSpec, space: SearchSpace) -> None:
    """Refuse a short bank where no format can be an anchor, before anything is measured.

    Raises:
        ConfigError: it was asked for, and no format of the menu is allowed for all units, or all
            are there already.
    """
    if spec.proposals.bank == "short" and space.held is not None:
        raise ConfigError(
            "--bank short quantizes a part of the formats, and --candidates are quantized "
            "already; leave one of the two out"
        )
    if spec.proposals.bank == "short" and not _common(space):
        raise ConfigError(
            "a short bank needs a format that every matrix can have, and no format of the menu "
            f"({', '.join(space.menu)}) is one under this profile; use --bank full, or add one"
        )


def _common(space: SearchSpace) -> list[str]:
    """Formats of the menu that every unit may take."""
    return [n for n in space.menu if all(n in space.allowed(u) for u in space.units)]


def anchors_of(space: SearchSpace, names: Sequence[str], beside: Sequence[float]) -> list[int]:
    """Columns of the formats in which every unit is measured.

    That of the budget, a format of 4.25 bits that every search is compared with, and others of
    about so many bits; fewer where the menu has no others. At least one format of the menu is
    allowed for every unit (`check_bank`).

    Args:
        space: the units.
        names: of all formats.
        beside: bits per weight of further anchors.
    """
    bits = [parse_format(name).nominal_bits for name in names]
    budget = space.limit_bits / space.inventory.n_weights
    common = [names.index(name) for name in _common(space)]
    wanted = [min(common, key=lambda i: abs(bits[i] - at)) for at in (*beside, budget)]
    return sorted({*wanted, names.index(REFERENCE_FORMATS[0])})


def _anchored(space: SearchSpace, anchors: Sequence[int], n_formats: int) -> BoolArray:
    """What is measured first, bool [U, F]: anchors of all units, every format of some.

    What is beside the layers is among these: no other unit's curve says anything of its own.
    """
    found = np.zeros((len(space.units), n_formats), dtype=np.bool_)
    found[:, anchors] = True
    found[:: _sample_step(space)] = True
    found[[unit.kind in ENDS.values() for unit in space.units]] = True
    return found


def sampled_share(space: SearchSpace) -> float:
    """Share of the units that a short bank holds in every format, those of the ends left out."""
    return len(space.units[:: _sample_step(space)]) / len(space.units)


def _sample_step(space: SearchSpace) -> int:
    """Each of how many units is measured in every format."""
    return max(1, len(space.units) // _SAMPLED_UNITS)


def _winners(
    space: SearchSpace,
    names: Sequence[str],
    costs: Costs,
    anchors: Sequence[int],
    around: Sequence[float],
) -> BoolArray:
    """Which formats of units can win, bool [U, F].

    Args:
        space: U units.
        names: F formats.
        costs: of the anchors, and of some units in every format.
        anchors: columns.
        around: sizes beside the budget's, bits per weight, whose choices are taken.
    """
    formats = [parse_format(name) for name in names]
    nominal = np.array([fmt.nominal_bits for fmt in formats])
    bits = np.array([[u.storage_bits(f) for f in formats] for u in space.units], dtype=np.int64)
    allowed = np.array([[name in space.allowed(u) for name in names] for u in space.units])
    least = int(np.where(allowed, bits, bits.max()).min(axis=1).sum())
    limits = [
        max(least, space.limit_bits + round(beside * space.inventory.n_weights))
        for beside in around
    ]
    found = np.zeros_like(allowed)
    for measured in (costs.units.fisher, costs.units.token_fisher):
        complete = complete_costs(measured, nominal, anchors)
        found |= shortlist(complete, bits, allowed, limits)
    return found


def _pairs(space: SearchSpace, names: Sequence[str], listed: BoolArray) -> Wanted:
    """Which pairs of matrix and format are in a table of units and formats."""
    pairs = {
        (matrix.name, names[column])
        for unit, row in zip(space.units, listed, strict=True)
        for matrix in unit.matrices
        for column in np.flatnonzero(row).tolist()
    }
    return lambda matrix, name: (matrix.name, name) in pairs


def bank_formats(space: SearchSpace) -> tuple[str, ...]:
    """What the bank holds: the menu and the formats to compare with, by nominal bits.

    Of candidates the menu alone: nothing is quantized.
    """
    names = {*space.menu, *(REFERENCE_FORMATS if space.held is None else ())}
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))


def open_filled_bank(
    spec: SearchSpec,
    inputs: Inputs,
    names: tuple[str, ...],
    clock: StageClock,
    wanted: Wanted = lambda matrix, name: True,
) -> Bank:
    """The bank of a search with what is wanted in it.

    Raises:
        StoreError: a file of it is damaged.
    """
    n_layers = len(inputs.source.map.layers)
    clock(Stage.BANK, 0, n_layers)
    bank = fill_source_bank(
        inputs.source,
        inputs.calibration,
        names,
        settings_of(spec.quantizer),
        spec.run.cache,
        clock,
        wanted,
    )
    clock(Stage.BANK, n_layers, n_layers)
    return bank


def open_candidate_bank(
    spec: SearchSpec, inputs: Inputs, candidates: Candidates, clock: StageClock
) -> Bank:
    """The bank of a search among candidates: their matrices, and the original's in bf16.

    Raises:
        ModelError: a file of a candidate is damaged.
        StoreError: a file of the bank is damaged.
    """
    # Nothing is rounded here, so nothing is asked of the outputs either.
    source, settings = inputs.source, replace(settings_of(spec.quantizer), two_sided=False)
    n_layers = len(source.map.layers)
    clock(Stage.BANK, 0, n_layers)
    facts = {
        **source.facts(),
        "calibration": inputs.calibration.provenance(),
        "candidates": sorted(candidates.checkpoints),
        "candidate_files": candidates.digest,
        "versions": versions(),
    }
    weights = f"{source.digest}+{candidates.digest}"
    key = bank_key(weights, inputs.calibration.digest, settings)
    root = cache_dir(spec.run.cache) / "banks"
    bank = open_bank(root, key, source.map.inventory, facts, source.scratch)
    store_candidates(bank, source.map, candidates)
    tokens = inputs.calibration.tokens
    fill_bank(bank, source.map, tokens, BankRequest([BF16.name], settings), progress=clock)
    bank.verify(candidates.menu)
    clock(Stage.BANK, n_layers, n_layers)
    return bank


def fill_source_bank(
    source: Source,
    calibration: TokenSet,
    names: Sequence[str],
    settings: QuantSettings,
    cache: Path | None,
    progress: Progress,
    wanted: Wanted = lambda matrix, name: True,
    root: Path | None = None,
) -> Bank:
    """The bank of a model, a calibration text and settings, with these formats in it.

    Args:
        source: the model.
        calibration: the text.
        names: formats.
        settings: of the quantizer; sequential ones need one format for each matrix, and one
            process does that.
        cache: where banks are kept; None for the default place.
        progress: called with a stage's name, steps done, steps.
        wanted: which (matrix, format name) pairs; all by default.
        root: folder of the bank, if it is not to be kept with the others in the cache.

    Raises:
        StoreError: a file of it is damaged.
    """
    facts = {
        **source.facts(),
        "calibration": calibration.provenance(),
        "settings": asdict(settings),
        "rounded_on": place_of(device_of(source.map.model)).device.type,
        "versions": versions(),
    }
    key = bank_key(source.digest, calibration.digest, settings)
    bank = open_bank(
        root or cache_dir(cache) / "banks",
        *(key, source.map.inventory, facts),
        None if root else source.scratch,
    )
    tokens = calibration.tokens

    def measured() -> OutputHessians:
        return output_hessians(source, calibration, cache, progress)

    request = BankRequest(names, settings, wanted, measured)
    if settings.sequential:
        fill_sequentially(bank, source.map, tokens, request, progress)
        bank.verify(names)
        return bank
    if source.workers is not None:
        text = Text(tokens, BATCH_WINDOWS, states_folder(source, calibration, cache))
        fill_bank_by(source.workers, bank, source.map, text, request, progress)
    fill_bank(bank, source.map, tokens, request, progress=progress)
    bank.verify(names)
    return bank


def output_hessians(
    source: Source, calibration: TokenSet, cache: Path | None, progress: Progress
) -> OutputHessians:
    """The output Hessians of a model on a calibration text, measured or found in the cache.

    Args:
        source: the model.
        calibration: the text.
        cache: where they are kept; None for the default place.
        progress: called with a stage's name, steps done, steps.

    Raises:
        ModelError: the model cannot be walked backwards.
        StoreError: the disk is full.
    """
    key = output_hessians_key(source.digest, calibration.digest, _OUTPUTS)
    folder = cache_dir(cache) / "outputs" / key
    tokens, model_map = calibration.tokens, source.map
    try:
        if source.workers is not None:
            states = states_folder(source, calibration, cache)
            text = Text(tokens, _OUTPUTS.batch_size, states)
            given = (source.workers, model_map, text, folder, _OUTPUTS)
            measure_output_hessians_by(*given, progress)
        return measure_output_hessians(model_map, tokens, folder, _OUTPUTS, progress)
    except ModelError as error:
        raise ModelError(f"{error}; or round one-sided, --no-two-sided") from error


def needed(spec: SearchSpec) -> frozenset[str]:
    """Optional costs and features that the allocators which are asked for use."""
    given = spec.proposals
    names = given.allocator_names if given.allocator is None else (given.allocator,)
    asked = ALLOCATORS if names == (ALL_ALLOCATORS,) else ALLOCATORS.keys() & set(names)
    return frozenset(need for name in asked for need in ALLOCATORS[name].needs)


def measure_unit_costs(
    spec: SearchSpec,
    inputs: Inputs,
    space: SearchSpace,
    bank: Bank,
    clock: StageClock,
    wanted: Wanted = want_all,
) -> Costs:
    """Costs of every unit in every format of the bank; `gemq` where an allocator asks for it.

    Args:
        spec: what to search.
        inputs: the model and its texts.
        space: the units.
        bank: it may hold more than this search made, from others before it.
        clock: told how far it is.
        wanted: which matrices in which formats count; all others have no cost (NaN).
    """
    source, n_layers = inputs.source, len(inputs.source.map.layers)
    tokens, settings = inputs.calibration.tokens, CostSettings(spec.proposals.seed)
    clock(Stage.COSTS, 0, n_layers)
    if source.workers is not None:
        folder = states_folder(source, inputs.calibration, spec.run.cache)
        text = Text(tokens, settings.batch_size, folder)
        measure_costs_by(
            *(source.workers, source.map, bank, text, bank_formats(space), settings),
            wanted=wanted,
            progress=clock,
        )
    table = measure_costs(
        source.map,
        bank,
        tokens,
        bank_formats(space),
        settings,
        with_gemq="gemq" in needed(spec),
        wanted=wanted,
        progress=clock,
    )
    clock(Stage.COSTS, n_layers, n_layers)
    return Costs(table, unit_costs(table, space.units))
