"""What is beside the decoder layers: found, tied or not, refused where it is not plain."""

import pytest
import torch
from torch import nn

from alphaquant.errors import ModelError
from alphaquant.models.ends import (
    ends_named,
    head_of,
    look_up,
    row_scale,
)
from alphaquant.models.mapping import kept_state, map_model, weights_digest
from alphaquant.models.walk import end_logits, walk, watch_head
from alphaquant.testing.models import tiny_model, tiny_tokens

BOTH = ("head", "embeddings")


def test_head_and_embeddings_are_matrices_after_the_last_layer() -> None:
    found = map_model(tiny_model("olmoe"), include=BOTH)
    embeddings, head = found.inventory.matrices[-2:]
    assert (embeddings.name, embeddings.kind) == ("model.embed_tokens", "embedding")
    assert (head.name, head.kind) == ("lm_head", "head")
    assert embeddings.layer == head.layer == found.inventory.n_layers == len(found.layers)
    assert found.inventory.include == BOTH and found.inventory.n_parts == len(found.parts) == 3
    assert found.view("lm_head").data_ptr() == found.model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("include", [(), ("head",), ("embeddings",)])
def test_what_is_not_included_stays_and_the_weights_have_one_digest(
    include: tuple[str, ...],
) -> None:
    model = tiny_model("olmoe")
    some, both = map_model(model, include=include), map_model(model, include=BOTH)
    assert some.inventory.include == include
    assert some.inventory.digest == both.inventory.digest
    assert weights_digest(some) == weights_digest(both)
    kept = {k.name for k in some.inventory.kept} - {k.name for k in both.inventory.kept}
    assert kept == {"lm_head.weight", "model.embed_tokens.weight"} - {
        f"{m.name}.weight" for m in some.inventory.matrices
    }
    assert set(kept_state(model, both.parts)) == {k.name for k in both.inventory.kept}
    assert some.inventory.n_file_weights == both.inventory.n_file_weights


@pytest.mark.parametrize("include", [("head",), ("embeddings",), BOTH])
def test_tied_weights_are_one_matrix_that_every_token_reads(include: tuple[str, ...]) -> None:
    found = map_model(tiny_model("gemma2"), include=include)
    (matrix,) = (m for m in found.inventory.matrices if m.layer == len(found.layers))
    assert (matrix.name, matrix.kind) == ("model.embed_tokens", "head")
    assert matrix.aliases == ("lm_head",) and not matrix.is_looked_up
    assert found.ends is not None and head_of(found.ends) is found.model.lm_head
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & {
        k.name for k in found.inventory.kept
    }


@pytest.mark.parametrize(
    ("names", "include"),
    [({"lm_head"}, ("head",)), ({"model.embed_tokens", "x"}, ("embeddings",)), ({"x"}, ())],
)
def test_names_tell_what_is_included(names: set[str], include: tuple[str, ...]) -> None:
    assert ends_named(tiny_model("olmoe"), names) == include


class Odd(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) + 1


class Scaled(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2.0


class Lies(Scaled):
    embed_scale = 3.0


@pytest.mark.parametrize("kind", [Odd, Lies])
def test_embeddings_that_do_more_than_scale_are_refused(kind: type[nn.Embedding]) -> None:
    model = tiny_model("olmoe")
    model.model.embed_tokens = kind(96, 40)
    with pytest.raises(ModelError, match=rf"--include embeddings: .* has a {kind.__name__} where"):
        map_model(model, include=("embeddings",))
    map_model(model, include=("head",))


def test_a_head_that_is_no_plain_linear_is_refused() -> None:
    model = tiny_model("olmoe")
    model.lm_head = nn.Sequential(nn.Linear(40, 96, bias=False))
    with pytest.raises(ModelError, match="--include head: .* has a Sequential where an nn.Linear"):
        map_model(model, include=("head",))


def test_rows_of_other_weights_are_scaled_as_the_own_ones_are() -> None:
    table, rows = Scaled(4, 3, padding_idx=3), torch.arange(6.0).view(2, 3)
    assert row_scale(table) == 2.0
    assert look_up(table, rows, torch.tensor([1, 0])).tolist() == [[6, 8, 10], [0, 2, 4]]
    assert table.padding_idx == 3


def test_a_head_is_shown_its_inputs_and_gives_logits_of_some_positions() -> None:
    found = map_model(tiny_model("gemma2"), include=("head",))  # it bends its logits
    tokens, seen = tiny_tokens(2, 6), []
    outputs = []
    for step in walk(found, [tokens]):
        step.run()
        outputs = step.outputs
    whole = found.model(tokens).logits
    part = end_logits(found, tokens, outputs[0], slice(2, 5))
    assert torch.allclose(part, whole[:, 2:5], rtol=1e-5, atol=1e-6)
    head = found.model.lm_head
    with watch_head(head, seen.append):
        found.model(tokens)
    assert torch.allclose(end_logits(found, tokens, outputs[0], slice(None)), whole, atol=1e-6)
    (inputs,) = seen
    cap = found.model.config.final_logit_softcapping
    assert torch.allclose(cap * torch.tanh(head(inputs) / cap), whole, atol=1e-5)
