"""Where matrices are rounded, and how many stacks at a time."""

import logging

import pytest
import torch

from alphaquant.quant import place as places
from alphaquant.quant.columns.column_loops import NumbaLoops, can_round_on
from alphaquant.quant.place import Place, place_of

GIB = 2**30


def test_a_cpu_rounds_one_stack_at_a_time() -> None:
    place = place_of(torch.device("cpu"))
    assert place == Place(torch.device("cpu"), place.loops, is_batched=False)
    assert isinstance(place.loops, NumbaLoops)
    assert place.n_together(2048, 2048) == 1


def test_weights_on_other_devices_are_rounded_on_the_cpu_and_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING):
        place = place_of(torch.device("mps"))
    assert place.device.type == "cpu" and not place.is_batched
    assert "weights on mps are rounded on the CPU" in caplog.text
    assert can_round_on("cpu") and not can_round_on("mps")


@pytest.mark.parametrize(
    ("free", "n_rows", "n_cols", "n_stacks"),
    [
        # 24 tensors of 16 MiB are 384 MiB a stack; four fifths of 100 GiB hold 213.
        pytest.param(100 * GIB, 2048, 2048, 213, id="gate and up of OLMoE"),
        pytest.param(GIB, 2048, 2048, 2, id="little memory"),
        pytest.param(0, 2048, 2048, 1, id="none: the allocator will say so"),
    ],
)
def test_as_many_stacks_as_the_free_memory_holds(
    free: int, n_rows: int, n_cols: int, n_stacks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free // 2, 140 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free - free // 2 + 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    monkeypatch.setattr(places, "loops_on", lambda device: NumbaLoops())
    monkeypatch.setattr(places, "can_round_on", lambda device_type: True)
    place = place_of(torch.device("cuda"))
    assert place.is_batched and place.n_together(n_rows, n_cols) == n_stacks
