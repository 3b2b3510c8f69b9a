"""A search from end to end on a tiny model: same seed same trials, feasible, resumable, agreed."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands import search as command
from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import plan_search, search
from alphaquant.commands.searching import outcome
from alphaquant.errors import (
    AlphaQuantError,
    BudgetError,
    ConfigError,
    DataError,
    FormatError,
    ModelError,
    StoreError,
)
from alphaquant.spaces.config import load_config, resolve
from alphaquant.spaces.units import Inventory
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies import loop
from alphaquant.studies.gate import judge
from alphaquant.studies.objective import Measured, SearchObjective
from alphaquant.studies.result import SearchResult
from alphaquant.studies.store.study import TrialRow
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.feasibility import is_feasible

MakeSpec = Callable[..., SearchSpec]


class Killed(BaseException):
    """Stands for a signal that no code of ours may catch."""


def comparable(rows: tuple[TrialRow, ...]) -> list[dict[str, Any]]:
    """Everything of trials but how long they took."""
    return [{**asdict(row), "seconds": 0.0} for row in rows]


def test_another_seed_gives_other_trials(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    other = search(make_spec(tmp_path / "out", seed=1, trials=2))
    assert other.rows[0].kl != found.rows[0].kl


ABOVE = ("size",)
"""Origins of trials that may be above the budget."""


@pytest.mark.parametrize("name", ["found", "long"])
def test_trials_but_those_of_the_front_are_within_the_budget_and_all_say_their_bits(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: SearchResult = request.getfixturevalue(name)
    inventory, limit = result.space.inventory, result.space.limit_bits
    for row in result.rows:
        assignment = result.folder.load_assignment(row.digest)
        assert assignment.storage_bits(inventory) <= limit or row.origin in ABOVE
        assert row.bits_per_weight == assignment.storage_bits(inventory) / inventory.n_weights
        assert set(assignment.formats.values()) <= set(result.space.menu)
    assert any(row.bits_per_weight > result.limit for row in result.rows)
    best = resolve(load_config(result.folder.path / "best.json"), inventory, strict=True)
    assert best.assignment.storage_bits(inventory) <= limit
    assert best.assignment == result.published


def test_all_steps_of_a_search_ran_and_races_ended_early(long: SearchResult) -> None:
    kinds = [kind for kind, _ in groupby(row.origin.split(":")[0] for row in long.rows)]
    assert kinds == [
        *("uniform", "knobs", "size", "knobs"),
    ]
    pruned = [row for row in long.rows if row.is_pruned]
    assert pruned
    assert {row.origin for row in pruned} == {"knobs"}
    assert all(len(row.kl_per_window) in (8, 16) for row in pruned)
    assert not {row.number for row in pruned} & {row.number for row in long.front_trials}
    assert long.probe is not None
    assert long.n_measured > len({row.digest for row in long.rows})
    assert 0 < long.n_passes < long.n_measured


def test_front_is_exactly_the_non_dominated_set_of_complete_trials(long: SearchResult) -> None:
    def is_dominated(row: TrialRow) -> bool:
        return any(
            (o.bits_per_weight <= row.bits_per_weight and o.kl <= row.kl)
            and (
                (o.bits_per_weight, o.kl) != (row.bits_per_weight, row.kl) or o.number < row.number
            )
            for o in long.rows
            if not o.is_pruned
        )

    complete = [row for row in long.rows if not row.is_pruned]
    best = {r.number for r in complete if not is_dominated(r)}
    assert {r.number for r in long.front_trials} == best
    assert len(long.front_trials) > 2


def stop_in(stage: str, step: int = 1) -> Callable[[str, int, int], None]:
    """Progress that dies in a stage once so many steps of it are done."""

    def stop(name: str, done: int, total: int) -> None:
        if name == stage and done >= step:
            raise Killed

    return stop


def test_search_stopped_everywhere_gives_the_trials_of_one_that_was_not_from_nothing(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, n_calls = SearchObjective.measure, 0

    def measure_and_die(self: SearchObjective, *args: Any) -> Measured:
        nonlocal n_calls
        n_calls += 1
        if n_calls in (4, 9):
            raise Killed
        return measure(self, *args)

    spec = make_spec(tmp_path / "out", cache=tmp_path / "cache")
    for stage in ("teacher", "bank", "costs", "study"):
        with pytest.raises(Killed):
            search(spec, progress=stop_in(stage))
    with monkeypatch.context() as patch:
        patch.setattr(SearchObjective, "measure", measure_and_die)
        for _ in range(2):
            with pytest.raises(Killed):
                search(spec)
    for stage in ("gate", "report"):
        with pytest.raises(Killed):
            search(spec, progress=stop_in(stage))
        assert not (spec.run.out / "front.json").exists()
    last = search(spec)
    assert comparable(last.rows) == comparable(found.rows)
    assert last.published.digest == found.published.digest


def measurements(cache: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of every log of measurements, without their seconds."""
    return {
        path.name: [{**json.loads(line), "seconds": 0.0} for line in path.read_text().splitlines()]
        for path in cache.glob("banks/*/evaluations/*.jsonl")
    }


