"""Trials and the original's outputs by workers: the numbers of one process."""

from pathlib import Path

import pytest
import torch

from alphaquant.evaluators.teacher import store_teacher
from alphaquant.evaluators.teacher_parts import store_teacher_by
from alphaquant.models.mapping import map_model
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.rounds import Rounds
from alphaquant.studies.shared import spread_rounds
from alphaquant.studies.shared.spread_rounds import MOST_PARTS, RoundTask, SpreadRounds, n_tasks
from alphaquant.testing.models import tiny_model, tiny_tokens
from alphaquant.work.tasks import InProcess

FORMATS = ("int2-g32", "int4-g32")
TOKENS = tiny_tokens(21, 8)
"""In batches of 2: eleven, more than parts."""


def no_progress(stage: str, done: int, total: int) -> None:
    """See `Progress`."""


def test_batches_by_tasks_have_the_numbers_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("qwen2_moe"))
    bank = open_bank(tmp_path, "key", model_map.inventory, {})
    fill_bank(bank, model_map, TOKENS, BankRequest(FORMATS, QuantSettings(method="rtn")))
    teacher = store_teacher(tmp_path / "t", model_map.model, TOKENS, batch_size=2)
    inventory = model_map.inventory
    mixed = {m.name: FORMATS[i % 2] for i, m in enumerate(inventory.matrices)}
    assignments = [*(uniform_assignment(inventory, n) for n in FORMATS), Assignment(mixed)]
    workers, told = InProcess(model_map), list[tuple[int, int]]()

    def numbers(rounds: Rounds | SpreadRounds) -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {a.digest: [] for a in assignments}
        batches = range(1, 11)
        measured = rounds.measure(
            assignments, TOKENS, teacher, batches, lambda *call: told.append(call)
        )
        for assignment, part in measured:
            found[assignment.digest].append([*part.kl.tolist(), *part.nll.tolist()])
        return found

    expected = numbers(Rounds(model_map, bank.layer, 2))
    for together, n_groups in ((8, 1), (2, 2)):
        monkeypatch.setattr(spread_rounds, "TOGETHER", together)
        told.clear()
        assert numbers(SpreadRounds(workers, bank.path, 2)) == expected
        assert told[-1] == (n_groups * MOST_PARTS, n_groups * MOST_PARTS)
        assert n_tasks(3, 10) == n_groups * MOST_PARTS
    assert [len(part) for part in expected[mixed_digest(assignments)]] == [4] * 9 + [2]


def mixed_digest(assignments: list[Assignment]) -> str:
    return assignments[-1].digest


def test_in_less_memory_a_task_gives_the_same(tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"))
    bank = open_bank(tmp_path, "key", model_map.inventory, {})
    fill_bank(bank, model_map, TOKENS, BankRequest(FORMATS, QuantSettings(method="rtn")))
    teacher = store_teacher(tmp_path / "t", model_map.model, TOKENS, batch_size=2)
    assignments = tuple(uniform_assignment(model_map.inventory, n) for n in FORMATS)
    task = RoundTask(bank.path, assignments, TOKENS, teacher, range(3), 2, 8)
    small = task.smaller()
    assert small.share == 32
    tiny = RoundTask(bank.path, assignments, TOKENS, teacher, range(3), 2, 2**60)
    numbers = [
        sorted((n, part.kl.tolist()) for n, part in t.run(model_map)) for t in (task, small, tiny)
    ]
    assert numbers[0] == numbers[1] == numbers[2]


@pytest.mark.parametrize("top_k", [4096, 20])
def test_predictions_by_tasks_are_the_file_of_one_process(top_k: int, tmp_path: Path) -> None:
    model_map = map_model(tiny_model("olmoe"))
    alone, shared = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    store_teacher(alone, model_map.model, TOKENS, top_k=top_k, model_map=model_map)
    calls: list[tuple[str, int, int]] = []
    teacher = store_teacher_by(
        InProcess(model_map), shared, TOKENS, top_k, lambda *call: calls.append(call)
    )
    assert shared.read_bytes() == alone.read_bytes()
    assert calls[-1] == ("teacher", len(TOKENS), len(TOKENS))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]
    again = store_teacher_by(InProcess(model_map), shared, TOKENS, top_k, no_progress)
    assert again == teacher


def test_what_was_predicted_before_a_stop_is_not_predicted_again(
    tmp_path: Path,
) -> None:
    model_map = map_model(tiny_model("olmoe"))
    path, done = tmp_path / "t.safetensors", 0

    def stop(stage: str, *_: int) -> None:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_teacher_by(InProcess(model_map), path, TOKENS, 20, stop)
    assert len(list(tmp_path.rglob("batch-*.safetensors"))) == 2
    n_walked = 0
    embedding = model_map.model.get_input_embeddings()

    def count(module: object, args: tuple[torch.Tensor]) -> None:
        nonlocal n_walked
        n_walked += len(args[0])

    embedding.register_forward_pre_hook(count)
    store_teacher_by(InProcess(model_map), path, TOKENS, 20, no_progress)
    assert n_walked == 2 * (len(TOKENS) - 16), "once to walk, once for what is behind the layers"
    store_teacher(tmp_path / "a", model_map.model, TOKENS, top_k=20, model_map=model_map)
    assert path.read_bytes() == (tmp_path / "a").read_bytes()
