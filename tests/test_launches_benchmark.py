"""Counts of launches: of a configuration, the example that the kernels' own test launches; and of
quantizing a layer, which depends on neither experts nor rows."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from alphaquant.models.mapping import map_model
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model
from tests.benches import import_benchmark

SETTINGS = QuantSettings(shrinkage=False)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return import_benchmark("launches")


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


SMALL = {"hidden_size": 512, "expert_width": 256}


@pytest.fixture(scope="module")
def quantizer() -> ModuleType:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    return import_benchmark("quantizer_launches")


def test_quantizing_a_layer_launches_the_same_for_all_experts_and_rows(
    quantizer: ModuleType,
) -> None:
    few, many = (
        quantizer.count(quantizer.Shape(**SMALL, n_experts=e, n_rows=n), ["nvfp4"], SETTINGS)
        for e, n in ((4, 3), (7, 70))
    )
    # on the host each matrix gets memory of its own: codes, scales and the scale of the matrix
    assert many - few == {"aten::clone": 3 * 3 * (7 - 4)} and not few - many


def test_columns_take_a_launch_per_block_and_pass(quantizer: ModuleType) -> None:
    shape = quantizer.Shape(**SMALL, has_attention=False)
    counts = quantizer.count(shape, ["int4-g128"], SETTINGS)
    n_blocks = 512 // 128 + 256 // 128
    assert counts["gptq_block_kernel"] == 2 * n_blocks  # two starts
    assert counts["sweep_block_kernel"] == 2 * 3 * n_blocks
    assert counts["fit_groups_kernel"] == 2  # gate and up, down: static groups of the second start


def test_a_layer_in_sixteen_formats_is_a_thousandth_of_the_launches_by_column(
    quantizer: ModuleType,
) -> None:
    found = quantizer.launches_of(quantizer.Shape(**SMALL), "int4-g128", SETTINGS)
    # A layer of OLMoE has four times the columns; what does not grow with them is counted too.
    assert 4 * found.of_formats(16) <= quantizer.EARLIER / 1000
