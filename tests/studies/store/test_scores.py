"""The log of measurements: exact, in order, and safe against kills and damage."""

import json
from pathlib import Path

import pytest
import torch

from alphaquant.errors import StoreError
from alphaquant.evaluators.divergence import Divergence
from alphaquant.studies.store.scores import EvaluationLog, first_windows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bank" / "evaluations" / "text.jsonl"


def part(n_windows: int, seed: int = 0, seconds: float = 0.1) -> Divergence:
    """Random numbers of all magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    kl, same, nll = (torch.randn(n_windows, generator=generator).exp() for _ in range(3))
    return Divergence(1e-6 * kl, same, nll, 48, seconds)


def assert_equal(found: Divergence | None, expected: Divergence) -> None:
    assert found is not None
    for name in ("kl", "same_top", "nll"):
        assert getattr(found, name).dtype == torch.float32
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (found.seq_len, found.seconds) == (expected.seq_len, expected.seconds)


def test_numbers_come_back_exactly(path: Path) -> None:
    log = EvaluationLog(path, 48)
    log.add("a", part(200, 1))
    log.add("b", part(1, 2))
    again = EvaluationLog(path, 48)
    for found in (log, again):
        assert_equal(found.get("a"), part(200, 1))
        assert_equal(found.get("b"), part(1, 2))
        assert found.get("c") is None
        assert [found.n_windows(name) for name in "abc"] == [200, 1, 0]


def test_later_windows_join_the_first_ones_whatever_comes_between(path: Path) -> None:
    log = EvaluationLog(path, 48)
    log.add("a", part(8, 1, 0.25))
    log.add("b", part(8, 2))
    log.add("a", part(3, 3, 0.5))
    joined = torch.cat([part(8, 1).kl, part(3, 3).kl])
    for found in (log, EvaluationLog(path, 48)):
        known = found.get("a")
        assert known is not None
        assert torch.equal(known.kl, joined)
        assert known.seconds == 0.75
        assert_equal(found.get("b"), part(8, 2))


def test_windows_that_two_processes_measured_count_once(path: Path) -> None:
    first, second = EvaluationLog(path, 48), EvaluationLog(path, 48)
    first.add("a", part(8, 1))
    second.add("a", part(8, 2))
    first.add("a", part(4, 3))
    found = EvaluationLog(path, 48)
    assert found.n_windows("a") == 12
    known = found.get("a")
    assert known is not None
    assert torch.equal(known.kl, torch.cat([part(8, 1).kl, part(4, 3).kl]))


@pytest.mark.parametrize("n_lost", [1, 2, 40])
def test_line_that_a_kill_cut_short_is_dropped_and_the_next_is_whole(
    n_lost: int, path: Path
) -> None:
    log = EvaluationLog(path, 48)
    log.add("a", part(8, 1))
    whole = path.read_bytes()
    log.add("a", part(8, 2))
    path.write_bytes(path.read_bytes()[:-n_lost])
    resumed = EvaluationLog(path, 48)
    assert path.read_bytes() == whole
    assert_equal(resumed.get("a"), part(8, 1))
    resumed.add("a", part(8, 2))
    assert EvaluationLog(path, 48).n_windows("a") == 16


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"\xff\xfe",
        b'{"digest": "a", "first": 0, "seconds": 1}',
        b'{"digest": "a", "first": 0, "seconds": 1, "kl": ["x"], "same_top": [1], "nll": [1]}',
        b'{"digest": "a", "first": [], "seconds": 1, "kl": [1], "same_top": [1], "nll": [1]}',
    ],
)
def test_damaged_line_is_refused_by_number(damage: bytes, path: Path) -> None:
    log = EvaluationLog(path, 48)
    for name in "abc":
        log.add(name, part(2))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    with pytest.raises(StoreError, match=r"text.jsonl, line 2, is damaged \(.*delete the file"):
        EvaluationLog(path, 48)


def test_nothing_is_written_before_the_first_measurement(path: Path) -> None:
    assert EvaluationLog(path, 48).get("a") is None
    assert not path.parent.exists()


def test_one_line_per_measurement_says_which_windows_it_holds(path: Path) -> None:
    log = EvaluationLog(path, 48)
    log.add("a", part(2, 1))
    log.add("a", part(3, 2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["digest"], line["first"], len(line["kl"])) for line in lines] == [
        *(("a", 0, 2), ("a", 2, 3)),
    ]


def test_first_windows_have_their_share_of_the_seconds() -> None:
    whole = part(8, 1, 2.0)
    found = first_windows(whole, 2)
    assert torch.equal(found.kl, whole.kl[:2])
    assert torch.equal(found.same_top, whole.same_top[:2])
    assert torch.equal(found.nll, whole.nll[:2])
    assert (found.seq_len, found.seconds) == (48, 0.5)
    assert first_windows(whole, 99).seconds == 2.0
