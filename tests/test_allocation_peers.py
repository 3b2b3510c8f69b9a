"""Peers that choose formats: jobs, cache, counts and checks, without the peers themselves."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alphaquant import demo
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.formats import parse_format
from alphaquant.studies.inputs import load_source
from tests.benches import import_benchmark

INT3 = {"family": "int", "bits": 3, "group_size": 128, "symmetric": True}
INT2 = {"family": "int", "bits": 2, "group_size": 64, "symmetric": True}
ROUTED = "model.layers.1.mlp.experts.7.down_proj"
PLAIN = "model.layers.0.self_attn.q_proj"
WORKER = """
import json, shutil, sys
from pathlib import Path
job, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
prepared = Path(PREPARED)
with (prepared / "jobs.jsonl").open("a") as file:
    file.write(json.dumps(job) + chr(10))
if (prepared / "broken").exists():
    sys.exit("no memory left")
for name in ("weights.safetensors", "report.json"):
    shutil.copy(prepared / name, target / name)
"""


@pytest.fixture(scope="module")
def allocation() -> ModuleType:
    return import_benchmark("allocation_peers")


@pytest.fixture(scope="module")
def choosers() -> ModuleType:
    return import_benchmark("choosers")


@pytest.fixture(scope="module")
def model_map() -> ModelMap:
    return load_source("demo", "cpu", "auto").map


def on_grid(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    groups = weight.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 2 ** (bits - 1)
    top = 2 ** (bits - 1)
    return ((groups / scale).round().clamp(-top, top - 1) * scale).flatten(-2)


@pytest.fixture(scope="module")
def made(model_map: ModelMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worker's output: int3, but int2 for the experts of layer 1, and one matrix kept."""
    folder = tmp_path_factory.mktemp("made")
    weights, formats = {}, {}
    for matrix in model_map.inventory.matrices:
        name, view = matrix.name, model_map.view(matrix.name)
        if name == PLAIN:
            weights[name] = view.float().clone()
            continue
        formats[name] = INT2 if matrix.layer == 1 and matrix.kind == "expert" else INT3
        weights[name] = on_grid(view, formats[name]["bits"], formats[name]["group_size"])
    save_file(weights, folder / "weights.safetensors")
    report = {
        "formats": formats,
        "search": {"seconds": 7.0, "cpu_seconds": 5.0},
        "quantize": {"seconds": 2.0, "cpu_seconds": 1.0},
        "notes": {"target_bits": 3.25},
        "peak_memory_bytes": 1,
        "threads": 1,
        "versions": {"auto-round": "0"},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def prepared(
    allocation: ModuleType, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the output, and a worker that hands it out."""
    folder = tmp_path / "prepared"
    shutil.copytree(made, folder)
    save_file({"tokens": torch.arange(8).reshape(2, 4)}, folder / "tokens.safetensors")
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER.replace("PREPARED", repr(str(folder))))
    monkeypatch.setattr(allocation, "_WORKER", worker)
    return folder


@pytest.fixture
def choose(allocation: ModuleType, prepared: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(budget_bits: float = 3.2, **options: Any) -> Any:
        return allocation.choose(
            sys.executable,
            allocation.AUTO_SCHEME,
            demo.model_path(),
            prepared / "tokens.safetensors",
            budget_bits,
            options,
            tmp_path / "cache",
        )

    return run


def jobs(prepared: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared / "jobs.jsonl").read_text().splitlines()]


def test_a_choice_is_counted_with_our_formats(
    choose: Callable[..., Any], model_map: ModelMap
) -> None:
    choice = choose(iters=0)
    sizes = {m.name: m.n_weights for m in model_map.inventory.matrices}
    n_int2 = sum(n for name, n in sizes.items() if ".1.mlp.experts." in name)
    n_kept, n_all = sizes[PLAIN], sum(sizes.values())
    expected = (2.25 * n_int2 + 16 * n_kept + 3.125 * (n_all - n_int2 - n_kept)) / n_all
    assert choice.bits_per_weight == pytest.approx(expected, abs=1e-12)
    assert list(choice.formats) == list(sizes)
    assert choice.formats[ROUTED] == INT2
    assert choice.formats[PLAIN]["family"] == "bf16"
    assert choice.assignment.formats[ROUTED] == "int2-g64"
    assert (choice.search_seconds, choice.quantize_seconds, choice.cpu_seconds) == (7.0, 2.0, 6.0)
    assert choice.notes["values_per_group"] == {"int3-g128": 8, "int2-g64": 4, "bf16": 0}
    assert choice.notes["target_bits"] == 3.25
    assert set(load_file(choice.weights)) == set(sizes)


def test_a_second_call_reads_the_cache_and_another_budget_does_not(
    choose: Callable[..., Any], prepared: Path
) -> None:
    assert choose(iters=0).notes["is_cached"] is False
    assert choose(iters=0).notes["is_cached"] is True
    assert choose(3.3, iters=0).notes["is_cached"] is False
    assert choose(iters=200).notes["is_cached"] is False
    assert choose(iters=0, schemes=["W3A16"]).notes["is_cached"] is False
    first, other_budget, other_rounding, other_schemes = jobs(prepared)
    assert first["budget_bits"] == 3.2 and other_budget["budget_bits"] == 3.3
    assert first["scores"] == other_budget["scores"] == other_rounding["scores"]
    assert first["scores"] != other_schemes["scores"]


def test_other_windows_have_other_scores(choose: Callable[..., Any], prepared: Path) -> None:
    choose()
    save_file({"tokens": torch.ones(2, 4, dtype=torch.int64)}, prepared / "tokens.safetensors")
    choose()
    first, second = jobs(prepared)
    assert first["scores"] != second["scores"]


def test_a_failure_is_told_and_not_cached(
    allocation: ModuleType, choose: Callable[..., Any], prepared: Path
) -> None:
    (prepared / "broken").touch()
    with pytest.raises(allocation.PeerError, match="no memory left"):
        choose()
    (prepared / "broken").unlink()
    assert choose().notes["is_cached"] is False
    assert len(jobs(prepared)) == 2


def test_a_choice_over_the_budget_is_refused(
    allocation: ModuleType, choose: Callable[..., Any]
) -> None:
    with pytest.raises(allocation.PeerError, match=r"chose 3\.\d+ bits per weight; .* is 3\.0"):
        choose(3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({ROUTED: w[ROUTED] + torch.rand(w[ROUTED].shape)}), "values; int2"),
        (lambda w: w.update({PLAIN: w[PLAIN] * 1.01}), "differs from the original"),
        (lambda w: w.pop(ROUTED), "missing"),
        (lambda w: w.update({ROUTED: w[ROUTED].T.contiguous()}), "is \\("),
    ],
    ids=["an expert left unquantized", "a kept matrix changed", "absent", "transposed"],
)
def test_weights_that_are_not_as_claimed_are_refused(
    allocation: ModuleType,
    choose: Callable[..., Any],
    prepared: Path,
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
) -> None:
    weights = load_file(prepared / "weights.safetensors")
    change(weights)
    save_file(weights, prepared / "weights.safetensors")
    with pytest.raises(allocation.PeerError, match=message):
        choose()


def test_int2_in_large_groups_joins_where_the_others_do_not_fit(allocation: ModuleType) -> None:
    assert "W2A16" in allocation.auto_scheme_options(2.25)["schemes"]
    assert allocation.auto_scheme_options(2.5, 200) == {
        "schemes": ["W2A16G64", "W3A16", "W4A16", "W8A16"],
        "iters": 200,
    }


def test_the_worker_counts_bits_as_our_formats_do(
    allocation: ModuleType, choosers: ModuleType
) -> None:
    shapes = {"a": (256, 128), "b": (3, 200)}
    n_weights = 256 * 128 + 3 * 200
    for fmt, name in zip(
        allocation.modelopt_options()["formats"], allocation.MODELOPT_FORMATS, strict=True
    ):
        ours = sum(parse_format(name).storage_bits(*shape) for shape in shapes.values())
        found = choosers.stored_bits(shapes, dict.fromkeys(shapes, fmt))
        assert found == pytest.approx(ours / n_weights, abs=1e-12)
        recipe = choosers._recipe(fmt, "mse")
        assert recipe["effective_bits"] == parse_format(name).nominal_bits
    assert choosers.stored_bits(shapes, {}) == 16


@pytest.mark.parametrize("change", [{"symmetric": False}, {"family": "nvfp"}])
def test_formats_that_modelopt_cannot_store_on_a_cpu_are_refused(
    choosers: ModuleType, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="only symmetric integers"):
        choosers._recipe({**INT3, **change}, "mse")


def test_fused_experts_are_named_one_by_one(choosers: ModuleType, model_map: ModelMap) -> None:
    found = choosers.layer_weights(model_map.model)
    assert set(found) == set(model_map.inventory.by_name)
    for name, weight in found.items():
        assert torch.equal(weight, model_map.view(name).float()), name
    shapes = choosers._shapes(model_map.model)
    assert shapes[ROUTED] == (256, 128)


def test_what_counts_leaves_out_routers_and_gates(choosers: ModuleType) -> None:
    layer = torch.nn.Module()
    layer.gate, layer.gate_proj = torch.nn.Linear(4, 2), torch.nn.Linear(4, 3)
    layer.shared_expert_gate = torch.nn.Linear(4, 1)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    outer = torch.nn.Module()
    outer.model = model
    assert choosers._shapes(outer) == {"model.layers.0.gate_proj": (3, 4)}


def test_enabled_quantizers_are_read_as_formats(choosers: ModuleType) -> None:
    def quantizer(bits: int, is_enabled: bool = True) -> SimpleNamespace:
        return SimpleNamespace(is_enabled=is_enabled, num_bits=bits, block_sizes={-1: 128})

    experts = "model.layers.0.mlp.experts"
    modules = {
        "model.layers.0.self_attn.q_proj.weight_quantizer": quantizer(3),
        "model.layers.0.self_attn.q_proj.input_quantizer": quantizer(3, is_enabled=False),
        "lm_head.weight_quantizer": quantizer(4, is_enabled=False),
        f"{experts}.gate_up_proj_weight_quantizers.7": quantizer(4),
        f"{experts}.down_proj_weight_quantizers.7": quantizer(3),
        experts: SimpleNamespace(),
    }
    model = SimpleNamespace(named_modules=lambda: modules.items())
    int4 = {**INT3, "bits": 4}
    assert choosers._recipe_formats(model, [INT3, int4]) == {
        "model.layers.0.self_attn.q_proj": INT3,
        f"{experts}.7.gate_proj": int4,
        f"{experts}.7.up_proj": int4,
        f"{experts}.7.down_proj": INT3,
    }


def test_scores_of_a_job_that_did_not_finish_are_dropped(
    choosers: ModuleType, tmp_path: Path
) -> None:
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "partial.json").touch()
    assert choosers._open_scores(scores) is None
    assert not list(scores.iterdir())
    clock = choosers.Clock()
    clock.seconds, clock.cpu_seconds = 3.0, 2.0
    choosers._keep_scores(scores, None, clock)
    assert choosers._open_scores(scores) == {"seconds": 3.0, "cpu_seconds": 2.0}


class FakeRounder:
    """Chooses int3 for as many of 64 equal matrices as its target, zeros counted, allows."""

    def __init__(self, target_bits: float) -> None:
        counted = {"int2": 2 + 18 / 64, "int3": 3 + 19 / 128}
        n_int3 = int(64 * (target_bits - counted["int2"]) / (counted["int3"] - counted["int2"]))
        self.layer_config = {
            f"m{i}": {"data_type": "int", "bits": f["bits"], "group_size": f["group_size"]}
            | {"sym": True}
            for i, f in enumerate([INT3] * n_int3 + [INT2] * (64 - n_int3))
        } | {"lm_head": {"bits": 16}}

    def quantize(self) -> tuple[str, None]:
        return "quantized", None


def test_the_target_of_auto_scheme_rises_until_the_budget_is_stored(
    choosers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"m{i}": (128, 128) for i in range(64)}
    monkeypatch.setattr(choosers, "load_model", lambda job: None)
    monkeypatch.setattr(choosers, "_shapes", lambda model: shapes)
    monkeypatch.setattr(choosers, "_scheme_search", lambda job, bits: FakeRounder(bits))
    monkeypatch.setenv("AR_AUTO_SCHEME_CACHE", "")
    job = {"budget_bits": 2.5, "scores": str(tmp_path / "scores")}
    choice = choosers.auto_scheme(job)
    # 18 of 64 in int3 store 2.25 + 0.875 * 18 / 64 = 2.49609 bits, 19 of 64 more than 2.5
    assert sum(f["bits"] == 3 for f in choice.formats.values()) == 18
    assert sum(f["bits"] == 3 for f in choosers._scheme_formats(FakeRounder(2.5)).values()) == 16
    assert "lm_head" not in choice.formats
    assert choice.notes["had_scores"] is False
    (tmp_path / "scores" / "scoring.json").write_text('{"seconds": 100, "cpu_seconds": 90}')
    again = choosers.auto_scheme(job)
    assert again.notes["had_scores"] is True
    assert 100 < again.search.seconds < 101
    assert 90 < again.search.cpu_seconds < 91
