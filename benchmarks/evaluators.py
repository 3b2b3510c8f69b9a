"""What evaluators cost, beside one plain forward pass over the same windows; and routing drift.

    python benchmarks/evaluators.py --out benchmarks/results/evaluators-demo.json

Each evaluator runs on the original model over the same windows, taking turns with a plain forward
pass; the ratio is the median over the turns of the quotient within one turn. Seconds are the
processor's, which other work on the machine changes little; with one thread they are those of a
quiet machine. Extra memory is the peak of resident memory during the first turn above
what was resident before it (Linux). Preparing is what comes before the first model is measured:
the original's predictions or routes.

Drift is that of the model with every matrix rounded to nearest in one format.

Prints two tables and writes JSON with provenance.
"""

import argparse
import copy
import ctypes
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from release import parse_with_out, run_facts
from torch import Tensor, nn

from alphaquant.evaluators.base import Evaluator, Score, Subject
from alphaquant.evaluators.divergence import DivergenceEvaluator
from alphaquant.evaluators.drift import RoutingDriftEvaluator
from alphaquant.evaluators.perplexity import PerplexityEvaluator
from alphaquant.evaluators.routes import keep_routes
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.evaluators.utilization import UtilizationEvaluator
from alphaquant.models.walk import batches_of
from alphaquant.reports.tables import markdown, with_error
from alphaquant.studies.inputs import load_source, read_text
from alphaquant.testing.evaluators import round_model

logger = logging.getLogger("evaluators")

BATCH_SIZE = 8

Make = Callable[[nn.Module, Tensor, Path], Evaluator]

EVALUATORS: dict[str, Make] = {
    "perplexity": lambda original, tokens, folder: PerplexityEvaluator(tokens, BATCH_SIZE),
    "divergence": lambda original, tokens, folder: DivergenceEvaluator(
        tokens, store_teacher(folder / "teacher.safetensors", original, tokens), BATCH_SIZE
    ),
    "utilization": lambda original, tokens, folder: UtilizationEvaluator(tokens, BATCH_SIZE),
    "drift": lambda original, tokens, folder: RoutingDriftEvaluator(
        tokens, keep_routes(original, tokens, BATCH_SIZE)
    ),
}
"""How each is made of the original, windows int64 [N, T] and a folder; a new one adds a row."""


@dataclass(frozen=True)
class Cost:
    """What an evaluator costs.

    Attributes:
        name: of the evaluator, or `forward` for the plain pass.
        seconds: of the processor, median over the turns.
        ratio: median over the turns of seconds to those of the plain pass in the turn.
        extra_bytes: peak resident memory above that before; None where it cannot be measured.
        prepare_seconds: of making the evaluator.
    """

    name: str
    seconds: float
    ratio: float
    extra_bytes: int | None
    prepare_seconds: float


@dataclass(frozen=True)
class Drift:
    """Scores of a model that is rounded to one format."""

    format: str
    scores: tuple[Score, ...]


def measure_costs(model: nn.Module, tokens: Tensor, n_turns: int) -> list[Cost]:
    """Costs of the plain pass and of every evaluator.

    Args:
        model: the original.
        tokens: int64 [N, T].
        n_turns: how often each runs.
    """
    runs: dict[str, Callable[[], object]] = {"forward": partial(run_forward, model, tokens)}
    prepared = {"forward": 0.0}
    subject = Subject(model)
    with tempfile.TemporaryDirectory(prefix="alphaquant-evaluators-") as folder:
        for name, make in EVALUATORS.items():
            started = time.process_time()
            evaluator = make(model, tokens, Path(folder))
            prepared[name] = time.process_time() - started
            runs[name] = partial(evaluator.evaluate, subject)
        run_forward(model, tokens[:1])  # what a first call alone has to do
        memory = {name: extra_memory(run) for name, run in runs.items()}
        turns = [{name: seconds_of(run) for name, run in runs.items()} for _ in range(n_turns)]
    return [
        Cost(
            name,
            statistics.median(turn[name] for turn in turns),
            statistics.median(turn[name] / turn["forward"] for turn in turns),
            memory[name],
            prepared[name],
        )
        for name in runs
    ]


@torch.no_grad()
def run_forward(model: nn.Module, tokens: Tensor) -> None:
    """The plain pass: logits of every batch, not kept."""
    for batch in batches_of(tokens, BATCH_SIZE):
        model(batch, use_cache=False)


def seconds_of(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def extra_memory(run: Callable[[], object]) -> int | None:
    """Peak of resident memory during a call above that before it, bytes; None outside Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed but not given back is reused
    reset.write_text("5")  # the peak becomes what is resident now
    before = _peak_bytes()
    run()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """VmHWM, "VmHWM:   123 kB"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def measure_drift(model: nn.Module, tokens: Tensor, formats: list[str]) -> list[Drift]:
    """Drift of the model in some formats, rounded to nearest; the model is not changed.

    Args:
        model: the original.
        tokens: int64 [N, T].
        formats: canonical names.
    """
    evaluator = RoutingDriftEvaluator(tokens, keep_routes(model, tokens, BATCH_SIZE))
    found = []
    for name in formats:
        scores = evaluator.evaluate(round_model(copy.deepcopy(model), name)).scores
        logger.info("%s: %s", name, ", ".join(f"{s.metric} {s.value:.6f}" for s in scores))
        found.append(Drift(name, scores))
    return found


def costs_table(rows: list[Cost]) -> str:
    """Costs as Markdown."""
    head = ["", "processor seconds", "of a forward pass", "extra memory, MB", "preparing, seconds"]
    cells = [
        [
            row.name,
            f"{row.seconds:.2f}",
            f"{row.ratio:.2f}",
            "not measured" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}",
            f"{row.prepare_seconds:.2f}",
        ]
        for row in rows
    ]
    return markdown(head, cells)


def drift_table(rows: list[Drift]) -> str:
    """Drift as Markdown."""
    head = ["format", *(f"{s.metric}, {s.unit}" for s in rows[0].scores)]
    return markdown(
        head,
        [
            [row.format, *(with_error(s.value, s.stderr or 0.0) for s in row.scores)]
            for row in rows
        ],
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--formats", nargs="+", default=["int2-g64", "int3-g64", "int4-g64"])
    args = parse_with_out(parser)
    source = load_source(args.model, "cpu", "auto")
    text = read_text(source, "demo", "heldout", args.windows, args.seq_len, 0)
    costs = measure_costs(source.map.model, text.tokens, args.turns)
    drifts = measure_drift(source.map.model, text.tokens, args.formats)
    result = {
        "costs": [asdict(row) for row in costs],
        "drift": [asdict(row) for row in drifts],
        "turns": args.turns,
        "batch_size": BATCH_SIZE,
        "model": source.facts(),
        "text": text.provenance(),
        **run_facts("cpu"),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{costs_table(costs)}\n\n{drift_table(drifts)}")


if __name__ == "__main__":
    main()
