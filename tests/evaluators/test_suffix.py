"""Predictions from any layer on equal those of the whole model."""

import pytest
import torch

from alphaquant.evaluators.perplexity import predict
from alphaquant.evaluators.suffix import SuffixModel
from alphaquant.quant.models import map_model
from alphaquant.quant.sites import ModelMap
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens


def whole(model_map: ModelMap, tokens: torch.Tensor) -> torch.Tensor:
    return predict(model_map.model, tokens)


@torch.no_grad()
def change(model_map: ModelMap, layer: int) -> None:
    """Quantize nothing, but move every matrix of one layer."""
    for matrix in model_map.layers[layer].matrices():
        model_map.view(matrix.name).mul_(0.9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_suffix_gives_the_predictions_of_the_whole_model(family: str) -> None:
    model_map, tokens = map_model(tiny_model(family)), tiny_tokens(5, 9)
    suffix = SuffixModel(model_map, tokens, 2)
    for first in range(suffix.n_layers):
        found = list(suffix.predict(first))
        assert [len(part) for part in found] == [2, 2, 1]
        torch.testing.assert_close(torch.cat(found), whole(model_map, tokens))


def test_a_changed_layer_is_seen_from_it_on_and_not_behind_it() -> None:
    model_map, tokens = map_model(tiny_model("olmoe")), tiny_tokens(3, 9)
    suffix = SuffixModel(model_map, tokens, 2)
    before = torch.cat(list(suffix.predict(0)))
    change(model_map, 1)
    after = whole(model_map, tokens)
    torch.testing.assert_close(torch.cat(list(suffix.predict(1))), after)
    change(model_map, 0)
    stale = torch.cat(list(suffix.predict(1)))
    torch.testing.assert_close(stale, after)
    assert not torch.allclose(stale, whole(model_map, tokens))
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("first", [0, 1])
def test_remembering_takes_the_current_weights(first: int) -> None:
    model_map, tokens = map_model(tiny_model("mixtral")), tiny_tokens(3, 9)
    suffix = SuffixModel(model_map, tokens, 3)
    change(model_map, first)
    suffix.remember(first)
    torch.testing.assert_close(torch.cat(list(suffix.predict(1))), whole(model_map, tokens))


def test_the_model_is_left_as_it_was() -> None:
    model_map, tokens = map_model(tiny_model("olmoe")), tiny_tokens(2, 5)
    before = whole(model_map, tokens)
    list(SuffixModel(model_map, tokens, 2).predict(0))
    assert all("forward" not in layer.module.__dict__ for layer in model_map.layers)
    assert torch.equal(whole(model_map, tokens), before)


def test_a_kill_inside_the_head_leaves_the_layers_as_they_were() -> None:
    model_map, tokens = map_model(tiny_model("olmoe")), tiny_tokens(2, 5)
    suffix = SuffixModel(model_map, tokens, 2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model_map.model.get_output_embeddings().register_forward_pre_hook(stop)  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        list(suffix.predict(0))
    handle.remove()
    assert all("forward" not in layer.module.__dict__ for layer in model_map.layers)
