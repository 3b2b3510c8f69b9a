"""How fast and how exact the allocation is: time on many units, brute force on few.

The time is of one core and of random costs: 20 064 units of 48 layers in 12 formats, without side
constraints and with each of them. Every run of a case is on the same arrays. The exactness is over
tiny random cases, whose optimum is found by trying every choice.

    python benchmarks/solver.py
    python benchmarks/solver.py --out benchmarks/results/solver.json
    python benchmarks/solver.py --layers 2 --experts 8 --repeats 1 --tiny 20

Prints two tables in Markdown; writes JSON with provenance only where `--out` is given.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from release import run_facts

from alphaquant.errors import BudgetError
from alphaquant.reports.tables import markdown
from alphaquant.search.arrays import FloatArray
from alphaquant.search.problem import Problem, make_problem
from alphaquant.search.side.constraints import SideConstraints, solve_constrained
from alphaquant.search.solver import Solution, close_gap, solve
from alphaquant.spaces.units import Matrix, Unit
from alphaquant.testing.constrained import tiny_case

BITS = np.array(
    [2.156, 2.312, 2.625, 3.164, 3.328, 3.656, 4.172, 4.344, 4.688, 5.164, 6.125, 8.125]
)
"""Stored bits per weight of the formats."""


@dataclass(frozen=True)
class Timing:
    """One kind of allocation at one budget.

    Attributes:
        name: the side constraints.
        bits_per_weight: the budget.
        seconds: median.
        all_seconds: of every run.
        gap: certified, see `Solution`.
        cost_ratio: cost over the cost without side constraints.
    """

    name: str
    bits_per_weight: float
    seconds: float
    all_seconds: tuple[float, ...]
    gap: float
    cost_ratio: float


@dataclass(frozen=True)
class Exactness:
    """How often the optimum of tiny cases was found.

    Attributes:
        cases: number of cases.
        close_gap: cases without side constraints that `close_gap` solved exactly.
        constrained: cases that `solve_constrained` solved exactly.
        greedy: the same without the integer search.
        greedy_found: cases in which it found a choice without the integer search.
    """

    cases: int
    close_gap: int
    constrained: int
    greedy: int
    greedy_found: int


def large_problem(n_layers: int, n_experts: int) -> Problem:
    """Two attention units and two units per expert in each layer, log-normal costs, 20 % noise."""
    rng, units = np.random.default_rng(0), []
    for layer in range(n_layers):
        shapes = [(f"{layer}.attention{i}", 2048, "attention") for i in range(2)]
        for expert in range(n_experts):
            shapes += [(f"{layer}.{expert}.w13", 3072, "expert")]
            shapes += [(f"{layer}.{expert}.w2", 1536, "expert")]
        units += [
            Unit(name, (Matrix(name, rows, 2048, kind, layer),)) for name, rows, kind in shapes
        ]
    n_weights = np.array([[unit.n_weights] for unit in units])
    noise = rng.lognormal(0, 0.2, (len(units), len(BITS)))
    cost = rng.lognormal(0, 2, (len(units), 1)) * 4.0**-BITS * noise
    is_expert = np.array([unit.kind == "expert" for unit in units])
    share = np.where(is_expert, np.minimum(1, rng.lognormal(-3.5, 1, len(units))), 1.0)
    return make_problem(
        units,
        [f"format{f}" for f in range(len(BITS))],
        (n_weights * BITS).astype(np.int64),
        np.ones(cost.shape, dtype=np.bool_),
        {"fisher": cost, "error": cost},
        1e5 * share,
        n_layers,
    )


def measure_times(problem: Problem, bits_per_weight: float, repeats: int) -> list[Timing]:
    """Each kind of side constraint at one budget."""
    cost, share = problem.costs["fisher"], problem.n_tokens / 1e5
    limit_bits = problem.limit_bits(bits_per_weight)
    free, seconds = timed(lambda: solve(cost, problem.bits, problem.allowed, limit_bits), repeats)
    median = statistics.median(seconds)
    rows = [Timing("none: solve", bits_per_weight, median, seconds, free.gap, 1.0)]
    for name, constraints in kinds(problem, free, share, bits_per_weight).items():
        found, seconds = timed(
            partial(solve_constrained, problem, cost, limit_bits, constraints, share), repeats
        )
        ratio, median = found.cost / free.cost, statistics.median(seconds)
        rows.append(Timing(name, bits_per_weight, median, seconds, found.gap, ratio))
    return rows


def kinds(
    problem: Problem, free: Solution, share: FloatArray, bits_per_weight: float
) -> dict[str, SideConstraints]:
    """What is measured; limits follow from the choice without side constraints."""
    read = float(problem.bits[np.arange(len(share)), free.choice] @ share)
    minimum = bits_per_weight - 0.05
    found = {f"{q} formats per layer": SideConstraints(q) for q in (1, 2, 3, 6)}
    return found | {
        "layer minimum 0.05 bits below": SideConstraints(layer_minimum_bits=minimum),
        "active bits 5 % below": SideConstraints(active_bits=int(0.95 * read)),
        "3 formats, both limits": SideConstraints(3, minimum, int(0.97 * read)),
    }


def timed(call: Callable[[], Solution], repeats: int) -> tuple[Solution, tuple[float, ...]]:
    """The solution and the seconds of each run."""
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - begin)
    return found, tuple(seconds)


def measure_exactness(n_cases: int) -> Exactness:
    """Compare with brute force."""
    counts = {"close_gap": 0, "constrained": 0, "greedy": 0, "greedy_found": 0}
    for case in map(tiny_case, range(n_cases)):
        problem, best = case.problem, case.optimum()
        arguments = (problem, case.cost, case.limit_bits, case.constraints, case.active_share)
        closed = close_gap(case.cost, problem.bits, problem.allowed, case.limit_bits)
        free = replace(case, constraints=SideConstraints()).optimum()
        counts["close_gap"] += is_exact(closed, free)
        counts["constrained"] += is_exact(solve_constrained(*arguments), best)
        try:
            greedy = solve_constrained(*arguments, max_nodes=0)
        except BudgetError:
            continue
        counts["greedy_found"] += 1
        counts["greedy"] += is_exact(greedy, best)
    return Exactness(n_cases, **counts)


def is_exact(solution: Solution, optimum: float) -> bool:
    """Whether a cost is the optimum up to rounding of sums."""
    return solution.cost <= optimum + 1e-12 * (1 + abs(optimum))


def tables(rows: Sequence[Timing], exact: Exactness) -> str:
    """Both results in Markdown."""
    head = ["side constraints", "bits/weight", "median seconds", "certified gap", "cost ratio"]
    cells = [
        [r.name, str(r.bits_per_weight), f"{r.seconds:.2f}", f"{r.gap:.1e}", f"{r.cost_ratio:.3f}"]
        for r in rows
    ]
    counted = [
        ["close_gap, no side constraints", exact.cases, exact.close_gap],
        ["solve_constrained", exact.cases, exact.constrained],
        ["solve_constrained without integer search", exact.greedy_found, exact.greedy],
    ]
    second = [[str(cell) for cell in row] for row in counted]
    title = f"{exact.cases} tiny cases"
    return f"{markdown(head, cells)}\n\n{markdown([title, 'found a choice', 'exact'], second)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="Result file, JSON; none by default.")
    parser.add_argument("--layers", type=int, default=48, help="Default: 48.")
    parser.add_argument("--experts", type=int, default=208, help="Per layer; default: 208.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 4.25])
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each; default: 3.")
    parser.add_argument("--tiny", type=int, default=200, help="Tiny cases; default: 200.")
    args = parser.parse_args(arguments)
    problem = large_problem(args.layers, args.experts)
    print(f"{len(problem.units)} units, {len(problem.formats)} formats, {args.layers} layers\n")
    rows = [row for bits in args.budgets for row in measure_times(problem, bits, args.repeats)]
    exact = measure_exactness(args.tiny)
    print(tables(rows, exact))
    if args.out is None:
        return
    words = ["FILE" if word == str(args.out) else word for word in arguments or sys.argv[1:]]
    result = {
        "units": len(problem.units),
        "timings": [asdict(row) for row in rows],
        "exactness": asdict(exact),
        "command": shlex.join(["python", "benchmarks/solver.py", *words]),
        **run_facts("cpu"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
