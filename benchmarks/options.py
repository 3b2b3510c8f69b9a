"""What each option of the quantizer is worth: one table over calibration seeds.

The demo model is quantized uniformly in several formats with the defaults and with one option
changed at a time, for several draws of the calibration windows; each result is compared with the
defaults on the same windows. The defaults follow from this table.

    python benchmarks/options.py --out benchmarks/results/options-demo.json
    python benchmarks/options.py --quick --out result.json

Prints a table in Markdown: KL to the original on held-out text, nats per token, and per option the
mean change in percent with its standard error over the seeds.
"""

import argparse
import json
import logging
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from release import BOOKS, run_facts
from torch import Tensor

from alphaquant import demo
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import open_teacher, store_teacher
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.swap import Swapper
from alphaquant.reports.tables import markdown
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.specs.texts import TextSpec
from alphaquant.studies.inputs import load_source, read_text

logger = logging.getLogger("options")

FORMATS = ("int2-g64", "int3-g128", "int4-g128", "mxfp4")
AUTHOR = "Arthur Conan Doyle"
"""Whose passages stand for a calibration text of one domain; the author of most of them."""

OPTIONS: dict[str, dict[str, Any]] = {
    "route_exponent=0": {"route_exponent": 0},
    "route_exponent=1": {"route_exponent": 1},
    "pooled_tokens=0": {"pooled_tokens": 0},
    "pooled_tokens=128": {"pooled_tokens": 128},
    "pooled_tokens=2048": {"pooled_tokens": 2048},
    "static_groups": {"static_groups": True},
    "n_starts=1, actorder": {"n_starts": 1, "actorder": True},
    "scale_search=mse": {"scale_search": "mse"},
    "scale_search=minmax": {"scale_search": "minmax"},
    "percdamp=0.001": {"percdamp": 0.001},
    "percdamp=0.1": {"percdamp": 0.1},
    "n_starts=1": {"n_starts": 1},
    "refine_sweeps=0": {"refine_sweeps": 0},
    "refine_sweeps=1": {"refine_sweeps": 1},
    "refine_sweeps=8": {"refine_sweeps": 8},
    "sequential": {"sequential": True},
}
DEFAULTS = "defaults"
ONE_DOMAIN = "calibration of one author"


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes:
        option: what was changed.
        format: of all matrices.
        seed: of the calibration windows.
        kl: to the original on held-out text, nats per token.
        kl_stderr: over its windows.
    """

    option: str
    format: str
    seed: int
    kl: float
    kl_stderr: float


class Bench:
    """The demo model, its held-out text, and quantizations of it."""

    def __init__(self, folder: Path, data: TextSpec) -> None:
        """Load the model and store its predictions."""
        self.source, self.data, self.folder = load_source("demo", "cpu", "auto"), data, folder
        self.heldout = self._read(data.heldout, "heldout", data.heldout_samples, 0)
        store_teacher(folder / "teacher.safetensors", self.source.map.model, self.heldout)
        self.teacher = open_teacher(folder / "teacher.safetensors")
        self.original = {n: v.clone() for n, v in self.source.map.views.items()}
        self.author = folder / "author.txt"
        self.author.write_text(passages_of(AUTHOR), encoding="utf-8")

    def calibration(self, seed: int, *, one_domain: bool) -> Tensor:
        """Windows of the calibration text, or of one author's passages in it."""
        text = str(self.author) if one_domain else self.data.calibration
        return self._read(text, "calibration", self.data.calibration_samples, seed)

    @torch.no_grad()
    def measure(
        self,
        option: str,
        settings: QuantSettings,
        tokens: Tensor,
        formats: Sequence[str],
        seed: int,
    ) -> Iterator[Row]:
        """Quantize in every format and compare with the original."""
        for format_name in self._quantized(settings, tokens, formats):
            found = measure_divergence(self.source.map.model, self.heldout, self.teacher).kl
            error = float(found.std() / math.sqrt(len(found)))
            self._restore()
            yield Row(option, format_name, seed, float(found.mean()), error)

    def _quantized(
        self, settings: QuantSettings, tokens: Tensor, formats: Sequence[str]
    ) -> Iterator[str]:
        """The model with the weights of one format after the other."""
        model_map = self.source.map
        if settings.sequential:
            for name in formats:
                assignment = uniform_assignment(model_map.inventory, name)
                layers = list(quantize_layers(model_map, assignment, settings, tokens))
                for item in (item for done in layers for item in done.items):
                    model_map.view(item.matrix.name).copy_(item.packed.dequantize())
                yield name
            return
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            bank = open_bank(Path(scratch), "bank", model_map.inventory, {})
            fill_bank(bank, model_map, tokens, BankRequest(formats, settings))
            for name in formats:
                Swapper(model_map, bank.layer).apply(uniform_assignment(model_map.inventory, name))
                yield name

    def _restore(self) -> None:
        for name, weight in self.original.items():
            self.source.map.view(name).copy_(weight)

    def _read(self, text: str, role: str, count: int, seed: int) -> Tensor:
        return read_text(self.source, text, role, count, self.data.seq_len, seed).tokens


