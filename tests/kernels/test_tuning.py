"""Tables of measured launches: reading, looking up, and what is refused."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.errors import StoreError
from alphaquant.kernels import tuning
from alphaquant.kernels.tuning import (
    TABLE_VARIABLE,
    DenseKey,
    KernelTable,
    Launch,
    LaunchKey,
    LinearConfig,
    crossover,
    dense_key,
    device_name,
    dump_table,
    launch_candidates,
    launch_key,
    read_table,
    size_class,
    table_file,
    table_for,
)
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import pack_drawn

KEY = LaunchKey("int4", "f16", 1, False, "bfloat16", 8192, 8192, 16)
LAUNCH = Launch(block_rows=64, n_warps=8, n_stages=5, n_splits=4)
DENSE = DenseKey("int4", "bfloat16", 8192, 8192)
TABLE = KernelTable("NVIDIA H200", "2.13.0", "3.7.1", "abc+", {KEY: LAUNCH}, {DENSE: 256})


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(dump_table(TABLE))
    assert read_table(path) == TABLE


def test_the_example_of_the_file_is_a_table(tmp_path: Path) -> None:
    text = str(tuning.__doc__)
    path = tmp_path / "table.json"
    path.write_text(text[text.index('    {"version"') : text.index("It is looked for")])
    found = read_table(path)
    assert found.launches == {KEY: Launch(128, 4, 3, 4)}
    assert found.dense_rows == {DENSE: 256}


def change(path: tuple[str | int, ...], value: Any) -> str:
    """The file of TABLE with one value replaced, or removed if the value is `...`."""
    content = json.loads(dump_table(TABLE))
    place = content
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "table is list, not dict"),
        (change(("version",), 2), "version 2"),
        (change(("commit",), ...), "table: missing or unknown: commit"),
        (change(("date",), "today"), "table: missing or unknown: date"),
        (change(("device",), 7), "device is int, not str"),
        (change(("launches",), {}), "launches is dict, not list"),
        (change(("launches", 0), 5), "launches[0] is int, not dict"),
        (change(("launches", 0, "n_splits"), 0), "launches[0].n_splits is 0"),
        (change(("launches", 0, "n_splits"), 1.5), "n_splits is float, not int"),
        (change(("launches", 0, "n_splits"), True), "n_splits is bool, not int"),
        (change(("launches", 0, "block_rows"), 96), "block_rows is 96, possible is (64, 128)"),
        (change(("launches", 0, "block_tokens"), 8), "block_tokens is 8"),
        (change(("launches", 0, "n_warps"), 2), "n_warps is 2, possible is (4, 8)"),
        (change(("launches", 0, "has_zeros"), 0), "has_zeros is int, not bool"),
        (change(("launches", 0, "element"), ...), "launches[0]: missing or unknown: element"),
        (change(("dense_rows", 0, "n_tokens"), 0), "dense_rows[0].n_tokens is 0"),
        (change(("dense_rows", 0, "more"), 1), "dense_rows[0]: missing or unknown: more"),
    ],
)
def test_a_file_that_is_no_table_is_one_error(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(StoreError) as caught:
        read_table(path)
    message = str(caught.value)
    assert words in message and str(path) in message and "make it again" in message
    assert "\n" not in message


def test_a_file_that_is_not_there_is_the_same_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TABLE_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(StoreError, match=r"none\.json"):
        table_for("cpu")


def test_a_table_is_found_by_the_name_of_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TABLE_VARIABLE, raising=False)
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    assert table_file("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    (tmp_path / "a-test-gpu.json").write_text(dump_table(TABLE))
    assert table_for("A Test-GPU") == TABLE
    assert table_for("Another test GPU") is None


def test_the_variable_comes_before_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(dump_table(TABLE))
    monkeypatch.setenv(TABLE_VARIABLE, str(path))
    found = table_for("cpu")
    assert found == TABLE
    assert table_for("another") is found  # the file is read once
    monkeypatch.setenv(TABLE_VARIABLE, "")
    assert table_for("cpu") is None


def test_tables_that_are_shipped_were_measured_and_the_page_knows_of_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    paths = list(tuning._FOLDER.glob("*"))
    assert ("no table is shipped" in page) == (not paths)
    for path in paths:
        table = read_table(path)
        assert table_file(table.device) == path.name
        assert table.commit and not table.commit.endswith("+")


def test_sizes_belong_to_the_nearest_power_of_two() -> None:
    sizes = (1, 2, 3, 768, 1408, 1792, 2048, 4096, 5792, 5793, 14336)
    assert [size_class(n) for n in sizes] == [
        *(1, 2, 4, 1024, 1024, 2048, 2048, 4096, 4096, 8192, 16384)
    ]


@pytest.mark.parametrize(
    ("name", "scales", "n_scales", "has_zeros", "element"),
    [
        ("int4-g128", "f16", 1, False, "int4"),
        ("int3-g32-asym", "f16", 4, True, "int3"),
        ("mxfp4", "e8m0", 4, False, "e2m1"),
        ("nvfp4", "e4m3", 8, False, "e2m1"),
    ],
)
def test_keys_say_what_a_launch_depends_on(
    name: str, scales: str, n_scales: int, has_zeros: bool, element: str
) -> None:
    weight = order_matrix(pack_drawn(name, 130, 300))
    assert launch_key(weight, torch.float16, 32) == LaunchKey(
        element, scales, n_scales, has_zeros, "float16", 128, 256, 32
    )
    assert dense_key(weight, torch.bfloat16) == DenseKey(element, "bfloat16", 128, 256)


def test_candidates_are_different_and_leave_no_split_without_a_tile() -> None:
    every = list(launch_candidates(64))
    assert len(every) == len(set(every)) == 80
    assert {launch.config for launch in every} > {LinearConfig()}
    assert [max(c.n_splits for c in launch_candidates(n)) for n in (1, 3, 7, 16)] == [1, 2, 4, 16]
    values = [set(column) for column in zip(*map(astuple, every), strict=True)]
    assert values == [{64, 128}, {4, 8}, {2, 3, 4, 5}, {1, 2, 4, 8, 16}]


@pytest.mark.parametrize(
    ("packed", "dense", "expected"),
    [
        ((1, 2, 5), (3, 3, 4), 256),  # the example of the docstring
        ((1, 2, 5), (3, 3, 6), 257),  # never faster
        ((3, 3, 3), (1, 4, 2), 256),  # faster once, by chance, does not count
        ((3, 3, 3), (2, 2, 3), 16),  # always at least as fast
    ],
)
def test_the_crossover_is_where_dense_stays_ahead(
    packed: tuple[float, ...], dense: tuple[float, ...], expected: int
) -> None:
    assert crossover((16, 64, 256), packed, dense) == expected


def test_a_device_without_cuda_goes_by_its_kind() -> None:
    assert device_name(torch.device("cpu")) == "cpu"
