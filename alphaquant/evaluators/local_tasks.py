"""MMLU from local CSV files as tasks of lm-eval: its own definition, other documents.

Writes a folder of task files that include lm-eval's and replace where rows come from, and reads
the rows when lm-eval asks. Prompts, choices, metrics and groups stay lm-eval's. Layout of the
data, that of the public release (Hendrycks et al., "Measuring Massive Multitask Language
Understanding", https://arxiv.org/abs/2009.03300)::

    DIR/dev/<subject>_dev.csv      examples, five of each subject in the release
    DIR/test/<subject>_test.csv    questions

A row is question, four choices, answer: A to D without a header as in the release, or 0 to 3 under
the header `question,choice0,choice1,choice2,choice3,answer`.
"""

import csv
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alphaquant.errors import DataError
from alphaquant.evaluators.harness import HarnessEvaluator
from alphaquant.evaluators.harness_tasks import (
    HarnessRequest,
    check_task_names,
    require_harness,
)

_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
_ANSWERS = {**{str(i): i for i in range(4)}, **{letter: i for i, letter in enumerate("ABCD")}}
_READER = f"{__name__}.read_mmlu"


def is_mmlu(task: str) -> bool:
    """Whether `write_mmlu_tasks` can make a task: `mmlu`, `mmlu_stem`, `mmlu_anatomy`, ..."""
    return task == "mmlu" or task.startswith("mmlu_")


def check_tasks(names: Iterable[str], data: Path | None) -> None:
    """Refuse tasks that lm-eval does not have; those of local MMLU files are looked at later.

    Args:
        names: tasks, groups, task files or folders of these.
        data: folder of MMLU's CSV files; None is the hub.

    Raises:
        ConfigError, DataError: as `check_task_names`.
    """
    check_task_names([name for name in names if data is None or not is_mmlu(name)])


def open_harness(
    request: HarnessRequest, tokenizer: Any, bos: str, data: Path | None
) -> HarnessEvaluator:
    """The evaluator of tasks of lm-eval, with their documents.

    Args:
        request: what to ask for; its folder is made here.
        tokenizer: of transformers, the model's.
        bos: what texts start with, one of `tokens.BOS_MODES`.
        data: folder of MMLU's CSV files; None is the hub.

    Raises:
        ConfigError, DataError: as `write_mmlu_tasks` and `HarnessEvaluator`.
    """
    if data is None:
        return HarnessEvaluator(request, tokenizer, bos)
    with TemporaryDirectory(prefix="alphaquant-") as scratch:
        write_mmlu_tasks(data, [*filter(is_mmlu, request.tasks)], Path(scratch))
        return HarnessEvaluator(replace(request, folder=Path(scratch)), tokenizer, bos)


def write_mmlu_tasks(data: Path, asked: Sequence[str], folder: Path) -> None:
    """Write task files of every MMLU subject that is in a folder of CSV files.

    Args:
        data: the folder of `dev` and `test`.
        asked: names of tasks and groups that will be used; those that lm-eval's MMLU does not have
            are left for others to refuse.
        folder: where to write; must exist.

    Raises:
        ConfigError: lm-eval is not installed.
        DataError: files of subjects that were asked for are missing.
    """
    require_harness(", ".join(asked))
    found = find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations is not None
    official = Path(found.submodule_search_locations[0]) / "tasks" / "mmlu" / "default"
    manager = importlib.import_module("lm_eval.tasks").TaskManager  # optional, slow to import
    index = manager(include_path=official, include_defaults=False).task_index
    asked_subjects = {s for name in asked if name in index for s in _subjects(index, name)}
    missing = sorted(s for s in asked_subjects if not all(p.is_file() for p in _files(data, s)))
    if missing:
        tests, examples = _files(data, missing[0])
        raise DataError(
            f"{len(missing)} of {len(asked_subjects)} MMLU subjects asked are not in {data}: "
            f"{', '.join(missing[:3])}; a subject needs {tests} and {examples}; add them, or name "
            "single subjects as in mmlu_anatomy"
        )
    for name, entry in index.items():
        if entry.yaml_path is None:  # a tag; the subjects' own files carry it
            continue
        lines = [f"include: {json.dumps(str(entry.yaml_path))}"]
        if entry.cfg is not None and "dataset_name" in entry.cfg:
            subject = str(entry.cfg["dataset_name"])
            if not all(path.is_file() for path in _files(data, subject)):
                continue
            source = {"folder": str(data), "subject": subject}
            lines += [f"custom_dataset: !function {_READER}"]
            lines += [f"dataset_kwargs: {json.dumps(source)}", "dataset_path: null"]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, ""]), encoding="utf-8")


def read_mmlu(folder: str, subject: str, **metadata: Any) -> Any:
    """The rows of one subject; lm-eval calls it.

    Args:
        folder: of `dev` and `test`.
        subject: e.g. `anatomy`.
        metadata: of the task file; not used.

    Returns:
        `datasets.DatasetDict` of `test` and `dev` with the hub's columns: question, subject,
        choices, answer (0 to 3).

    Raises:
        DataError: a file cannot be read or is of another form.
    """
    datasets = importlib.import_module("datasets")  # slow to import
    parts = zip(("test", "dev"), _files(Path(folder), subject), strict=True)
    return datasets.DatasetDict(
        {part: datasets.Dataset.from_list(list(_rows(path, subject))) for part, path in parts}
    )


def _rows(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    """The questions of a file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            lines = list(csv.reader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; give a CSV file in UTF-8") from error
    start = 1 if lines[:1] == [_HEADER] else 0
    if len(lines) == start:
        raise DataError(f"{path} has no rows; a row is {','.join(_HEADER)}; add some")
    for number, line in enumerate(lines[start:], start + 1):
        if len(line) != len(_HEADER) or line[-1].strip() not in _ANSWERS:
            raise DataError(
                f"{path}, row {number} is {str(line)[:60]}; a row is {','.join(_HEADER)}, the "
                f"answer one of {', '.join(_ANSWERS)}; mend the row"
            )
        answer = _ANSWERS[line[-1].strip()]
        yield {"question": line[0], "subject": subject, "choices": line[1:5], "answer": answer}


def _files(data: Path, subject: str) -> tuple[Path, Path]:
    """Questions and examples of a subject."""
    return data / "test" / f"{subject}_test.csv", data / "dev" / f"{subject}_dev.csv"


def _subjects(index: dict[str, Any], name: str) -> Iterator[str]:
    """The subjects of a task, group or tag of lm-eval's MMLU."""
    entry = index[name]
    if entry.cfg is not None and "dataset_name" in entry.cfg:
        yield str(entry.cfg["dataset_name"])
        return
    members = entry.tags if entry.cfg is None else entry.cfg["task"]
    for member in members:
        yield from _subjects(index, member)
