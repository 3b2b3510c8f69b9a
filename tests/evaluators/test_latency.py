"""Predicted step times: hand-made tables, one measured here on the CPU, and what is refused."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alphaquant.errors import ConfigError, DataError
from alphaquant.evaluators.base import Subject
from alphaquant.evaluators.latency import LatencyEvaluator, LatencyTable, read_latency_table
from alphaquant.models.mapping import map_model
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.testing.cost_cases import COST_FORMATS, make_cost_case
from alphaquant.testing.models import tiny_model

DENSE = Matrix("model.layers.0.self_attn.o_proj", 16, 32, "attention", 0)
EXPERT = Matrix("model.layers.0.mlp.experts.0.down_proj", 32, 16, "expert", 0, 0)
INVENTORY = Inventory("tiny", (DENSE, EXPERT))
FIELDS = ("device", "kernel", "format", "rows", "cols", "tokens", "microseconds")
# Hand-made numbers, not measured: those of the worked example.
HAND_MADE = (
    ("made-up", "k", "int4-g32", 16, 32, 2, 10.0),
    ("made-up", "k", "int4-g32", 16, 32, 6, 14.0),
    ("made-up", "k", "int4-g32", 32, 16, 1, 3.0),
    ("made-up", "k", "int4-g32", 32, 16, 4, 6.0),
)

Row = tuple[Any, ...]


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    lines = [json.dumps(dict(zip(FIELDS, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    lines = [",".join(FIELDS), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def table_of(tmp_path: Path, rows: Sequence[Row] = HAND_MADE) -> LatencyTable:
    return read_latency_table(write_json(tmp_path / "table.jsonl", rows))


def subject_of(format_name: str = "int4-g32", inventory: Inventory = INVENTORY) -> Subject:
    """Half of the tokens reach the one expert that there is, if shares say so."""
    model: Any = nn.Module()
    model.config = SimpleNamespace(num_experts_per_tok=1)
    return Subject(model, inventory, uniform_assignment(inventory, format_name))


HALF = {EXPERT.name: 0.5}


def microseconds(evaluator: LatencyEvaluator, subject: Subject) -> float:
    (score,) = evaluator.evaluate(subject).scores
    assert (score.metric, score.unit) == ("decode_latency", "ms/token")
    return 1000 * score.value


def test_the_worked_example(tmp_path: Path) -> None:
    found = LatencyEvaluator(table_of(tmp_path), 4, active_share=HALF).evaluate(subject_of())
    (score,) = found.scores
    assert score.value == pytest.approx(0.015875, rel=1e-14)
    assert score.stderr is None
    dense, expert = found.details["parts"]
    assert dense == {
        **{"format": "int4-g32", "rows": 16, "cols": 32, "tokens": 4.0},
        **{"expected_matrices": 1.0, "microseconds": 12.0, "kernel": "k"},
    }
    assert expert["tokens"] == pytest.approx(32 / 15, rel=1e-14)
    assert expert["expected_matrices"] == 15 / 16
    assert expert["microseconds"] == pytest.approx(3 + 17 / 15, rel=1e-14)


@pytest.mark.parametrize("share", [0.3, 0.1, 1 / 3, 1e-9])
def test_one_sequence_runs_an_expert_with_its_share_on_one_token(
    share: float, tmp_path: Path
) -> None:
    inventory = Inventory("tiny", (EXPERT,))
    evaluator = LatencyEvaluator(table_of(tmp_path), 1, active_share={EXPERT.name: share})
    # 1 - (1 - share) is off by a rounding of 1.
    found = microseconds(evaluator, subject_of(inventory=inventory))
    assert found == pytest.approx(3.0 * share, abs=3 * 2**-52)


@pytest.mark.parametrize("share", [1.0, 1 - 2**-53])
def test_an_expert_that_all_tokens_reach_is_like_a_dense_matrix(
    share: float, tmp_path: Path
) -> None:
    inventory = Inventory("tiny", (EXPERT,))
    evaluator = LatencyEvaluator(table_of(tmp_path), 3, active_share={EXPERT.name: share})
    assert microseconds(evaluator, subject_of(inventory=inventory)) == 5.0


def test_an_expert_that_no_token_reaches_takes_no_time_and_needs_no_row(tmp_path: Path) -> None:
    table = table_of(tmp_path, HAND_MADE[:2])
    evaluator = LatencyEvaluator(table, 6, active_share={EXPERT.name: 0.0})
    assert microseconds(evaluator, subject_of()) == 14.0


def test_uniform_shares_come_from_the_configuration(tmp_path: Path) -> None:
    inventory = Inventory(
        "tiny",
        tuple(
            Matrix(f"model.layers.0.mlp.experts.{e}.down_proj", 32, 16, "expert", 0, e)
            for e in range(4)
        ),
    )
    # Four experts, each reached by a quarter of the tokens.
    assert microseconds(LatencyEvaluator(table_of(tmp_path)), subject_of(inventory=inventory)) == 3


def test_the_fastest_kernel_that_covers_the_tokens_is_taken(tmp_path: Path) -> None:
    rows = (
        *HAND_MADE,
        ("made-up", "small", "int4-g32", 16, 32, 1, 1.0),
        ("made-up", "small", "int4-g32", 16, 32, 3, 2.0),
        ("made-up", "wide", "int4-g32", 16, 32, 1, 13.5),
        ("made-up", "wide", "int4-g32", 16, 32, 8, 13.5),
        ("other", "k", "int4-g32", 16, 32, 2, 0.1),
    )
    table = table_of(tmp_path, rows)
    inventory = Inventory("tiny", (DENSE,))
    found = {}
    for n_tokens in (3, 4, 6):
        evaluator = LatencyEvaluator(table, n_tokens, "made-up")
        (part,) = evaluator.evaluate(subject_of(inventory=inventory)).details["parts"]
        found[n_tokens] = (part["kernel"], part["microseconds"])
    assert found == {3: ("small", 2.0), 4: ("k", 12.0), 6: ("wide", 13.5)}


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    as_json = write_json(tmp_path / "a.jsonl", HAND_MADE)
    as_csv = write_csv(tmp_path / "a.csv", HAND_MADE)
    a, b = read_latency_table(as_json), read_latency_table(as_csv)
    assert a.rows == b.rows
    assert len(a.rows) == 4
    assert b.digest == hashlib.sha256(as_csv.read_bytes()).hexdigest()
    found = LatencyEvaluator(b, 4, active_share=HALF).evaluate(subject_of())
    assert found.scores[0].data_digest == b.digest == found.details["table_digest"]


def test_what_was_not_measured_is_listed_once_and_refused(tmp_path: Path) -> None:
    second = Matrix("model.layers.1.self_attn.o_proj", 16, 32, "attention", 1)
    inventory = Inventory("tiny", (DENSE, EXPERT, second))
    formats = {DENSE.name: "mxfp4", EXPERT.name: "int8-g32", second.name: "mxfp4"}
    subject = Subject(nn.Module(), inventory, Assignment(formats))
    evaluator = LatencyEvaluator(table_of(tmp_path), 4, active_share=HALF)
    with pytest.raises(ConfigError) as refused:
        evaluator.evaluate(subject)
    text = str(refused.value)
    assert text.count("mxfp4 [16, 32]") == 1
    assert "int8-g32 [32, 16]" in text


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_tokens_outside_of_the_measured_are_refused(n_tokens: int, tmp_path: Path) -> None:
    evaluator = LatencyEvaluator(table_of(tmp_path), n_tokens)
    subject = subject_of(inventory=Inventory("tiny", (DENSE,)))
    words = rf"int4-g32 \[16, 32\] at {n_tokens} tokens \(measured: k 2 to 6\)"
    with pytest.raises(ConfigError, match=words):
        evaluator.evaluate(subject)


def test_a_device_has_to_be_named_where_there_are_several(tmp_path: Path) -> None:
    table = table_of(tmp_path, (*HAND_MADE, ("other", *HAND_MADE[0][1:])))
    with pytest.raises(ConfigError, match="device None .* made-up, other"):
        LatencyEvaluator(table)
    with pytest.raises(ConfigError, match="device 'third' .* made-up, other"):
        LatencyEvaluator(table, device="third")


def test_no_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_tokens is 0"):
        LatencyEvaluator(table_of(tmp_path), 0)


def test_a_subject_without_formats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="latency of a model"):
        LatencyEvaluator(table_of(tmp_path)).evaluate(Subject(nn.Module()))


GOOD = HAND_MADE[0]
ROW = dict(zip(FIELDS, GOOD, strict=True))


@pytest.mark.parametrize("write", [write_json, write_csv])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((*GOOD[:6], 0.0), "line .*: microseconds: .*greater than 0"),
        ((*GOOD[:6], float("inf")), "line .*: microseconds: .*finite"),
        ((*GOOD[:5], 0, 1.0), "line .*: tokens: "),
        ((*GOOD[:3], -1, *GOOD[4:]), "line .*: rows: "),
        ((*GOOD[:2], "int9", *GOOD[3:]), "line .*: format: .*int9"),
        ((*GOOD[:2], "int4", *GOOD[3:]), "line .*: format: .*write int4-g128"),
        (("", *GOOD[1:]), "line .*: device: "),
        ((*GOOD[:3], "wide", *GOOD[4:]), "line .*: rows: "),
        (GOOD, "rows 1 and 2 measure the same thing"),
    ],
)
def test_bad_rows_are_refused_with_their_line(
    write: Any, row: Row, words: str, tmp_path: Path
) -> None:
    suffix = "csv" if write is write_csv else "jsonl"
    path = write(tmp_path / f"t.{suffix}", (GOOD, row))
    with pytest.raises(DataError, match=words) as refused:
        read_latency_table(path)
    line = 3 if write is write_csv else 2
    assert f"line {line}:" in str(refused.value) or row == GOOD


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", "", "holds no measurement"),
        ("t.csv", ",".join(FIELDS), "holds no measurement"),
        ("t.jsonl", "{", "line 1: .*not JSON"),
        ("t.jsonl", "[1]", "line 1: top level"),
        ("t.jsonl", '{"device": "d"}', "kernel: is required and missing"),
        (
            "t.jsonl",
            json.dumps({**ROW, "devise": "d"}),
            "devise: unknown key.*did you mean device",
        ),
        ("t.csv", "device,kernel\nd,k\n", "format: is required and missing"),
        ("t.csv", ",".join((*FIELDS, "x")) + "\nd,k,int4-g32,1,1,1,1.0,2\n", "x: unknown key"),
        ("t.csv", ",".join(FIELDS) + "\nd,k,int4-g32,1,1,1,1.0,2\n", "line 2: 8 fields, but 7"),
        ("t.csv", ",".join(FIELDS) + "\nd,k,int4-g32,1,1\n", "line 2: 5 fields, but 7 columns"),
        ("t.jsonl", json.dumps({**ROW, "rows": "16"}), "rows: "),
    ],
)
def test_files_that_are_no_table_are_refused(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_latency_table(path)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_latency_table(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_latency_table(tmp_path / "b.csv")


def measured_rows(case: Any, formats: Sequence[str], counts: Sequence[int]) -> list[Row]:
    """torch.matmul with dequantized weights on this machine's CPU, once per shape and format."""
    rows: dict[tuple[str, int, int, int], Row] = {}
    for matrix in case.map.inventory.matrices:
        for name in formats:
            weight = case.bank.read(matrix, name).dequantize()
            for n in counts:
                inputs = torch.ones(n, matrix.cols)
                started = time.perf_counter()
                torch.matmul(inputs, weight.T)
                seconds = time.perf_counter() - started
                key = (name, matrix.rows, matrix.cols, n)
                rows[key] = ("cpu", "torch.matmul", *key, 1e6 * seconds)
    return list(rows.values())


