"""Any task of the LM Evaluation Harness (lm-eval) on a model in memory: its numbers, unchanged.

lm-eval builds the prompts, runs the model through its own `HFLM` and aggregates; this file loads
the tasks once, fixes and records seeds and versions, and turns results into scores. A score is
named `<task>.<metric>`, or `<task>.<metric>,<filter>` where the filter is not lm-eval's `none`.
Groups that aggregate (`mmlu`) give scores of themselves and of their subgroups; what is below them
stands in the details. No chat template is applied. Texts start as the tokenizer starts them, as
windows of text do, unless `bos` says otherwise. Library `lm_eval` is optional and slow to
import, so it is imported inside functions. Tasks are found and loaded by `harness_tasks.py`.

Source: https://github.com/EleutherAI/lm-evaluation-harness, release 0.4.13.
"""

import copy
import hashlib
import importlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from alphaquant.errors import DataError
from alphaquant.evaluators.base import Evaluated, Metric, Score, Subject
from alphaquant.evaluators.harness_tasks import (
    HarnessRequest,
    WantedScore,
    load_tasks,
    quiet,
    wanted_scores,
)
from alphaquant.texts.tokens import check_bos, starting_tokens

SEEDS = {
    "random_seed": 0,
    "numpy_random_seed": 1234,
    "torch_random_seed": 1234,
    "fewshot_random_seed": 1234,
}
"""Seeds of every evaluation: lm-eval's own defaults."""

BOOTSTRAP_ITERS = 100_000
"""Resamples of standard errors that have no formula: lm-eval's own default."""


@dataclass(frozen=True)
class _TaskFacts:
    """What one task ran on.

    `documents` and `prompts` are sha256 over lm-eval's own hashes of each, in order; `n_tokens`
    counts the scored or generated texts, each tokenized by itself; `n_cut` is the documents whose
    prompt was longer than the model takes.
    """

    documents: str
    prompts: str
    n_tokens: int
    n_cut: int


