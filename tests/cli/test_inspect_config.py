"""`aq-inspect`: tables or JSON on stdout; wrong input is in tests/corpus."""

import json
from pathlib import Path
from typing import Any

import pytest

from alphaquant.testing.models import tiny_model
from alphaquant.testing.packed import save_packed


@pytest.fixture
def inspect(run: Any) -> Any:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def command(*options: str) -> tuple[int, str, str]:
        done = run("aq-inspect", *options)
        return done.code, done.out, done.err

    return command


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "c.json"
    path.write_text('{"default": {"wq": "int4", "group_size": 32}}')
    return str(path)


def test_table_and_json_say_the_same(inspect: Any, config: str, tiny: Path) -> None:
    code, text, err = inspect(config, "--model", str(tiny))
    assert (code, err) == (0, "")
    code, out, err = inspect(config, "--model", str(tiny), "--json")
    assert (code, err) == (0, "")
    content = json.loads(out)
    assert f"{content['bits']['bits_per_weight']:.4f} bits per weight" in text
    assert all(f"{part['name']} " in text for part in content["roles"])


def test_weights_are_not_needed(inspect: Any, config: str, tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    whole = inspect(config, "--model", str(tiny))[1]
    found = inspect(config, "--model", str(bare))[1].replace(str(bare), str(tiny))
    assert found.split() == whole.split()  # lines break elsewhere where paths are longer


def test_verify_prints_one_line_or_names_the_damaged_file(inspect: Any, tmp_path: Path) -> None:
    packed = save_packed(tiny_model("olmoe"), tmp_path / "packed")
    code, out, err = inspect(str(packed), "--verify")
    assert (code, err) == (0, "") and out.count("\n") == 1
    assert out.startswith(f"{packed}: 7 files of ") and "are what was written (sha256)" in out
    assert json.loads(inspect(str(packed), "--verify", "--json")[1])["n_files"] == 7
    file = packed / "model-layer-001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    code, out, err = inspect(str(packed), "--verify")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"error: {file} is not what aq-quantize wrote")
    assert inspect(str(packed), "--verify", "--model", "demo")[0] == 2
