"""Assignments measured together have the numbers that each has alone, and leave no trace."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.evaluators.divergence import Divergence, measure_divergence
from alphaquant.evaluators.teacher import Teacher, store_teacher
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.quant.bank import Bank, BankLayer, open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies import rounds as module
from alphaquant.studies.rounds import Rounds, memory_left
from alphaquant.testing.models import tiny_model, tiny_tokens

FORMATS = ("int2-g32", "int4-g32", "mxfp4")
TOKENS = tiny_tokens(5, 8)
"""In batches of 2: three, the last of one window."""


class Case:
    """A model with its bank, a teacher, and assignments that share more or less."""

    def __init__(self, family: str, path: Path, include: tuple[str, ...] = ()) -> None:
        self.map: ModelMap = map_model(tiny_model(family), include=include)
        self.bank: Bank = open_bank(path, "key", self.map.inventory, {})
        fill_bank(self.bank, self.map, TOKENS, BankRequest(FORMATS, QuantSettings(method="rtn")))
        self.teacher: Teacher = store_teacher(path / "t", self.map.model, TOKENS, batch_size=2)
        inventory, last = self.map.inventory, len(self.map.layers) - 1
        coarse, fine, mx = (uniform_assignment(inventory, name) for name in FORMATS)
        late = {m.name: "mxfp4" if m.layer == last else "int2-g32" for m in inventory.matrices}
        mixed = {m.name: FORMATS[i % 3] for i, m in enumerate(inventory.matrices)}
        self.assignments = [coarse, fine, Assignment(late), mx, Assignment(mixed)]
        self.n_opened: Counter[tuple[str, int]] = Counter()

    def open_layer(self, format_name: str, layer: int) -> BankLayer:
        self.n_opened[format_name, layer] += 1
        return self.bank.layer(format_name, layer)

    def rounds(self, most_bytes: int | None = None) -> Rounds:
        return Rounds(self.map, self.open_layer, 2, most_bytes)

    def together(self, rounds: Rounds, batches: range = range(3)) -> dict[str, list[Divergence]]:
        found: dict[str, list[Divergence]] = {}
        for assignment, part in rounds.measure(self.assignments, TOKENS, self.teacher, batches):
            found.setdefault(assignment.digest, []).append(part)
        return found

    def alone(self, assignment: Assignment) -> Divergence:
        """By an ordinary forward pass of the whole model, whose weights are put back."""
        own = {name: view.clone() for name, view in self.map.views.items()}
        Swapper(self.map, self.bank.layer).apply(assignment)
        found = measure_divergence(self.map.model, TOKENS, self.teacher, batch_size=2)
        for name, weight in own.items():
            self.map.view(name).copy_(weight)
        return found

    def runs_of_layers(self) -> list[int]:
        """Counts from now on how often each layer computes anything."""
        counts = [0] * len(self.map.layers)
        for layer in self.map.layers:

            def count(*_: Any, index: int = layer.index) -> None:
                counts[index] += 1

            layer.module.self_attn.register_forward_pre_hook(count)
        return counts


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case("qwen2_moe", tmp_path)


@pytest.mark.parametrize(
    ("family", "include"),
    [
        ("qwen2_moe", ("head", "embeddings")),
        ("gpt_oss", ()),
        ("gemma2", ("head",)),  # tied
        ("deepseek_v3", ("embeddings",)),
    ],
)
def test_numbers_are_those_of_each_assignment_alone_bit_for_bit(
    family: str, include: tuple[str, ...], tmp_path: Path
) -> None:
    case = Case(family, tmp_path, include)
    found = case.together(case.rounds())
    assert len(found) == 5
    for assignment in case.assignments:
        alone, parts = case.alone(assignment), found[assignment.digest]
        assert [len(part.kl) for part in parts] == [2, 2, 1]
        for name in ("kl", "same_top", "nll"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(alone, name)), (family, name)
    assert len({float(parts[0].kl[0]) for parts in found.values()}) == 5


@pytest.mark.parametrize("most_bytes", [0, 20_000, 60_000])
def test_turns_do_not_change_the_numbers(most_bytes: int, case: Case) -> None:
    whole, turns = case.together(case.rounds()), case.together(case.rounds(most_bytes))
    assert turns.keys() == whole.keys()
    for digest, parts in whole.items():
        assert [p.kl.tolist() for p in turns[digest]] == [p.kl.tolist() for p in parts]


def test_some_batches_are_the_same_batches(case: Case) -> None:
    whole, last = case.together(case.rounds()), case.together(case.rounds(), range(1, 3))
    for digest, parts in whole.items():
        assert [p.kl.tolist() for p in last[digest]] == [p.kl.tolist() for p in parts[1:]]


def test_a_file_is_opened_once_per_layer_and_what_is_shared_runs_once(case: Case) -> None:
    runs = case.runs_of_layers()
    case.together(case.rounds())
    assert set(case.n_opened.values()) == {1}
    assert len(case.n_opened) == len(FORMATS) * len(case.map.layers)
    # Three batches; the first and the third assignment differ in the last layer alone.
    assert runs == [3 * 4] * (len(runs) - 1) + [3 * 5]


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt])
def test_weights_are_the_same_afterwards(
    stop: type[BaseException] | None, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: tensor.clone() for name, tensor in case.map.model.state_dict().items()}
    forwards = [layer.module.__dict__.get("forward") for layer in case.map.layers]
    if stop is None:
        case.together(case.rounds())
    else:
        honest, calls = module._run_group, []

        def interrupted(*args: Any) -> None:
            honest(*args)
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt

        monkeypatch.setattr(module, "_run_group", interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.together(case.rounds())
    after = case.map.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [layer.module.__dict__.get("forward") for layer in case.map.layers] == forwards


def test_whoever_waits_is_told_of_every_layer(case: Case) -> None:
    steps: list[tuple[int, int]] = []
    tell: Callable[[int, int], None] = lambda done, total: steps.append((done, total))  # noqa: E731
    list(case.rounds().measure(case.assignments, TOKENS, case.teacher, range(3), tell))
    n_layers = len(case.map.layers)
    assert steps == [(done, n_layers) for done in range(n_layers + 1)]


def test_seconds_are_shared_by_windows(case: Case) -> None:
    parts = [part for parts in case.together(case.rounds()).values() for part in parts]
    each = parts[0].seconds / 2
    assert each > 0
    assert [p.seconds for p in parts] == pytest.approx([each * len(p.kl) for p in parts])


def test_turns_are_few_and_even(case: Case) -> None:
    n_bytes = 3 * 2 * 8 * case.map.model.config.hidden_size * 4  # of an assignment and a batch
    turns = [
        (some.stop - some.start, len(numbers))
        for some, numbers in case.rounds(4 * n_bytes)._turns(5, range(7), 8)
    ]
    assert sum(a * b for a, b in turns) == 35
    assert max(a * b for a, b in turns) <= 4
    assert case.rounds(0)._turns(2, range(2), 8) == [
        (slice(i, i + 1), range(j, j + 1)) for i in range(2) for j in range(2)
    ]
    assert case.rounds(35 * n_bytes)._turns(5, range(7), 8) == [(slice(0, 5), range(7))]


def test_memory_left_is_a_number_of_bytes() -> None:
    assert 2**20 < memory_left(torch.device("cpu")) < 2**50