def test_a_table_measured_on_the_cpu_predicts_a_whole_model(tmp_path: Path) -> None:
    case = make_cost_case(tmp_path / "bank", "mixtral")
    inventory = case.map.inventory
    rows = measured_rows(case, COST_FORMATS, (1, 4))
    table = read_latency_table(write_csv(tmp_path / "t.csv", rows))
    by_key = {row[2:6]: row[6] for row in rows}
    formats = {m.name: COST_FORMATS[i % 2] for i, m in enumerate(inventory.matrices)}
    subject = Subject(case.map.model, inventory, Assignment(formats))
    # Half of the four experts are used by a token: at B = 1 half of the time of one token.
    expected = sum(
        by_key[(formats[m.name], m.rows, m.cols, 1)] * (0.5 if m.kind == "expert" else 1.0)
        for m in inventory.matrices
    )
    assert microseconds(LatencyEvaluator(table, 1), subject) == pytest.approx(expected, rel=1e-12)
    assert microseconds(LatencyEvaluator(table, 4), subject) > 0


def test_a_dense_model_needs_no_shares(tmp_path: Path) -> None:
    model = tiny_model("llama")
    inventory = map_model(model).inventory
    shapes = sorted({(m.rows, m.cols) for m in inventory.matrices})
    rows = [("made-up", "k", "int4-g32", *shape, 1, 1.0) for shape in shapes]
    subject = Subject(model, inventory, uniform_assignment(inventory, "int4-g32"))
    evaluator = LatencyEvaluator(table_of(tmp_path, rows))
    assert microseconds(evaluator, subject) == len(inventory.matrices)
