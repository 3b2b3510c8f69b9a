"""How much of the divergence comes from routing that flips, and whether the costs miss it.

Costs know no token that quantization sends to another expert. Here random assignments of one
budget, uniform formats and the exact optimum of the costs are measured twice on the same text: as
they are, and with the experts of every token held to those that the original chose (weighted by
the quantized model's own router). What lies between the two is the most that a term for flips
could explain. Beside both stands what the costs predict: the rank correlation over the random
assignments, and how far the worst is underestimated.

    python benchmarks/routing_flips.py --out benchmarks/results/routing-flips-demo.json
    python benchmarks/routing_flips.py --model DIR --seq-len 256 --out result.json

Routers are those of transformers' classes that return logits, weights and chosen experts in this
order and weigh by a softmax: OLMoE, Qwen2-MoE, Qwen3-MoE.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation import Bench
from release import BOOKS, parse_with_out, run_facts
from torch import Tensor, nn

from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.routes import Routes, find_routed, keep_routes
from alphaquant.reports.tables import markdown
from alphaquant.search.allocators import ALLOCATORS
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import find_device
from alphaquant.studies.program import rank_correlation

BUDGETS = (2.25, 2.5, 3.0)
BATCH = 8
"""Windows of a batch, of the original's routes and of the measurements."""


@dataclass(frozen=True)
class Row:
    """One assignment on the evaluation text.

    Attributes:
        budget: bits per weight.
        name: `random N`, `optimum`, or a uniform format.
        predicted: the Fisher cost, nats per token.
        kl: of the model as it is, nats per token.
        kl_held: of the model whose tokens keep the original's experts.
        overlap: share of the original's choices that the model chose too.
    """

    budget: float
    name: str
    predicted: float
    kl: float
    kl_held: float
    overlap: float


