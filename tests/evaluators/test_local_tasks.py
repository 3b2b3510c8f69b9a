"""MMLU from CSV files: lm-eval's own prompts, groups and numbers."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alphaquant.errors import DataError
from alphaquant.evaluators import harness_tasks
from alphaquant.evaluators.base import Subject
from alphaquant.evaluators.harness import HarnessEvaluator
from alphaquant.evaluators.harness_tasks import HarnessRequest, LoadedTasks, load_tasks
from alphaquant.evaluators.local_tasks import is_mmlu, read_mmlu, write_mmlu_tasks
from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.testing.checkpoints import save_tiny

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install .[tasks]")

Row = tuple[str, ...]
OFFICIAL = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
QUESTION = "Which, of these, is the cavity?\nSay which. "
ANATOMY = (QUESTION, "Abdominal", "Cranial, that is", "Pleural", 'Sp"inal', "1")


def subjects() -> list[str]:
    """The 57, by lm-eval's own files."""
    return sorted(path.stem.removeprefix("mmlu_") for path in OFFICIAL.glob("mmlu_*.yaml"))


def rows_of(subject: str, n: int) -> list[Row]:
    return [(f"{subject} {i}?", *"wxyz", str((i + len(subject)) % 4)) for i in range(n)]


def save(folder: Path, subject: str, rows: list[Row], *, released: bool = False) -> None:
    """Write both files of a subject; `released` is the form without a header."""
    for part, some in (("test", rows), ("dev", rows_of(f"{subject} example", 3))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        path = folder / part / f"{subject}_{part}.csv"
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle)
            if not released:
                writer.writerow(["question", *(f"choice{i}" for i in range(4)), "answer"])
            for row in some:
                writer.writerow([*row[:5], "ABCD"[int(row[5])]] if released else row)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two subjects, the second in the form of the public release."""
    save(tmp_path / "data", "anatomy", [ANATOMY, *rows_of("anatomy", 3)])
    save(tmp_path / "data", "astronomy", rows_of("astronomy", 5), released=True)
    return tmp_path / "data"


@pytest.fixture
def loaded(data: Path, tmp_path: Path) -> Callable[..., LoadedTasks]:
    """Loads tasks of the two subjects."""

    def make(*tasks: str) -> LoadedTasks:
        folder = tmp_path / "-".join(tasks)
        folder.mkdir()
        write_mmlu_tasks(data, tasks, folder)
        return load_tasks(HarnessRequest(tasks, folder))

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def prompts_of(task: Any, n_shots: int) -> list[tuple[str, str]]:
    """Prompt and continuation of every request that lm-eval makes."""
    task.set_config(key="num_fewshot", value=n_shots)
    task.set_fewshot_seed(seed=1234)
    with harness_tasks.quiet():
        task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_prompt_is_the_published_one(loaded: Callable[..., LoadedTasks]) -> None:
    prompts = prompts_of(loaded("mmlu_anatomy").tasks["mmlu_anatomy"], 1)[:4]
    expected = (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "anatomy example 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
        "Which, of these, is the cavity?\nSay which.\n"
        'A. Abdominal\nB. Cranial, that is\nC. Pleural\nD. Sp"inal\nAnswer:'
    )
    assert prompts == [(expected, f" {letter}") for letter in "ABCD"]


@pytest.mark.parametrize("n_shots", [0, 3])
def test_prompts_are_lm_evals_template_on_the_same_rows(
    n_shots: int, data: Path, loaded: Callable[..., LoadedTasks]
) -> None:
    index = lm_eval.tasks.TaskManager(include_path=OFFICIAL, include_defaults=False).task_index
    config = index["mmlu_astronomy"].cfg
    rows = read_mmlu(str(data), "astronomy")

    def rendered(row: Any) -> str:
        text: str = lm_eval.utils.apply_template(config["doc_to_text"], row)
        return text

    answers = config["doc_to_choice"]
    examples = [f"{rendered(r)} {answers[r['answer']]}\n\n" for r in rows["dev"]][:n_shots]
    expected = [
        (config["description"] + "".join(examples) + rendered(row), f" {answer}")
        for row in rows["test"]
        for answer in answers
    ]
    assert prompts_of(loaded("mmlu_astronomy").tasks["mmlu_astronomy"], n_shots) == expected


def test_only_the_source_of_the_rows_differs_from_lm_evals_definition(
    loaded: Callable[..., LoadedTasks],
) -> None:
    index = lm_eval.tasks.TaskManager(include_path=OFFICIAL, include_defaults=False).task_index
    official = index["mmlu_anatomy"].cfg
    ours = loaded("mmlu_anatomy").tasks["mmlu_anatomy"].dump_config()
    moved = {"dataset_path", "fewshot_config", "metadata", "tag"}
    for key in set(official) - moved:
        assert ours[key] == official[key], key
    assert ours["fewshot_config"]["sampler"] == official["fewshot_config"]["sampler"]
    assert ours["metadata"]["version"] == official["metadata"]["version"]


@pytest.mark.parametrize("n_shots", [0, 2])
def test_two_subjects_give_the_numbers_of_lm_eval(
    n_shots: int, data: Path, tiny: Path, tmp_path: Path
) -> None:
    tasks = ["mmlu_anatomy", "mmlu_astronomy"]
    write_mmlu_tasks(data, tasks, tmp_path)
    model = load_model(tiny)
    request = HarnessRequest(tuple(tasks), tmp_path, n_shots, 3, 2)
    found = HarnessEvaluator(request, load_tokenizer(tiny)).evaluate(Subject(model))
    wrapper = lm_eval.models.huggingface.HFLM
    direct = lm_eval.simple_evaluate(
        wrapper(pretrained=model, tokenizer=load_tokenizer(tiny), batch_size=2),
        tasks=tasks,
        num_fewshot=n_shots,
        limit=3,
        task_manager=lm_eval.tasks.TaskManager(include_path=tmp_path, include_defaults=False),
    )
    for task, score, row in zip(tasks, found.scores, found.details["tasks"], strict=True):
        values = direct["results"][task]
        assert score.metric == f"{task}.acc"
        assert (score.value, score.stderr) == (values["acc,none"], values["acc_stderr,none"])
        assert (score.n_samples, score.n_tokens) == (3, 3 * 4)
        assert (row["task"], row["n_shots"]) == (task, direct["n-shot"][task]) == (task, n_shots)
    documents = [s["doc_hash"] for s in direct["samples"]["mmlu_anatomy"]]
    assert len(documents) == 3
    assert found.scores[0].data_digest != found.scores[1].data_digest


def test_groups_weight_subjects_by_their_size(tiny: Path, tmp_path: Path) -> None:
    sizes = {subject: 1 + i % 3 for i, subject in enumerate(subjects())}
    for subject, n in sizes.items():
        save(tmp_path / "data", subject, rows_of(subject, n))
    (tmp_path / "tasks").mkdir()
    write_mmlu_tasks(tmp_path / "data", ["mmlu"], tmp_path / "tasks")
    request = HarnessRequest(("mmlu",), tmp_path / "tasks")
    made = HarnessEvaluator(request, load_tokenizer(tiny))
    found = made.evaluate(Subject(load_model(tiny)))
    groups = ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities")
    assert [s.metric for s in found.scores] == [f"{group}.acc" for group in groups]
    rows = found.details["tasks"]
    assert {r["task"]: r["n_samples"] for r in rows} == {f"mmlu_{s}": n for s, n in sizes.items()}
    right = sum(r["n_samples"] * r["values"]["acc,none"] for r in rows)
    total = sum(sizes.values())
    assert found.scores[0].value == pytest.approx(right / total, abs=1e-12)
    plain = sum(r["values"]["acc,none"] for r in rows) / len(rows)
    assert found.scores[0].value != pytest.approx(plain, abs=1e-6)
    assert sum(s.n_samples for s in found.scores[1:]) == found.scores[0].n_samples == total
    assert {s.direction for s in found.scores} == {"maximize"}


def test_both_forms_of_the_files_give_the_same_rows(tmp_path: Path) -> None:
    rows = [ANATOMY, *rows_of("anatomy", 2)]
    for released in (False, True):
        save(tmp_path / str(released), "anatomy", rows, released=released)
    with_header, without = (
        read_mmlu(str(tmp_path / str(released)), "anatomy")["test"].to_list()
        for released in (False, True)
    )
    assert with_header == without
    choices = list(ANATOMY[1:5])
    first = {"question": QUESTION, "subject": "anatomy", "choices": choices, "answer": 1}
    assert with_header[0] == first
    assert list(with_header[0]) == ["question", "subject", "choices", "answer"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("a,b,c,d,e,f\n", "row 1 .*mend"),
        ("q,w,x,y,z,A\nq,w,x,y,A\n", "row 2 .*mend"),
        ("q,w,x,y,z,5\n", "row 1 .*one of 0, 1, 2, 3, A, B, C, D"),
    ],
)
def test_a_damaged_file_is_told_with_its_row(
    text: str, words: str, data: Path, loaded: Callable[..., LoadedTasks]
) -> None:
    (data / "test" / "anatomy_test.csv").write_text(text)
    with pytest.raises(DataError, match=f"anatomy_test.csv.*{words}"):
        loaded("mmlu_anatomy")


def test_subjects_that_are_missing_are_named(data: Path, tmp_path: Path) -> None:
    (data / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(DataError, match=r"1 of 1 .*anatomy; a subject needs.*anatomy_dev.csv"):
        write_mmlu_tasks(data, ["mmlu_anatomy"], tmp_path)
    with pytest.raises(DataError, match=r"56 of 57 .*mmlu_anatomy"):
        write_mmlu_tasks(data, ["mmlu"], tmp_path)
    write_mmlu_tasks(data, ["mmlu_astronomy"], tmp_path)
    assert (tmp_path / "mmlu_astronomy.yaml").is_file()
    assert not (tmp_path / "mmlu_anatomy.yaml").exists()


@pytest.mark.parametrize(
    ("task", "expected"),
    [("mmlu", True), ("mmlu_stem", True), ("mmlu_anatomy", True), ("mmlu.yaml", False)],
)
def test_tasks_of_mmlu_are_known_by_name(task: str, expected: bool) -> None:
    assert is_mmlu(task) is expected
