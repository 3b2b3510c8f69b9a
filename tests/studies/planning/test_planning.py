"""Plans: work counted from shapes, time from speeds, and what does not fit."""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alphaquant.commands.searching.plan_text import plan_text
from alphaquant.errors import ConfigError, ModelError, StoreError
from alphaquant.models.loading import auto_class
from alphaquant.models.mapping import map_model
from alphaquant.models.pages.memory import GIB
from alphaquant.models.sites import ModelMap
from alphaquant.progress import Stage
from alphaquant.quant.engine import quantize_batches
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import make_space
from alphaquant.specs.quantizer import QuantSettings, settings_of
from alphaquant.specs.run import RunSpec, duration_seconds
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.planning import estimate, pilot
from alphaquant.studies.planning.estimate import (
    Machine,
    Plan,
    check_room,
    fitting_plan,
    plan_stages,
)
from alphaquant.studies.planning.needs import Needs
from alphaquant.studies.planning.pilot import UNKNOWN, Pilot, Rates, shares_of
from alphaquant.studies.planning.shares import ALONE, Crew, crew_of
from alphaquant.studies.sizing import sized
from alphaquant.testing.any_model import routed_architectures, tiny_config

OLMOE = {
    **{"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2},
    **{"num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16},
    **{"vocab_size": 50304, "max_position_embeddings": 4096, "pad_token_id": 0},
}
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_experts": 4},
    **{"num_experts_per_tok": 2, "num_attention_heads": 4, "vocab_size": 64},
    **{"max_position_embeddings": 512, "pad_token_id": 0},
}
RATES = Rates(
    1e-11,
    1e-11,
    1e-3,
    5e10,
    defaultdict(lambda: 0.5),
    defaultdict(lambda: 0.25),
    dequantized=1e9,
    hashed=1e9,
)
MakeNeeds = Callable[..., Needs]


@cache
def skeleton(sizes: tuple[tuple[str, int], ...]) -> ModelMap:
    """An OLMoE without numbers."""
    with torch.device("meta"):
        return map_model(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **dict(sizes)))
        )


def needs_of(model_map: ModelMap, **settings: Any) -> Needs:
    """Needs of a search of a model without weights, in a dtype of two bytes."""
    profile = find_profile("any")
    spec = sized(SearchSpec.of(**{"budget": "4.25bits", "model": "m", **settings}), model_map)
    menu, budget = menu_of(spec.limits.formats, profile), parse_budget(spec.limits.budget)
    return Needs(spec, model_map, make_space(model_map.inventory, profile, menu, budget), 2)


@pytest.fixture
def make_needs() -> MakeNeeds:
    """Make the needs of a search of an OLMoE without weights: `make_needs(SMALL, effort=...)`."""
    return lambda sizes=OLMOE, **settings: needs_of(skeleton(tuple(sizes.items())), **settings)


def seconds_of(plan: Plan, stage: Stage) -> float:
    (found,) = [s.seconds for s in plan.stages if s.stage == stage]
    return found


def test_work_of_olmoe_is_counted_from_its_shapes(make_needs: MakeNeeds) -> None:
    needs = make_needs(effort="quick")
    attention, expert = 4 * 2048**2, 3 * 2048 * 1024
    assert needs.active == 2 * (attention + 8 * expert)
    shapes = {(s.n_rows, s.n_cols): s.count for s in needs.stacks}
    # o has the shape of an expert's gate and up, and is a stack of its own
    assert shapes[3 * 2048, 2048] == 2
    assert sum(s.count for s in needs.stacks) == 2 * (64 + 64 + 1 + 1)
    per_token = 2 * 2048**2 + 8 * (2048**2 + 1024**2)
    assert needs.hessian_products == pytest.approx(1.25 * 2 * per_token)
    share = 66 / 392  # of all matrices every sixth is in all 16 formats
    assert needs.n_formats == pytest.approx(share * 16 + (1 - share) * 3.5)
    assert needs.calibration == 2048 * 8


