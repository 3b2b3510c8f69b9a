"""What a search computes, stage by stage, for models of any size: operations, memory and disk.

    python benchmarks/plan_operations.py --out benchmarks/results/plan-operations.json
    python benchmarks/plan_operations.py --shapes qwen3-30b qwen3-235b --efforts quick \
        --budget 4.25bits --rate 100 --out FILE

The plan of `aq-search --plan` is work over speed, and speed is measured on the machine that plans.
Here the speed is one operation a second, so that the "seconds" of the plan are operations: those
of the quantizer counted by torch on one stack of each shape (matrix products; the column loops,
which are not products, are left out), two for each weight that a token passes, two for each
product of a Hessian. Costs and output Hessians are planned as forward passes of which their time
on a CPU is worth eleven, so they count more than is multiplied. No weights are needed. `--rate`
divides them by a speed that is assumed, not measured. Memory is that of a CPU, where weights are
mapped files, in bfloat16.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from growth_models import SHAPES, Shape
from release import parse_with_out, run_facts
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from alphaquant.models.mapping import map_model
from alphaquant.quant.engine import quantize_batches
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.two_sided.output_hessian import row_blocks
from alphaquant.reports.tables import markdown
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.menus import menu_of
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import make_space
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings, settings_of
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.planning.estimate import Plan, plan_stages
from alphaquant.studies.planning.needs import Needs, Stack
from alphaquant.studies.planning.pilot import Rates
from alphaquant.studies.sizing import sized

TERA, GIB = 1e12, 2**30
_FORMATS = ("int4-g64", "int3-g128", "nl3-g32-s256")
"""Those that the plan times in place of all."""


class _Random:
    """Weights of a stack."""

    def __init__(self, stack: Stack) -> None:
        self._shapes = {m.name: (m.rows, m.cols) for m in stack.matrices}

    def view(self, name: str) -> Tensor:
        return torch.randn(*self._shapes[name])


def counted(stack: Stack, settings: QuantSettings) -> tuple[float, float]:
    """Operations of rounding a stack: whatever the formats, and for one more."""
    n_cols = stack.n_cols
    inputs = torch.randn(n_cols, n_cols)
    hessian = (inputs.T @ inputs).add_(torch.eye(n_cols))
    batch = HessianBatch((stack.matrices,), hessian[None], (n_cols,), ("plain",))
    if settings.two_sided:
        batch = replace(batch, outputs={m.name: _outputs_of(m) for m in stack.matrices})

    def run(formats: tuple[str, ...]) -> float:
        with FlopCounterMode(display=False) as counter:
            list(quantize_batches(_Random(stack), [batch], formats, settings))
        return float(counter.get_total_flops())

    one, three = run(_FORMATS[:1]), run(_FORMATS)
    each = (three - one) / 2
    return one - each, each


def _outputs_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """Output Hessians of a matrix."""
    sizes = [rows.stop - rows.start for rows in row_blocks(matrix.rows)]
    drawn = [torch.randn(2 * n_rows, n_rows) for n_rows in sizes]
    return tuple(x.T @ x / len(x) for x in drawn)


def plan_of(shape: Shape, effort: str, budget: str) -> Plan:
    """The plan of a search of such a model, at one operation a second."""
    torch.set_num_threads(1)  # operations of a pool's threads are not counted
    with torch.device("meta"):
        model_map = map_model(AutoModelForCausalLM.from_config(shape.config()).eval())
    with tempfile.TemporaryDirectory() as folder:
        spec = SearchSpec.of(model="demo", budget=budget, effort=effort, out=Path(folder))
    spec, profile = sized(spec, model_map), find_profile("any")
    menu = menu_of("auto", profile)
    space = make_space(model_map.inventory, profile, menu, parse_budget(budget))
    needs = Needs(spec, model_map, space, torch.bfloat16.itemsize)
    settings = settings_of(spec.quantizer)
    once: dict[tuple[int, int], float] = defaultdict(float)
    each: dict[tuple[int, int], float] = defaultdict(float)
    for stack in needs.stacks:
        small = Stack(tuple(_cut(m) for m in stack.matrices), stack.count)
        factor = stack.n_rows / small.n_rows
        first, further = counted(small, settings)
        once[stack.n_rows, stack.n_cols], each[stack.n_rows, stack.n_cols] = (
            first,
            factor * further,
        )
    rates = Rates(
        layer=2.0,
        calibrated=2.0,
        head=2.0 * shape.hidden * shape.vocabulary,
        float32=0.5,
        once=once,
        per_format=each,
        dequantized=float("inf"),
        hashed=float("inf"),
    )
    return plan_stages(needs, rates, has_copy=True)


def _cut(matrix: Matrix) -> Matrix:
    """The same with 256 rows: rows are rounded each for itself."""
    rows = min(matrix.rows, 256)
    return Matrix(matrix.name, rows, matrix.cols, matrix.kind, matrix.layer, matrix.expert)


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["olmoe", "qwen3-30b", "qwen3-235b"])
    parser.add_argument("--efforts", nargs="+", default=["quick", "default"])
    parser.add_argument("--budget", default="4.25bits")
    parser.add_argument("--rate", type=float, default=100.0, help="tera-operations a second")
    args = parse_with_out(parser)
    found: list[dict[str, Any]] = []
    for name in args.shapes:
        for effort in args.efforts:
            plan = plan_of(SHAPES[name], effort, args.budget)
            found.append({"shape": name, "effort": effort, "n_weights": plan.n_weights})
            found[-1] |= {"n_formats": plan.n_formats, "memory": plan.memory, "disk": plan.disk}
            found[-1] |= {"stages": [asdict(stage) for stage in plan.stages]}
            rows = [
                [s.stage.text, f"{s.seconds / TERA:.1f}", f"{s.seconds / TERA / args.rate:.0f}"]
                + [f"{s.memory / GIB:.1f}", f"{s.disk / GIB:.1f}"]
                for s in plan.stages
            ]
            total = plan.seconds / TERA
            rows.append(
                ["all", f"{total:.1f}", f"{total / args.rate:.0f}"]
                + [f"{plan.memory / GIB:.1f}", f"{plan.disk / GIB:.1f}"]
            )
            print(f"\n{name}, {effort}: {plan.n_weights:.3g} weights, "
                  f"{plan.n_formats:.1f} formats of a matrix\n")  # fmt: skip
            heads = ["stage", "tera-operations", f"s at {args.rate:.0f} a second", "GiB", "disk"]
            print(markdown(heads, rows), flush=True)
    facts = {"plans": found, "budget": args.budget, **run_facts("cpu")}
    args.out.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
