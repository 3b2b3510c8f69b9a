"""The plan of a search: seconds, memory and disk of every stage.

Seconds are work (`needs.py`) over speed (`pilot.py`). Memory is what a stage holds at once on a
CPU, where weights are mapped files of which a layer is in memory. All are estimates;
benchmarks/README.md has plans beside measurements.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from alphaquant.errors import ConfigError, StoreError
from alphaquant.models.pages.memory import GIB, free_memory, total_memory
from alphaquant.models.sites import ModelMap
from alphaquant.models.walk import positions_at_once
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.spaces.space import SearchSpace
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantizer import settings_of
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.planning.needs import COST_PASSES, TRACED, Needs
from alphaquant.studies.planning.pilot import Pilot, Rates
from alphaquant.studies.planning.shares import ALONE, Crew, crew_of
from alphaquant.studies.rounds import HIDDEN_SHARE
from alphaquant.studies.shared.spread_rounds import n_tasks
from alphaquant.studies.sizing import EFFORTS, effort_of, sized

_PROGRAM_BYTES = GIB // 2
"""Of the program with its libraries."""
_COPIES = 3
"""Layers in memory while one is copied: in the checkpoint, merged, and cast."""
_STARTING = 6.0
"""Seconds of finding matrices and routers, reading texts and tokenizing them."""
_BATCH_WINDOWS = 8
_FURTHER_TEXTS = 2
"""Calibration texts of recipes beside the search's own."""
_ROUNDED_BYTES = GIB // 2
"""Of what is rounded at the same time, and of an expert's factors."""


@dataclass(frozen=True)
class PlannedStage:
    """What a stage takes.

    Attributes:
        stage: which.
        seconds: wall time.
        memory: bytes at once.
        disk: bytes that it writes and keeps.
    """

    stage: Stage
    seconds: float
    memory: int
    disk: int = 0


@dataclass(frozen=True)
class Plan:
    """What a search will take on this machine.

    Attributes:
        spec: of the search, without open sizes.
        n_weights: quantizable weights of the model.
        n_formats: formats of a matrix in the bank, in the mean.
        stages: in order.
    """

    spec: SearchSpec
    n_weights: int
    n_formats: float
    stages: tuple[PlannedStage, ...]

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(s.seconds for s in self.stages)

    @property
    def memory(self) -> int:
        """Bytes at once, at most."""
        return max(s.memory for s in self.stages)

    @property
    def disk(self) -> int:
        """Bytes that all stages write."""
        return sum(s.disk for s in self.stages)


@dataclass(frozen=True)
class Machine:
    """Where a search would run.

    Attributes:
        device: of the model.
        dtype: of the computation.
        progress: called with ("pilot", measurements done, measurements).
    """

    device: torch.device
    dtype: torch.dtype
    progress: Progress = no_progress


