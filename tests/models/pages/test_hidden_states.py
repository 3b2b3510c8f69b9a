"""Hidden states on disk: the same numbers, and a walk that is the same as in memory."""

import gc
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.errors import StoreError
from alphaquant.models.mapping import map_model
from alphaquant.models.pages import hidden_states, memory
from alphaquant.models.pages.hidden_states import DiskStates, fits
from alphaquant.models.walk import batches_of, check_walk, walk
from alphaquant.testing.models import tiny_model, tiny_tokens


def n_maps() -> int:
    """Maps of files without a name that this process holds."""
    with open(f"/proc/{os.getpid()}/maps") as file:
        return sum("(deleted)" in line for line in file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_kept_is_the_same_and_goes_with_its_tensor(dtype: torch.dtype) -> None:
    gc.collect()  # maps of other tests, which would go while this one counts
    states, before = DiskStates(), n_maps()
    tensor = torch.randn(3, 1000, 8).to(dtype).transpose(1, 2)
    kept = states.keep(tensor)
    assert kept.dtype == dtype and torch.equal(kept, tensor)
    assert kept.data_ptr() != tensor.data_ptr() and states.keep(kept) is kept
    states.drop(kept)
    assert torch.equal(kept, tensor)
    kept += 1  # as layers may do with what they are given
    states.drop(kept)
    assert torch.equal(kept, tensor + 1)
    assert n_maps() == before + 1
    del kept
    gc.collect()
    assert n_maps() == before


def test_tuples_keep_their_first_and_gradients_stay_where_they_are() -> None:
    states, other = DiskStates(), torch.ones(2)
    first, second = states.keep_hidden((torch.zeros(2), other))
    assert second is other and torch.equal(first, torch.zeros(2))
    leaf = torch.ones(2, requires_grad=True)
    assert states.keep(leaf) is leaf
    assert states.keep_hidden(None) is None


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states.tempfile, "TemporaryFile", full)
    with pytest.raises(StoreError, match=r"No space left.*it needs 4096 bytes"):
        DiskStates().keep(torch.zeros(1024))


def test_an_eighth_of_the_free_memory_is_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "free_memory", lambda: 800)
    assert fits(100) and not fits(101)
    assert 0 < memory.free_memory() <= memory.total_memory()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "llama4_text"])
@torch.no_grad()
def test_a_walk_with_states_on_disk_gives_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_map = map_model(tiny_model(family))
    batches = batches_of(tiny_tokens(5, 13), 2)

    def outputs() -> tuple[list[list[Tensor]], list[Any]]:
        results: list[Any] = []
        steps = [[h.clone() for h in step.run()] for step in walk(model_map, batches, results)]
        return steps, results

    steps, results = outputs()
    monkeypatch.setattr("alphaquant.models.walk.fits", lambda n_bytes: False)
    gc.collect()
    before = n_maps()
    steps_on_disk, results_on_disk = outputs()
    for a, b in zip(steps, steps_on_disk, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y in zip(results, results_on_disk, strict=True):
        assert torch.equal(x.logits, y.logits)
    check_walk(model_map, batches)
    gc.collect()
    assert n_maps() == before


@torch.no_grad()
def test_hidden_states_of_a_large_text_are_on_disk_between_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("alphaquant.models.walk.fits", lambda n_bytes: False)
    gc.collect()
    before = n_maps()
    for step in walk(map_model(tiny_model("olmoe")), batches_of(tiny_tokens(6, 13), 2)):
        assert n_maps() >= before + 3  # one per batch
        assert step.states is not None
        assert all(h.data_ptr() in step.states._maps for h in step.run())
    with torch.enable_grad():
        for step in walk(map_model(tiny_model("olmoe")), batches_of(tiny_tokens(2, 5), 2)):
            assert step.states is None
