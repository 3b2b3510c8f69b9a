"""KL and same-top against torch and by hand; the teacher's file and how it is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alphaquant.errors import DataError, StoreError
from alphaquant.evaluators import predictions
from alphaquant.evaluators.divergence import Divergence, measure_divergence
from alphaquant.evaluators.perplexity import measure_perplexity
from alphaquant.evaluators.teacher import Teacher, log_rest, open_teacher, store_teacher
from alphaquant.models.mapping import map_model
from alphaquant.testing.models import VOCABULARY, tiny_model, tiny_tokens
from tests.damage import flip_a_bit, garble, truncate

Make = Callable[..., nn.Module]
TOKENS = tiny_tokens(5, 9)
P, Q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def changed() -> nn.Module:
    """The original with a little noise on every weight."""
    model = tiny_model("mixtral")
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model


def divergence(
    path: Path,
    original: nn.Module,
    model: nn.Module,
    tokens: Tensor = TOKENS,
    *,
    top_k: int = 4096,
) -> Divergence:
    teacher = store_teacher(path / f"teacher-{top_k}.safetensors", original, tokens, top_k=top_k)
    return measure_divergence(model, tokens, teacher, batch_size=2)


def direct_kl(original: nn.Module, model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """KL per position from the logits, float64 [N, T]."""
    p, q = (
        torch.log_softmax(m(tokens, use_cache=False).logits.double(), -1)
        for m in (original, model)
    )
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        pytest.param(3, math.log(2) / 4, id="exact"),
        pytest.param(1, math.log(2) / 2 + math.log(2 / 3) / 2, id="one token and the rest"),
    ],
)
def test_one_position_by_hand(
    tmp_path: Path, table_model: Make, top_k: int, expected: float
) -> None:
    tokens = torch.tensor([[0, 0], [0, 0]])
    models = [table_model([row] * 3) for row in (P, Q)]
    found = divergence(tmp_path, *models, tokens, top_k=top_k)
    # float32 logarithms of numbers of size 1.
    assert found.kl.tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert found.same_top.tolist() == [0.0, 0.0]
    assert found.nll.tolist() == pytest.approx([math.log(4)] * 2, abs=1e-6)


@pytest.mark.parametrize("top_k", [4096, 96, 95, 10, 1])
def test_a_model_has_no_divergence_from_itself(
    tmp_path: Path, original: nn.Module, top_k: int
) -> None:
    found = divergence(tmp_path, original, original, top_k=top_k)
    assert found.kl.abs().max() <= 1e-7
    assert found.same_top.tolist() == [1.0] * len(TOKENS)


def test_kl_equals_torch_on_the_logits(
    tmp_path: Path, original: nn.Module, changed: nn.Module
) -> None:
    found = divergence(tmp_path, original, changed)
    expected = direct_kl(original, changed).mean(-1)
    assert expected.min() > 0.01  # else there is nothing to compare
    # float32 log-probabilities carry errors of about 1e-6, which p weighs to the same size.
    assert found.kl.tolist() == pytest.approx(expected.tolist(), abs=5e-6)


def test_kl_is_not_symmetric(tmp_path: Path, original: nn.Module, changed: nn.Module) -> None:
    (tmp_path / "back").mkdir()
    there = divergence(tmp_path, original, changed).kl.mean()
    back = divergence(tmp_path / "back", changed, original).kl.mean()
    assert abs(there - back) > 1e-4


def test_fewer_stored_tokens_give_a_lower_bound_that_grows_to_the_exact_value(
    tmp_path: Path, original: nn.Module, changed: nn.Module
) -> None:
    by_k = {
        k: divergence(tmp_path, original, changed, top_k=k).kl
        for k in (1, 4, 32, VOCABULARY - 1, VOCABULARY)
    }
    bounds = torch.stack(list(by_k.values()))
    assert (bounds.diff(dim=0) >= -1e-6).all()  # float32
    assert (by_k[1] < 0.9 * by_k[VOCABULARY]).all()
    # The rest of k = V - 1 is a single token, so nothing is lost.
    assert torch.allclose(by_k[VOCABULARY - 1], by_k[VOCABULARY], atol=1e-6)


def test_a_tiny_rest_is_measured_and_not_rounded_away(tmp_path: Path, table_model: Make) -> None:
    # One minus the top in float32 is noise for p and 0 for q.
    models = [table_model([[1.0, rest / 2, rest / 2]] * 3) for rest in (1e-6, 1e-9)]
    found = divergence(tmp_path, *models, torch.zeros(2, 4, dtype=torch.int64), top_k=1)
    # 1e-6 (ln 1e-6 - ln 1e-9) + the top's (1 - 1e-6) ln((1 - 1e-6) / (1 - 1e-9)), where float32
    # knows log-probabilities near 0 to 2**-24 = 6e-8.
    assert found.kl.tolist() == pytest.approx([1e-6 * math.log(1e3) - 1e-6] * 2, abs=1.2e-7)


def test_same_top_counts_positions(tmp_path: Path, table_model: Make) -> None:
    a = table_model([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    b = table_model([[0.4, 0.5, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])  # differs after a 0
    tokens = torch.tensor([[0, 1, 2, 1], [0, 0, 0, 1]])
    for top_k in (1, 2, 3):
        found = divergence(tmp_path, a, b, tokens, top_k=top_k)
        assert found.same_top.tolist() == [0.75, 0.25]


def test_scores_are_the_means_over_windows(
    tmp_path: Path, original: nn.Module, changed: nn.Module
) -> None:
    found = divergence(tmp_path, original, changed)
    kl, top, perplexity = found.scores("digest")
    assert [s.metric for s in (kl, top, perplexity)] == ["kl", "same_top", "perplexity"]
    assert [s.direction for s in (kl, top, perplexity)] == ["minimize", "maximize", "minimize"]
    assert [s.n_tokens for s in (kl, top, perplexity)] == [45, 45, 40]
    assert {s.n_samples for s in (kl, top, perplexity)} == {5}
    assert {s.data_digest for s in (kl, top, perplexity)} == {"digest"}
    assert kl.value == pytest.approx(float(found.kl.mean()), rel=1e-6)
    assert kl.stderr == pytest.approx(float(found.kl.std()) / math.sqrt(5), rel=1e-6)
    expected = measure_perplexity(changed, TOKENS, "")
    assert perplexity.value == pytest.approx(expected.value, rel=1e-5)
    assert perplexity.stderr == pytest.approx(expected.stderr, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_do_not_change_the_numbers(
    tmp_path: Path, original: nn.Module, changed: nn.Module, batch_size: int
) -> None:
    path = tmp_path / "a.safetensors"
    teacher = store_teacher(path, original, TOKENS, batch_size=batch_size, top_k=20)
    found = measure_divergence(changed, TOKENS, teacher, batch_size=batch_size)
    expected = divergence(tmp_path, original, changed, top_k=20)
    assert torch.allclose(found.kl, expected.kl, atol=5e-6)
    assert torch.allclose(found.nll, expected.nll, atol=5e-6)
    assert torch.equal(found.same_top, expected.same_top)


def test_a_walk_stores_the_predictions_of_ordinary_passes(tmp_path: Path) -> None:
    model, tokens, steps = tiny_model("olmoe"), tiny_tokens(5, 12), []
    known = store_teacher(tmp_path / "a.safetensors", model, tokens, batch_size=2)
    walked = store_teacher(
        *(tmp_path / "b.safetensors", model, tokens),
        batch_size=2,
        model_map=map_model(model),
        progress=lambda stage, done, total: steps.append((done, total)),
    )
    assert walked.path.read_bytes() == known.path.read_bytes()
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == ((0, 5), (5, 5))


@pytest.mark.parametrize("top_k", [VOCABULARY, 20])
def test_predictions_in_parts_do_not_change_the_numbers(
    tmp_path: Path,
    original: nn.Module,
    changed: nn.Module,
    top_k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = divergence(tmp_path, original, changed, top_k=top_k)
    whole = load_file(tmp_path / f"teacher-{top_k}.safetensors")
    monkeypatch.setattr("alphaquant.models.walk.ROW_BYTES", 4 * VOCABULARY * 2)
    for n_positions in (18, 9, 4):  # of the file's windows: all of a batch, one, not even one
        monkeypatch.setattr(predictions, "positions_at_once", lambda _, n=n_positions: n)
        (tmp_path / str(n_positions)).mkdir()
        found = divergence(tmp_path / str(n_positions), original, changed, top_k=top_k)
        stored = load_file(tmp_path / str(n_positions) / f"teacher-{top_k}.safetensors")
        for name, tensor in whole.items():
            assert torch.allclose(stored[name], tensor, rtol=0, atol=5e-6), name
        assert torch.allclose(found.kl, expected.kl, rtol=0, atol=1e-6)
        assert torch.allclose(found.nll, expected.nll, rtol=0, atol=1e-6)
        assert torch.equal(found.same_top, expected.same_top)


# The teacher's file


def test_its_tensors_are_those_that_safetensors_would_write(
    tmp_path: Path, original: nn.Module
) -> None:
    teacher = store_teacher(tmp_path / "a.safetensors", original, TOKENS, batch_size=2, top_k=10)
    found = [
        nn.functional.log_softmax(original(part, use_cache=False).logits, -1)
        for part in TOKENS.split(2)
    ]
    tokens = torch.cat([part.topk(10, -1).indices.sort(-1).values for part in found])
    tensors = load_file(teacher.path)
    assert torch.equal(tensors["log_probs"], torch.cat(found).gather(-1, tokens))
    assert torch.equal(tensors["tokens"], tokens.int())
    with safe_open(teacher.path, "pt") as file:
        save_file(tensors, tmp_path / "b.safetensors", metadata=file.metadata())
    assert open_teacher(tmp_path / "b.safetensors").facts == teacher.facts


def test_a_full_disk_is_an_error_that_names_the_file(
    tmp_path: Path, original: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tensor, "numpy", full)
    with pytest.raises(StoreError, match=r"cannot write .*No space left .* bytes, .* are free"):
        store_teacher(tmp_path / "a.safetensors", original, TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_holds(tmp_path: Path, original: nn.Module) -> None:
    path = tmp_path / "new folder" / "a.safetensors"
    steps: list[tuple[str, int, int]] = []
    teacher = store_teacher(
        path, original, TOKENS, batch_size=2, top_k=10, progress=lambda *step: steps.append(step)
    )
    assert steps == [("teacher", done, 5) for done in (0, 2, 4, 5)]
    tensors = load_file(path)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "log_probs": (torch.float32, (5, 9, 10)),
        "tokens": (torch.int32, (5, 9, 10)),
        "rest": (torch.float32, (5, 9)),
    }
    logits = original(TOKENS, use_cache=False).logits
    top = torch.softmax(logits, -1).topk(10, -1)
    assert torch.equal(tensors["tokens"], top.indices.sort(-1).values.to(torch.int32))
    assert teacher.facts["mass"] == pytest.approx(float(top.values.sum(-1).mean()), abs=1e-5)
    assert {k: teacher.facts[k] for k in ("n_windows", "seq_len", "k", "vocabulary")} == {
        "n_windows": 5,
        "seq_len": 9,
        "k": 10,
        "vocabulary": VOCABULARY,
    }
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert teacher.perplexity == pytest.approx(float(losses.exp()), rel=1e-5)
    assert Teacher(path, {}).perplexity is None  # of an earlier version
    assert open_teacher(path) == teacher
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_the_whole_vocabulary_has_no_rest(tmp_path: Path, original: nn.Module) -> None:
    teacher = store_teacher(tmp_path / "a.safetensors", original, TOKENS)
    tensors = load_file(teacher.path)
    assert set(tensors) == {"log_probs", "rest"}
    assert torch.isneginf(tensors["rest"]).all()
    assert teacher.facts["mass"] == 1.0


def test_a_stored_teacher_is_opened_without_running_the_model(
    tmp_path: Path, table_model: Make
) -> None:
    model, tokens = table_model(), torch.tensor([[0, 1, 2]])
    first = store_teacher(tmp_path / "a.safetensors", model, tokens)
    n_calls = model.n_calls
    again = store_teacher(tmp_path / "a.safetensors", model, tokens)
    assert again == first
    assert model.n_calls == n_calls == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(torch.tensor([[0, 1, 2], [0, 1, 3]]), id="one other token"),
        pytest.param(torch.tensor([[0, 1, 2]]), id="fewer windows"),
        pytest.param(torch.tensor([[0, 1], [2, 0], [1, 2]]), id="other shape"),
    ],
)
def test_a_teacher_of_other_windows_is_refused(
    tmp_path: Path, table_model: Make, other: Tensor
) -> None:
    model = table_model()
    path, tokens = tmp_path / "a.safetensors", torch.tensor([[0, 1, 2], [0, 1, 2]])
    teacher = store_teacher(path, model, tokens)
    message = r"holds predictions for 2 windows of 3 tokens, which are not the .* delete it"
    with pytest.raises(StoreError, match=message):
        measure_divergence(model, other, teacher)
    with pytest.raises(StoreError, match=message):
        store_teacher(path, model, other)


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, table_model: Make) -> None:
    tokens = torch.tensor([[0, 1, 2]])
    teacher = store_teacher(tmp_path / "a.safetensors", table_model(n=7), tokens)
    with pytest.raises(StoreError, match="over 7 tokens, the model predicts 8"):
        measure_divergence(table_model(n=8), tokens, teacher)


def test_windows_of_one_token_are_refused(tmp_path: Path, table_model: Make) -> None:
    tokens = torch.tensor([[0], [1]])
    teacher = store_teacher(tmp_path / "a.safetensors", table_model(), tokens)
    with pytest.raises(DataError, match="2 tokens or more"):
        measure_divergence(table_model(), tokens, teacher)


def drop_checksum(path: Path) -> None:
    with safe_open(path, "pt") as file:
        facts = {"facts": file.metadata()["facts"]}
    save_file(load_file(path), path, metadata=facts)


def drop_facts(path: Path) -> None:
    save_file(load_file(path), path)


def drop_rows(path: Path) -> None:
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    save_file({n: t[1:].contiguous() for n, t in load_file(path).items()}, path, metadata=facts)


def drop_digest(path: Path) -> None:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    del facts["data_digest"]
    save_file(load_file(path), path, metadata={"facts": json.dumps(facts)})


DAMAGE = (*(truncate, garble, flip_a_bit, drop_checksum, drop_facts, drop_rows, drop_digest),)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_store_error(
    tmp_path: Path, table_model: Make, damage: Callable[[Path], None]
) -> None:
    path, tokens = tmp_path / "a.safetensors", torch.tensor([[0, 1, 2], [0, 1, 2]])
    store_teacher(path, table_model(), tokens, top_k=2)
    damage(path)
    with pytest.raises(StoreError, match=r"a\.safetensors is damaged .*delete it and run"):
        store_teacher(path, table_model(), tokens, top_k=2)


def test_a_missing_file_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is damaged"):
        open_teacher(tmp_path / "a.safetensors")


def test_a_measurement_that_fails_leaves_no_file(tmp_path: Path, table_model: Make) -> None:
    with pytest.raises(IndexError):
        store_teacher(tmp_path / "a.safetensors", table_model(n=7), torch.tensor([[0], [9]]))
    assert list(tmp_path.iterdir()) == []


def test_predictions_are_as_they_were_after_the_rest_is_summed() -> None:
    rows = torch.log_softmax(torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0)), -1)
    tokens = rows.topk(10, -1).indices.to(torch.int32)
    before = rows.clone()
    found = log_rest(rows, tokens)
    assert torch.equal(rows, before)
    others = before.scatter(-1, tokens.to(torch.int64), -torch.inf)
    assert torch.equal(found, others.logsumexp(-1))
