"""The benchmarks of the kernels without a GPU: every row in the interpreter, timings from a fake.

What depends on times is tested with timers that make them up.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alphaquant.evaluators.latency import read_latency_table
from alphaquant.kernels.tuning import Launch, read_table
from alphaquant.spaces.formats import parse_format
from tests import benches
from tests.benches import FakeTimer, bench_with

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

load = benches.load


@pytest.fixture(scope="module")
def speed(load: Callable[[str], Any]) -> Any:
    return load("kernel_speed")


@pytest.fixture(scope="module")
def timing(load: Callable[[str], Any]) -> Any:
    return load("kernel_timing")


@pytest.fixture(scope="module")
def shapes(load: Callable[[str], Any]) -> Any:
    return load("kernel_shapes")


def start(program: ModuleType, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]) -> None:
    """Run a program in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with mock.patch.dict(os.environ):
        program.main()


def seconds(load: Callable[[str], Any], value: float) -> Any:
    """A timing of so many seconds."""
    return load("kernel_timing").Timing(value, value, value, 2, 1)


def test_a_timing_is_the_median_of_the_replays_with_quartiles(timing: Any) -> None:
    found = timing.summarize([4.0, 8.0, 2.0, 6.0, 100.0], 2)
    assert found == timing.Timing(3.0, 2.0, 4.0, 5, 2)


def test_copies_together_exceed_three_caches(timing: Any) -> None:
    assert [timing.n_copies(n, 50) for n in (1, 10, 149, 150, 151, 1000)] == [151, 16, 2, 2, 1, 1]
    assert timing.n_copies(8, 0) == 1


def test_the_timer_of_a_dry_run_calls_once_and_times_nothing(timing: Any) -> None:
    ran: list[int] = []
    assert timing.run_once([lambda: ran.append(0), lambda: ran.append(1)]) is None
    assert ran == [0]


