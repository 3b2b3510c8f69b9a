"""Tasks of lm-eval: the numbers that lm-eval itself gives, on any model, from local files."""

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from alphaquant.commands.quantize import quantize
from alphaquant.errors import AlphaQuantError, ConfigError, DataError
from alphaquant.evaluators import harness_tasks
from alphaquant.evaluators.base import Score, Subject
from alphaquant.evaluators.harness import SEEDS, HarnessEvaluator
from alphaquant.evaluators.harness_tasks import HarnessRequest
from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.runtime.checkpoint import load
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.evaluators import check_evaluator

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install .[tasks]")

DOCUMENTS = ["A first text of seven  words here.\n", "Zwei Wörter, naïve façade.", "One more."]
PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=64)


@pytest.fixture(scope="module")
def model(tiny: Path) -> nn.Module:
    return load_model(tiny)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task files of docs/evaluation.md with documents, in the current folder."""
    for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        name = re.match(r"task: (\w+)", text)
        assert name is not None
        (tmp_path / f"{name[1]}.yaml").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = ["question,a,b,label", *(f"Is {i} odd?,no,yes,{i % 2}" for i in range(5))]
    (tmp_path / "choices.csv").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMLU stands for all of lm-eval's tasks: reading the 14 thousand files takes seconds."""
    manager: Callable[..., Any] = lm_eval.tasks.TaskManager
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"

    def make(*, include_path: Any, include_defaults: bool = True) -> Any:
        paths = include_path if isinstance(include_path, list) else [include_path]
        defaults = [folder] if include_defaults else []
        return manager(include_path=[*defaults, *paths], include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", make)


def evaluator(tiny: Path, *tasks: str, **settings: Any) -> HarnessEvaluator:
    return HarnessEvaluator(HarnessRequest(tasks, **settings), load_tokenizer(tiny))


def directly(model: nn.Module, tiny: Path, tasks: list[str], **settings: Any) -> Any:
    """What lm-eval gives without us."""
    wrapper = lm_eval.models.huggingface.HFLM
    lm = wrapper(pretrained=model, tokenizer=load_tokenizer(tiny), batch_size=8)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, **settings)


def named(scores: tuple[Score, ...]) -> dict[str, Score]:
    return {score.metric: score for score in scores}


def test_text_task_gives_the_numbers_of_lm_eval(files: Path, tiny: Path, model: nn.Module) -> None:
    found = evaluator(tiny, "my_text.yaml").evaluate(Subject(model))
    direct = directly(model, tiny, ["my_text.yaml"])["results"]["my_text"]
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert [s.metric for s in found.scores] == [f"my_text.{m}" for m in metrics]
    for score, metric in zip(found.scores, metrics, strict=True):
        assert score.value == direct[f"{metric},none"]
        assert (score.stderr, direct[f"{metric}_stderr,none"]) == (None, "N/A")
        assert score.direction == "minimize"


def test_word_and_byte_numbers_are_one_loss_by_words_and_by_bytes(
    files: Path, tiny: Path, model: nn.Module
) -> None:
    scores = named(evaluator(tiny, "my_text.yaml").evaluate(Subject(model)).scores)
    n_words = sum(len(re.split(r"\s+", text)) for text in DOCUMENTS)
    n_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    loss = n_words * math.log(scores["my_text.word_perplexity"].value)
    assert n_bytes * math.log(scores["my_text.byte_perplexity"].value) == pytest.approx(loss)
    bits = scores["my_text.bits_per_byte"]
    assert n_bytes * bits.value * math.log(2) == pytest.approx(loss)
    tokenizer = load_tokenizer(tiny)
    n_tokens = sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in DOCUMENTS)
    assert (bits.n_samples, bits.n_tokens) == (3, n_tokens)


