"""MMLU from local files: accuracy, run time, and the same numbers as lm-eval called directly.

Some subjects in full, by our evaluator and by `lm_eval.simple_evaluate` on the same model and
files, with and without examples before the question; then all 57 subjects.

    python benchmarks/mmlu.py DATA --out benchmarks/results/mmlu-demo.json
    python benchmarks/mmlu.py DATA --subjects anatomy --limits 5 5 --table-limits 1 1 --out FILE

DATA is the folder of `dev` and `test` (see `alphaquant.evaluators.local_tasks`). `--limits` bounds
the documents of each subject in the first part, `--table-limits` in the second: one number per
entry of `--shots`, 0 is all. Prints tables in Markdown and writes JSON with provenance.
"""

import argparse
import importlib
import json
import logging
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from release import commit, parse_with_out

from alphaquant.evaluators.base import Score, Subject
from alphaquant.evaluators.harness import HarnessEvaluator
from alphaquant.evaluators.harness_tasks import HarnessRequest
from alphaquant.evaluators.local_tasks import write_mmlu_tasks
from alphaquant.models.loading import load_model, load_tokenizer
from alphaquant.provenance import device_facts, versions
from alphaquant.reports.tables import markdown, with_error
from alphaquant.studies.inputs import find_device, model_location

logger = logging.getLogger("mmlu")

SUBJECTS = ("abstract_algebra", "anatomy", "astronomy", "business_ethics", "college_chemistry")
SCORE = "acc,none"


@dataclass(frozen=True)
class Case:
    """Some tasks with one number of shots.

    Attributes:
        tasks: of lm-eval.
        n_shots: examples before each question.
        limit: documents of each subject; None is all.
    """

    tasks: tuple[str, ...]
    n_shots: int
    limit: int | None


@dataclass(frozen=True)
class Row:
    """What a case gave.

    Attributes:
        case: what was run.
        scores: ours.
        details: of the evaluator.
        seconds: of the evaluation, documents already read.
        load_seconds: of reading task files and documents.
        direct: lm-eval's own results, by task; None where they were not asked for.
        direct_seconds: of its call; None likewise.
    """

    case: Case
    scores: tuple[Score, ...]
    details: Mapping[str, Any]
    seconds: float
    load_seconds: float
    direct: Mapping[str, Any] | None = None
    direct_seconds: float | None = None

    @property
    def largest_difference(self) -> float | None:
        """Between our values and standard errors and lm-eval's own; over all tasks and groups."""
        if self.direct is None:
            return None
        differences: list[float] = [
            abs(ours - self.direct[task][key])
            for task, values in self.values().items()
            for key, ours in values.items()
            if isinstance(ours, float)  # one document has no standard error
        ]
        return max(differences)

    def values(self) -> dict[str, dict[str, float]]:
        """Our values by task and lm-eval's key."""
        found = {row["task"]: dict(row["values"]) for row in self.details["tasks"]}
        for score in self.scores:
            values = {SCORE: score.value, "acc_stderr,none": score.stderr}
            found.setdefault(score.metric.removesuffix(".acc"), values)
        return found