def test_a_graph_holds_every_copy_equally_often(
    timing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    replay = mock.Mock()

    def capture(self: Any, calls: Sequence[Any], warm_up: Sequence[Any]) -> Any:
        for call in calls:
            call()
        assert len(warm_up) == 3
        return SimpleNamespace(replay=replay)

    times = iter((6.0, 12.0, 18.0))
    event = mock.Mock(elapsed_time=lambda end: next(times))
    monkeypatch.setattr(timing.GraphTimer, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    timer = timing.GraphTimer(n_replays=3, min_calls=4)
    found = timer([lambda name=name: ran.append(name) for name in "abc"])
    assert ran == list("abcabc")
    assert replay.call_count == 3
    # The median of three replays of six calls, 12 ms: 2 ms per call.
    assert found == timing.Timing(0.002, pytest.approx(0.0015), 0.0025, 3, 6)


def test_targets_are_those_of_the_square_and_a_floor_elsewhere(shapes: Any) -> None:
    square, other = shapes.SQUARE, shapes.DENSE_SHAPES[1]
    found = [shapes.dense_target("int3", square, n) for n in (1, 16, 32, 64, 128)]
    assert found == [2.25, 2.25, 0.95, 1.5, 0.95]
    assert shapes.dense_target("int3", other, 1) == 0.95
    assert shapes.dense_target("int5", square, 1) == 0.95
    assert (
        shapes.dense_target("e5m2", square, 64) == shapes.dense_target("int8", square, 64) == 1.3
    )


@pytest.mark.parametrize("n_experts", [4, 5, 8, 64])
def test_the_mix_has_every_format_and_the_nearest_bits(shapes: Any, n_experts: int) -> None:
    names = shapes.mix_formats(n_experts)
    assert len(names) == n_experts and set(names) == set(shapes.UNIFORM)
    bits = sum(parse_format(name).nominal_bits for name in names) / n_experts
    # Exactly where E / 8 is whole: bits are 1/8 above integers, 4.25 is 2/8 above.
    assert bits == 4.25 if n_experts % 8 == 0 else abs(bits - 4.25) < 1 / n_experts


def test_the_example_of_the_mix_is_right(shapes: Any) -> None:
    assert [shapes.mix_counts(8)[name] for name in shapes.UNIFORM] == [2, 3, 1, 2]
    with pytest.raises(ValueError, match="3 experts"):
        shapes.mix_counts(3)


@pytest.mark.slow
def test_every_format_and_layer_of_the_benchmark_runs(
    speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    words = ["--device", "cpu", "--dry-run", "--out", str(out), "--parts", "dense", "grouped"]
    start(speed, monkeypatch, [*words, "--shapes", "tiny-odd", "tiny-layer", "--moe-tokens", "3"])
    result = json.loads(out.read_text())
    dense = {(r["format"], r["shape"], r["n_tokens"]) for r in result["dense"]}
    tokens = speed.TINY_TOKENS
    assert dense == {(f, "tiny-odd", n) for f in speed.DENSE_FORMATS for n in tokens}
    grouped = [(r["format"], r["n_tokens"]) for r in result["grouped"]]
    names = ("int2-g128", "int3-g128", "int4-g128", "int8-g128", "mix")
    assert grouped == [(name, 3) for name in names]
    for row in (*result["dense"], *result["grouped"]):
        assert 0 < row["relative_error"] < 1e-2
        measured = ("packed", "speedup", "bytes_per_second", "is_met")
        assert all(row[name] is None for name in measured), "a dry run times nothing"
    assert all(row["empty"] is None and row["copy"] is None for row in result["dense"])
    assert result["versions"]["triton"] and result["device"] and "commit" in result
    assert result["settings"]["dry_run"] is True
    printed = capsys.readouterr().out
    assert printed.count("\n| ") == len(dense) + len(grouped) + 1


@pytest.mark.parametrize(
    "words",
    [
        ["--device", "cpu"],
        ["--device", "cuda", "--dry-run"],
        ["--device", "cpu", "--dry-run", "--shapes", "tiny", "huge"],
    ],
)
def test_what_cannot_run_is_one_clear_error(
    speed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    out = tmp_path / "result.json"
    with pytest.raises(SystemExit) as caught:
        start(speed, monkeypatch, [*words, "--out", str(out)])
    assert caught.value.code == 2 and not out.exists()
    text = capsys.readouterr().err
    assert "--device cpu --dry-run" in text or "--shapes has no huge; choose from tiny" in text


def test_a_wrong_product_ends_the_run_after_the_rows_before_it(
    speed: Any, load: Callable[[str], Any], tmp_path: Path
) -> None:
    bench = bench_with(load, load("kernel_timing").run_once)
    right = bench.kernels.packed_linear

    def wrong(x: Tensor, weight: Any, **given: Any) -> Tensor:
        return right(x, weight, **given) * (1.02 if len(x) == 17 else 1.0)

    bench = replace(bench, kernels=replace(bench.kernels, packed_linear=wrong))
    out = tmp_path / "result.json"
    record = speed.Record(out, {})
    shape = speed.TINY_DENSE[1]
    rows = load("kernel_dense").measure_dense(bench, shape, "int4-g128", (1, 17, 18))
    with pytest.raises(RuntimeError, match="int4-g128 tiny-odd with 17 tokens: relative error"):
        list(speed.kept(record, "dense", rows))
    assert [row["n_tokens"] for row in json.loads(out.read_text())["dense"]] == [1]


def test_not_a_number_is_a_wrong_product(load: Callable[[str], Any]) -> None:
    check = load("kernel_bench").check_error
    assert check(0.009, "x") == 0.009
    for error in (0.011, float("nan")):
        with pytest.raises(RuntimeError, match="x: relative error"):
            check(error, "x")


def test_a_dense_row_compares_what_packed_linear_does_by_itself(
    load: Callable[[str], Any],
) -> None:
    """Dequantizing takes 2 us, packed 4 us, cuBLAS 6 us; from 17 tokens on it dequantizes."""
    dense, shapes = load("kernel_dense"), load("kernel_shapes")

    def made_up(call: Any) -> float:
        function, given = getattr(call, "func", None), getattr(call, "keywords", {})
        if function is torch.matmul:
            return 6e-6
        if "dense_rows" in given:
            return 2e-6 if given["dense_rows"] == 1 else 4e-6
        return 1e-6  # copy and empty kernel

    bench = bench_with(load, FakeTimer(made_up), l2_bytes=40_000)
    kernels = replace(bench.kernels, default_dense_rows=lambda weight, dtype: 17)
    bench = replace(bench, kernels=kernels)
    shape = shapes.DenseShape("tiny", 128, 256)
    few, many = dense.measure_dense(bench, shape, "int4-g128", (1, 17))
    n_bytes = 128 * 256 // 2 + 2 * 128 * 2
    assert (few.default, many.default) == ("packed", "dequantized")
    assert (few.speedup, many.speedup) == (pytest.approx(1.5), pytest.approx(3.0))
    assert few.n_bytes == n_bytes and few.target == 0.95 and few.is_met
    assert few.bytes_per_second == pytest.approx(n_bytes / 4e-6)
    assert few.share_of_copy == pytest.approx(0.25)
    # 3 x 40000 / 16896 bytes: eight copies, all of them different memory.
    packed = next(calls for calls in bench.timer.calls if "dense_rows" in calls[0].keywords)
    places = {call.args[1].words.data_ptr() for call in packed}
    assert len(packed) == len(places) == 120_000 // n_bytes + 1
    matmul = next(calls for calls in bench.timer.calls if calls[0].func is torch.matmul)
    assert len(matmul) == 120_000 // (2 * 128 * 256) + 1
    # The empty kernel and the copy are timed once for both rows.
    assert set(bench.known) == {
        *(("cublas", 128, 256, n) for n in (1, 17)),
        *(("copy", n_bytes), ("empty",)),
    }


def test_dense_times_are_a_table_that_predicts_latency(
    load: Callable[[str], Any], tmp_path: Path
) -> None:
    def made_up(call: Any) -> float:
        return 6e-6 if getattr(call, "func", None) is torch.matmul else 4e-6

    dense, latency = load("kernel_dense"), load("kernel_latency")
    shape = load("kernel_shapes").DenseShape("tiny", 128, 256)
    rows: list[Any] = []
    for name in ("int4-g128", "int2-g128"):
        rows += dense.measure_dense(bench_with(load, FakeTimer(made_up)), shape, name, (1, 17))
    latency.write_latencies(tmp_path / "table.jsonl", "a GPU", rows)
    curves = read_latency_table(tmp_path / "table.jsonl").curves("a GPU")
    found = {(p.format, p.rows, p.cols): kernels for p, kernels in curves.items()}
    packed = {"alphaquant packed_linear": {1: 4.0, 17: 4.0}}
    assert found[("int4-g128", 128, 256)] == found[("int2-g128", 128, 256)] == packed
    assert found[("bf16", 128, 256)] == {"cublas bf16": {1: 6.0, 17: 6.0}}
    untimed = [replace(row, packed=None, cublas=None) for row in rows]
    assert not list(latency.latency_rows("a GPU", untimed))


def test_a_slower_product_misses_its_target(load: Callable[[str], Any]) -> None:
    dense, shapes = load("kernel_dense"), load("kernel_shapes")
    slow = FakeTimer(lambda call: 1.0 if getattr(call, "func", None) is torch.matmul else 1.1)
    shape = shapes.DenseShape("tiny", 3, 130)
    (row,) = dense.measure_dense(bench_with(load, slow), shape, "int8-g128", (1,))
    assert row.speedup == pytest.approx(1 / 1.1) and row.is_met is False
    cells = load("kernel_tables").dense_cells(row)
    assert len(cells) == len(load("kernel_tables").DENSE_HEAD) and "missed" in cells


def test_tuning_writes_the_fastest_launch_and_the_crossover(
    speed: Any,
    load: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fastest = Launch(64, 8, 5, 2)

    def made_up(call: Any) -> float:
        given = getattr(call, "keywords", {})
        if "config" in given:
            is_fastest = (given["config"], given["n_splits"]) == (fastest.config, fastest.n_splits)
            return 1.0 if is_fastest else 2.0
        if "dense_rows" in given and given["dense_rows"] != 1:
            return 1.0 if len(call.args[0]) < 17 else 3.0
        return 2.0

    bench = bench_with(load, FakeTimer(made_up))
    monkeypatch.setattr(speed, "open_bench", lambda device: bench)
    out, table = tmp_path / "result.json", tmp_path / "table.json"
    words = ["--device", "cpu", "--dry-run", "--parts", "dense", "--shapes", "tiny-odd"]
    words += ["--formats", "int4-g128", "--tokens", "1", "17", "18"]
    start(speed, monkeypatch, [*words, "--out", str(out), "--tune", str(table)])
    found = read_table(table)
    assert {key.block_tokens: launch for key, launch in found.launches.items()} == {
        16: fastest,
        32: fastest,
        64: fastest,
    }
    assert all((key.rows, key.cols, key.dtype) == (4, 128, "bfloat16") for key in found.launches)
    assert list(found.dense_rows.values()) == [17]
    rows = json.loads(out.read_text())["dense"]
    assert [row["n_tokens"] for row in rows] == [1, 17, 18]


def test_without_times_a_table_stays_empty(load: Callable[[str], Any]) -> None:
    tune, shapes = load("kernel_tune"), load("kernel_shapes")
    bench = bench_with(load, lambda calls: None)
    assert list(tune.tune_shape(bench, shapes.TINY_DENSE[1], "int4-g128", (16,))) == []
    assert (
        tune.find_crossover([], load("kernel_bench").pack(torch.ones(1, 128), "int4-g128")) == []
    )


def test_peers_that_are_missing_or_refuse_are_notes(
    speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = sys.modules["kernel_peers"]

    def refuse(weight: Tensor, name: str) -> Any:
        raise NotImplementedError("no such\nmatrix")

    def right(weight: Tensor, name: str) -> Any:
        return (lambda x: x @ weight.to(x.dtype).T), weight

    missing = peers.Peer("no_such_package", ("int4-g128",), right)
    refusing = peers.Peer("numpy", ("int4-g128",), refuse)
    serving = peers.Peer("torch", ("int8-row",), right)
    monkeypatch.setattr(speed, "PEERS", (missing, refusing, serving))
    out = tmp_path / "result.json"
    words = ["--device", "cpu", "--dry-run", "--parts", "peers", "--shapes", "tiny"]
    start(speed, monkeypatch, [*words, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["notes"] == [
        "no_such_package is left out: it is not installed, or cannot be imported",
        "numpy with int4-g128 tiny: NotImplementedError: no such matrix",
    ]
    assert [(r["peer"], r["version"], r["n_tokens"]) for r in result["peers"]] == [
        ("torch", torch.__version__, n) for n in speed.TINY_TOKENS
    ]
    head, row = sys.modules["kernel_tables"].PEER_HEAD, peers.PeerRow(**result["peers"][0])
    assert len(sys.modules["kernel_tables"].peer_cells(row)) == len(head)


def test_torchao_multiplies_with_the_matrix_that_it_says(
    speed: Any, load: Callable[[str], Any]
) -> None:
    peers, shapes = sys.modules["kernel_peers"], load("kernel_shapes")
    peer = next(peer for peer in peers.PEERS if peer.name == "torchao")
    if peers.installed(peer) is None:
        pytest.skip("torchao is not installed")
    bench = bench_with(load, FakeTimer(lambda call: 1.0))
    for name in ("int8-row", "fp8-e4m3-row"):
        (row,) = peers.measure_peer(bench, peer, shapes.TINY_DENSE[0], name, (2,))
        assert row.speedup == 1.0 and row.relative_error < 1e-2
        weight = load("kernel_bench").draw(130, 256, "cpu")
        _, stands_for = peers.torchao_linear(weight, name)
        assert 0 < float((stands_for - weight).norm() / weight.norm()) < 0.05
    with pytest.raises(ValueError, match="packs no matrix 3 x 171"):
        peers.torchao_linear(torch.ones(3, 171), "int4-g128-asym")


def test_rows_are_written_as_json(load: Callable[[str], Any], speed: Any, tmp_path: Path) -> None:
    row = load("kernel_peers").PeerRow(
        *("a", "1", "int4-g128", "s", 1, 2, 3, 0.1, seconds(load, 1.0), None, None)
    )
    record = speed.Record(tmp_path / "r.json", {"commit": "c"})
    record.add("peers", row)
    record.note("left out")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["peers"] == [asdict(row)] and found["notes"] == ["left out"]
    assert found["commit"] == "c" and found["dense"] == []