def test_search_killed_in_its_steps_is_one_that_was_not_and_measures_nothing_twice(
    long: SearchResult, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replaced(long.spec, out=tmp_path / "out", cache=tmp_path / "cache")
    cache = long.spec.run.cache
    assert cache is not None
    ignore = shutil.ignore_patterns("evaluations")
    shutil.copytree(cache, tmp_path / "cache", ignore=ignore)

    def die_in_a_race(*args: Any) -> bool:
        raise Killed

    with pytest.raises(Killed):
        search(spec, progress=stop_in("probe", 7))
    for module, name, die in (
        (loop, "is_hopeless", die_in_a_race),
        (judge, "uniform_assignment", die_in_a_race),
        (outcome, "write_configs", die_in_a_race),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, die)
            search(spec)
        assert not (spec.run.out / "best.json").exists()
    last = search(spec)
    assert comparable(last.rows) == comparable(long.rows)
    assert last.published == long.published
    assert last.gate == long.gate
    assert last.probe == long.probe
    assert measurements(tmp_path / "cache") == measurements(cache)
    assert (last.n_measured, last.n_passes) == (0, 0.0)


def test_finished_search_reports_again_without_a_trial_and_more_trials_extend_it(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "out", trials=6)
    ran: list[int] = []
    first = search(spec, on_trial=lambda row: ran.append(row.number))
    again = search(spec, on_trial=lambda row: ran.append(row.number))
    assert again.rows == first.rows
    assert ran == list(range(6))
    (spec.run.out / "configs" / "trial-999.json").write_text("of a point that left the front")
    longer = search(replaced(spec, trials=10), on_trial=lambda row: ran.append(row.number))
    assert ran == list(range(10))
    assert comparable(longer.rows) == comparable(found.rows)
    assert_configs_are_those_of_the_gate(longer)


def test_timeout_stops_after_a_trial_and_says_so(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = search(make_spec(tmp_path / "out", timeout=0))
    assert len(result.rows) == 1
    assert "the timeout of 0 s is over; trials so far: 1" in caplog.text
    assert result.stopped == "the timeout of 0 s is over"


def test_a_search_with_a_time_limit_goes_on_with_the_effort_that_it_has(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    told: list[str] = []
    spec = make_spec(tmp_path / "out", effort="thorough", time_limit="2h", trials=2)
    search(spec, tell=told.append)
    assert told[0].startswith("effort thorough: ")
    again = search(replaced(spec, effort="quick", trials=3))
    assert again.spec.run.effort == "thorough"
    assert len(again.rows) == 3
    with pytest.raises(StoreError, match=r"other settings \(effort\)"):
        search(replaced(spec, effort="quick", time_limit=None))


def test_a_plan_needs_no_weights_and_writes_nothing(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out", cache=tmp_path / "cache")
    found = plan_search(spec)
    assert found.seconds > 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text("another's")
    assert plan_search(spec).disk == found.disk  # where results would go does not matter


def test_packed_checkpoint_of_best_measures_as_its_trial(
    found: SearchResult, texts: dict[str, Path], tmp_path: Path
) -> None:
    model, best = found.spec.checkpoint.model, found.folder.path / "best.json"
    spec = QuantizeSpec.of(model=model, config=best, out=tmp_path / "packed")
    written = quantize(spec)
    assert written.quantized_bytes == found.counts.quantized_bytes
    row = next(r for r in found.rows if r.digest == found.published.digest)
    scores = evaluate(
        EvaluateSpec(
            model=str(tmp_path / "packed"),
            reference=model,
            data=str(texts["search"]),
            samples=6,
            seq_len=found.spec.texts.seq_len,
        )
    ).scores
    assert {s.metric: s.value for s in scores} == pytest.approx(
        {"kl": row.kl, "same_top": row.same_top, "perplexity": row.perplexity}, abs=1e-6
    )


@pytest.mark.parametrize("name", ["found", "long"])
def test_files_of_a_search_agree(name: str, request: pytest.FixtureRequest) -> None:
    result: SearchResult = request.getfixturevalue(name)
    folder = result.folder.path
    front = json.loads((folder / "front.json").read_text())
    assert front["version"] == 2
    with (folder / "trials.csv").open() as file:
        trials = {int(row["number"]): row for row in csv.DictReader(file)}
    assert front["n_trials"] == len(trials) == len(result.rows)
    on_front = {n for n, row in trials.items() if row["on_front"] == "True"}
    assert on_front == {row.number for row in result.front_trials}
    published = {n for n, row in trials.items() if row["is_published"] == "True"}
    points = [point for point in front["front"] if point["heldout"]["trial"] is not None]
    # The best may be off the front: what is lower there is lower by noise.
    assert {point["evaluation"]["number"] for point in points} == published
    assert published <= on_front | {result.best.number}
    report = (folder / "report.md").read_text()
    for point in points:
        row, evaluation = trials[point["evaluation"]["number"]], point["evaluation"]
        assert float(row["kl"]) == evaluation["kl"]
        assert float(row["bits_per_weight"]) == evaluation["bits_per_weight"]
        assert row["digest"] == evaluation["digest"] == point["heldout"]["digest"]
        assert f"{point['heldout']['kl']:.6f}" in report
    assert all(point["config"] in report for point in front["front"])
    assert_configs_are_those_of_the_gate(result)
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("name", ["found", "long"])
def test_every_configuration_resolves_to_its_assignment(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: SearchResult = request.getfixturevalue(name)
    inventory: Inventory = result.space.inventory
    held = {row.digest: row for row in result.gate.points}
    paths = [*(result.folder.path / "configs").iterdir(), result.folder.path / "best.json"]
    for path in paths:
        config = load_config(path)
        summary: Any = config.summary
        assignment = resolve(config, inventory, strict=True).assignment
        assert assignment.digest == summary["assignment_digest"]
        assert summary["heldout"][0]["kl"] == held[assignment.digest].kl
        if summary["trial"] is not None:
            row = result.rows[summary["trial"]]
            assert (assignment.digest, summary["bits_per_weight"]) == (
                row.digest,
                row.bits_per_weight,
            )
            assert summary["scores"][0]["value"] == row.kl
        counts = asdict(assignment.count_bits(inventory))
        assert {k: summary[k] for k in counts} == counts


def test_front_json_carries_provenance(long: SearchResult) -> None:
    front = json.loads((long.folder.path / "front.json").read_text())
    facts = front["provenance"]
    assert {"model_digest", "data", "versions", "device", "seed"} <= facts.keys()
    assert {t["digest"] for t in facts["data"].values()}.__len__() == 3
    assert front["seconds"].keys() == {
        *(
            "load",
            "prepare",
            "teacher",
            "bank",
            "hessians",
            "outputs",
            "costs",
            "planned",
            "study",
        ),
        *("probe", "gate", "report"),
    }
    assert front["n_measured"] == long.n_measured
    assert front["stopped"] == "all 20 trials of --trials or --effort are done"
    assert long.probe is not None
    assert front["probe"]["spearman"] == long.probe.spearman
    stages = [stage["stage"] for stage in front["stages"]]
    assert stages[0] == "uniform"
    assert {"size", "sampled knobs"} <= set(stages)
    names = {row["name"] for row in front["heldout"]}
    assert {front["best"]["searched"], "int4-g64", "mxfp4"} <= names


def assert_configs_are_those_of_the_gate(result: SearchResult) -> None:
    names = {p.name for p in (result.folder.path / "configs").iterdir()}
    assert names == {
        f"uniform-{row.name}.json" if row.trial is None else f"trial-{row.trial:03d}.json"
        for row in result.gate.points
    }


@pytest.mark.parametrize(
    ("profile", "formats", "budget"),
    [
        ("vllm", "fp8-e4m3-row,mxfp4,bf16", "7bits"),
        ("transformers", "int3-g32,int4-g32,int8-row", "6bits"),
    ],
)
def test_profile_couples_units_and_the_result_obeys(
    profile: str, formats: str, budget: str, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "out", profile=profile, formats=formats, budget=budget, trials=9)
    result = search(spec)
    n_units = len(result.space.units)
    assert n_units < len(result.space.inventory.matrices)
    allowed = {unit.name: result.space.allowed(unit) for unit in result.space.units}
    for row in result.rows:
        assignment = result.folder.load_assignment(row.digest)
        assert row.origin in ABOVE or is_feasible(result.space, assignment)
        for unit in result.space.units:
            names = {assignment.formats[m.name] for m in unit.matrices}
            assert len(names) == 1
            assert names <= set(allowed[unit.name])
        experts: dict[int, set[str]] = {}
        for matrix in result.space.inventory.matrices:
            if matrix.kind == "expert":
                layer = matrix.layer if profile == "vllm" else 0
                experts.setdefault(layer, set()).add(assignment.formats[matrix.name])
        assert all(len(names) == 1 for names in experts.values())
    assert len({r.digest for r in result.rows}) > 2


def test_groups_of_units_take_what_is_beside_the_layers_too(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(
        tmp_path / "out", include="head,embeddings", mode="groups", trials=9, bank="short"
    )
    result = search(spec)
    assert result.space.inventory.include == ("head", "embeddings")
    chosen = [result.folder.load_assignment(row.digest).formats for row in result.rows]
    assert len({(found["lm_head"], found["model.embed_tokens"]) for found in chosen}) > 1
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["include"] == ["head", "embeddings"]


def test_a_search_of_less_takes_the_bank_of_one_of_more(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    more = {"cache": tmp_path / "cache", "trials": 3}
    found = [
        search(make_spec(tmp_path / include, include=include, **more))
        for include in ("head,embeddings", "head", "embeddings", "none")
    ]
    sizes = [len(result.space.inventory.matrices) for result in found]
    assert sizes == [sizes[3] + 2, sizes[3] + 1, sizes[3] + 1, sizes[3]]


@pytest.mark.parametrize(
    ("limits", "outside"),
    [
        ({"max_formats_per_layer": 1}, set()),
        ({"layer_minimum_bits": 4.4, "budget": "4.6bits"}, {"mxfp4"}),
    ],
)
def test_side_constraints_hold_in_every_configuration(
    limits: dict[str, Any], outside: set[str], make_spec: MakeSpec, tmp_path: Path
) -> None:
    result = search(make_spec(tmp_path / "out", trials=9, **limits))
    inventory = result.space.inventory
    paths = [*(result.folder.path / "configs").iterdir(), result.folder.path / "best.json"]
    found = [resolve(load_config(path), inventory, strict=True).assignment for path in paths]
    rows = [result.folder.load_assignment(row.digest) for row in result.rows]
    for assignment in (*found, *rows):
        for layer in range(inventory.n_parts):
            inside = [m for m in inventory.matrices if m.layer == layer]
            experts = {assignment.formats[m.name] for m in inside if m.kind == "expert"}
            assert len(experts) <= limits.get("max_formats_per_layer", len(inside))
            n_bits = sum(m.storage_bits(assignment.format_of(m.name)) for m in inside)
            n_weights = sum(m.n_weights for m in inside)
            assert n_bits / n_weights >= limits.get("layer_minimum_bits", 0.0)
    assert len({row.digest for row in result.rows}) > 2
    compared = {row.name for row in result.gate.rows if row.trial is None}
    assert compared == ({"int4-g64", "mxfp4", "int8-row"} - outside)


@pytest.mark.parametrize(
    ("changes", "origins"),
    [
        ({"mode": "groups", "trials": 14}, {"uniform", "knobs", "size", "groups"}),
        ({"allocator": "evolution", "trials": 8}, {"uniform", "allocator"}),
        ({"allocator": "gemq"}, {"uniform", "allocator"}),
        ({"allocator": "token-fisher", "include": "head"}, {"uniform", "allocator"}),
    ],
)
def test_other_programs_end_in_the_same_files(
    changes: dict[str, Any], origins: set[str], make_spec: MakeSpec, tmp_path: Path
) -> None:
    result = search(make_spec(tmp_path / "out", **changes))
    assert {row.origin.split(":")[0] for row in result.rows} == origins
    if "allocator" in changes:
        assert [r.origin for r in result.rows][2:] == [f"allocator:{changes['allocator']}"]
    names = {"front.json", "best.json", "trials.csv", "report.md", "report.html", "study.db"}
    assert {*names, "run.json"} <= {path.name for path in result.folder.path.iterdir()}
    again = search(result.spec)
    assert again.rows == result.rows
    assert again.n_measured == 0


def test_searches_of_other_budgets_share_what_was_measured(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = search(make_spec(tmp_path / "a", trials=5, cache=cache))
    other = search(make_spec(tmp_path / "b", trials=5, cache=cache, budget="5bits"))
    shared = {row.digest for row in first.rows} & {row.digest for row in other.rows}
    assert {row.digest for row in first.rows[:2]} <= shared
    assert other.n_measured == len({row.digest for row in other.rows} - shared)


def test_menu_of_one_format_gives_that_format_and_says_so(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    result = search(make_spec(tmp_path / "out", formats="int4-g32", trials=6))
    assert result.gate.winner == "int4-g32"
    assert len({row.digest for row in result.rows}) == 1
    assert [row.duplicate_of for row in result.rows] == [None, 0, 0, 0, 0, 0]
    assert [row.number for row in result.rows] == list(range(6))
    assert search(result.spec).rows == result.rows
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["default"]["wq"] == "int4"
    assert best["overrides"] == []
    report = (tmp_path / "out" / "report.md").read_text()
    assert "best.json is uniform int4-g32" in report


def test_model_whose_kl_is_not_finite_is_refused_and_no_trial_is_kept(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = SearchObjective.measure

    def measure_nan(self: SearchObjective, *args: Any) -> Measured:
        found = measure(self, *args)
        scores = (replace(found.scores[0], value=float("nan")), *found.scores[1:])
        return Measured(scores, found.kl)

    spec = make_spec(tmp_path / "out", trials=3)
    with monkeypatch.context() as patch:
        patch.setattr(SearchObjective, "measure", measure_nan)
        with pytest.raises(ModelError, match="is nan.*--dtype float32"):
            search(spec)
    assert [row.number for row in search(spec).rows] == [0, 1, 2]


def left_in(folder: Path) -> list[Path]:
    """What is in a folder, apart from a copy of weights in a cache there, which the next uses."""
    copies = folder / "cache" / "weights"
    found = folder.rglob("*")
    return [p for p in found if copies not in (p, *p.parents) and p not in copies.parents]


def no_work(self: SearchObjective, *args: Any) -> Measured:
    raise AssertionError("a wrong input must be refused before any trial")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"formats": "int9"}, FormatError, "int9"),
        ({"budget": "4 parsecs"}, BudgetError, "parsecs"),
        ({"budget": "1bits"}, BudgetError, "cannot be reached.*reach from.*larger budget"),
        ({"budget": "1KB"}, BudgetError, "stays unquantized"),
        ({"profile": "tgi"}, ConfigError, "tgi.*vllm"),
        ({"sampler": "cma"}, ConfigError, "sampler is 'cma' .*use tpe"),
        ({"grouping": "name"}, ConfigError, "grouping is 'name' .*use layer or utilization"),
        ({"allocator": "magic"}, ConfigError, "magic.*fisher.*evolution"),
        ({"active_budget": "3bits"}, BudgetError, "active budget '3bits'; write bytes"),
        ({"mode": "groups", "layer_minimum_bits": 3.0}, ConfigError, "groups keeps the budget"),
        ({"layer_minimum_bits": 6.0}, BudgetError, "layer_minimum_bits = 6.0 takes"),
        ({"active_budget": "1KB"}, BudgetError, "a token reads .* bytes in the smallest"),
        ({"include": "tail"}, ConfigError, "--include tail; known are head, embeddings"),
        ({"include": "head", "profile": "vllm"}, ConfigError, "as they are; leave --include out"),
        ({"include": "head", "allocators": "gemq,pmq"}, ConfigError, "need gemq, which only matr"),
        ({"device": "quantum"}, ModelError, "quantum.*cpu"),
        ({"device": "meta"}, ModelError, "meta.*cpu"),
        ({"dtype": "int8"}, ModelError, "int8.*float32"),
        ({"model": "/nowhere/model"}, ModelError, "/nowhere/model"),
    ],
)
def test_wrong_names_are_refused_and_leave_nothing(
    changes: dict[str, Any],
    error: type[AlphaQuantError],
    words: str,
    make_spec: MakeSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SearchObjective, "measure", no_work)
    with pytest.raises(error, match=words):
        search(make_spec(tmp_path / "out", cache=tmp_path / "cache", **changes))
    assert left_in(tmp_path) == []


def test_model_without_quantizable_units_is_refused_and_leaves_nothing(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    model = save_tiny(
        tmp_path / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=None
    )
    with pytest.raises(ModelError, match="no quantizable matrices"):
        search(make_spec(tmp_path / "out", model=str(model)))
    assert [p.name for p in tmp_path.iterdir()] == ["gpt2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": "nothing.txt"}, "nothing.txt.*existing file"),
        ({"calibration_samples": 9_000}, "too short.*lower the number"),
        ({"seq_len": 4000}, "4000.*1 to 128.*--seq-len"),
    ],
)
def test_wrong_texts_are_refused_and_leave_nothing(
    changes: dict[str, Any], words: str, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path / "out", cache=tmp_path / "cache")
    with pytest.raises(DataError, match=words):
        search(replaced(spec, **changes))
    assert left_in(tmp_path) == []


def test_one_file_for_two_roles_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out")
    with pytest.raises(DataError, match="overlap.*disjoint"):
        search(replaced(spec, heldout=spec.texts.evaluation))
    assert not spec.run.out.exists()


def test_out_of_something_else_is_never_touched(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="no search of ours.*another --out"):
        search(make_spec(tmp_path, overwrite=True))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_out_of_another_search_needs_overwrite(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    shutil.copytree(found.folder.path, tmp_path / "out")
    other = make_spec(tmp_path / "out", trials=3, budget="6bits")
    before = (tmp_path / "out" / "front.json").read_bytes()
    with pytest.raises(StoreError, match=r"other settings \(budget\).*--overwrite"):
        search(other)
    assert (tmp_path / "out" / "front.json").read_bytes() == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = search(replaced(other, overwrite=True))
    assert len(again.rows) == 3
    assert again.space.limit_bits != found.space.limit_bits
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_taken_out_is_refused_before_the_model_is_loaded(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(found.folder.path, tmp_path / "out")

    def no_load(*args: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(command, "load_source", no_load)
    with pytest.raises(StoreError, match=r"other settings \(seed\)"):
        search(make_spec(tmp_path / "out", seed=1))


def test_overwrite_with_a_wrong_text_keeps_the_earlier_search(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    shutil.copytree(found.folder.path, tmp_path / "out")
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    spec = make_spec(tmp_path / "out", budget="6bits", overwrite=True)
    with pytest.raises(DataError):
        search(replaced(spec, heldout="nothing.txt"))
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before


def test_text_that_changed_since_is_noticed(
    make_spec: MakeSpec, texts: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(texts["search"], text)
    spec = make_spec(tmp_path / "out", trials=2, evaluation=str(text))
    search(spec)
    text.write_text(text.read_text()[500:])
    with pytest.raises(StoreError, match=r"other settings \(evaluation_text\)"):
        search(spec)


def test_damaged_bank_is_refused_by_file(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(tmp_path / "out", trials=1, cache=tmp_path / "cache")
    search(spec)
    file = next((tmp_path / "cache").rglob("int4-g32/layer-001.safetensors"))
    content = file.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 0xFF]) + content[-4:]
    for path, damaged in (
        (file, flipped),
        (file, content[: len(content) // 2]),
        (file.with_suffix(".json"), b"{"),
    ):
        whole = path.read_bytes()
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match="layer-001.*damaged.*delete"):
            search(spec)
        path.write_bytes(whole)
    file.write_bytes(flipped)
    shutil.rmtree(file.parent)
    assert len(search(spec).rows) == 1


def test_study_elsewhere_that_belongs_to_another_search_leaves_no_directory(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    search(make_spec(tmp_path / "a", trials=1, storage=url))
    with pytest.raises(StoreError, match="belongs to another search.*--study"):
        search(make_spec(tmp_path / "b", trials=1, storage=url, budget="6bits"))
    assert not (tmp_path / "b").exists()
    with pytest.raises(StoreError, match="are not in .*another --study"):
        search(make_spec(tmp_path / "b", trials=1, storage=url))


def test_external_storage_that_cannot_be_opened_leaves_no_directory(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    for url in ("sqlite:////nowhere/x.db", "mongodb://x", "no url", "sqlite://"):
        with pytest.raises(StoreError, match="cannot be used|no directory /nowhere|in memory"):
            search(make_spec(tmp_path / "out", storage=url))
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused_before_anything_is_loaded(
    make_spec: MakeSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_source", no_work)
    file = tmp_path / "file"
    file.write_text("mine")
    for changes, words in (
        ({"out": file / "x" / "y"}, "--out .*: .*file is no directory"),
        ({"cache": file}, "--cache .*file is no directory"),
        ({"storage": f"sqlite:///{tmp_path}"}, "is no file; give another --storage"),
        ({"storage": f"journal:{tmp_path}/no/s"}, "there is no directory .*no"),
    ):
        with pytest.raises(StoreError, match=words):
            search(make_spec(**{"out": tmp_path / "out", **changes}))
    assert list(tmp_path.iterdir()) == [file]


def test_second_search_of_an_out_or_a_study_is_refused_and_the_first_goes_on(
    found: SearchResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    spec = make_spec(tmp_path / "out", storage=url)
    refused: list[str] = []

    def start_others(row: TrialRow) -> None:
        if row.number in (3, 9):
            for other in (spec, replaced(spec, out=tmp_path / "other")):
                with pytest.raises(StoreError, match=f"in use: process {os.getpid()} ") as caught:
                    search(other)
                refused.append(str(caught.value).split(" is in use")[0])

    result = search(spec, on_trial=start_others)
    assert comparable(result.rows) == comparable(found.rows)
    assert refused == [f"--out {spec.run.out}", f"study 'aq-search' in {url}"] * 2
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.rglob("*.lock"))
    assert comparable(search(spec).rows) == comparable(found.rows)


def test_budget_that_binds_nothing_is_said_once(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(make_spec(tmp_path / "out", budget="16bits", trials=1))
    said = [r.message for r in caplog.records if "binds nothing" in r.message]
    assert len(said) == 1
    assert said[0].startswith("budget 16bits binds nothing: the largest formats at hand take 8")
