"""What a rotation of the residual stream is worth: the same formats and budgets with and without.

    python benchmarks/rotation.py uniform --seeds 5 --out benchmarks/results/rotation-demo.json
    python benchmarks/rotation.py search --budgets 2.25bits 3bits 4.25bits --out FILE
    python benchmarks/rotation.py uniform --model FILE.gguf --text FOLDER --quantizer rtn --out R

A seed draws the calibration windows and, in the rotated models, the signs. The teacher is the
original, not rotated, and the held-out windows are those of seed 0 throughout. `search` runs
`aq-search` with and without `--rotate` and compares what they publish. Ratios are of sums over the
same windows, with the standard error of the paired difference (delta method), then their geometric
mean over seeds.
"""

import argparse
import json
import logging
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from release import parse_with_out, run_facts
from torch import Tensor

from alphaquant.commands.search import search
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.files import whole_file
from alphaquant.progress import no_progress
from alphaquant.quant.swap import Swapper
from alphaquant.reports.tables import markdown
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.texts import DEMO_TEXT
from alphaquant.studies.costing import fill_source_bank
from alphaquant.studies.inputs import Source, find_device, load_source, read_text
from alphaquant.studies.objective import EvaluationSet, Objective

logger = logging.getLogger("rotation")

QUANTIZERS = {
    "default": QuantSettings(),
    "gptq": QuantSettings(refine_sweeps=0, n_starts=1),
    "rtn": QuantSettings(method="rtn"),
}
"""Ours, GPTQ in one pass, and round-to-nearest."""

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int4-row", "int4-g128", "mxfp4", "nl4-g32-s256")


@dataclass(frozen=True)
class Texts:
    """What is read of which text.

    Attributes:
        calibration: a text.
        heldout: another.
        n_calibration: windows.
        n_heldout: likewise.
        seq_len: tokens per window; None for the default.
        settings: of the quantizer that reads the former.
    """

    calibration: str
    heldout: str
    n_calibration: int
    n_heldout: int
    seq_len: int | None
    settings: QuantSettings


def paired_ratio(rotated: Tensor, plain: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same windows and its standard error.

    Args:
        rotated: float [N].
        plain: float [N].
    """
    ratio = float(rotated.mean() / plain.mean())
    rest = (rotated - ratio * plain).double()
    return ratio, float(rest.std() / math.sqrt(len(rest)) / plain.double().mean())


def kl_of(
    source: Source, texts: Texts, seed: int, names: Sequence[str], on: EvaluationSet, cache: Path
) -> dict[str, Tensor]:
    """KL per window of uniform formats, [N] each."""
    windows = read_text(
        source, texts.calibration, "calibration", texts.n_calibration, texts.seq_len, seed
    )
    bank = fill_source_bank(source, windows, names, texts.settings, cache, no_progress)
    objective = Objective(Swapper(source.map, bank.layer))
    inventory = source.map.inventory
    wanted = [uniform_assignment(inventory, name) for name in names]
    found = objective.divergences(wanted, on)
    return {name: one.kl for name, one in zip(names, found, strict=True)}


def uniform(args: argparse.Namespace, cache: Path) -> Iterator[dict[str, Any]]:
    """Rows of uniform formats, one per seed and format."""
    names = [parse_format(name).name for name in args.formats]
    texts = Texts(
        f"{args.text}/calibration.txt" if args.text else DEMO_TEXT,
        f"{args.text}/heldout.txt" if args.text else DEMO_TEXT,
        *(args.calibration_samples, args.heldout_samples, args.seq_len),
        QUANTIZERS[args.quantizer],
    )
    device = find_device("auto")
    original = load_source(args.model, device, "auto", cache=cache)
    tokens = read_text(original, texts.heldout, "heldout", texts.n_heldout, texts.seq_len, 0)
    path = cache / f"teacher-{original.digest[:16]}-{tokens.digest[:16]}.safetensors"
    on = EvaluationSet(tokens, store_teacher(path, original.map.model, tokens.tokens))
    for seed in range(args.first, args.first + args.seeds):
        plain = kl_of(original, texts, seed, names, on, cache)
        source = load_source(args.model, device, "auto", cache=cache, rotate=seed)
        own = measure_divergence(source.map.model, tokens.tokens, on.teacher).kl
        turned = kl_of(source, texts, seed, names, on, cache)
        for name in names:
            ratio, stderr = paired_ratio(turned[name], plain[name])
            logger.info("seed %d %s %.3f +- %.3f", seed, name, ratio, stderr)
            yield {
                "seed": seed,
                "format": name,
                "kl": float(plain[name].mean()),
                "kl_rotated": float(turned[name].mean()),
                "ratio": ratio,
                "ratio_stderr": stderr,
                "kl_of_rotated_weights": float(own.mean()),
                "rotation": source.facts()["rotation"],
            }


def searched(args: argparse.Namespace, cache: Path) -> Iterator[dict[str, Any]]:
    """Rows of searches, one per seed and budget."""
    for seed in range(args.first, args.first + args.seeds):
        for budget in args.budgets:
            found = {}
            for rotate in (None, seed):
                with tempfile.TemporaryDirectory(prefix="alphaquant-rotation-") as out:
                    spec = SearchSpec.of(
                        **{"model": args.model, "budget": budget, "seed": seed, "rotate": rotate},
                        **{"effort": args.effort, "out": Path(out) / "out", "cache": cache},
                    )
                    found[rotate] = search(spec)
            best = {rotate: one.gate.best for rotate, one in found.items()}
            ratio = best[seed].kl / best[None].kl
            logger.info("seed %d %s %.3f", seed, budget, ratio)
            yield {
                "seed": seed,
                "format": budget,
                "kl": best[None].kl,
                "kl_stderr": best[None].kl_stderr,
                "kl_rotated": best[seed].kl,
                "kl_rotated_stderr": best[seed].kl_stderr,
                "ratio": ratio,
                "bits": [best[None].bits_per_weight, best[seed].bits_per_weight],
                "rotation": found[seed].provenance.rotation,
            }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per format or budget, over seeds."""
    lines = []
    for name in dict.fromkeys(row["format"] for row in rows):
        own = [row for row in rows if row["format"] == name]
        logs = [math.log(row["ratio"]) for row in own]
        spread = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None
        if spread is None:
            spread = own[0].get("ratio_stderr", float("nan")) / own[0]["ratio"]
        ratio = math.exp(statistics.fmean(logs))
        kl, turned = (statistics.fmean(r[key] for r in own) for key in ("kl", "kl_rotated"))
        cells = [name, str(len(own)), f"{kl:.6f}", f"{turned:.6f}"]
        lines.append([*cells, f"{ratio:.3f} +- {ratio * spread:.3f}"])
    return markdown(["format", "seeds", "KL", "KL rotated", "ratio +- standard error"], lines)


def main() -> None:
    """Run and print."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("uniform", "search"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", help="folder with calibration.txt and heldout.txt")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--quantizer", choices=QUANTIZERS, default="default")
    parser.add_argument("--budgets", nargs="+", default=["2.25bits", "3bits", "4.25bits"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--heldout-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory(prefix="alphaquant-rotation-") as scratch:
        cache = args.cache or Path(scratch)
        rows = []
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "cache", "text")}
        settings["model"] = Path(args.model).name
        facts = {"settings": settings, **run_facts(find_device("auto"))}
        for row in (uniform if args.what == "uniform" else searched)(args, cache):
            row["rotation"].pop("source", None)  # a place on this machine
            rows.append(row)
            with whole_file(args.out) as part:
                part.write_text(json.dumps({"rows": rows, **facts}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
