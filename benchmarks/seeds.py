"""The spread of a search's result over seeds: other calibration windows, labels and trials.

    python benchmarks/seeds.py --budget 3.0bits --seeds 10 --out benchmarks/results/seeds-demo.json

Every seed is a whole `aq-search` with windows of its own, so Hessians, bank, costs and trials all
differ; the held-out windows are those of seed 0 throughout, so that results can be compared.
Prints a table and the spread, and writes JSON with provenance.
"""

import argparse
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from release import BOOKS, parse_with_out, run_facts

from alphaquant.commands.search import search
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.progress import StageClock, no_progress
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.flat import replaced
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import bank_formats, open_filled_bank
from alphaquant.studies.inputs import find_device, load_source, read_text
from alphaquant.studies.objective import EvaluationSet, Objective
from alphaquant.studies.stages import load_inputs

logger = logging.getLogger("seeds")


def run_seed(spec: SearchSpec, heldout: EvaluationSet) -> dict[str, Any]:
    """One search, and its winner beside uniform formats of the same bank on common text."""
    started = time.process_time()
    found = search(spec)
    seconds = time.process_time() - started
    clock = StageClock(no_progress)
    asked = spec.checkpoint
    source = load_source(asked.model, find_device(asked.device), asked.dtype)
    inputs = load_inputs(spec, source)
    bank = open_filled_bank(spec, inputs, bank_formats(found.space), clock)
    objective = Objective(Swapper(source.map, bank.layer))
    best = objective.measure(found.published, heldout).score("kl")
    names = {row.rival.name for row in found.gate.points if row.rival is not None}
    uniform = {
        name: objective.measure(uniform_assignment(source.map.inventory, name), heldout)
        .score("kl")
        .value
        for name in sorted(names)
        if found.gate.row(name).is_within_budget
    }
    return {
        "seed": spec.proposals.seed,
        "bits_per_weight": found.counts.bits_per_weight,
        "kl": best.value,
        "kl_stderr": best.stderr,
        "own_heldout_kl": found.gate.best.kl,
        "winner": found.gate.winner,
        "n_published": sum(row.is_published for row in found.gate.rows),
        "n_withheld": len(found.gate.withheld),
        "uniform": uniform,
        "cpu_seconds": seconds,
    }


def common_heldout(spec: SearchSpec, folder: Path) -> EvaluationSet:
    """Held-out windows of seed 0 with the original's predictions."""
    asked = spec.checkpoint
    source = load_source(asked.model, find_device(asked.device), asked.dtype)
    texts = spec.texts
    tokens = read_text(source, texts.heldout, "heldout", texts.heldout_samples, None, 0)
    path = folder / "heldout.safetensors"
    return EvaluationSet(tokens, store_teacher(path, source.map.model, tokens.tokens))


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean, standard deviation and range of the KL, and the worst ratio to uniform."""
    kl = [row["kl"] for row in rows]
    ratios = [row["kl"] / min(row["uniform"].values()) for row in rows if row["uniform"]]
    return {
        "mean": statistics.fmean(kl),
        "standard_deviation": statistics.stdev(kl) if len(kl) > 1 else 0.0,
        "least": min(kl),
        "most": max(kl),
        "worst_ratio_to_uniform": max(ratios, default=float("nan")),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| seed | bits/weight | KL | best uniform | its KL | withheld |", "|---" * 6 + "|"]
    for r in rows:
        name = min(r["uniform"], key=r["uniform"].__getitem__, default="none")
        lines.append(
            f"| {r['seed']} | {r['bits_per_weight']:.4f} | {r['kl']:.6f} +- {r['kl_stderr']:.6f} "
            f"| {name} | {r['uniform'].get(name, float('nan')):.6f} | {r['n_withheld']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="3.0bits")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--trials", type=int, default=48)
    args = parse_with_out(parser)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="alphaquant-seeds-") as name:
        folder = Path(name)
        spec = SearchSpec.of(model=args.model, budget=args.budget, trials=args.trials, texts=BOOKS)
        heldout = common_heldout(spec, folder)
        for seed in range(args.first, args.first + args.seeds):
            one = folder / str(seed)
            spec = replaced(spec, seed=seed, out=one / "out", cache=one / "cache")
            rows.append(run_seed(spec, heldout))
            shutil.rmtree(one)
            logger.info("%s", table(rows[-1:]).splitlines()[-1])
            result = {
                "rows": rows,
                "summary": summary(rows),
                "settings": {"budget": args.budget, "trials": args.trials, "model": args.model},
                "heldout": heldout.tokens.provenance(),
                **run_facts(find_device("auto")),
            }
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