def plan_stages(needs: Needs, rates: Rates, *, has_copy: bool, crew: Crew = ALONE) -> Plan:
    """What every stage of a search will take.

    Args:
        needs: what is computed and kept.
        rates: of the machine, for one process.
        has_copy: whether the weights are used in place, or copied already.
        crew: who shares the work.
    """
    held = _PROGRAM_BYTES + needs.rest_bytes + 2 * needs.layer_bytes
    stages = [*_loading(needs, rates, held, has_copy), *_quantizing(needs, rates, held)]
    stages = [_shared(stage, needs, crew) for stage in stages]
    effort, text = effort_of(needs.spec), needs.evaluation
    probed = min(effort.probe_tokens, text)
    passes = (  # stage, tokens of all assignments and of one, formats read, assignments together
        (Stage.PLANNED, needs.n_planned * text, text, needs.n_formats, needs.n_planned),
        (Stage.PROBE, needs.probe_tokens, probed, needs.n_formats, effort.n_probes),
        (Stage.STUDY, needs.n_sampled * text, text, needs.n_sampled, 1),
        (
            *(Stage.GATE, needs.gate_tokens, needs.heldout, needs.n_formats),
            needs.gate_tokens // needs.heldout,
        ),
    )
    for stage, n_tokens, n_each, n_read, n_together in passes:
        if not n_together:
            continue
        seconds = _forward_seconds(needs, rates, n_tokens)
        seconds += n_read * needs.space.inventory.n_weights / rates.dequantized
        # Hidden states and dequantized weights take what is free, and no more than they need.
        most = free_memory() // HIDDEN_SHARE
        states = min(3 * n_tokens * needs.token_bytes, most)
        weights = min(round(n_read) * needs.layer_bytes, most // 2)
        memory = crew.n_together * (held + _predicted_bytes(needs)) + states + weights
        n_units = n_tasks(n_together, _n_batches(needs, n_each))
        stages.append(PlannedStage(stage, crew.seconds(seconds, n_units), memory))
    most = max(stage.memory for stage in stages)
    stages += _recipes(needs, rates, most)
    n_weights = needs.space.inventory.n_weights
    return Plan(needs.spec, n_weights, needs.n_formats, tuple(stages))


def fitting_plan(
    spec: SearchSpec,
    model_map: ModelMap,
    space: SearchSpace,
    machine: Machine,
    *,
    has_copy: bool,
    is_known: bool = False,
) -> Plan:
    """The plan of a search; with a time limit that of the largest effort that fits in it.

    The speed of the machine is measured, which takes seconds.

    Args:
        spec: what was asked.
        model_map: the model, with weights or without.
        space: units, menu, budget.
        machine: where it would run.
        has_copy: see `plan_stages`.
        is_known: the effort is that of a search that goes on, and is kept.

    Raises:
        ConfigError: nothing fits in the time.
        ModelError: the speed cannot be measured for this architecture.
    """
    limit, plans = spec.run.limit_seconds, list[Plan]()
    efforts = list(EFFORTS)[list(EFFORTS).index(spec.run.effort) :: -1]
    rates: Rates | None = None
    for effort in efforts if limit is not None and not is_known else efforts[:1]:
        own = sized(replaced(spec, effort=effort), model_map)
        needs = Needs(own, model_map, space, machine.dtype.itemsize)
        pilot = Pilot(needs, machine.dtype, machine.device, machine.progress)
        settings = settings_of(own.quantizer)
        rates = pilot.measure(settings) if rates is None else pilot.measure_again(rates, settings)
        crew = crew_of(own.run, machine.device)
        plans.append(plan_stages(needs, rates, has_copy=has_copy, crew=crew))
        if limit is None or is_known or plans[-1].seconds <= limit:
            return plans[-1]
    minutes = plans[-1].seconds / 60
    raise ConfigError(
        f"time_limit is {spec.run.time_limit}, and the smallest search, --effort "
        f"{plans[-1].spec.run.effort}, is estimated at {minutes:.0f} min here; give "
        "more time, fewer --formats or fewer windows (--plan shows the stages)"
    )


def check_room(plan: Plan, cache: Path) -> None:
    """Refuse what does not fit this machine, before anything is made.

    What lies in the cache counts as room: it may be what the search would write.

    Args:
        plan: of the search.
        cache: where most of its files go.

    Raises:
        StoreError: saying what is needed, what there is, and what to change.
    """
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if plan.disk > free and plan.disk > free + _bytes_in(cache):
        raise StoreError(
            f"the search needs about {plan.disk / GIB:.1f} GiB in {cache}, and {free / GIB:.1f} "
            "GiB are free there; give another --cache, fewer --formats, or --effort quick"
        )
    memory = total_memory()
    if plan.memory > memory:
        worst = max(plan.stages, key=lambda s: s.memory)
        raise StoreError(
            f"the search needs about {plan.memory / GIB:.1f} GiB of memory ({worst.stage.text}), "
            f"and there are {memory / GIB:.1f} GiB; give --dtype bfloat16, a shorter --seq-len, "
            "or a machine with more"
        )


def _bytes_in(folder: Path) -> int:
    """Bytes of the files below a folder, 0 where there is none."""
    found = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # another process may remove it
            found += file.stat().st_size if file.is_file() else 0
    return found


def _loading(needs: Needs, rates: Rates, held: int, has_copy: bool) -> Sequence[PlannedStage]:
    """Weights and the original's predictions."""
    n_bytes = needs.layer_bytes * len(needs.model_map.layers) + needs.rest_bytes
    copy = (
        ()
        if has_copy
        else (
            PlannedStage(
                Stage.PREPARE,
                3 * n_bytes / rates.hashed,  # read, digested, written and digested
                _PROGRAM_BYTES + _COPIES * needs.layer_bytes,
                n_bytes,
            ),
        )
    )
    load = PlannedStage(Stage.LOAD, _STARTING + 2 * n_bytes / rates.hashed, held)
    seconds = _forward_seconds(needs, rates, needs.evaluation + needs.heldout)
    teacher = PlannedStage(
        Stage.TEACHER, seconds, held + _predicted_bytes(needs), needs.teacher_bytes
    )
    return (*copy, load, teacher)


def _quantizing(needs: Needs, rates: Rates, held: int) -> Sequence[PlannedStage]:
    """Hessians, the bank, and costs; all rounds of each together."""
    n_rounds = needs.n_rounds
    hessians = _hessian_seconds(needs, rates)
    bank = _rounding_seconds(needs, rates, n_rounds, needs.n_formats)
    costs = needs.cost_passes * _calibration_seconds(needs, rates)
    costs += needs.cost_products / rates.float32
    costs += needs.n_formats * needs.space.inventory.n_weights / rates.dequantized
    traced = TRACED * _BATCH_WINDOWS * needs.seq_len * needs.token_bytes
    of_bank = needs.bank_bytes // len(needs.model_map.layers) // n_rounds
    memory = held + 2 * needs.layer_hessian_bytes + of_bank + _ROUNDED_BYTES
    traced_memory = held + needs.layer_bytes + _predicted_bytes(needs) + traced
    outputs: tuple[PlannedStage, ...] = ()
    if needs.is_two_sided:
        seconds, n_bytes = _output_seconds(needs, rates), needs.outputs_bytes
        outputs = (PlannedStage(Stage.OUTPUTS, seconds, traced_memory, n_bytes),)
    return (
        *outputs,
        PlannedStage(Stage.HESSIANS, n_rounds * hessians, held + 2 * needs.layer_hessian_bytes),
        PlannedStage(Stage.BANK, bank, memory, needs.bank_bytes),
        PlannedStage(
            Stage.COSTS,
            costs,
            traced_memory,
            needs.states_bytes,
        ),
    )


def _recipes(needs: Needs, rates: Rates, memory: int) -> tuple[PlannedStage, ...]:
    """Every recipe but the search's own rounds one format of each matrix and measures it.

    Two further texts and a rotated copy are reckoned with; some models leave them out.
    """
    n_recipes, n_weights = needs.spec.run.recipes, needs.space.inventory.n_weights
    if not n_recipes:
        return ()
    each = _hessian_seconds(needs, rates) + _rounding_seconds(needs, rates, 1, 1)
    each += _forward_seconds(needs, rates, needs.evaluation) + n_weights / rates.dequantized
    seconds, n_bytes = (n_recipes - 1) * each, needs.layer_bytes * len(needs.model_map.layers)
    n_bytes += needs.rest_bytes + round(needs.bank_bytes / needs.n_formats)
    if needs.is_two_sided:
        seconds += _FURTHER_TEXTS * _output_seconds(needs, rates)
        n_bytes += _FURTHER_TEXTS * needs.outputs_bytes
    return (PlannedStage(Stage.RECIPES, seconds, memory, n_bytes),)


def _hessian_seconds(needs: Needs, rates: Rates) -> float:
    """Of the Hessians of one text."""
    passes = _calibration_seconds(needs, rates, with_head=False)
    return passes + needs.calibration * needs.hessian_products / rates.float32


def _rounding_seconds(needs: Needs, rates: Rates, n_rounds: int, n_formats: float) -> float:
    """Of the quantizer, which does some of its work once a round and the rest once a format."""
    return sum(
        s.count
        * (
            n_rounds * rates.once[s.n_rows, s.n_cols]
            + n_formats * rates.per_format[s.n_rows, s.n_cols]
        )
        for s in needs.stacks
    )


def _output_seconds(needs: Needs, rates: Rates) -> float:
    """Of the output Hessians of one text."""
    seconds = COST_PASSES * _calibration_seconds(needs, rates)
    return seconds + needs.calibration * needs.output_products / rates.float32


def _shared(stage: PlannedStage, needs: Needs, crew: Crew) -> PlannedStage:
    """A stage before the trials, shared by workers where it can be."""
    if stage.stage in (Stage.PREPARE, Stage.LOAD):
        return stage
    n_units = len(needs.model_map.layers)
    if stage.stage == Stage.TEACHER:
        n_units = _n_batches(needs, min(needs.evaluation, needs.heldout))
    seconds = crew.seconds(stage.seconds, n_units)
    return replace(stage, seconds=seconds, memory=crew.n_together * stage.memory)


def _n_batches(needs: Needs, n_tokens: int) -> int:
    """Batches of a text."""
    return -(-n_tokens // (_BATCH_WINDOWS * needs.seq_len))


def _predicted_bytes(needs: Needs) -> int:
    """Of predictions of a part of a batch, with what is made of them."""
    return 4 * 4 * needs.vocabulary * positions_at_once(needs.vocabulary)


def _forward_seconds(needs: Needs, rates: Rates, n_tokens: float) -> float:
    """Of forward passes over so many tokens, compared with the original's."""
    return n_tokens * (needs.active * rates.layer + rates.head)


def _calibration_seconds(needs: Needs, rates: Rates, with_head: bool = True) -> float:
    """Of a forward pass over the calibration text."""
    head = rates.head if with_head else 0.0
    return needs.calibration * (needs.active * rates.calibrated + head)
