"""The examples run as they are, and print what they promise."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run an example in this process, where warnings are errors, and give what it prints."""

    def run_example(name: str) -> str:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {f"test_{name}" for name in names} <= globals().keys()


@pytest.mark.slow
def test_gptq_quantization_example(run: Callable[[str], str]) -> None:
    printed = run("gptq_quantization_example.py")
    assert "architecture: olmoe\n" in printed
    before, after = (float(n) for n in re.findall(r"loss \w+: +([\d.]+)", printed))
    assert 0 < abs(after - before) < 0.1
    assert "matrices: 208\n" in printed
    line = re.search(r"experts\.3\.down_proj: int3-g64, routing_weighted\+pooled, (\d+)", printed)
    assert line and 0 < int(line[1]) < 4 * 128


def test_gptq_moe_example(run: Callable[[str], str]) -> None:
    printed = run("gptq_moe_example.py")
    found = re.findall(r"\^ (\d): (\d+) of 384 tokens, (\w+), .* error ([\d.e-]+)", printed)
    assert [(exponent, hessian) for exponent, _, hessian, _ in found] == [
        *(("0", "plain"), ("1", "routing_weighted"), ("2", "routing_weighted")),
    ]
    assert len({tokens for _, tokens, _, _ in found}) == 1 and int(found[0][1]) > 0
    errors = [float(error) for _, _, _, error in found]
    assert errors[2] < errors[0] < 0.01  # the last one minimizes what is measured
    assert printed.endswith("written in place: True\n")