def test_seconds_are_work_over_speed(make_needs: MakeNeeds) -> None:
    needs = make_needs(effort="quick")
    plan = plan_stages(needs, RATES, has_copy=True)
    forward = needs.evaluation * (needs.active * 1e-11 + 1e-3)
    read = needs.space.inventory.n_weights / 1e9
    assert seconds_of(plan, Stage.STUDY) == pytest.approx(needs.n_sampled * (forward + read))
    n_stacks = sum(s.count for s in needs.stacks)
    assert seconds_of(plan, Stage.BANK) == pytest.approx(
        n_stacks * (2 * 0.5 + needs.n_formats * 0.25)
    )
    assert plan.seconds == pytest.approx(sum(s.seconds for s in plan.stages))
    assert Stage.PROBE not in {s.stage for s in plan.stages}, "quick has none"
    assert Stage.PROBE in {s.stage for s in plan_stages(make_needs(), RATES, has_copy=True).stages}
    faster = plan_stages(needs, replace(RATES, layer=5e-12, head=5e-4), has_copy=True)
    assert seconds_of(faster, Stage.TEACHER) == seconds_of(plan, Stage.TEACHER) / 2
    assert seconds_of(faster, Stage.HESSIANS) == seconds_of(plan, Stage.HESSIANS)
    rough = plan_stages(needs, replace(RATES, calibrated=0.0), has_copy=True)
    assert seconds_of(rough, Stage.TEACHER) == seconds_of(plan, Stage.TEACHER)
    spared = 2 * needs.calibration * needs.active * 1e-11  # in both rounds
    assert seconds_of(plan, Stage.HESSIANS) - seconds_of(rough, Stage.HESSIANS) == pytest.approx(
        spared
    )


def test_a_copy_of_the_weights_is_time_and_disk(make_needs: MakeNeeds) -> None:
    needs = make_needs()
    without, with_copy = (plan_stages(needs, RATES, has_copy=h) for h in (True, False))
    parameters = sum(p.numel() for p in needs.model_map.model.parameters())
    assert with_copy.disk - without.disk == 2 * parameters
    assert with_copy.seconds > without.seconds


def test_a_plan_without_speeds_has_memory_and_disk(make_needs: MakeNeeds) -> None:
    plan = plan_stages(make_needs(), UNKNOWN, has_copy=True)
    assert plan.seconds < 10
    assert plan.memory > 2 * 64 * 3 * 2048 * 1024
    assert plan.disk > 10**9


@pytest.mark.parametrize(
    ("free", "memory", "message"),
    [(10**9, 10**12, "GiB are free there"), (10**13, 10**9, "GiB of memory")],
)
def test_what_does_not_fit_is_refused_with_what_to_change(
    make_needs: MakeNeeds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    memory: int,
    message: str,
) -> None:
    plan = plan_stages(make_needs(), RATES, has_copy=True)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(estimate, "total_memory", lambda: memory)
    with pytest.raises(StoreError, match=message):
        check_room(plan, tmp_path / "not" / "there")
    if memory > free:  # what another run left in the cache may be what this one needs
        monkeypatch.setattr(estimate, "_bytes_in", lambda folder: 10**13)
        check_room(plan, tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**13))
    monkeypatch.setattr(estimate, "total_memory", lambda: 100 * GIB)
    check_room(plan, tmp_path)


def test_a_time_limit_takes_the_largest_effort_that_fits(
    make_needs: MakeNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot.Pilot, "measure", lambda self, settings: RATES)
    monkeypatch.setattr(pilot.Pilot, "measure_again", lambda self, known, settings: known)

    def plan_of(**settings: Any) -> Plan:
        spec = SearchSpec.of(budget="4.25bits", model="m", **settings)
        known = make_needs()
        machine = Machine(torch.device("cpu"), torch.bfloat16)
        return fitting_plan(spec, known.model_map, known.space, machine, has_copy=True)

    seconds = {e: plan_of(effort=e).seconds for e in ("quick", "default", "thorough")}
    assert sorted(seconds.values()) == list(seconds.values())
    between = f"{seconds['quick'] + 1:.0f}s"
    assert plan_of(effort="thorough", time_limit=between).spec.run.effort == "quick"
    assert plan_of(effort="default", time_limit="500h").spec.run.effort == "default"
    with pytest.raises(ConfigError, match="the smallest search, --effort quick, is estimated at"):
        plan_of(time_limit="1s")


def test_rates_are_measured_with_the_real_functions(
    make_needs: MakeNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pilot, "_HASHED", 2**16)
    needs = make_needs(SMALL, seq_len=32)
    steps: list[tuple[int, int]] = []
    measured = Pilot(
        *(needs, torch.float32, torch.device("cpu")),
        progress=lambda stage, done, total: steps.append((done, total)),
    )
    settings = settings_of(needs.spec.quantizer)
    rates = measured.measure(settings)
    assert (steps[0][0], steps[-1][0]) == (0, steps[-1][1])
    again = measured.measure_again(rates, settings)
    assert (again.layer, again.float32) == (rates.layer, rates.float32)
    assert again.per_format != rates.per_format
    assert min(rates.layer, rates.float32, rates.dequantized, rates.hashed) > 0
    assert rates.per_format.keys() == {(s.n_rows, s.n_cols) for s in needs.stacks}
    assert min(rates.per_format.values()) > 0
    text = plan_text(plan_stages(needs, rates, has_copy=False))
    assert text.splitlines()[4].split() == ["stage", "minutes", "memory,", "GiB", "disk,", "GiB"]
    assert "original's outputs" in text


