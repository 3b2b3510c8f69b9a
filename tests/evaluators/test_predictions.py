"""Predictions part by part are those of the whole batch, and the model's layers run once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from alphaquant.evaluators import predictions
from alphaquant.evaluators.predictions import (
    Piece,
    most_likely,
    predict,
    predict_pieces,
)
from alphaquant.models.mapping import map_model
from alphaquant.models.walk import (
    ROW_BYTES,
    end_logits,
    positions_at_once,
    row_chunks,
    walk,
)
from alphaquant.testing.models import VOCABULARY, tiny_model, tiny_tokens

TOKENS = tiny_tokens(5, 6)


def limit(patch: pytest.MonkeyPatch, n_positions: int) -> None:
    """Let predictions of so many positions be in memory."""
    patch.setattr(predictions, "positions_at_once", lambda vocabulary: n_positions)


def joined(pieces: list[Piece]) -> Tensor:
    """All pieces in their places."""
    whole = torch.full((*TOKENS.shape, VOCABULARY), torch.nan)
    for piece in pieces:
        whole[piece.windows, piece.positions] = piece.log_probs
    return whole


@pytest.mark.parametrize(
    ("n_positions", "shapes"),
    [
        pytest.param(30, [(5, 6)], id="all at once"),
        pytest.param(13, [(2, 6), (2, 6), (1, 6)], id="two windows at a time"),
        pytest.param(4, [(1, 4), (1, 2)] * 5, id="a window in two parts"),
        pytest.param(1, [(1, 1)] * 30, id="one position at a time"),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "gemma2"])  # gemma2 caps its logits
def test_pieces_are_the_whole_batch(
    n_positions: int, shapes: list[tuple[int, int]], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    expected = predict(model, TOKENS)
    limit(monkeypatch, n_positions)
    found = list(predict_pieces(model, TOKENS))
    assert [tuple(piece.log_probs.shape[:2]) for piece in found] == shapes
    # Products of other sizes may add in another order: 2**-24 of numbers of size 10.
    assert torch.allclose(joined(found), expected, rtol=0, atol=5e-6)


def test_the_layers_run_once_however_many_pieces_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = tiny_model("mixtral"), []
    model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    limit(monkeypatch, 2)
    assert len(list(predict_pieces(model, TOKENS))) == 15
    assert len(calls) == 1


def test_a_model_without_a_body_predicts_all_at_once(
    table_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 1)
    (piece,) = predict_pieces(table_model(), TOKENS % 7)
    assert piece.log_probs.shape == (5, 6, 7)


def test_numbers_are_those_of_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    logits = model(TOKENS, use_cache=False).logits
    monkeypatch.setattr(
        "alphaquant.models.walk.ROW_BYTES", 4 * VOCABULARY * 7
    )  # 30 rows in five chunks
    assert torch.equal(predict(model, TOKENS), torch.log_softmax(logits, -1))


def test_the_most_likely_token_is_the_first_of_equals() -> None:
    rows = torch.randn(64, 500, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    rows[:, 400] = rows[:, 7] = rows.max()
    rows[0, 300] = torch.nan
    found = most_likely(rows.float().reshape(8, 8, 500))
    assert torch.equal(found.flatten(), rows.float().argmax(-1))
    assert set(found.flatten().tolist()[1:]) == {7}


def test_rows_come_in_chunks_of_a_bounded_size() -> None:
    n_wide = ROW_BYTES // 4
    assert row_chunks(torch.empty(3, n_wide)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert row_chunks(torch.empty(3, 2 * n_wide)) == row_chunks(torch.empty(3, n_wide))
    assert row_chunks(torch.empty(5, n_wide // 4)) == [slice(0, 4), slice(4, 5)]
    assert row_chunks(torch.empty(0, 8)) == []


@pytest.mark.parametrize(
    ("vocabulary", "n_positions"),
    [
        pytest.param(256, 28672, id="28 MiB"),
        pytest.param(49152, 256, id="28 MiB are 149 positions"),
        pytest.param(262144, 256, id="28 MiB are 28 positions"),
    ],
)
def test_heads_are_not_read_anew_for_a_few_positions(vocabulary: int, n_positions: int) -> None:
    assert positions_at_once(vocabulary) == n_positions


@torch.no_grad()
def test_heads_are_given_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of slices, torch copies the weight of a linear in bfloat16 for every window."""
    model, strides = tiny_model("mixtral"), set()
    width = model.config.hidden_size

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        strides.add(args[0].stride() == (args[0].shape[1] * width, width, 1))

    model.get_output_embeddings().register_forward_pre_hook(see)
    limit(monkeypatch, 4)
    list(predict_pieces(model, TOKENS))
    model_map = map_model(model)
    for step in walk(model_map, [TOKENS]):
        step.run()
        output = step.outputs[0]
    end_logits(model_map, TOKENS, output, slice(1, 3))
    assert strides == {True}
