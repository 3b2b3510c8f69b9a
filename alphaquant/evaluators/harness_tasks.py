"""Tasks of lm-eval: what to ask for, where they are found, and which scores they will give.

Loads tasks and their documents through lm-eval's own `TaskManager`; runs no model, that is
`harness.py`. Library `lm_eval` is optional and slow to import, so functions import it.
"""

import difflib
import importlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alphaquant.errors import AlphaQuantError, ConfigError, DataError
from alphaquant.evaluators.base import Direction, Metric

_UNITS = {
    **dict.fromkeys(("acc", "acc_norm", "acc_bytes", "exact_match", "f1"), "fraction"),
    "perplexity": "per token",
    "word_perplexity": "per word",
    "byte_perplexity": "per byte",
    "bits_per_byte": "bits/byte",
}
"""Units of lm-eval's common metrics; those of others are the tasks' own."""

_NAMED = re.compile(rb"^(?:task|group|tag): *[\"']?([\w.-]+)", re.MULTILINE)
"""Where a task file says what it is called."""

_NO_TASK_FILES = (".py", ".pyc", ".md", ".json", ".jsonl", ".txt")
"""Suffixes of what else lies beside task files."""


@dataclass(frozen=True)
class HarnessRequest:
    """What to ask lm-eval for.

    Attributes:
        tasks: names of tasks, groups or tags, task files (`.yaml`), or folders of these, which
            stand for every task in them.
        folder: task files whose tasks win over lm-eval's of the same names; must need no others.
        n_shots: examples before each question; None is each task's own number. A task whose file
            says 0 keeps 0.
        limit: only the first so many documents of each task; None is all.
        batch_size: sequences per forward pass.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    n_shots: int | None = None
    limit: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class WantedScore:
    """Where a score stands in lm-eval's results."""

    metric: Metric
    task: str
    name: str
    filter: str
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of lm-eval with their documents read.

    Attributes:
        tasks: lm-eval's `Task` objects by name.
        groups: its `Group` objects by name, inner ones included.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def load_tasks(request: HarnessRequest) -> LoadedTasks:
    """Find the tasks and read their documents.

    Args:
        request: what to ask for.

    Raises:
        ConfigError: lm-eval is not installed or has no such task, or a setting is out of range.
        DataError: the documents of a task cannot be had, or are fewer than the shots asked.
    """
    require_harness(", ".join(request.tasks))
    if not request.tasks or request.batch_size < 1:
        raise ConfigError(
            f"tasks {request.tasks} in batches of {request.batch_size} asked; name a task, and "
            "use batches of 1 or more"
        )
    for name, value, least in (("shots", request.n_shots, 0), ("limit", request.limit, 1)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; use {least} or more, or leave it out")
    with quiet():
        index, names = _index(request)
        found = _load(index, names)
        _check_shots(found["tasks"], request.n_shots)
    return LoadedTasks(found["tasks"], found["groups"])


def require_harness(asked: str) -> None:
    """Check that lm-eval is installed.

    Args:
        asked: the tasks that need it, for the message.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            f"{asked} asked, which only lm-eval can know, and lm-eval is not installed; install "
            'it with pip install "aq-search[tasks]", or ask for tasks of this program alone'
        )


def check_task_names(tasks: Sequence[str]) -> None:
    """Refuse names that stand in no task file, without reading lm-eval's index, which takes long.

    What is left can still be no task: a word of a task's text. `load_tasks` refuses that.

    Args:
        tasks: as in `HarnessRequest`.

    Raises:
        ConfigError: lm-eval is not installed or has no such task.
    """
    names = [task for task in tasks if not Path(task).expanduser().exists()]
    if not names:
        return
    require_harness(", ".join(names))
    folders = [Path(task).expanduser() for task in tasks if task not in names]
    texts = [text for folder in (_own_folder(), *folders) for text in _task_texts(folder)]
    for name in names:
        word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
        if not any(word.search(text) for text in texts):
            found = {m.decode() for text in texts for m in _NAMED.findall(text)}
            raise ConfigError(_unknown(name, sorted(found)))


def _own_folder() -> Path:
    """The folder of lm-eval's task files; the library is not imported."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "lm-eval is installed"
    return Path(spec.origin).parent / "tasks"


def _task_texts(path: Path) -> Iterator[bytes]:
    """Task files below a folder, and the templates that they include, which have any suffix."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in _NO_TASK_FILES and file.is_file():
            yield file.read_bytes()


def _index(request: HarnessRequest) -> tuple[Any, list[str]]:
    """An index that knows everything asked for, and the names and files to load from it.

    Reading all of lm-eval's 14 thousand task files takes seconds, so that is done for names that
    are nowhere else, and for groups of a user's own.
    """
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    paths = [Path(task).expanduser() for task in request.tasks]
    folders = [p for p in paths if p.is_dir()]
    files = {str(p) for p in paths if p.is_file()}
    include = [*folders, *([request.folder] if request.folder else [])]
    index = manager(include_path=include, include_defaults=False)
    known = {*index.all_tasks, *files, *map(str, folders)}
    has_groups = any(re.search(r"^group:", Path(f).read_text(), re.MULTILINE) for f in files)
    if has_groups or not all(str(p) in known for p in paths):
        index = manager(include_path=include)
        known |= set(index.all_tasks)
    names: list[str] = []
    for path in paths:
        if path in folders:
            names += manager(include_path=path, include_defaults=False).all_subtasks
        elif str(path) in known:
            names.append(str(path))
        else:
            raise ConfigError(_unknown(str(path), index.all_tasks))
    return index, names


def _unknown(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.75)
    meant = f"did you mean {', '.join(near)}?" if near else "see lm-eval ls tasks"
    return (
        f"unknown task {name!r}; possible are this program's own, {len(names)} names that "
        f"lm-eval {version('lm_eval')} knows, a task file (.yaml) and a folder of these; {meant}"
    )


def _load(manager: Any, names: list[str]) -> dict[str, Any]:
    """Tasks and groups by name, documents read."""
    try:
        loaded: dict[str, Any] = manager.load(names)
    except AlphaQuantError:  # of documents that we read
        raise
    except Exception as error:  # hub, file system, YAML, datasets and tasks each raise their own
        said = " ".join(str(error).split())[:200]
        raise DataError(
            f"lm-eval cannot load {', '.join(names)} ({type(error).__name__}: {said}); documents "
            "come from the Hugging Face hub, its cache, or local files: give a network or a "
            "filled cache, for mmlu --task-data DIR with dev/<subject>_dev.csv and "
            "test/<subject>_test.csv, or a task file of your own that names local files "
            "(docs/evaluation.md)"
        ) from error
    if not loaded["tasks"]:
        raise DataError(
            f"no tasks in {', '.join(names) or 'the folder'}; a task file ends in .yaml and has "
            "the key 'task'; give one that does"
        )
    return loaded


def _check_shots(tasks: Mapping[str, Any], n_shots: int | None) -> None:
    """Refuse more examples than there are."""
    for name, task in tasks.items():
        documents = task.fewshot_docs() if n_shots else None
        if documents is not None and n_shots is not None and len(documents) < n_shots:
            raise DataError(
                f"{n_shots} shots asked; {name} has {len(documents)} example documents; ask for "
                f"{len(documents)} or fewer"
            )


def wanted_scores(loaded: LoadedTasks) -> tuple[WantedScore, ...]:
    """The scores to report; a metric without a direction stands in the details alone."""
    found: list[WantedScore] = []
    held: set[str] = set()
    for name, group in loaded.groups.items():
        if not group.has_aggregation:
            continue
        leaves = {task.task_name: task for task in group.get_all_tasks()}
        held |= set(leaves)
        for aggregate in group.aggregate_metric_list:
            filters = aggregate.filter_list or sorted(
                {f for t in leaves.values() for f in _filters(t)}
            )
            found += _wanted_of(name, leaves, aggregate.metric, filters)
    for name, task in loaded.tasks.items():
        if name not in held:
            for metric in task.higher_is_better():
                found += _wanted_of(name, {name: task}, metric, _filters(task))
    return tuple(found)


def _wanted_of(
    name: str, leaves: Mapping[str, Any], metric: str, filters: Sequence[str]
) -> Iterator[WantedScore]:
    """The scores of one metric of a task or group."""
    better = {task.higher_is_better().get(metric) for task in leaves.values()} - {None}
    if len(better) != 1:
        return
    direction: Direction = "maximize" if better.pop() else "minimize"
    for kind in filters:
        full = f"{name}.{metric}" if kind == "none" else f"{name}.{metric},{kind}"
        unit = _UNITS.get(metric, "of the task")
        yield WantedScore(Metric(full, unit, direction), name, metric, kind, tuple(leaves))


def _filters(task: Any) -> list[str]:
    """Names of what a task does to answers before it scores them."""
    return [f["name"] for f in task.get_config("filter_list") or [{"name": "none"}]]


@contextmanager
def quiet() -> Iterator[None]:
    """Errors of lm-eval only, and its progress bars on a terminal only.

    What it warns of stands in the details, or is by design. Log lines go where they went.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        logger.setLevel(level)