def test_an_architecture_whose_first_layers_make_no_model_is_one_clear_error(
    make_needs: MakeNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: Any) -> Any:
        raise ValueError("two lists\n of other lengths")

    needs = make_needs(SMALL)
    monkeypatch.setattr(pilot, "auto_class", refuse)
    with pytest.raises(ModelError, match=r"first layers \(two lists of other lengths\); leave"):
        Pilot(needs, torch.float32, torch.device("cpu")).measure(QuantSettings())


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(routed_architectures()) - {"doge", "jetmoe"}))
def test_every_architecture_that_is_quantized_has_a_plan(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pilot, "_HASHED", 2**16)
    with torch.device("meta"):
        config = tiny_config(arch)
        model_map = map_model(auto_class(config).from_config(config))
    needs = needs_of(model_map, effort="quick", seq_len=16, budget="6bits")
    rates = Pilot(needs, torch.float32, torch.device("cpu")).measure(QuantSettings())
    assert 0 < plan_stages(needs, rates, has_copy=False).seconds < 1000


@pytest.mark.parametrize(
    ("text", "seconds"), [("600s", 600), ("90min", 5400), ("1.5 h", 5400), (" 2h ", 7200)]
)
def test_durations_have_a_unit(text: str, seconds: float) -> None:
    assert duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "0min", "-1h", "1d", "h", "nan s", "1e3s"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="give a duration such as 600s, 90min or 2h"):
        SearchSpec.of(budget="4bits", time_limit=text)


def test_types_of_llama_cpp_stand_for_their_classes_where_they_fit() -> None:
    formats = [parse_format(n) for n in ("int4-g64", "int8-g128", "q4_k", "iq2_xs", "iq3_s")]
    ours = ("int4-g64", "int3-g128", "nl3-g32-s256")
    shares = shares_of([*formats, parse_format("iq2_s")], 256)
    assert shares == pytest.approx(
        {ours: 2 / 6, ("q4_k",): 1 / 6, ("iq3_s",): 1 / 6, ("iq2_s",): 2 / 6}
    )
    assert shares_of(formats, 128) == pytest.approx({ours: 2 / 5})


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_llama_cpp_s_types_are_timed_by_its_own_code(
    make_needs: MakeNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pilot, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pilot, "_HASHED", 2**16)
    asked: list[str] = []

    def quantize(weights: Any, batches: Any, formats: Any, settings: Any) -> Any:
        asked.extend(formats)
        return quantize_batches(weights, batches, formats, settings)

    monkeypatch.setattr(pilot, "quantize_batches", quantize)
    needs = make_needs(
        {**SMALL, "hidden_size": 256}, seq_len=32, formats="int4-g64,q4_k", budget="4.4bits"
    )
    rates = Pilot(needs, torch.float32, torch.device("cpu")).measure(QuantSettings())
    n_fitting = sum(s.n_cols == 256 for s in needs.stacks)
    assert asked.count("q4_k") == n_fitting > 0
    assert min(rates.per_format.values()) > 0


def test_workers_divide_the_stages_that_they_share_by_whole_units(make_needs: MakeNeeds) -> None:
    needs = make_needs({**OLMOE, "num_hidden_layers": 16}, effort="quick")
    alone, eight, six = (plan_stages(needs, RATES, has_copy=True, crew=Crew(n)) for n in (1, 8, 6))
    for stage in (Stage.BANK, Stage.COSTS):  # by layers: 16 are 2 turns of 8, and 3 of 6
        assert seconds_of(eight, stage) == pytest.approx(seconds_of(alone, stage) / 8)
        assert seconds_of(six, stage) == pytest.approx(seconds_of(alone, stage) * 3 / 16)
    # 8192 tokens are 2 batches of 8 windows of 512
    assert seconds_of(eight, Stage.STUDY) == pytest.approx(seconds_of(alone, Stage.STUDY) / 2)
    assert seconds_of(eight, Stage.LOAD) == seconds_of(alone, Stage.LOAD)
    assert eight.memory == pytest.approx(alone.memory, rel=0.2)  # free memory is looked at
    together = plan_stages(needs, RATES, has_copy=True, crew=Crew(8, n_together=8))
    assert together.memory > 4 * alone.memory


def test_workers_of_one_cpu_share_its_cores_and_those_with_gpus_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crew(device: str = "cpu", **run: Any) -> Crew:
        return crew_of(RunSpec(**run), torch.device(device))

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert crew() == ALONE == Crew(1, 1.0, 1)
    assert crew(workers=4) == Crew(4, 0.25, 4)  # two threads each
    assert crew(workers=16) == Crew(8, 0.125, 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert crew(workers=4) == Crew(4, 1.0, 4)
    assert crew("cuda", workers=8) == crew(workers=8, cluster="auto") == Crew(8)
