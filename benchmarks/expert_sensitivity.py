"""Whether expert sensitivities order experts as the true divergence does.

Each sampled expert is quantized alone, all else original, and the KL to the original is measured
on held-out text. Its order is compared with that of every view of
`alphaquant.costs.experts`: over the five most and five least sensitive experts,
over the whole sample, and within each layer.

    python benchmarks/expert_sensitivity.py --format int2-g64 \
        --out benchmarks/results/expert-sensitivity-demo.json

Prints Markdown and writes JSON with provenance.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from release import commit, parse_with_out
from scipy.stats import spearmanr

from alphaquant.commands.sensitivity import (
    N_SHOWN,
    FoundSensitivity,
    measure_expert_sensitivity,
    sensitivity_json,
)
from alphaquant.costs.experts import VIEWS, SensitiveExpert, expert_units
from alphaquant.evaluators.base import Score
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.models.sites import ModelMap
from alphaquant.provenance import device_facts
from alphaquant.quant.bank import Bank
from alphaquant.spaces.units import Matrix
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.specs.texts import TextSpec
from alphaquant.studies.inputs import read_text
from alphaquant.studies.objective import EvaluationSet

logger = logging.getLogger("expert_sensitivity")


@contextmanager
@torch.no_grad()
def swapped(
    model_map: ModelMap, bank: Bank, matrices: Sequence[Matrix], format_name: str
) -> Iterator[None]:
    """A model with some matrices in a format of the bank; they are put back bit for bit."""
    originals = {m.name: model_map.view(m.name).clone() for m in matrices}
    try:
        for m in matrices:
            model_map.view(m.name).copy_(bank.read(m, format_name).dequantize())
        yield
    finally:
        for name, original in originals.items():
            model_map.view(name).copy_(original)


def chosen_experts(experts: Sequence[SensitiveExpert], n: int, seed: int) -> list[SensitiveExpert]:
    """The most and least sensitive experts, then drawn ones up to `n`, in order of rank."""
    ends = {*range(N_SHOWN), *range(len(experts) - N_SHOWN, len(experts))}
    drawn = np.random.default_rng(seed).permutation(len(experts)).tolist()
    others = [i for i in drawn if i not in ends][: max(n - len(ends), 0)]
    return [experts[i] for i in sorted({*ends, *others})]


def true_kl(found: FoundSensitivity, matrices: Sequence[Matrix], on: EvaluationSet) -> Score:
    """KL to the original with some matrices quantized and all else as it is."""
    source = found.source
    with swapped(source.map, found.bank, matrices, found.sensitivity.format):
        measured = measure_divergence(source.map.model, on.tokens.tokens, on.teacher)
    return next(s for s in measured.scores(on.tokens.digest) if s.metric == "kl")


def measure_rows(
    found: FoundSensitivity, experts: Sequence[SensitiveExpert], on: EvaluationSet
) -> list[dict[str, Any]]:
    """What is known of each expert, with its true KL."""
    units = {unit.name: unit for unit in expert_units(found.source.map.inventory)}
    rows = []
    for i, expert in enumerate(experts):
        kl = true_kl(found, units[expert.name].matrices, on)
        rank = found.sensitivity.experts.index(expert) + 1
        rows.append({"rank": rank, **asdict(expert), "kl": kl.value, "kl_stderr": kl.stderr})
        logger.info("%d of %d: %s, KL %.3e", i + 1, len(experts), expert.name, kl.value)
    return rows


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman rank correlation of each view with the true KL.

    None for fewer than three experts, or where all have the same value.
    """
    found: dict[str, float | None] = {}
    for view in VIEWS:
        pairs = [(r[view], r["kl"]) for r in rows if r[view] is not None]
        columns = list(zip(*pairs, strict=True))
        is_defined = len(pairs) > 2 and all(len(set(column)) > 1 for column in columns)
        found[view] = float(spearmanr(*columns)[0]) if is_defined else None
    return found


