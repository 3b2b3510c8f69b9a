"""`aq-sensitivity`: a table on stdout, JSON in a file; wrong input is in tests/corpus."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.cli import sensitivity
from alphaquant.commands.sensitivity import SensitivitySpec
from alphaquant.errors import ConfigError
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies import expert_sensitivity as studies

Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command in this process: its exit code."""

    def run_command(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["aq-sensitivity", *options])
        with pytest.raises(SystemExit) as ended:
            sensitivity.main()
        return ended.value.code if isinstance(ended.value.code, int) else 0

    return run_command


@pytest.fixture
def options(tiny: Path, texts: dict[str, Path], cache: Path) -> tuple[str, ...]:
    """A tiny model on a short text."""
    return (
        *("--model", str(tiny), "--format", "int3-g32", "--cache", str(cache)),
        *("--calibration", str(texts["calibration"]), "--calibration-samples", "4"),
        *("--seq-len", "32", "--method", "rtn"),
    )


def test_table_and_file_say_the_same(
    command: Command,
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "out.json"
    assert command(*options, "--out", str(out)) == 0
    content = json.loads(out.read_text())
    assert len(content["experts"]) == 8
    text = capsys.readouterr().out
    first = content["experts"][0]
    row = next(line.split() for line in text.splitlines() if line.split()[0] == "1")
    assert row[1:4] == [str(first[key]) for key in ("layer", "expert", "n_tokens")]
    assert row[5] == f"{first['cost_per_bit']:.3e}"
    assert f"{content['total']['fisher']:.6f}" in text


def test_every_option_reaches_the_specification(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs: list[Any] = []

    def keep(spec: Any, **_: Any) -> None:
        specs.append(spec)
        raise ConfigError("captured")

    monkeypatch.setattr(studies, "measure_expert_sensitivity", keep)
    full = (
        *("--format", "f", "--out", "o", "--model", "m", "--against", "a", "--calibration", "c"),
        *("--calibration-samples", "4", "--seq-len", "64", "--seed", "3", "--cache", "k"),
        *("--device", "cpu", "--dtype", "bfloat16", "--method", "rtn", "--percdamp", "0.5"),
        *("--blocksize", "64", "--scale-search", "mse", "--route-exponent", "1"),
        *("--pooled-tokens", "9", "--actorder", "--static-groups", "--refine-sweeps", "1"),
        *("--n-starts", "1"),
    )
    assert command(*full) == command("--format", "f", "--out", "o") == 1
    quant = QuantSettings(
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
    expected = SensitivitySpec(
        format="f",
        model="m",
        against="a",
        calibration="c",
        n_calibration=4,
        seq_len=64,
        seed=3,
        quant=quant,
        cache=Path("k"),
        device="cpu",
        dtype="bfloat16",
    )
    assert specs == [expected, SensitivitySpec("f")]
