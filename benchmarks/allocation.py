"""The allocation measured: every allocator, every stage and the peers at equal bytes.

One model, one evaluator, one held-out text. All allocators choose from one bank; the peers bring
their own quantized weights. For each budget:

    allocators   each published and plain one over the bank; evolution with `--evaluations`
    stages       the best assignment of a search after each of its stages
    ours         `best.json` of the search, quantized anew to a packed checkpoint and loaded again;
                 its bytes are those of the file
    peers        AutoScheme with RTN and with AutoRound's 200 iterations, ModelOpt auto_quantize;
                 AutoScheme's formats also with our bank, to tell allocation from quantizer

    python benchmarks/allocation.py --peer-python PYTHON --out FILE
    python benchmarks/allocation.py --model DIR --seq-len 256 --out FILE

Prints tables and writes JSON with provenance.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation_peers import (
    ALLOCATION_NOTES,
    AUTO_SCHEME,
    MODELOPT,
    PeerChoice,
    auto_scheme_options,
    choose,
    modelopt_options,
)
from release import BOOKS, parse_with_out, run_facts
from safetensors.torch import load_file, save_file

from alphaquant import demo
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import search
from alphaquant.costs.gradients import trace_layers
from alphaquant.costs.labels import SampledLabels
from alphaquant.evaluators.divergence import Divergence, measure_divergence
from alphaquant.models.walk import batches_of
from alphaquant.progress import StageClock, no_progress
from alphaquant.quant.swap import Swapper
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.search.allocators import ALLOCATORS, available
from alphaquant.search.evolution import EvolutionSettings, evolve
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import make_space
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.costing import open_filled_bank
from alphaquant.studies.inputs import find_device, load_source
from alphaquant.studies.objective import Objective, SearchObjective
from alphaquant.studies.preparing import Prepared, prepare
from alphaquant.studies.result import SearchResult, stage_gains
from alphaquant.studies.stages import load_inputs
from alphaquant.studies.trials import Proposer
from alphaquant.studies.truth import ChoiceTruth

logger = logging.getLogger("allocation")

PARTS = ("allocators", "search", "evolution", "peers")
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.25)
PEERS = {
    "AutoScheme + RTN": (AUTO_SCHEME, 0),
    "AutoScheme + AutoRound, 200 iterations": (AUTO_SCHEME, 200),
    "ModelOpt auto_quantize": (MODELOPT, 0),
}

PEER_FORMATS = ("int2-g128", "int2-g64", "int3-g128", "int4-g128", "int8-g128")
"""What AutoScheme chooses from."""


@dataclass(frozen=True)
class Row:
    """One assignment on held-out text.

    Attributes:
        group: `uniform`, `allocator`, `stage`, `ours` or `peer`.
        name: which.
        budget: bits per weight asked for.
        bits_per_weight: stored.
        checkpoint_bytes: of all tensors; of the file for `ours`.
        kl: nats per token, with its standard error over windows.
        kl_stderr: see `kl`.
        same_top: share of positions.
        perplexity: token perplexity.
        cpu_seconds: processor time of choosing, where it is known.
        n_passes: true evaluations that choosing took, in passes over the evaluation text.
    """

    group: str
    name: str
    budget: float
    bits_per_weight: float
    checkpoint_bytes: int
    kl: float
    kl_stderr: float
    same_top: float
    perplexity: float
    cpu_seconds: float | None = None
    n_passes: float = 0.0


class Bench:
    """One model with its bank, costs and texts, and the rows measured so far."""

    def __init__(self, spec: SearchSpec, out: Path) -> None:
        """Quantize and measure everything that allocators choose by."""
        self.spec, self._out = spec, out
        started = time.process_time()
        self.clock = StageClock(no_progress)
        self.clock("load", 0, 1)
        asked, limits = spec.checkpoint, spec.limits
        source = load_source(asked.model, find_device(asked.device), asked.dtype)
        profile, budget = find_profile(limits.profile), parse_budget(limits.budget)
        menu = menu_of(limits.formats, profile)
        space = make_space(source.map.inventory, profile, menu, budget)
        inputs, everything = load_inputs(spec, source), replaced(spec, allocators="all")
        self.prepared: Prepared = prepare(everything, inputs, space, self.clock)
        self.clock.stop()
        self.prepare_cpu_seconds = time.process_time() - started
        # Formats of the peers, before anything is swapped in.
        open_filled_bank(spec, self.prepared.inputs, PEER_FORMATS, self.clock)
        self.objective = Objective(Swapper(source.map, self.prepared.bank.layer))
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}
        self._known: dict[str, Divergence] = {}

    @property
    def proposer(self) -> Proposer:
        """Rules to assignments."""
        return Proposer(self.prepared.space, self.prepared.problem, self.spec.proposals.seed)

    def limit(self, budget: float) -> int:
        """Total bits of a budget in bits per weight."""
        return self.prepared.problem.limit_bits(budget)

    def add(
        self, group: str, name: str, budget: float, assignment: Assignment, **more: Any
    ) -> Row:
        """Measure an assignment of the bank on held-out text."""
        heldout = self.prepared.teachers.heldout
        if assignment.digest not in self._known:
            self._known[assignment.digest] = self.objective.divergence(assignment, heldout)
        counts = assignment.count_bits(self.prepared.space.inventory)
        sizes = (counts.bits_per_weight, counts.checkpoint_bytes)
        return self.keep(group, name, budget, sizes, self._known[assignment.digest], **more)

    def keep(
        self,
        group: str,
        name: str,
        budget: float,
        sizes: tuple[float, int],
        found: Divergence,
        **more: Any,
    ) -> Row:
        """Remember a measurement and write all of them down."""
        digest = self.prepared.teachers.heldout.tokens.digest
        scores = {s.metric: s for s in found.scores(digest)}
        row = Row(
            group,
            name,
            budget,
            *sizes,
            scores["kl"].value,
            scores["kl"].stderr or 0.0,
            scores["same_top"].value,
            scores["perplexity"].value,
            **more,
        )
        self.rows.append(row)
        logger.info("%s %s at %.2f: KL %.6f", group, name, budget, row.kl)
        self.write()
        return row

    def write(self) -> None:
        """The result file, complete up to here."""
        inputs = self.prepared.inputs
        result = {
            "rows": [asdict(r) for r in self.rows],
            "facts": self.facts,
            "seconds_per_stage": dict(self.clock.seconds),
            "prepare_cpu_seconds": self.prepare_cpu_seconds,
            "menu": list(self.prepared.space.menu),
            "n_units": len(self.prepared.space.units),
            "peer_notes": ALLOCATION_NOTES,
            "settings": self.spec.facts(),
            **inputs.source.facts(),
            "data": inputs.text_facts(),
            **run_facts(find_device("auto")),
        }
        self._out.write_text(json.dumps(result, indent=1) + "\n")


def run_uniform(bench: Bench) -> None:
    """Every uniform format of the menu, at its own size."""
    inventory = bench.prepared.space.inventory
    for name in bench.prepared.space.menu:
        assignment = uniform_assignment(inventory, name)
        bits = assignment.count_bits(inventory).bits_per_weight
        bench.add("uniform", name, bits, assignment)


def run_allocators(bench: Bench, budget: float) -> None:
    """Every allocator of the table at one budget."""
    problem = bench.prepared.problem
    for name in available(problem):
        started = time.process_time()
        choice = (
            ALLOCATORS[name]
            .allocate(problem, bench.limit(budget), bench.spec.proposals.seed)
            .choice
        )
        seconds = time.process_time() - started
        assignment = bench.proposer.spread(choice)
        bench.add("allocator", name, budget, assignment, cpu_seconds=seconds)


def run_evolution(bench: Bench, budget: float, n_evaluations: int) -> None:
    """The search of EvoPress with its own evaluations on the evaluation text."""
    prepared = bench.prepared
    objective = SearchObjective(
        bench.objective.swapper,
        prepared.teachers.evaluation,
        prepared.log_of(prepared.teachers.evaluation),
    )
    truth = ChoiceTruth(objective, bench.proposer.spread)
    n = truth.n_windows
    started = time.process_time()
    found = evolve(
        prepared.problem,
        bench.limit(budget),
        bench.spec.proposals.seed,
        lambda choice, n_windows: float(truth.measure(choice, n_windows).mean()),
        n_evaluations,
        EvolutionSettings(windows=(max(1, n // 8), max(1, n // 2), n)),
    )
    bench.add(
        "allocator",
        "evolution",
        budget,
        bench.proposer.spread(found.choice),
        cpu_seconds=time.process_time() - started,
        n_passes=found.n_evaluations,
    )


def run_search(bench: Bench, budget: float, folder: Path) -> None:
    """A search at one budget: the best after each stage, and the checkpoint of `best.json`."""
    spec = replaced(bench.spec, budget=f"{budget}bits", out=folder / f"search-{budget}")
    started = time.process_time()
    found = search(spec)
    seconds = time.process_time() - started
    for name, assignment in best_of_stages(found):
        bench.add("stage", name, budget, assignment)
    target = folder / f"best-{budget}"
    config = spec.run.out / "best.json"
    quantize(QuantizeSpec(model=spec.checkpoint.model, config=config, out=target))
    heldout = bench.prepared.teachers.heldout
    measured = measure_divergence(load(target), heldout.tokens.tokens, heldout.teacher)
    n_bytes = quantized_bytes(target)
    assert n_bytes == found.counts.quantized_bytes, "the file has the bytes that were counted"
    sizes = (found.counts.bits_per_weight, n_bytes + bench.prepared.space.inventory.kept_bytes)
    more = {"cpu_seconds": seconds, "n_passes": found.n_passes}
    bench.keep("ours", "aq-search", budget, sizes, measured, **more)
    bench.facts[f"search {budget}"] = {
        "winner": found.gate.winner,
        "stages": [asdict(gain) for gain in stage_gains(found.rows, found.limit)],
        "probe": None if found.probe is None else asdict(found.probe),
        "n_trials": len(found.rows),
        "stopped": found.stopped,
        "n_measured": found.n_measured,
        "n_passes": found.n_passes,
        "largest_gap": max((r.gap or 0.0) for r in found.rows),
        "seconds_per_stage": dict(found.seconds),
        "withheld": len(found.gate.withheld),
    }


def best_of_stages(found: SearchResult) -> Iterator[tuple[str, Assignment]]:
    """The best assignment within the budget after each stage of a search, as the search saw it."""
    for gain in stage_gains(found.rows, found.limit):
        if gain.kl is not None:
            row = next(r for r in found.rows if not r.is_pruned and r.kl == gain.kl)
            yield gain.stage, found.folder.load_assignment(row.digest)


def run_costs(bench: Bench, budget: float) -> None:
    """Every measured cost over all units, by the exact solver alone."""
    for name, cost in bench.prepared.problem.costs.items():
        proposal = bench.proposer.at(cost, bench.limit(budget), name)
        bench.add("cost", f"{name}, all units", budget, proposal.assignment)


def run_peers(bench: Bench, budget: float, python: str, folder: Path, cache: Path) -> None:
    """The peers at one budget."""
    inputs = bench.prepared.inputs
    tokens = folder / "tokens.safetensors"
    save_file({"tokens": inputs.calibration.tokens}, tokens)
    asked = bench.spec.checkpoint.model
    location = demo.model_path() if asked == "demo" else asked
    for name, (peer, iters) in PEERS.items():
        options = modelopt_options() if peer == MODELOPT else auto_scheme_options(budget, iters)
        made = choose(python, peer, Path(location), tokens, budget, options, cache)
        run_peer_weights(bench, name, budget, made)
        if name == "AutoScheme + RTN":
            bench.add("peer", "AutoScheme, our quantizer", budget, made.assignment)


def run_peer_weights(bench: Bench, name: str, budget: float, made: PeerChoice) -> None:
    """Put a peer's dequantized weights into the model and measure it."""
    source, heldout = bench.prepared.inputs.source, bench.prepared.teachers.heldout
    weights = load_file(made.weights)
    with torch.no_grad():
        for matrix in source.map.inventory.matrices:
            source.map.view(matrix.name).copy_(weights[matrix.name])
    # The weights are no longer those of the last assignment.
    bench.objective = Objective(Swapper(source.map, bench.prepared.bank.layer))
    found = measure_divergence(source.map.model, heldout.tokens.tokens, heldout.teacher)
    counts = made.assignment.count_bits(source.map.inventory)
    sizes = (made.bits_per_weight, counts.checkpoint_bytes)
    bench.keep("peer", name, budget, sizes, found, cpu_seconds=made.cpu_seconds)
    bench.facts[f"{name} {budget}"] = {
        "search_seconds": made.search_seconds,
        "quantize_seconds": made.quantize_seconds,
        "cpu_seconds": made.cpu_seconds,
        "versions": dict(made.versions),
        "notes": dict(made.notes),
    }