def groups_of(rows: list[dict[str, Any]], n_experts: int) -> dict[str, list[dict[str, Any]]]:
    """The sets of experts that orders are compared over."""
    ends = [r for r in rows if r["rank"] <= N_SHOWN or r["rank"] > n_experts - N_SHOWN]
    groups = {"five most and five least": ends, "sample": rows}
    groups["sample, seen by 64 tokens or more"] = [r for r in rows if r["n_tokens"] >= 64]
    for layer in sorted({r["layer"] for r in rows}):
        groups[f"layer {layer}"] = [r for r in rows if r["layer"] == layer]
    return groups


def additivity(
    found: FoundSensitivity, rows: Sequence[dict[str, Any]], on: EvaluationSet
) -> dict[str, float]:
    """KL of the sampled experts together, beside the sums of their KL and of their costs."""
    names = {r["name"] for r in rows}
    units = [u for u in expert_units(found.source.map.inventory) if u.name in names]
    together = true_kl(found, [m for u in units for m in u.matrices], on)
    return {
        "kl_together": together.value,
        "sum_of_kl": sum(r["kl"] for r in rows),
        "sum_of_fisher": sum(r["fisher"] for r in rows),
    }


def compared(
    found: FoundSensitivity, on: EvaluationSet, n_experts: int, seed: int
) -> dict[str, Any]:
    """Chosen experts with their true KL, and how the views order them."""
    rows = measure_rows(found, chosen_experts(found.sensitivity.experts, n_experts, seed), on)
    groups = groups_of(rows, found.sensitivity.total.n_experts)
    return {
        "experts": rows,
        "spearman": {k: {"n": len(v), **correlations(v)} for k, v in groups.items()},
        "additivity": additivity(found, rows, on),
        "kl_of_the_original": true_kl(found, [], on).value,
    }


def markdown_of(result: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The five most and least sensitive experts, then the rank correlations."""
    n = result["total"]["n_experts"]
    lines = [
        "| rank | layer | expert | tokens | use | Fisher | cost per bit | fragility | true KL |",
        "|---" * 9 + "|",
    ]
    for r in rows:
        if r["rank"] <= N_SHOWN or r["rank"] > n - N_SHOWN:
            fragility = "unseen" if r["fragility"] is None else f"{r['fragility']:.2e}"
            lines.append(
                f"| {r['rank']} | {r['layer']} | {r['expert']} | {r['n_tokens']} "
                f"| {100 * r['use']:.2f} % | {r['fisher']:.2e} | {r['cost_per_bit']:.2e} "
                f"| {fragility} | {r['kl']:.2e} +- {r['kl_stderr']:.1e} |"
            )
    lines += ["", "| experts | n | " + " | ".join(VIEWS) + " |", "|---" * (2 + len(VIEWS)) + "|"]
    for name, group in result["spearman"].items():
        cells = ["" if group[v] is None else f"{group[v]:.3f}" for v in VIEWS]
        lines.append(f"| {name} | {group['n']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--format", default="int2-g64")
    parser.add_argument("--against", default="bf16")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--heldout", default=TextSpec.heldout)
    parser.add_argument("--heldout-samples", type=int, default=64)
    parser.add_argument("--experts", type=int, default=64, help="how many are quantized alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    started = time.perf_counter()
    spec = SensitivitySpec.of(
        format=args.format,
        model=args.model,
        against=args.against,
        calibration_samples=args.calibration_samples,
        seed=args.seed,
        cache=args.cache,
    )
    found = measure_expert_sensitivity(spec)
    tokens = read_text(
        found.source, args.heldout, "heldout", args.heldout_samples, None, args.seed
    )
    with tempfile.TemporaryDirectory(prefix="alphaquant-sensitivity-") as name:
        path = Path(name) / "heldout.safetensors"
        on = EvaluationSet(tokens, store_teacher(path, found.source.map.model, tokens.tokens))
        result = {
            **sensitivity_json(found),
            **compared(found, on, args.experts, args.seed),
            "heldout": tokens.provenance(),
            "seconds": time.perf_counter() - started,
            "commit": commit(),
            **device_facts(found.source.runs_as.rsplit("-", 1)[-1]),
        }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown_of(result, result["experts"]))
    print(json.dumps({k: result[k] for k in ("additivity", "kl_of_the_original")}, indent=1))


if __name__ == "__main__":
    main()
