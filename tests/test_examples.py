"""The examples run as they are, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(name: str) -> str:
    """Standard output of an example."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {f"test_{name}" for name in names} <= globals().keys()


@pytest.mark.slow
def test_gptq_quantization_example() -> None:
    printed = run("gptq_quantization_example.py")
    assert "architecture: olmoe\n" in printed
    before, after = (float(n) for n in re.findall(r"loss \w+: +([\d.]+)", printed))
    assert 0 < abs(after - before) < 0.1
    assert "matrices: 208\n" in printed
    line = re.search(r"experts\.3\.down_proj: int3-g64, routing_weighted\+pooled, (\d+)", printed)
    assert line and 0 < int(line[1]) < 4 * 128


def test_gptq_moe_example() -> None:
    printed = run("gptq_moe_example.py")
    found = re.findall(r"\^ (\d): (\d+) of 384 tokens, (\w+), .* error ([\d.e-]+)", printed)
    assert [(exponent, hessian) for exponent, _, hessian, _ in found] == [
        *(("0", "plain"), ("1", "routing_weighted"), ("2", "routing_weighted")),
    ]
    assert len({tokens for _, tokens, _, _ in found}) == 1 and int(found[0][1]) > 0
    errors = [float(error) for _, _, _, error in found]
    assert errors[2] < errors[0] < 0.01  # the last one minimizes what is measured
    assert printed.endswith("written in place: True\n")