def forward_backward_seconds(spec: SearchSpec) -> float:
    """Processor seconds of one forward and backward pass over the calibration windows."""
    asked = spec.checkpoint
    source = load_source(asked.model, find_device(asked.device), asked.dtype)
    tokens = load_inputs(spec, source).calibration.tokens
    started = time.process_time()
    for _ in trace_layers(
        source.map, batches_of(tokens, 8), [SampledLabels(1, spec.proposals.seed)]
    ):
        pass
    return time.process_time() - started


def table(rows: Sequence[Row]) -> str:
    """KL by name and budget, as Markdown; the groups in order of appearance."""
    budgets = sorted({r.budget for r in rows})
    head = "| | " + " | ".join(f"{b:g}" for b in budgets) + " |"
    lines = [head, "|---" * (len(budgets) + 1) + "|"]
    for group, name in dict.fromkeys((r.group, r.name) for r in rows):
        found = {r.budget: r for r in rows if (r.group, r.name) == (group, name)}
        cells = [f"{found[b].kl:.6f}" if b in found else "" for b in budgets]
        lines.append(f"| {group}: {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(rows: Sequence[Row]) -> str:
    """Ours by every peer and by the best published allocator, as Markdown."""
    budgets = sorted({r.budget for r in rows if r.group == "ours"})
    ours = {r.budget: r.kl for r in rows if r.group == "ours"}
    rivals: dict[str, dict[float, float]] = {}
    for r in rows:
        if r.group == "peer":
            rivals.setdefault(r.name, {})[r.budget] = r.kl
        if r.group == "allocator" and r.name in PUBLISHED_NAMES:
            best = rivals.setdefault("best published allocator", {})
            best[r.budget] = min(r.kl, best.get(r.budget, np.inf))
    lines = ["| aq-search / | " + " | ".join(f"{b:g}" for b in budgets) + " |"]
    lines.append("|---" * (len(budgets) + 1) + "|")
    for name, kl in rivals.items():
        cells = [f"{ours[b] / kl[b]:.3f}" if b in kl else "" for b in budgets]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PUBLISHED_NAMES = ("alpha-hill", "alphaq", "pmq", "gemq", "evolution", "utilization", "uniform")
"""Rules of other authors, and what they are compared with."""


def make_spec(args: argparse.Namespace, folder: Path) -> SearchSpec:
    """The search of the first budget; the others differ in budget and folder."""
    return SearchSpec.of(
        model=args.model,
        budget=f"{args.budgets[0]}bits",
        trials=args.trials,
        texts=replace(BOOKS, heldout=args.heldout, seq_len=args.seq_len),
        out=folder / "search",
        cache=args.cache or folder / "cache",
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seq-len", type=int, help="tokens per window")
    parser.add_argument("--heldout", default="demo")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--trials", type=int, help="of a search; its own rule by default")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to run")
    parser.add_argument("--evaluations", type=int, default=60, help="of evolution")
    parser.add_argument("--peer-python", help="interpreter that has the peers")
    parser.add_argument("--peer-cache", type=Path, help="results of peers that are kept")
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory(prefix="alphaquant-allocation-") as name:
        folder = Path(name)
        spec = make_spec(args, folder)
        seconds = forward_backward_seconds(spec)
        bench = Bench(spec, args.out)
        bench.facts["forward_backward_cpu_seconds"] = seconds
        if "allocators" in args.only:
            run_uniform(bench)
        for budget in args.budgets:
            if "allocators" in args.only:
                run_allocators(bench, budget)
                run_costs(bench, budget)
            if "search" in args.only:
                run_search(bench, budget, folder)
            if "evolution" in args.only:
                run_evolution(bench, budget, args.evaluations)
            if "peers" in args.only and args.peer_python:
                kept = args.peer_cache or folder / "peers"
                run_peers(bench, budget, args.peer_python, folder, kept)
        bench.write()
        at_budgets = [r for r in bench.rows if r.group != "uniform"]
        print(table(at_budgets), ratios(at_budgets), sep="\n\n")


if __name__ == "__main__":
    main()
