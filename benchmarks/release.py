"""What the search is worth: packed checkpoints of `best.json` beside uniform formats.

For each budget it runs `aq-search`'s own function, writes the packed checkpoint of `best.json`,
loads it and measures it on held-out text; beside it every uniform format next to a budget,
quantized with RTN, with plain GPTQ and with the default (GPTQ and refinement) by one pipeline.
Bits are checked against the bytes in the files.

    python benchmarks/release.py --out benchmarks/results/release-demo.json
    python benchmarks/release.py --model DIR --budgets 3.5 --trials 20 --out result.json

Prints two tables and writes JSON with provenance.
"""

import argparse
import json
import logging
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkout import commit

from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import open_teacher, store_teacher
from alphaquant.provenance import device_facts, versions
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.config import load_config, resolve
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.menus import DEFAULT_MENU, REFERENCE_FORMATS
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.texts import TextSpec
from alphaquant.studies.inputs import find_device, load_source, read_text

logger = logging.getLogger("release")

METHODS = {
    "rtn": QuantSettings(method="rtn"),
    "gptq": QuantSettings(refine_sweeps=0, n_starts=1),
    "gptq + refinement": QuantSettings(),
}


@dataclass(frozen=True)
class Row:
    """One packed checkpoint on held-out text."""

    name: str
    method: str
    bits_claimed: float
    bytes_claimed: int
    bytes_in_files: int
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float
    seconds: float


BOOKS = TextSpec(
    **{"calibration": "demo", "evaluation": "demo", "heldout": "demo"},
    **{"calibration_samples": 128, "evaluation_samples": 48, "heldout_samples": 64},
)
"""The texts of all benchmarks: one domain, so that figures of different releases compare."""


class Bench:
    """One model, one held-out text, many checkpoints."""

    def __init__(self, model: str, cache: Path | None) -> None:
        """Load the model and its texts, and store the original's predictions."""
        data = BOOKS
        self.model, self.cache = model, cache
        self.source = load_source(model, find_device("auto"), "auto")
        self.calibration = read_text(
            self.source, data.calibration, "calibration", data.calibration_samples, None, 0
        )
        self.heldout = read_text(
            self.source, data.heldout, "heldout", data.heldout_samples, None, 0
        )
        self.scratch = Path(tempfile.mkdtemp(prefix="alphaquant-release-"))
        path = self.scratch / "teacher.safetensors"
        store_teacher(path, self.source.map.model, self.heldout.tokens)
        self.teacher = open_teacher(path)

    def uniform(self, format_name: str, method: str) -> Row:
        """Quantize everything to one format."""
        assignment = uniform_assignment(self.source.map.inventory, format_name)
        target = self.scratch / f"{format_name}-{method.replace(' ', '')}"
        result = quantize_to_checkpoint(
            PackingJob(self.source.map, assignment, METHODS[method], self.calibration.tokens),
            target,
            facts={},
        )
        return self._measure(f"uniform {format_name}", method, target, assignment, result.seconds)

    def best(self, budget: str, trials: int) -> tuple[Row, dict[str, Any]]:
        """Search, quantize `best.json`, measure the checkpoint."""
        out = self.scratch / f"search-{budget}"
        spec = SearchSpec.of(
            model=self.model, budget=budget, trials=trials, texts=BOOKS, out=out, cache=self.cache
        )
        started = time.perf_counter()
        found = search(spec)
        seconds = time.perf_counter() - started
        target = self.scratch / f"best-{budget}"
        config = out / "best.json"
        quantize(QuantizeSpec(model=self.model, config=config, out=target))
        plan = resolve(load_config(config), self.source.map.inventory)
        row = self._measure(
            f"best.json {budget}", "gptq + refinement", target, plan.assignment, seconds
        )
        facts = {
            "budget": budget,
            "winner": found.gate.winner,
            "seconds_per_stage": found.seconds,
            "n_measured": found.n_measured,
        }
        return row, facts

    def _measure(
        self, name: str, method: str, target: Path, assignment: Assignment, seconds: float
    ) -> Row:
        inventory = self.source.map.inventory
        counts = assignment.count_bits(inventory)
        model = load(target)
        scores = {
            s.metric: s
            for s in measure_divergence(model, self.heldout.tokens, self.teacher).scores(
                self.heldout.digest
            )
        }
        return Row(
            name,
            method,
            counts.bits_per_weight,
            counts.quantized_bytes,
            quantized_bytes(target),
            scores["kl"].value,
            scores["kl"].stderr or 0.0,
            scores["same_top"].value,
            scores["perplexity"].value,
            seconds,
        )


def neighbours(bench: Bench, budgets: list[str]) -> list[str]:
    """Uniform formats next to the budgets, below and above, and the references of 4.25 bits."""
    inventory = bench.source.map.inventory
    bits = {
        n: inventory.storage_bits(parse_format(n)) / inventory.n_weights
        for n in {*DEFAULT_MENU, *REFERENCE_FORMATS, "int3-g128-asym"}
    }
    ordered = sorted(bits, key=lambda n: (bits[n], n))
    chosen = set(REFERENCE_FORMATS)
    for budget in budgets:
        limit = float(budget.removesuffix("bits"))
        chosen |= set([n for n in ordered if bits[n] <= limit][-1:])
        chosen |= set([n for n in ordered if bits[n] > limit][:1])
    return sorted(chosen, key=lambda n: (bits[n], n))


def run_facts(device: str) -> dict[str, Any]:
    """Versions, commit and machine of a run, for the file of its numbers."""
    return {"versions": versions(), "commit": commit(), **device_facts(device)}


def parse_with_out(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with `--out`, make its folder, and log progress to stderr."""
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("alphaquant").setLevel(logging.WARNING)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = "| | method | bits/weight | bytes in files / claimed | KL | same top | perplexity |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for r in rows:
        ratio = r.bytes_in_files / r.bytes_claimed
        lines.append(
            f"| {r.name} | {r.method} | {r.bits_claimed:.4f} | {ratio:.6f} "
            f"| {r.kl:.6f} +- {r.kl_stderr:.6f} | {100 * r.same_top:.2f} % | {r.perplexity:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--budgets", nargs="+", default=["2.5bits", "3.0bits", "3.5bits", "4.25bits"]
    )
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    bench = Bench(args.model, args.cache)
    rows, searches = [], []
    for budget in args.budgets:
        row, facts = bench.best(budget, args.trials)
        logger.info("%s: KL %.6f", row.name, row.kl)
        rows.append(row)
        searches.append(facts)
    for name in neighbours(bench, args.budgets):
        rows += [bench.uniform(name, method) for method in METHODS]
    result = {
        "rows": [asdict(r) for r in rows],
        "searches": searches,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model": bench.source.facts(),
        "heldout": bench.heldout.provenance(),
        "calibration": bench.calibration.provenance(),
        **run_facts(find_device("auto")),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    stages = sorted({s for f in searches for s in f["seconds_per_stage"]})
    print("\n| stage | " + " | ".join(f["budget"] for f in searches) + " |")
    print("|---" * (1 + len(searches)) + "|")
    for stage in stages:
        cells = [f"{f['seconds_per_stage'].get(stage, 0.0):.1f}" for f in searches]
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
