"""How the default menu was chosen: which formats an optimal allocation misses least.

Every format of a wide menu is put into one bank and scored. Then formats are removed one by one,
always the one whose loss raises the optimum of the additive costs least, in the mean of the log
over the budgets. The optimum is exact and takes milliseconds, so this needs no evaluation; the
wide menu, the default one, the default one without one-bit formats and one of integers and mxfp4
alone are then measured on held-out text, and uniform formats for comparison.

    python benchmarks/menu.py --out benchmarks/results/menu-demo.json

Prints the order of removal and the measured table, and writes JSON with provenance.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from allocation import BUDGETS, Bench, table
from release import BOOKS, parse_with_out, run_facts

from alphaquant.errors import BudgetError
from alphaquant.search.problem import Problem
from alphaquant.search.solver import solve
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.menus import DEFAULT_MENU, MENUS
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import find_device

PLAIN = (*MENUS["int"], "mxfp4")
"""What an earlier ablation left of 32 formats without tables and super-blocks."""

WIDE = (
    *PLAIN,
    *("int2-g32-s256", "int3-g32-s256", "int3-g16-s256", "int4-g32-s256"),
    *("nl2-g128", "nl2-g64", "nl2-g64-s256", "nl2-g32-s256", "nl2-g16-s256"),
    *("nl3-g128", "nl3-g64", "nl3-g64-s256", "nl3-g32-s256", "nl3-g16-s256"),
    *("nl4-g128", "nl4-g64", "nl4-g32-s256", "nl4-g16-s256"),
)
UNIFORM = (
    *("int2-g64", "int2-g32-s256", "nl2-g64", "nl2-g32-s256"),
    *("int3-g64", "int3-g32-s256", "nl3-g64", "nl3-g32-s256"),
    *("int4-g64", "int4-g32-s256", "nl4-g64", "nl4-g32-s256"),
)
"""Formats of 2.25, 3.25 and 4.25 bits where 256 inputs are whole super-blocks."""

LEAST = 4


def optima(problem: Problem, cost: Any, columns: Sequence[int]) -> Any:
    """The least additive cost at each budget, float64 [B]; infinite where nothing fits."""
    kept = list(columns)
    found = []
    for budget in BUDGETS:
        try:
            limit_bits = problem.limit_bits(budget)
            solution = solve(
                cost[:, kept], problem.bits[:, kept], problem.allowed[:, kept], limit_bits
            )
            found.append(solution.cost)
        except BudgetError:
            found.append(np.inf)
    return np.array(found)


def removals(problem: Problem, cost: Any) -> list[dict[str, Any]]:
    """Formats in the order in which they are missed least, with what is lost up to then."""
    columns = list(range(len(problem.formats)))
    full, order = optima(problem, cost, columns), []
    while len(columns) > LEAST:
        losses = {
            c: float(np.log(optima(problem, cost, [x for x in columns if x != c]) / full).mean())
            for c in columns
        }
        worst = min(losses, key=losses.__getitem__)
        columns.remove(worst)
        order.append(
            {
                "removed": problem.formats[worst],
                "n_left": len(columns),
                "ratios": (optima(problem, cost, columns) / full).tolist(),
            }
        )
    return order


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory(prefix="alphaquant-menu-") as name:
        folder = Path(name)
        spec = SearchSpec.of(
            model=args.model,
            budget=f"{BUDGETS[0]}bits",
            formats=",".join(dict.fromkeys((*WIDE, *UNIFORM))),
            texts=replace(BOOKS, seq_len=args.seq_len),
            out=folder / "out",
            cache=args.cache or folder / "cache",
        )
        bench = Bench(spec, folder / "rows.json")
        problem, cost = bench.prepared.problem, bench.proposer.base_cost
        order = removals(problem, cost)
        menus = {
            "wide": problem.formats,
            "default": DEFAULT_MENU,
            "default without int1": [n for n in DEFAULT_MENU if not n.startswith("int1")],
            "integers and mxfp4": PLAIN,
        }
        for label, menu in menus.items():
            closed = np.array([n not in menu for n in problem.formats])
            allowed = problem.allowed & ~closed
            inside = replace(bench.proposer, problem=replace(problem, allowed=allowed))
            for budget in BUDGETS:
                proposal = inside.at(inside.base_cost, bench.limit(budget), label)
                bench.add("menu", f"{label} ({len(menu)} formats)", budget, proposal.assignment)
        inventory = bench.prepared.space.inventory
        for format_name in UNIFORM:
            assignment = uniform_assignment(inventory, format_name)
            bits = assignment.count_bits(inventory).bits_per_weight
            bench.add("uniform", format_name, round(bits, 2), assignment)
        result = {
            "removals": order,
            "budgets": BUDGETS,
            "rows": json.loads((folder / "rows.json").read_text())["rows"],
            "settings": spec.facts(),
            **bench.prepared.inputs.source.facts(),
            "data": bench.prepared.inputs.text_facts(),
            **run_facts(find_device("auto")),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        for step in order:
            shown = " ".join(f"{r:.3f}" for r in step["ratios"])
            print(f"{step['n_left']:3d} left without {step['removed']:16s} {shown}")
        print(table(bench.rows))


if __name__ == "__main__":
    main()
