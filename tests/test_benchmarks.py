"""The benchmark of the quantizer: its pieces on small inputs, without other quantizers."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alphaquant.demo import text_path
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.texts import TextSpec
from tests.benches import import_benchmark


@pytest.fixture(scope="module")
def quantizer() -> ModuleType:
    return import_benchmark("quantizer")


@pytest.fixture(scope="module")
def peers(quantizer: ModuleType) -> ModuleType:
    return sys.modules["quantizer_peers"]


@pytest.fixture(scope="module")
def demo(quantizer: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    for part in ("calibration", "heldout"):
        text = text_path(part).read_text(encoding="utf-8")[:30_000]
        (folder / f"{part}.txt").write_text(text, encoding="utf-8")
    calibration, heldout = str(folder / "calibration.txt"), str(folder / "heldout.txt")
    data = TextSpec(
        calibration=calibration, heldout=heldout, calibration_samples=16, heldout_samples=2
    )
    facts = quantizer.prepare("demo", folder, data)
    assert facts["calibration"]["role"] == "calibration"
    assert facts["heldout"]["role"] == "heldout"
    return folder


def test_each_option_changes_plain_gptq_in_one_field(quantizer: ModuleType) -> None:
    found = quantizer.variants()
    plain = vars(found["gptq"])
    assert (plain["refine_sweeps"], plain["route_exponent"], plain["pooled_tokens"]) == (0, 0, 0)
    changed = {n: s for n, s in found.items() if n.startswith("gptq, ")}
    assert {"gptq, actorder=True", "gptq, percdamp=0.1", "gptq, refine_sweeps=3"} <= set(changed)
    for name, settings in changed.items():
        different = {k for k, v in vars(settings).items() if v != plain[k]}
        assert different == {name.removeprefix("gptq, ").split("=")[0]}


@pytest.mark.slow
def test_gptq_beats_rounding_to_nearest_on_the_demo(quantizer: ModuleType, demo: Path) -> None:
    gptq = quantizer.measure("demo", demo, "int2-g64-asym", "gptq")
    rtn = quantizer.measure("demo", demo, "int2-g64-asym", "rtn minmax")
    assert 0 < gptq.kl < 0.7 * rtn.kl
    assert gptq.bits_per_weight == pytest.approx(2 + 18 / 64)
    assert gptq.peak_memory_bytes >= gptq.memory_before_bytes > 0
    json.dumps(vars(gptq))


def test_a_worker_that_fails_is_a_row_with_its_error(
    quantizer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(quantizer, "__file__", str(worker))
    worker.write_text("raise RuntimeError('no memory left')")
    row = quantizer.measure_apart("demo", tmp_path, "int4-g128", "gptq")
    assert row.kl is None
    assert "no memory left" in row.error
    assert "failed" in quantizer.table([row], lambda r: f"{r.kl:.5f}")
    worker.write_text(
        "import json, sys; print('noise')\n"
        "print(json.dumps({'method': sys.argv[9], 'format': sys.argv[7], "
        "'bits_per_weight': 4.0, 'options': {}, 'kl': 0.25}))"
    )
    row = quantizer.measure_apart("demo", tmp_path, "int4-g128", "gptq")
    assert (row.method, row.format, row.kl, row.error) == ("gptq", "int4-g128", 0.25, "")


def test_the_smoke_run_gives_every_family_a_row(quantizer: ModuleType) -> None:
    rows = quantizer.measure_families(("olmoe", "mixtral"), ("mxfp4",), ("rtn mse", "gptq"))
    assert [(r["family"], r["method"]) for r in rows] == [
        (family, method) for family in ("olmoe", "mixtral") for method in ("rtn mse", "gptq")
    ]
    assert all(0 < r["kl"] < 1 for r in rows)
    assert quantizer.families_table(rows).count("\n") == 3


def test_the_table_marks_the_default_in_one_pass(quantizer: ModuleType) -> None:
    rows = [
        quantizer.Row(name, "mxfp4", 4.25, {}, 1.0, 1.0, kl=0.5)
        for name in (quantizer.ONE_PASS, "gptq")
    ]
    assert quantizer.table(rows, lambda r: f"{r.kl}").splitlines()[2:] == [
        f"| **{quantizer.ONE_PASS}** | 0.5 |",
        "| gptq | 0.5 |",
    ]


def test_the_layer_run_times_the_engine_and_counts_its_bytes(quantizer: ModuleType) -> None:
    shape = quantizer.LayerShape(64, 32, 8, 2, 4, 2, 16)
    result = quantizer.measure_layer(shape, "int4-g32", quantizer.QuantSettings())
    n_weights = 4 * 64 * 64 + 8 * 3 * 64 * 32
    assert result["packed_bytes"] == n_weights * 4.5 / 8
    assert result["tokens_per_expert"] == 2 * 16 * 2 / 8
    assert result["seconds"]["GPTQ"] > 0
    assert result["seconds"]["refinement"] > 0
    memory = list(result["peak_memory_bytes"].values())
    assert memory == sorted(memory)
    assert "int4-g32, 32 tokens" in quantizer.layer_text(result)


def test_a_peer_that_is_not_installed_is_a_row_with_its_error(
    quantizer: ModuleType, demo: Path, tmp_path: Path
) -> None:
    found = quantizer.Peers(sys.executable, tmp_path / "cache", "demo", demo)
    row = found.measure("GPTQModel GPTQ", "int4-g128")
    assert row.kl is None
    assert "No module named 'gptqmodel'" in row.error
    assert not (tmp_path / "cache").exists()


def test_an_interpreter_that_is_missing_is_told(peers: ModuleType) -> None:
    with pytest.raises(peers.PeerError, match="no-such-python"):
        peers.peer_versions("no-such-python")


def test_a_stored_result_is_reused_and_measured(
    quantizer: ModuleType, peers: ModuleType, demo: Path, tmp_path: Path
) -> None:
    found = quantizer.Peers(sys.executable, tmp_path, "demo", demo)
    method, fmt = "AutoRound RTN", parse_format("int2-g64")
    job = peers.peer_job(peers.PEER_METHODS[method], Path("elsewhere"), Path("any"), fmt)
    folder = tmp_path / peers.job_key(job, found._digests, found.versions)
    folder.mkdir()
    report = {
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "peak_memory_bytes": 2,
        "threads": 1,
        "versions": {},
    }
    (folder / "report.json").write_text(json.dumps(report))
    weights = {n: torch.zeros_like(w) for n, w in found._original.items()}
    quantizer.save_file(weights, folder / "weights.safetensors")
    row = found.measure(method, "int2-g64")
    assert row.error == ""
    assert row.notes["is_cached"] is True
    assert row.notes["values_per_group"] == 1
    assert row.kl > 1  # all weights are zero


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"iters": 1}},
        {"peer": "llmcompressor"},
        {"format": {"family": "int", "bits": 3, "group_size": 64, "symmetric": True}},
    ],
)
def test_the_key_follows_the_job_and_not_its_paths(peers: ModuleType, change: dict) -> None:
    job = peers.peer_job(
        peers.PEER_METHODS["AutoRound RTN"], Path("a"), Path("b"), parse_format("int2-g64")
    )
    digests, versions = {"model": "1", "tokens": "2"}, {"torch": "2.13.0", "auto-round": "1"}
    key = peers.job_key(job, digests, versions)
    assert peers.job_key({**job, "model": "c", "tokens": "d"}, digests, versions) == key
    assert peers.job_key({**job, **change}, digests, versions) != key
    assert peers.job_key(job, {**digests, "tokens": "3"}, versions) != key
    assert peers.job_key(job, digests, {**versions, "auto-round": "2"}) != key


def test_weights_outside_the_format_are_refused(peers: ModuleType) -> None:
    fmt = parse_format("int2-g64")
    original = {"a": torch.zeros(2, 128)}
    weight = torch.arange(4.0).repeat(2, 32)
    assert peers.check_weights({"a": weight}, original, fmt) == 4
    five = weight.clone()
    five[1, 70] = 9.0
    with pytest.raises(peers.PeerError, match="5 values"):
        peers.check_weights({"a": five}, original, fmt)
    with pytest.raises(peers.PeerError, match=r"\(128, 2\)"):
        peers.check_weights({"a": weight.T.contiguous()}, original, fmt)
    with pytest.raises(peers.PeerError, match="missing"):
        peers.check_weights({}, original, fmt)


@pytest.fixture(scope="module")
def options() -> ModuleType:
    return import_benchmark("options")


def test_changes_are_paired_by_seed(options: ModuleType) -> None:
    rows = [
        options.Row(option, "int4-g128", seed, kl, 0.0)
        for option, found in ((options.DEFAULTS, (1.0, 2.0)), ("x", (1.1, 2.4)))
        for seed, kl in enumerate(found)
    ]
    mean, error = options.changes(rows)["x", "int4-g128"]
    assert mean == pytest.approx(15.0)  # +10 % and +20 %
    assert error == pytest.approx(5.0)  # their standard deviation, 7.07, over the square root of 2
    assert "| x | +15.0 % +- 5.0 |" in options.table(rows)


def test_every_option_changes_the_defaults(options: ModuleType) -> None:
    cases = list(options.cases(None))
    assert cases[0] == (options.DEFAULTS, QuantSettings(), False)
    for name, settings, one_domain in cases[1:]:
        assert (settings != QuantSettings()) != one_domain, name


def test_passages_of_one_author_are_only_theirs(options: ModuleType) -> None:
    text = options.passages_of(options.AUTHOR)
    authors = {line for line in text.splitlines() if line.startswith("## Author: ")}
    assert authors == {f"## Author: {options.AUTHOR}"} and len(text) > 200_000


@pytest.mark.slow
def test_measuring_an_option_leaves_the_model_as_it_was(
    options: ModuleType, tmp_path: Path
) -> None:
    bench = options.Bench(tmp_path, TextSpec(calibration_samples=2, heldout_samples=4, seq_len=64))
    tokens = bench.calibration(0, one_domain=True)
    for settings in (QuantSettings(), QuantSettings(sequential=True)):
        rows = list(bench.measure("x", settings, tokens, ["int2-g64"], 0))
        assert [r.kl > 0.01 for r in rows] == [True]
        assert all(torch.equal(bench.original[n], v) for n, v in bench.source.map.views.items())