def test_choices_from_a_csv_file_are_scored(files: Path, tiny: Path, model: nn.Module) -> None:
    found = evaluator(tiny, "my_choices.yaml", limit=4).evaluate(Subject(model))
    direct = directly(model, tiny, ["my_choices.yaml"], limit=4)["results"]["my_choices"]
    (score,) = found.scores
    assert (score.value, score.stderr) == (direct["acc,none"], direct["acc_stderr,none"])
    assert (score.metric, score.direction, score.unit) == (
        *("my_choices.acc", "maximize", "fraction"),
    )
    assert score.n_tokens == 4 * 2  # " no" and " yes" are one token each
    (row,) = found.details["tasks"]
    assert (row["n_samples"], row["n_available"], row["n_cut"]) == (4, 5, 0)
    assert row["values"]["acc,none"] == score.value
    assert found.details["lm_eval"] == lm_eval.__version__
    assert {name: found.details[name] for name in SEEDS} == SEEDS


def test_seeds_are_the_defaults_of_lm_eval() -> None:
    defaults = lm_eval.simple_evaluate.__wrapped__.__kwdefaults__ or {}
    names = lm_eval.simple_evaluate.__wrapped__.__code__.co_varnames
    values = lm_eval.simple_evaluate.__wrapped__.__defaults__
    n_arguments = lm_eval.simple_evaluate.__wrapped__.__code__.co_argcount
    defaults |= dict(zip(names[n_arguments - len(values) : n_arguments], values, strict=True))
    assert {name: defaults[name] for name in SEEDS} == SEEDS


def test_a_folder_stands_for_all_of_its_tasks(files: Path, tiny: Path, model: nn.Module) -> None:
    made = evaluator(tiny, str(files), limit=2)
    assert [m.name for m in made.metrics] == [
        "my_choices.acc",
        *(f"my_text.{m}" for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
    ]
    found = made.evaluate(Subject(model))
    assert [s.metric for s in found.scores] == [m.name for m in made.metrics]
    assert {s.n_samples for s in found.scores} == {2}


def test_contract_is_kept(files: Path, tiny: Path, model: nn.Module) -> None:
    check_evaluator(evaluator(tiny, "my_choices.yaml"), Subject(model))


def test_random_states_and_tokenizer_are_left_as_they_were(
    files: Path, tiny: Path, model: nn.Module
) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.pad_token = None
    made = HarnessEvaluator(HarnessRequest(("my_choices.yaml",)), tokenizer)
    random.seed(7)
    np.random.seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    made.evaluate(Subject(model))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index]
    assert tokenizer.pad_token is None


def test_texts_start_as_asked_in_all_of_lm_eval(files: Path, tiny: Path, model: nn.Module) -> None:
    tokenizer = load_tokenizer(tiny)
    bos = tokenizer.bos_token_id
    for mode in ("auto", "never", "always"):
        made = HarnessEvaluator(HarnessRequest(("my_choices.yaml",)), tokenizer, mode)
        lm = made._wrapped(Subject(model))
        begins = lm.tok_encode("a")[0] == bos, int(lm.tok_batch_encode(["a"])[0][0, 0]) == bos
        assert begins == (mode == "always",) * 2
        found = made.evaluate(Subject(model))
        assert found.details["bos"] == ([bos] if mode == "always" else None)
    assert tokenizer.encode("a")[0] != bos
    own = load_tokenizer(tiny)
    own.add_bos_token = True  # as Llama's
    for mode in ("auto", "never"):
        made = HarnessEvaluator(HarnessRequest(("my_choices.yaml",)), own, mode)
        assert (made._wrapped(Subject(model)).tok_encode("a")[0] == bos) == (mode == "auto")


def test_tasks_need_a_tokenizer(files: Path) -> None:
    with pytest.raises(DataError, match="the model has no tokenizer; copy"):
        HarnessEvaluator(HarnessRequest(("my_choices.yaml",)), None)


