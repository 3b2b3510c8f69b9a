"""The count of launches in a configuration: the example that the kernels' own test launches."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from alphaquant.models.mapping import map_model
from alphaquant.testing.models import tiny_model

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("launches")


def test_layers_count_formats_once_and_gate_and_up_together_where_they_agree(
    benchmark: ModuleType,
) -> None:
    inventory = map_model(tiny_model("olmoe")).inventory
    names = ("int4-g128", "int2-g128-asym", "mxfp4", "bf16")
    formats = {}
    for m in inventory.matrices:
        number = 0 if m.expert is None else m.expert
        is_down = m.projection == "down_proj"
        formats[m.name] = names[(number + is_down) % 4]
        if m.layer == 1 and m.projection == "up_proj":
            formats[m.name] = names[(number + 1) % 4]
    # As tests/kernels/test_launches.py sees them: 4 + 4 + 2, and 4 + 4 + 1 + 4 + 2.
    assert benchmark.launches_of(formats, inventory) == [10, 15]
    one = dict.fromkeys(formats, "int4-g128")
    assert benchmark.launches_of(one, inventory) == [4, 4]


def test_it_prints_a_row_per_configuration(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "all4.json"
    path.write_text(json.dumps({"default": {"wq": "int4", "group_size": 128}}))
    monkeypatch.setattr(sys, "argv", ["launches.py", str(path)])
    benchmark.main()
    assert f"| {path} | 4, 4, 4, 4 | 4 |" in capsys.readouterr().out
