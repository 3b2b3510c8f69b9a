"""`aq-sensitivity`: a table on stdout, JSON in a file; wrong input is in tests/corpus."""

import json
from pathlib import Path
from typing import Any

import pytest

from alphaquant.specs.sensitivity import SensitivitySpec
from tests.programs import parse


@pytest.fixture
def options(tiny: Path, texts: dict[str, Path], cache: Path) -> tuple[str, ...]:
    """A tiny model on a short text."""
    return (
        *("--model", str(tiny), "--format", "int3-g32", "--cache", str(cache)),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "4"),
        *("--seq-len", "32", "--method", "rtn"),
    )


def test_table_and_file_say_the_same(run: Any, options: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.json"
    done = run("aq-sensitivity", *options, "--out", str(out))
    assert done.code == 0
    content = json.loads(out.read_text())
    assert len(content["experts"]) == 8
    first = content["experts"][0]
    row = next(line.split() for line in done.out.splitlines() if line.split()[0] == "1")
    assert row[1:4] == [str(first[key]) for key in ("layer", "expert", "n_tokens")]
    assert row[5] == f"{first['cost_per_bit']:.3e}"
    assert f"{content['total']['fisher']:.6f}" in done.out


def test_every_option_reaches_the_specification() -> None:
    full = (
        "--format f --out o --model m --against a --calibration c --calibration-samples 4 "
        "--seq-len 64 --seed 3 --cache k --device cpu --dtype bfloat16 --method rtn "
        "--percdamp 0.5 --blocksize 64 --scale-search mse --route-exponent 1 --pooled-tokens 9 "
        "--actorder --static-groups --refine-sweeps 1 --n-starts 1 --bos never"
    )
    expected = SensitivitySpec.of(
        format="f",
        model="m",
        against="a",
        calibration="c",
        calibration_samples=4,
        seq_len=64,
        bos="never",
        seed=3,
        cache=Path("k"),
        device="cpu",
        dtype="bfloat16",
        method="rtn",
        percdamp=0.5,
        route_exponent=1,
        pooled_tokens=9,
        actorder=True,
        static_groups=True,
        refine_sweeps=1,
        n_starts=1,
        blocksize=64,
        scale_search="mse",
    )
    assert parse(f"aq-sensitivity {full}").arguments == {"spec": expected, "out": Path("o")}
    shortest = parse("aq-sensitivity --format f --out o").arguments["spec"]
    assert shortest == SensitivitySpec.of(format="f")