class HarnessEvaluator:
    """Tasks of lm-eval.

    Attributes:
        request: what was asked for.
    """

    def __init__(self, request: HarnessRequest, tokenizer: Any, bos: str = "auto") -> None:
        """Load the tasks and their documents.

        Args:
            request: what to ask for.
            tokenizer: of transformers, the model's; a copy is used, because lm-eval adds padding.
            bos: what texts start with, one of `tokens.BOS_MODES`.

        Raises:
            ConfigError, DataError: as `load_tasks`.
            DataError: no tokenizer, or one that cannot start texts as asked.
        """
        self.request = request
        self._bos = bos
        self._tokenizer = _starting(tokenizer, bos)
        self._loaded = load_tasks(request)
        self._wanted = wanted_scores(self._loaded)

    @property
    def name(self) -> str:
        """What was asked for, e.g. `mmlu,arc_easy`."""
        return ",".join(self.request.tasks)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Of the groups that aggregate, then of the tasks that are in none."""
        return tuple(w.metric for w in self._wanted)

    def evaluate(self, subject: Subject) -> Evaluated:
        """Measure; the numbers that `lm_eval.simple_evaluate` gives for the same tasks.

        What that does besides, such as running git and pip to describe the machine, is left out.

        Raises:
            DataError: a task gives no number for one of its metrics.
        """
        started = time.perf_counter()
        modes = [(module, module.training) for module in subject.model.modules()]
        with quiet(), _random_state_kept():
            self._seed()
            lm = self._wrapped(subject)
            found = importlib.import_module("lm_eval").evaluate(
                lm,
                {"tasks": self._loaded.tasks, "groups": self._loaded.groups},
                limit=self.request.limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
            )
        for module, mode in modes:
            module.training = mode
        facts = {name: _facts(rows, lm) for name, rows in found["samples"].items()}
        seconds = time.perf_counter() - started
        scores = tuple(_score(w, found["results"], facts, seconds) for w in self._wanted)
        return Evaluated(scores, self._details(found, facts, lm.max_length))

    def _seed(self) -> None:
        """Seeds and shots, by the rules of `lm_eval.simple_evaluate`."""
        random.seed(SEEDS["random_seed"])
        np.random.seed(SEEDS["numpy_random_seed"])
        torch.manual_seed(SEEDS["torch_random_seed"])
        for task in self._loaded.tasks.values():
            own, asked = task.get_config("num_fewshot"), self.request.n_shots
            shots = own if asked is None or own == 0 else asked
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEEDS["fewshot_random_seed"])

    def _wrapped(self, subject: Subject) -> Any:
        """The model as lm-eval takes it."""
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
        size = self.request.batch_size
        return wrapper(
            pretrained=subject.model,
            tokenizer=self._tokenizer,
            batch_size=size,
            add_bos_token=False if self._bos == "never" else None,  # None: as the tokenizer does
        )

    def _details(
        self, found: Mapping[str, Any], facts: Mapping[str, _TaskFacts], max_length: int
    ) -> dict[str, Any]:
        """Settings of the run and one row per task."""
        rows = []
        for name, fact in facts.items():
            values = found["results"][name]
            rows.append(
                {
                    "task": name,
                    "version": found["versions"][name],
                    "n_shots": found["n-shot"][name],
                    "n_samples": found["n-samples"][name]["effective"],
                    "n_available": found["n-samples"][name]["original"],
                    "n_cut": fact.n_cut,
                    "documents": fact.documents,
                    "prompts": fact.prompts,
                    "values": {k: v for k, v in values.items() if "," in k},
                }
            )
        return {
            "lm_eval": version("lm_eval"),
            "limit": self.request.limit,
            "batch_size": self.request.batch_size,
            "max_length": max_length,
            "bootstrap_iters": BOOTSTRAP_ITERS,
            "bos": list(starting_tokens(self._tokenizer, self._bos)) or None,
            **SEEDS,
            "tasks": rows,
        }


def _starting(tokenizer: Any, bos: str) -> Any:
    """A copy of a tokenizer that starts texts as asked; lm-eval itself can only leave it out."""
    if tokenizer is None:
        raise DataError(
            "tasks of lm-eval asked, and the model has no tokenizer; copy the tokenizer's files "
            "of the original model into its directory"
        )
    check_bos(bos)
    made = copy.deepcopy(tokenizer)
    if bos == "always":
        wanted = starting_tokens(made, bos)
        if starting_tokens(made, "auto") != wanted:
            made.add_bos_token = True
        if starting_tokens(made, "auto") != wanted:
            raise DataError(
                f"--bos always asked, and a {type(tokenizer).__name__} cannot be told to start "
                "texts so for lm-eval; give --bos auto, or leave out the tasks of lm-eval"
            )
    return made


def _score(
    wanted: WantedScore,
    results: Mapping[str, Any],
    facts: Mapping[str, _TaskFacts],
    seconds: float,
) -> Score:
    """One score from lm-eval's results."""
    row, leaves = results[wanted.task], [facts[name] for name in wanted.leaves]
    value = row.get(f"{wanted.name},{wanted.filter}")
    if not isinstance(value, int | float | np.number):
        raise DataError(
            f"lm-eval gives {value!r} for {wanted.metric.name}; a score is a number; evaluate "
            "this task with lm-eval itself"
        )
    stderr = row.get(f"{wanted.name}_stderr,{wanted.filter}")
    n_samples = int(row["sample_len"])
    without = math.nan if n_samples == 1 else None
    digests = [fact.documents for fact in leaves]
    return Score(
        metric=wanted.metric.name,
        value=float(value),
        unit=wanted.metric.unit,
        direction=wanted.metric.direction,
        stderr=float(stderr) if isinstance(stderr, int | float | np.number) else without,
        n_samples=n_samples,
        n_tokens=sum(fact.n_tokens for fact in leaves),
        seconds=seconds,
        data_digest=digests[0] if len(digests) == 1 else _digest(digests),
    )


def _facts(rows: Sequence[Mapping[str, Any]], lm: Any) -> _TaskFacts:
    """What lm-eval's samples of one task tell; those of further filters repeat the first's."""
    first = [row for row in rows if row["filter"] == rows[0]["filter"]]
    lengths: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(lm.tok_encode(text))
        return lengths[text]

    n_tokens = n_cut = 0
    for row in first:
        cut = False
        for arguments, responses in zip(row["arguments"], row["resps"], strict=True):
            prompt, rest = arguments[0], arguments[-1] if len(arguments) > 1 else ""
            if isinstance(rest, Mapping):  # of what is generated
                n_tokens += sum(length(text) for text in responses)
                room = lm.max_length - rest.get("max_gen_toks", lm.max_gen_toks)
                cut |= length(prompt) > room
            elif len(arguments) == 1:  # a whole document, read in windows
                n_tokens += length(prompt)
            else:
                n_tokens += length(rest)
                cut |= length(prompt) + length(rest) > lm.max_length + 1
        n_cut += cut
    documents = _digest([row["doc_hash"] for row in first])
    prompts = _digest([row["prompt_hash"] + row["target_hash"] for row in first])
    return _TaskFacts(documents, prompts, n_tokens, n_cut)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """lm-eval seeds every generator of the process; put them back."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
