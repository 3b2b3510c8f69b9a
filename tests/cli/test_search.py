"""`aq-search`: results on stdout, the rest on stderr; wrong input is in tests/corpus."""

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from optuna.trial import TrialState

from alphaquant.commands import search
from alphaquant.lease import PATIENCE_VARIABLE
from alphaquant.studies import loop
from alphaquant.studies.store.storages import open_storage
from alphaquant.studies.store.urls import sqlite_url
from alphaquant.testing.storages.disks import NoDiskError, SmallDisk, small_disk

OF_ONE_PROCESS = ("seconds", "n_measured", "n_passes")
"""What a search that was stopped counts anew."""


def read_trials(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "trials.csv").drop(columns="seconds")


def lasting(value: Any) -> Any:
    """A value of JSON without what depends on how often the search was stopped."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in OF_ONE_PROCESS}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def assert_same_search(one: Path, other: Path) -> None:
    """Every trial, the whole front and every published configuration are the same."""
    pd.testing.assert_frame_equal(read_trials(one), read_trials(other), check_exact=True)
    names = sorted(p.name for p in (other / "configs").iterdir())
    assert sorted(p.name for p in (one / "configs").iterdir()) == names
    for name in ("front.json", "best.json", *(f"configs/{n}" for n in names)):
        found, expected = (json.loads((out / name).read_text()) for out in (one, other))
        assert lasting(found) == lasting(expected), name


def test_result_is_on_stdout_and_progress_on_stderr(
    run: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("aq-search", *small, "--out", str(out))
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("front of ")
    words = "trial bits MB KL +- stderr uniform its KL same top from"
    assert lines[1].split() == words.split()
    front = json.loads((out / "front.json").read_text())["front"]
    table = lines[1 : 2 + len(front)]
    assert sum(line.lstrip().startswith("*") for line in table) == 1
    assert {point["config"] for point in front} == {
        str(p.relative_to(out)) for p in (out / "configs").iterdir()
    }
    for line, point in zip(table[1:], front, strict=True):
        trial = point["heldout"]["trial"]
        assert line.split()[0].lstrip("*^") == ("-" if trial is None else str(trial))
        assert f"{point['heldout']['kl']:.6f}" in line
    assert f"configurations: {out / 'configs'}/" in lines
    assert "Bits per weight are all bits stored" in done.out
    assert f"aq-quantize --model {small[1]} --config {out / 'best.json'} --out DIR" in done.out
    assert "trial 0: uniform:int3-g32" in done.err
    assert "study: 5 of 5" in done.err
    assert "trial 0:" not in done.out
    assert "│" not in done.out


def test_interrupt_ends_with_130_and_the_same_command_resumes(
    run: Any, small: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell, n_told = loop.finish_trial, 0

    def interrupt(*args: Any) -> None:
        nonlocal n_told
        n_told += 1
        if n_told == 3:
            raise KeyboardInterrupt
        tell(*args)

    monkeypatch.setattr(loop, "finish_trial", interrupt)
    stopped = run("aq-search", *small, "--out", str(tmp_path / "a"))
    assert stopped.code == 130
    assert stopped.err.endswith("stopped; run the same command again to resume\n")
    resumed = run("aq-search", *small, "--out", str(tmp_path / "a"))
    assert resumed.code == 0
    assert "trial 1:" not in resumed.err
    whole = run("aq-search", *small, "--out", str(tmp_path / "b"))
    assert whole.code == 0
    assert_same_search(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_search_killed_by_a_signal_goes_on_as_if_it_had_not_been(
    how: signal.Signals, start: Any, run: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = (*small, "--trials", "24", "--out", str(out), "--cache", str(tmp_path / "cache"))
    stages = ("load model", "bank of formats", "trial 3:", "trial 15:")
    for stage in stages:
        process = start("aq-search", *options)
        for line in process.stderr:
            if line.startswith(stage):
                process.send_signal(how)
                break
        _, err = process.communicate(timeout=300)
        if how == signal.SIGINT:
            assert process.returncode == 130, err
            assert err.endswith("stopped; run the same command again to resume\n")
        elif how == signal.SIGTERM:
            assert process.returncode == 0, err
            assert err.endswith("stopped by SIGTERM; the same command goes on from here\n")
        else:
            assert process.returncode == -signal.SIGKILL
        assert not (out / "best.json").exists()
    assert run("aq-search", *options).code == 0
    whole = run("aq-search", *small, "--trials", "24", "--out", str(tmp_path / "whole"))
    assert whole.code == 0
    assert_same_search(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_driver_that_was_paused_stops_in_one_line_and_the_second_ones_result_is_whole(
    start: Any,
    run: Any,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(PATIENCE_VARIABLE, "8")
    out = tmp_path / "out"
    options = (*small, "--trials", "24", "--out", str(out))
    first = start("aq-search", *options)
    for line in first.stderr:
        if line.startswith("trial 3:"):
            first.send_signal(signal.SIGSTOP)
            break
    refused = run("aq-search", *options)
    assert refused.code == 1
    assert f"error: --out {out} is in use: process {first.pid} on " in refused.err
    time.sleep(8)
    second = run("aq-search", *options)
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=300)
    assert second.code == 0
    for what in (f"--out {out}", "study 'aq-search' in "):
        assert re.search(f"took {what}.* over from process {first.pid} on ", caplog.text)
    assert first.returncode == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "was taken over" in error and "it stops here" in error
    assert run("aq-search", *small, "--trials", "24", "--out", str(tmp_path / "w")).code == 0
    assert_same_search(out, tmp_path / "w")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of its own, which a test fills."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(small_disk(tmp_path / "disk", "100k"))
        except NoDiskError as error:
            pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("place", ["cache", "out"])
def test_a_full_disk_stops_in_one_line_and_the_same_command_goes_on(
    place: str,
    disk: SmallDisk,
    run: Any,
    small: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk grows step by step, so that another write of the search is the one that fails."""
    monkeypatch.setattr(search, "check_room", lambda plan, cache: None)  # it would refuse before
    places = {"cache": tmp_path / "cache", "out": tmp_path / "out", place: disk.folder / "it"}
    options = (*small, "--out", str(places["out"]), "--cache", str(places["cache"]))
    n_failed = 0
    for size in ("100k", "300k", "600k", "1m", "2m", "64m"):
        disk.resize(size)
        done = run("aq-search", *options)
        if done.code == 0:
            break
        n_failed += 1
        (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert re.search(r"No space left|disk is full|bytes, and \d+ are free", error), error
        assert re.search("same command|the cache elsewhere", error), error
        assert not list(disk.folder.rglob("*.part"))
    assert done.code == 0
    assert n_failed >= 2
    whole = run("aq-search", *small, "--out", str(tmp_path / "whole"))
    assert whole.code == 0
    assert_same_search(places["out"], tmp_path / "whole")


N_KILLS = 20


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_driver_that_is_killed_twenty_times_loses_doubles_and_damages_nothing(
    start: Any, run: Any, small: tuple[str, ...], tmp_path: Path
) -> None:
    """Each time after a random share of what a whole search takes, from an empty cache on."""
    out, rng = tmp_path / "out", random.Random(0)
    options = (*small, "--trials", "24", "--out")
    began = time.monotonic()
    process = start("aq-search", *options, str(tmp_path / "whole"), "--cache", str(tmp_path / "w"))
    assert process.communicate(timeout=600) is not None and process.returncode == 0
    whole = time.monotonic() - began
    cache, n_killed = tmp_path / "cache", 0
    for _ in range(N_KILLS):
        process = start("aq-search", *options, str(out), "--cache", str(cache))
        time.sleep(rng.uniform(0.2, 1) * whole)
        process.kill()
        process.communicate()
        n_killed += process.returncode == -signal.SIGKILL
    assert n_killed >= N_KILLS // 2  # the others had ended before
    assert run("aq-search", *options, str(out), "--cache", str(cache)).code == 0
    assert_same_search(out, tmp_path / "whole")
    with open_storage(sqlite_url(out / "study.db"), must_exist=True) as storage:
        (study,) = storage.get_all_studies()
        done = storage.get_all_trials(study._study_id, states=(TrialState.COMPLETE,))
    assert len(done) == len(read_trials(out)) == 24
    assert run("aq-cache", "verify", "--cache", str(cache)).code == 0
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_demo_model_is_searched_quantized_and_measured(run: Any, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"
    started = time.monotonic()
    options = ("--formats", "int3-g64-asym,int4-g64,int8-g128", "--trials", "12")
    small = ("--calibration-samples", "16", "--evaluation-samples", "8", "--heldout-samples", "8")
    common = ("--budget", "4.25bits", "--out", str(out), "--cache", str(tmp_path / "cache"))
    assert run("aq-search", *common, *options, *small).code == 0
    assert time.monotonic() - started < 120
    best = str(out / "best.json")
    assert run("aq-quantize", "--model", "demo", "--config", best, "--out", str(packed)).code == 0
    done = run(
        *("aq-eval", "--model", str(packed), "--reference", "demo", "--json"),
        *("--data", "demo:search", "--samples", "8"),
    )
    trials = pd.read_csv(out / "trials.csv")
    digest = json.loads(Path(best).read_text())["summary"]["assignment_digest"]
    expected = trials.loc[trials["digest"] == digest, "kl"].iloc[0]
    measured = json.loads(done.out)["scores"][0]["value"]
    assert measured == pytest.approx(expected, abs=1e-6)
    assert expected == trials.loc[trials["bits_per_weight"] <= 4.25, "kl"].min()
