"""A quantization that is killed again and again comes to the checkpoint of one that is not."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import sys
from pathlib import Path
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.quant.models import map_model
from alphaquant.quant.pipeline import quantize_to_checkpoint
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.testing.models import tiny_model, tiny_tokens

model_map = map_model(tiny_model("olmoe", num_hidden_layers=12))
assignment = uniform_assignment(model_map.inventory, "int3-g32")
print("ready", flush=True)
quantize_to_checkpoint(
    model_map, assignment, Path(sys.argv[1]), QuantSettings(), tiny_tokens(4, 16), facts={}
)
"""


def start(out: Path) -> subprocess.Popen[str]:
    """Start a run; it has loaded its model."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_twenty_kills_lose_no_finished_layer_and_change_no_byte(tmp_path: Path) -> None:
    started = time.perf_counter()
    with start(tmp_path / "whole") as process:
        assert process.wait() == 0
    expected, took = tensor_files(tmp_path / "whole"), time.perf_counter() - started
    draw, n_kills, n_resumed, out = random.Random(0), 0, 0, tmp_path / "q"
    while n_kills < 20:
        layers = tmp_path / "q.part" / "layers"
        before = {p.name: p.stat().st_mtime_ns for p in layers.glob("*.json")}
        with start(out) as process:
            time.sleep(draw.uniform(0, took / 4))
            process.send_signal(signal.SIGKILL)
            n_kills += 1
        after = {p.name: p.stat().st_mtime_ns for p in layers.glob("*.json")}
        if not out.exists():
            assert before.items() <= after.items()
            n_resumed += bool(before)
    if not out.exists():
        with start(out) as process:
            assert process.wait() == 0
    assert n_resumed >= 1
    assert tensor_files(out) == expected
