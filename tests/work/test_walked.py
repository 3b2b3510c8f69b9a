"""Hidden states in files: how layers are called from there on, and which models hand on more."""

from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.models.mapping import map_model
from alphaquant.models.walk import walk
from alphaquant.testing.models import tiny_model, tiny_tokens
from alphaquant.work.walked import (
    MOST_UNITS,
    StateFiles,
    Text,
    even_parts,
    folder_of_states,
    hands_on_more,
    steps_from,
    walk_tasks,
)

TEXT = Text(tiny_tokens(5, 8), 2, Path("nowhere"))


def test_units_are_of_the_text_alone_and_few() -> None:
    assert [list(unit) for unit in TEXT.units] == [[0], [1], [2]]
    long = Text(tiny_tokens(200, 2), 2, Path("nowhere"))
    assert len(long.units) == MOST_UNITS
    assert [n for unit in long.units for n in unit] == list(range(100))
    assert {len(unit) for unit in long.units} == {3, 4}
    assert [list(p) for p in even_parts(range(4, 11), 3)] == [[4, 5], [6, 7], [8, 9, 10]]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_layer_is_called_as_in_one_walk_though_those_below_are_not_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model(family))
    expected: list[Any] = []
    with torch.no_grad():
        for step in walk(model_map, TEXT.batches):
            expected.append([call.hidden.clone() for call in step.calls])
            step.run()
        last = [output.clone() for output in step.outputs]
    states = StateFiles(tmp_path, TEXT)
    for task in walk_tasks(states, 1):
        task.run(model_map)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a layer below was run")

    monkeypatch.setattr(model_map.layers[0].module, "forward", refuse)
    step = next(steps_from(model_map, states, 1))
    assert step.layer is model_map.layers[1]
    assert all(map(torch.equal, [call.hidden for call in step.calls], expected[1]))
    monkeypatch.setattr(model_map.layers[1].module, "forward", refuse)
    assert all(map(torch.equal, next(steps_from(model_map, states, 2)).outputs, last))


def test_a_walk_whose_files_are_there_is_not_walked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model("olmoe"))
    states = StateFiles(tmp_path, TEXT)
    tasks = walk_tasks(states, 0)
    tasks[0].run(model_map)
    monkeypatch.setattr(
        "alphaquant.work.walked.walk", lambda *args, **kwargs: pytest.fail("walked")
    )
    tasks[0].run(model_map)
    with pytest.raises(pytest.fail.Exception):
        tasks[1].run(model_map)


def test_a_folder_stays_when_work_is_cut_short_and_goes_when_it_is_done(tmp_path: Path) -> None:
    folder, states = tmp_path / "states", StateFiles(tmp_path / "states" / "walk", TEXT)
    with pytest.raises(KeyboardInterrupt), folder_of_states(folder):
        states.write(0, TEXT.units[0], [torch.zeros(2, 8, 4)])
        raise KeyboardInterrupt
    assert len(list(folder.rglob("*.safetensors"))) == 1
    with folder_of_states(folder):
        assert states.has_layer(0, TEXT.units[0])
    assert list(tmp_path.iterdir()) == []


def test_layers_that_leave_state_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model_map = map_model(tiny_model("olmoe"))
    window = TEXT.tokens[:1]
    assert hands_on_more(model_map, window) is None
    layer = model_map.layers[1].module
    forward = layer.forward

    def with_state(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs), torch.zeros(1)

    monkeypatch.setattr(layer, "forward", with_state)
    assert hands_on_more(model_map, window) == "model.layers.1"
