"""Perplexity against torch's cross entropy and against numbers computed by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from alphaquant.errors import DataError
from alphaquant.evaluators.perplexity import losses_of, measure_perplexity, perplexity_score
from alphaquant.evaluators.predictions import Piece, predict
from alphaquant.testing.models import tiny_model, tiny_tokens

Make = Callable[..., nn.Module]


def test_two_windows_by_hand(table_model: Make) -> None:
    model = table_model([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.2, 0.4, 0.4]])
    # Window 0: p(1|0) p(0|1) = 1/4 * 1/8; window 1: p(0|0) p(0|0) = 1/2 * 1/2.
    score = measure_perplexity(model, torch.tensor([[0, 1, 0], [0, 0, 0]]), "digest")
    losses = (5 * math.log(2) / 2, math.log(2))
    value = math.exp(sum(losses) / 2)
    # float32 log-softmax is good to about 1e-7.
    assert score.value == pytest.approx(value, rel=1e-6)
    assert score.stderr == pytest.approx(value * abs(losses[0] - losses[1]) / 2, rel=1e-6)
    assert (score.metric, score.direction, score.unit) == ("perplexity", "minimize", "per token")
    assert (score.n_samples, score.n_tokens, score.data_digest) == (2, 4, "digest")
    assert score.seconds > 0


@pytest.mark.parametrize("batch_size", [1, 3, 8], ids=["single", "last batch short", "one batch"])
def test_it_is_exp_of_the_mean_cross_entropy(batch_size: int) -> None:
    model, tokens = tiny_model("mixtral"), tiny_tokens(5, 9)
    score = measure_perplexity(model, tokens, "", batch_size=batch_size)
    logits = model(tokens, use_cache=False).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten())
    # float32 forward passes in another batch size differ by about 1e-6 in a logit of size 10.
    assert score.value == pytest.approx(float(expected.exp()), rel=1e-5)


def test_the_standard_error_is_that_of_the_mean_loss_times_the_perplexity() -> None:
    nll = torch.tensor([1.0, 2.0, 3.0, 6.0])
    score = perplexity_score(nll, seq_len=5, seconds=1.5, data_digest="d")
    assert score.value == pytest.approx(math.exp(3))
    assert score.stderr == pytest.approx(math.exp(3) * math.sqrt(14 / 3 / 4))
    assert (score.n_samples, score.n_tokens, score.seconds) == (4, 16, 1.5)


def test_the_error_of_one_window_is_nan(table_model: Make) -> None:
    score = measure_perplexity(table_model(), torch.tensor([[0, 1, 2]]), "")
    assert score.stderr is not None
    assert math.isnan(score.stderr)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(table_model: Make) -> None:
    model = table_model([[0.25] * 4] * 4)
    tokens = torch.randint(4, (3, 6), generator=torch.Generator().manual_seed(0))
    score = measure_perplexity(model, tokens, "")
    assert score.value == pytest.approx(4.0, rel=1e-6)
    assert score.stderr == pytest.approx(0.0, abs=1e-5)


def test_a_loss_beyond_float64_is_infinite_and_not_an_error() -> None:
    assert perplexity_score(torch.tensor([1e3, 1e3]), 2, 0.0, "").value == math.inf


def test_windows_of_one_token_predict_nothing(table_model: Make) -> None:
    with pytest.raises(DataError, match="windows of 1 token asked.*2 tokens or more"):
        measure_perplexity(table_model(), torch.tensor([[1], [2]]), "")


def test_losses_are_of_the_following_token(table_model: Make) -> None:
    tokens = torch.tensor([[3, 1, 4], [1, 5, 6]])
    log_probs = predict(table_model(), tokens)
    losses = losses_of(Piece(slice(0, 2), slice(0, 3), log_probs), tokens)
    assert losses.shape == (2, 2)
    assert losses[1, 0] == -log_probs[1, 0, 5]
    assert losses[0, 1] == -log_probs[0, 1, 4]
    middle = Piece(slice(1, 2), slice(1, 2), log_probs[1:, 1:2])
    assert losses_of(middle, tokens).tolist() == [[float(losses[1, 1])]]
    last = Piece(slice(0, 1), slice(2, 3), log_probs[:1, 2:])
    assert losses_of(last, tokens).shape == (1, 0)


def test_predictions_are_normalized_float32_without_a_graph() -> None:
    model = tiny_model("llama").to(torch.bfloat16).requires_grad_(True)
    log_probs = predict(model, tiny_tokens(2, 3))
    assert log_probs.dtype == torch.float32
    assert not log_probs.requires_grad
    # 96 terms rounded to 2**-24 each.
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(2, 3), atol=1e-5)