def test_packed_model_scores_as_its_weights_do(files: Path, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"default": {"wq": "int8"}}')
    quantize(QuantizeSpec.of(model=str(tiny), config=config, out=tmp_path / "packed"))
    packed = load(tmp_path / "packed")
    (score,) = evaluator(tiny, "my_choices.yaml").evaluate(Subject(packed)).scores
    direct = directly(packed, tiny, ["my_choices.yaml"])["results"]["my_choices"]
    assert score.value == direct["acc,none"]
    bits = evaluator(tiny, "my_text.yaml")
    ours, plain = (bits.evaluate(Subject(m)).scores[2].value for m in (packed, load_model(tiny)))
    assert ours != plain
    assert ours == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize(("n_over", "n_cut"), [(0, 0), (1, 1)])
def test_prompts_that_lm_eval_cuts_are_counted(
    n_over: int, n_cut: int, files: Path, tiny: Path, model: nn.Module
) -> None:
    tokenizer = load_tokenizer(tiny)

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    # The last token of the continuation is predicted and not read: 64 are read of 65.
    rest = max(length(" no"), length(" yes"))
    words = next(w for n in range(99) if length(w := "and" + " and" * n) + rest == 65 + n_over)
    rows = ["question,a,b,label", f"{words},no,yes,0", "Short?,no,yes,1"]
    Path("choices.csv").write_text("\n".join(rows))
    found = evaluator(tiny, "my_choices.yaml").evaluate(Subject(model))
    assert [row["n_cut"] for row in found.details["tasks"]] == [n_cut]
    assert found.details["max_length"] == 64


def test_other_documents_have_other_digests(files: Path, tiny: Path, model: nn.Module) -> None:
    made = [evaluator(tiny, "my_choices.yaml", limit=n) for n in (2, 2, 3)]
    first, same, other = (e.evaluate(Subject(model)) for e in made)
    assert first.scores[0].data_digest == same.scores[0].data_digest
    assert first.scores[0].data_digest != other.scores[0].data_digest
    assert first.details["tasks"][0]["prompts"] != other.details["tasks"][0]["prompts"]


def test_nothing_is_printed(
    files: Path, tiny: Path, model: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluator(tiny, "my_choices.yaml", n_shots=0).evaluate(Subject(model))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("tasks", "settings", "error", "words"),
    [
        ((), {}, ConfigError, "name a task"),
        (("my_text.yaml",), {"batch_size": 0}, ConfigError, "batches of 0"),
        (("my_text.yaml",), {"n_shots": -1}, ConfigError, "shots is -1"),
        (("my_text.yaml",), {"limit": 0}, ConfigError, "limit is 0"),
        (("mmlu_anatomi",), {}, ConfigError, "mmlu_anatomi.*did you mean.*mmlu_anatomy"),
        (("nowhere.yaml",), {}, ConfigError, "nowhere.yaml.*a task file"),
        (("mmlu_anatomy",), {}, DataError, "mmlu_anatomy.*hub.*--task-data"),
        (("cache",), {}, DataError, "no tasks"),
    ],
)
@pytest.mark.usefixtures("few_tasks")
def test_bad_input_is_refused(
    tasks: tuple[str, ...],
    settings: dict[str, Any],
    error: type[AlphaQuantError],
    words: str,
    files: Path,
    tiny: Path,
) -> None:
    (files / "cache").mkdir()
    with pytest.raises(error, match=words):
        evaluator(tiny, *tasks, **settings)


def test_more_shots_than_examples_are_refused(files: Path, tiny: Path) -> None:
    path = files / "my_choices.yaml"
    path.write_text(path.read_text() + "fewshot_split: test\n")
    with pytest.raises(DataError, match=r"6 shots asked; my_choices has 5"):
        evaluator(tiny, str(path), n_shots=6)


def test_without_lm_eval_the_message_says_how_to_install_it(
    files: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness_tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "aq-search\[tasks\]"'):
        evaluator(tiny, "my_text.yaml")