class HeldRouters:
    """Routers that choose what the original chose, while `on` says so; counts overlaps always."""

    def __init__(self, model: nn.Module, routes: Routes) -> None:
        """Remember where the routers are.

        Args:
            model: of any weights.
            routes: of the original on the windows that are measured, in the same batches.
        """
        self._routers = [site.router for site in find_routed(model)]
        self._routes = routes
        self._calls = [0] * len(self._routers)
        self._shared, self._chosen = 0, 0

    @property
    def overlap(self) -> float:
        """Share of the original's choices that were chosen, of all calls so far."""
        return self._shared / self._chosen

    @contextmanager
    def on(self, is_held: bool) -> Iterator[None]:
        """Watch one pass over all windows, and hold the choices or not."""
        self._calls = [0] * len(self._routers)
        self._shared, self._chosen = 0, 0
        handles = []
        for layer, router in enumerate(self._routers):
            assert router is not None, "the router's logits are known"
            handles.append(router.register_forward_hook(self._hook(layer, router, is_held)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, router: Any, is_held: bool) -> Any:
        def hook(_: nn.Module, args: Any, given: tuple[Tensor, Tensor, Tensor]) -> Any:
            logits, weights, ids = given
            batch = self._routes.batches[self._calls[layer]][layer]
            self._calls[layer] += 1
            chosen = batch.expert_ids.flatten(0, 1).to(ids.device, ids.dtype)  # [n, k]
            self._shared += int((chosen.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1).sum())
            self._chosen += chosen.numel()
            if not is_held:
                return None
            found = torch.softmax(logits, -1, dtype=torch.float32).gather(-1, chosen)
            if router.norm_topk_prob:
                found = found / found.sum(-1, keepdim=True)
            return logits, found.to(weights.dtype), chosen

        return hook


def measure(
    bench: Bench, routers: HeldRouters, assignments: Sequence[tuple[float, str, float, Assignment]]
) -> Iterator[Row]:
    """Measure assignments (budget, name, prediction, formats) with both routings."""
    evaluation, swapper = bench.prepared.teachers.evaluation, bench.objective.swapper
    tokens, teacher = evaluation.tokens.tokens, evaluation.teacher
    for budget, name, predicted, assignment in assignments:
        swapper.apply(assignment)
        found = []
        for is_held in (True, False):
            with routers.on(is_held):
                measured = measure_divergence(swapper.model, tokens, teacher, batch_size=BATCH)
            found.append(float(measured.kl.mean()))
        yield Row(budget, name, predicted, found[1], found[0], routers.overlap)


def candidates(
    bench: Bench, budget: float, n_random: int
) -> Iterator[tuple[float, str, float, Assignment]]:
    """What is measured at a budget: random assignments, the optimum, the nearest uniform one."""
    problem, space = bench.prepared.problem, bench.prepared.space
    cost, limit = problem.costs["fisher"], bench.limit(budget)
    rows = np.arange(len(problem.units))
    for i in range(n_random):
        choice = ALLOCATORS["random"].allocate(problem, limit, 1000 + i).choice
        yield budget, f"random {i}", float(cost[rows, choice].sum()), bench.proposer.spread(choice)
    choice = ALLOCATORS["fisher"].allocate(problem, limit, 0).choice
    yield budget, "optimum", float(cost[rows, choice].sum()), bench.proposer.spread(choice)
    sizes = {
        name: uniform_assignment(space.inventory, name).count_bits(space.inventory).bits_per_weight
        for name in space.menu
    }
    name = min(sizes, key=lambda n: abs(sizes[n] - budget))
    column = list(problem.formats).index(name)
    predicted = float(cost[rows, column].sum())
    yield budget, name, predicted, uniform_assignment(space.inventory, name)


def summary(rows: Sequence[Row], budget: float) -> dict[str, float | str]:
    """Of one budget: what flips cost, and how well the costs rank with them and without."""
    own = [r for r in rows if r.budget == budget]
    drawn = [r for r in own if r.name.startswith("random")]
    optimum = next(r for r in own if r.name == "optimum")
    uniform = own[-1]
    predicted = [r.predicted for r in drawn]
    return {
        "budget": budget,
        "overlap of random ones": float(np.mean([r.overlap for r in drawn])),
        "KL held / KL, random ones": float(np.mean([r.kl_held / r.kl for r in drawn])),
        "KL held / KL, optimum": optimum.kl_held / optimum.kl,
        "uniform": uniform.name,
        "KL held / KL, uniform": uniform.kl_held / uniform.kl,
        "rank correlation": rank_correlation(predicted, [r.kl for r in drawn]),
        "rank correlation, held": rank_correlation(predicted, [r.kl_held for r in drawn]),
        "worst KL / predicted": max(r.kl / r.predicted for r in own),
        "worst KL / predicted, held": max(r.kl_held / r.predicted for r in own),
        "optimum KL / predicted": optimum.kl / optimum.predicted,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--n-random", type=int, default=24, help="assignments of each budget")
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory(prefix="alphaquant-flips-") as name:
        folder = Path(name)
        spec = SearchSpec.of(
            model=args.model,
            budget=f"{args.budgets[0]}bits",
            texts=replace(BOOKS, seq_len=args.seq_len),
            out=folder / "out",
            cache=args.cache or folder / "cache",
        )
        bench = Bench(spec, folder / "rows.json")
        tokens = bench.prepared.teachers.evaluation.tokens.tokens
        model = bench.objective.swapper.model
        routers = HeldRouters(model, keep_routes(model, tokens, BATCH))  # the original's weights
        rows = [
            row
            for budget in args.budgets
            for row in measure(bench, routers, list(candidates(bench, budget, args.n_random)))
        ]
        found = [summary(rows, budget) for budget in args.budgets]
        result = {
            "summary": found,
            "rows": [asdict(row) for row in rows],
            "settings": spec.facts(),
            **bench.prepared.inputs.source.facts(),
            "data": bench.prepared.inputs.text_facts(),
            **run_facts(find_device("auto")),
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        head = [str(x["budget"]) for x in found]
        cells = [
            [key, *(v if isinstance(v := x[key], str) else f"{v:.3f}" for x in found)]
            for key in list(found[0])[1:]
        ]
        print(markdown(["", *head], cells))


if __name__ == "__main__":
    main()
