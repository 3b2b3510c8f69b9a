"""Killed at random points, twenty times each: what was finished is not done again."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alphaquant.testing.checkpoints import save_texts, save_tiny

N_KILLS = 20
OF_ONE_PROCESS = ("seconds", "n_measured", "n_passes")
"""What a run that was stopped counts anew."""

SERVER = """
import json, os, signal, sys, time
import alphaquant.cli.quantize, alphaquant.cli.search
import alphaquant.commands.quantize, alphaquant.commands.search
import transformers.quantizers.auto, transformers.integrations
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM
for line in sys.stdin:
    module, log, seconds, *sys.argv = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, name in ((1, os.devnull), (2, log)):
            os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        sys.modules[module].main()
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # one that has ended waits to be asked for
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Runs commands one after the other, each in a process of its own that has imported all, and kills
those that are given some seconds."""


@dataclass(frozen=True)
class Server:
    """Runs the commands; `log` collects what they print on stderr."""

    process: "subprocess.Popen[str]"
    log: Path

    def run(self, module: str, options: tuple[str, ...], kill_after: float | None = None) -> int:
        """The exit code of a command that is killed after so many seconds, if they are given."""
        asked, answers = self.process.stdin, self.process.stdout
        assert asked is not None and answers is not None
        asked.write(json.dumps([module, str(self.log), kill_after, "aq", *options]) + "\n")
        asked.flush()
        return int(answers.readline())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server; it is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        yield Server(process, tmp_path / "log")
        process.kill()


def lasting(value: Any) -> Any:
    """A value of JSON without what depends on how often the run was stopped."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if k not in OF_ONE_PROCESS}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def packed_content(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint, its report without seconds, and without the report's sha256."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    report = lasting(json.loads(files.pop("quantize_report.json")))
    sums = [s for s in files.pop("SHA256SUMS").splitlines() if b"quantize_report" not in s]
    return {**files, "report": json.dumps(report).encode(), "sums": b"\n".join(sums)}


def search_content(out: Path) -> dict[str, Any]:
    """The whole front and every published configuration."""
    files = [out / "front.json", out / "best.json", *sorted((out / "configs").iterdir())]
    return {str(f.relative_to(out)): lasting(json.loads(f.read_text())) for f in files}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_quantizations_make_no_layer_twice_and_change_no_byte(
    server: Server, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "model", num_hidden_layers=12)
    text = save_texts(tmp_path, 3000)["calibration"]
    config = tmp_path / "config.json"
    config.write_text('{"default": {"wq": "int3", "group_size": 32}}')
    options = (
        *("--model", str(tmp_path / "model"), "--config", str(config), "--calibration", str(text)),
        *("--nsamples", "4", "--seqlen", "16", "--out"),
    )
    module, whole, out = "alphaquant.cli.quantize", tmp_path / "whole", tmp_path / "q"
    started = time.perf_counter()
    assert server.run(module, (*options, str(whole))) == 0
    took = time.perf_counter() - started
    draw, layers, n_resumed = random.Random(0), tmp_path / "q.part" / "layers", 0
    for n_kills in range(N_KILLS):
        before = {p.name: p.stat().st_mtime_ns for p in layers.glob("*.json")}
        code = server.run(module, (*options, str(out)), draw.uniform(0, 0.5 * took))
        assert code in (0, -signal.SIGKILL)
        n_resumed += bool(before)
        if out.exists():
            assert packed_content(out) == packed_content(whole)
            out.rename(tmp_path / f"finished {n_kills}")
        else:
            after = {p.name: p.stat().st_mtime_ns for p in layers.glob("*.json")}
            assert before.items() <= after.items(), "a finished layer was made again"
    assert server.run(module, (*options, str(out))) == 0
    assert packed_content(out) == packed_content(whole)
    assert n_resumed >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_search_makes_no_trial_twice_and_comes_to_the_same_front(
    server: Server, tmp_path: Path
) -> None:
    texts = save_texts(tmp_path)
    options = (
        *("--model", str(save_tiny(tmp_path / "tiny")), "--budget", "4.2bits", "--trials", "40"),
        *("--formats", "int3-g32,int4-g32", "--seq-len", "32"),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "8"),
        *("--evaluation", str(texts["search"]), "--evaluation-samples", "4"),
        *("--heldout", str(texts["heldout"]), "--heldout-samples", "4"),
    )
    module, whole, out = "alphaquant.cli.search", tmp_path / "whole", tmp_path / "out"
    started = time.perf_counter()
    apart = ("--out", str(whole), "--cache", str(tmp_path / "another cache"))
    assert server.run(module, (*options, *apart)) == 0
    took = time.perf_counter() - started
    server.log.unlink()
    draw, mine = random.Random(7), ("--out", str(out), "--cache", str(tmp_path / "cache"))
    codes = [
        server.run(module, (*options, *mine), draw.uniform(0, 0.6 * took)) for _ in range(N_KILLS)
    ]
    assert set(codes) <= {0, -signal.SIGKILL}
    assert server.run(module, (*options, *mine)) == 0
    seen = re.findall(r"^trial (\d+):", server.log.read_text(), re.MULTILINE)
    assert len(seen) == len(set(seen)), "a finished trial was made again"
    assert len(seen) >= 20  # what was killed between its end and its line is not seen
    rows = [pd.read_csv(o / "trials.csv").drop(columns="seconds") for o in (out, whole)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    assert search_content(out) == search_content(whole)