def passages_of(author: str) -> str:
    """The passages of one author in the demo's calibration text."""
    text = demo.text_path("calibration").read_text(encoding="utf-8")
    passages = [p for p in text.split("# Title: ") if f"## Author: {author}" in p]
    return "".join(f"# Title: {p}" for p in passages)


def cases(names: Sequence[str] | None) -> Iterator[tuple[str, QuantSettings, bool]]:
    """Option, its settings, and whether the calibration is of one domain."""
    yield DEFAULTS, QuantSettings(), False
    for name, changes in OPTIONS.items():
        if names is None or name in names:
            yield name, replace(QuantSettings(), **changes), False
    if names is None or ONE_DOMAIN in names:
        yield ONE_DOMAIN, QuantSettings(), True


def changes(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean change of the KL against the defaults in percent, and its standard error.

    Paired: each seed's result is compared with the defaults on the same windows.
    """
    base = {(r.format, r.seed): r.kl for r in rows if r.option == DEFAULTS}
    found: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        found.setdefault((r.option, r.format), []).append(
            100 * (r.kl / base[r.format, r.seed] - 1)
        )
    return {
        key: (statistics.fmean(v), statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0)
        for key, v in found.items()
    }


def table(rows: Sequence[Row]) -> str:
    """Options by formats: the defaults' KL, then changes in percent."""
    formats = list(dict.fromkeys(r.format for r in rows))
    found = changes(rows)
    lines = []
    for option in dict.fromkeys(r.option for r in rows):
        cells = []
        for name in formats:
            values = [r.kl for r in rows if (r.option, r.format) == (option, name)]
            mean, error = found[option, name]
            if option == DEFAULTS:
                spread = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else 0.0
                cells.append(f"{statistics.fmean(values):.5f} +- {spread:.5f}")
            else:
                cells.append(f"{mean:+.1f} % +- {error:.1f}")
        lines.append([option, *cells])
    return markdown(["option", *formats], lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All cases for all seeds; prints the table and returns the result."""
    data = replace(BOOKS, calibration_samples=8, heldout_samples=4) if args.quick else BOOKS
    seeds = range(2 if args.quick else args.seeds)
    formats = args.formats or (("int4-g128",) if args.quick else FORMATS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="alphaquant-options-") as scratch:
        bench = Bench(Path(scratch), data)
        for seed in seeds:
            for option, settings, one_domain in cases(args.options):
                tokens = bench.calibration(seed, one_domain=one_domain)
                for row in bench.measure(option, settings, tokens, formats, seed):
                    rows.append(row)
                    logger.info("%s", json.dumps(asdict(row)))
        facts = bench.source.facts()
    print(table(rows))
    return {
        "rows": [asdict(r) for r in rows],
        "defaults": asdict(QuantSettings()),
        "data": asdict(data),
        "one_domain": AUTHOR,
        **facts,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="Result file, JSON.")
    parser.add_argument("--seeds", type=int, default=5, help="Draws of calibration windows.")
    parser.add_argument("--formats", nargs="+", help=f"Default: {' '.join(FORMATS)}.")
    parser.add_argument("--options", nargs="+", choices=[*OPTIONS, ONE_DOMAIN], help="All.")
    parser.add_argument("--quick", action="store_true", help="Few windows, one format.")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("alphaquant").setLevel(logging.WARNING)
    words = ["FILE" if word == str(args.out) else word for word in arguments or sys.argv[1:]]
    facts = {
        "command": shlex.join(["python", "benchmarks/options.py", *words]),
        **run_facts("cpu"),
    }
    result: Mapping[str, Any] = run(args) | facts  # the commit is that of the code that ran
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
