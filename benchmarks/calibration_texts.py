"""What calibration text that the model writes itself is worth: searches on it, and its balance.

    python benchmarks/calibration_texts.py --budgets 3bits 4.25bits --out FILE

The demo model is searched with its default calibration text, with `ebss`, and with half of each;
everything else is the same. Held-out KL is that of what each search publishes, on the same
windows. Balance is the imbalance of experts (`alphaquant/texts/balanced.py`) of each calibration
text and of the held-out text.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from release import parse_with_out, run_facts

from alphaquant.commands.search import search
from alphaquant.evaluators.routes import route_batches
from alphaquant.files import whole_file
from alphaquant.reports.tables import markdown, with_error
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.texts import DEMO_TEXT
from alphaquant.studies.inputs import Source, find_device, load_source, read_text
from alphaquant.texts.balanced import imbalance

logger = logging.getLogger("calibration_texts")

TEXTS = {
    "default": DEMO_TEXT,
    "ebss": "ebss",
    "half of each": "ebss=0.5,demo=0.375,demo:code=0.125",
}


def imbalance_of(source: Source, text: str, role: str, seed: int, n_windows: int) -> float:
    """Imbalance of experts over all windows of a text."""
    tokens = read_text(source, text, role, n_windows, None, seed).tokens
    usage: list[torch.Tensor] = []
    for batch in route_batches(source.map.model, tokens):
        counts = [
            torch.bincount(r.expert_ids.flatten(), minlength=r.site.n_experts + 1) for r in batch
        ]
        own = [c[None, : r.site.n_experts].double() for c, r in zip(counts, batch, strict=True)]
        usage = own if not usage else [a + b for a, b in zip(usage, own, strict=True)]
    return float(imbalance(usage, tokens.numel()))


def run(args: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    """A row for each text and budget."""
    rows = []
    for budget in args.budgets:
        for name in args.texts:
            text = TEXTS[name]
            with tempfile.TemporaryDirectory(prefix="alphaquant-texts-") as out:
                spec = SearchSpec.of(
                    **{"model": "demo", "budget": budget, "seed": args.seed},
                    **{"effort": args.effort, "calibration": text, "cache": cache},
                    out=Path(out) / "out",
                )
                found = search(spec)
            best = found.gate.best
            rows.append(
                {
                    "text": name,
                    "source": text,
                    "budget": budget,
                    "kl": best.kl,
                    "kl_stderr": best.kl_stderr,
                    "perplexity": best.perplexity,
                    "bits": best.bits_per_weight,
                    "data": found.provenance.as_json()["data"],
                }
            )
            logger.info("%s %s %s", name, budget, with_error(best.kl, best.kl_stderr))
            with whole_file(args.out) as part:
                part.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def main() -> None:
    """Run and print."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", nargs="+", default=["3bits", "4.25bits"])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--effort", default="default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=64, help="of which balance is told")
    parser.add_argument("--cache", type=Path)
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory(prefix="alphaquant-texts-") as scratch:
        cache = args.cache or Path(scratch)
        rows = run(args, cache)
        source = load_source("demo", "cpu", "auto", cache=cache)
        asked = {name: (text, "calibration") for name, text in TEXTS.items()}
        asked["held-out"] = (DEMO_TEXT, "heldout")
        balance = {
            name: imbalance_of(source, *one, args.seed, args.windows)
            for name, one in asked.items()
        }
    settings = {"effort": args.effort, "seed": args.seed, "windows": args.windows}
    result = {"rows": rows, "imbalance": balance, "settings": settings}
    with whole_file(args.out) as part:
        facts = run_facts(find_device("auto"))
        part.write_text(json.dumps({**result, **facts}, indent=1) + "\n")
    lines = [[r["text"], r["budget"], with_error(r["kl"], r["kl_stderr"])] for r in rows]
    print(markdown(["calibration", "budget", "held-out KL"], lines))
    print(json.dumps(balance, indent=1))


if __name__ == "__main__":
    main()