class Bench:
    """One model, one folder of data."""

    def __init__(self, model: str, data: Path, batch_size: int) -> None:
        """Load the model."""
        self.location, self.data, self.batch_size = model_location(model), data, batch_size
        self.model = load_model(self.location, find_device("auto"))

    def run(self, case: Case, *, direct: bool) -> Row:
        """Measure one case; `direct` also by lm-eval alone."""
        with tempfile.TemporaryDirectory(prefix="alphaquant-mmlu-") as scratch:
            folder, started = Path(scratch), time.perf_counter()
            write_mmlu_tasks(self.data, case.tasks, folder)
            request = HarnessRequest(case.tasks, folder, case.n_shots, case.limit, self.batch_size)
            evaluator = HarnessEvaluator(request, load_tokenizer(self.location))
            loaded = time.perf_counter()
            found = evaluator.evaluate(Subject(self.model))
            seconds = time.perf_counter() - loaded
            row = (case, found.scores, found.details, seconds, loaded - started)
            if not direct:
                return Row(*row)
            started = time.perf_counter()
            results = self._directly(case, folder)
            return Row(*row, results, time.perf_counter() - started)

    def _directly(self, case: Case, folder: Path) -> Mapping[str, Any]:
        """Results of lm-eval without us, apart from the task files."""
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
        manager = importlib.import_module("lm_eval.tasks").TaskManager
        tokenizer = load_tokenizer(self.location)
        found: Mapping[str, Any] = importlib.import_module("lm_eval").simple_evaluate(
            wrapper(pretrained=self.model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=[*case.tasks],
            num_fewshot=case.n_shots,
            limit=case.limit,
            task_manager=manager(include_path=folder, include_defaults=False),
        )["results"]
        return found


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ["tasks", "shots", "documents", "cut", "accuracy", "lm-eval directly", "difference"]
    lines = []
    for row in rows:
        tasks = row.details["tasks"]
        for score in row.scores:
            name = score.metric.removesuffix(".acc")
            direct = "" if row.direct is None else repr(row.direct[name][SCORE])
            difference = row.largest_difference
            # Not of inner groups: details do not say which subjects are theirs.
            cut = [t["n_cut"] for t in tasks if name in ("mmlu", t["task"])]
            lines.append(
                [
                    name,
                    str(row.case.n_shots),
                    str(score.n_samples),
                    "" if not cut else str(sum(cut)),
                    with_error(score.value, score.stderr or 0.0),
                    direct,
                    "" if difference is None else f"{difference:g}",
                ]
            )
    return markdown(head, lines)


def times(rows: list[Row]) -> str:
    """Seconds as Markdown."""
    head = ["tasks", "shots", "documents", "load s", "evaluate s", "lm-eval directly s"]
    lines = [
        [
            f"{len(row.details['tasks'])} subjects",
            str(row.case.n_shots),
            str(sum(t["n_samples"] for t in row.details["tasks"])),
            f"{row.load_seconds:.1f}",
            f"{row.seconds:.1f}",
            "" if row.direct_seconds is None else f"{row.direct_seconds:.1f}",
        ]
        for row in rows
    ]
    return markdown(head, lines)


def write(args: argparse.Namespace, rows: list[Row], facts: Mapping[str, Any]) -> None:
    """Write what there is so far."""
    result = {
        "rows": [
            asdict(r) | {"largest_difference": r.largest_difference, "values": r.values()}
            for r in rows
        ],
        "model": args.model,
        **facts,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--subjects", nargs="*", default=SUBJECTS, help="Compared with lm-eval.")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument("--limits", type=int, nargs="+", default=[0, 20])
    parser.add_argument("--table-limits", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch-size", type=int, default=8)
    args = parse_with_out(parser)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    hidden = {str(args.out): "FILE", str(args.data): "DATA"}
    words = [hidden.get(word, word) for word in sys.argv[1:]]
    facts = {
        "command": shlex.join(["python", "benchmarks/mmlu.py", *words]),
        "versions": versions() | {"lm_eval": version("lm_eval")},
        "commit": commit(),
        **device_facts(find_device("auto")),
    }
    bench = Bench(args.model, args.data, args.batch_size)
    compared = tuple(f"mmlu_{subject}" for subject in args.subjects)
    parts = ((compared, args.limits, True), (("mmlu",), args.table_limits, False))
    cases = [
        (Case(tasks, n_shots, limit or None), direct)
        for tasks, limits, direct in parts
        for n_shots, limit in zip(args.shots, limits, strict=True)
        if tasks
    ]
    rows: list[Row] = []
    for case, direct in cases:
        rows.append(bench.run(case, direct=direct))
        logger.info("%s shots: %.1f s", case.n_shots, rows[-1].seconds)
        write(args, rows, facts)
    print(f"{table(rows)}\n\n{times(rows)}")


if __name__ == "__main__":
    main()
