"""GGUF files of ours beside llama.cpp's own types, on the demo model, run by llama.cpp.

    python benchmarks/llama_cpp.py --out benchmarks/results/llama_cpp-demo.json
    python benchmarks/llama_cpp.py --configs RUN/best.json OTHER/best.json --out result.json

Uniform rows: every matrix whose width 256 divides in one type of llama.cpp, the demo's down
projections (128 inputs) in iq4_nl. First by llama.cpp's own code with the diagonal of our Hessians
as importance, then by descent from there on: the same types, the same bytes. Searched rows: the
configurations of `aq-search --profile gguf`. Each is written by `--export gguf`, its divergence
from the original measured on held-out text twice: of the dequantized weights by transformers, and
of the file by llama.cpp, which rounds the inputs of quantized matrices to 8 bits.

Prints a table in Markdown and writes JSON with provenance.
"""

import argparse
import json
import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from release import run_facts
from torch import Tensor

from alphaquant.evaluators.engines.llama_cpp import logits
from alphaquant.exports.gguf.writer import MODEL_FILE, GgufExport
from alphaquant.exports.writing import export_packed
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.config import load_config, resolve
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.inputs import Source, load_source, read_text

logger = logging.getLogger("llama_cpp")

TYPES = ("iq2_xs", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")
SMALL = "iq4_nl"
"""For widths that 256 does not divide."""


@dataclass(frozen=True)
class Row:
    """One GGUF file on held-out text.

    Attributes:
        name: its types, or the configuration.
        rounding: `llama.cpp`, or `ours`.
        bits_per_weight: of the quantizable weights.
        file_bytes: of the file.
        output_error: sum of tr(D H D') over that of tr(W H W'), mean of the matrices.
        kl: of the dequantized weights to the original, nats per token.
        kl_stderr: over windows.
        served_kl: the same of what llama.cpp computes from the file.
        served_stderr: over windows.
    """

    name: str
    rounding: str
    bits_per_weight: float
    file_bytes: int
    output_error: float
    kl: float
    kl_stderr: float
    served_kl: float
    served_stderr: float


@dataclass(frozen=True)
class Bench:
    """What every row is measured with."""

    source: Source
    calibration: Tensor
    heldout: Tensor
    right: Tensor

    @torch.no_grad()
    def row(
        self, name: str, rounding: str, assignment: Assignment, settings: QuantSettings
    ) -> Row:
        """Quantize, write, and run both."""
        job = PackingJob(self.source.map, assignment, settings, self.calibration)
        with tempfile.TemporaryDirectory() as folder:
            packed, out = Path(folder) / "packed", Path(folder) / "out"
            quantize_to_checkpoint(job, packed, facts={}, tokenizer=self.source.tokenizer)
            out.mkdir()
            export_packed(GgufExport(), packed, out)
            report = json.loads((packed / "quantize_report.json").read_text())
            errors = [row["output_error"] for row in report["matrices"]]
            model = load(packed, "cpu", "float32")
            found = divergence(self.right, model_logits(model, self.heldout))
            n_bytes = (out / MODEL_FILE).stat().st_size
            rows = [logits(out / MODEL_FILE, [w])[0] for w in self.heldout.tolist()]
        served = divergence(self.right, torch.from_numpy(np.stack(rows)))
        bits = assignment.count_bits(self.source.map.inventory).bits_per_weight
        error = float(np.mean([e for e in errors if e is not None]))
        made = Row(name, rounding, bits, n_bytes, error, *found, *served)
        logger.info("%s", made)
        return made


@torch.no_grad()
def model_logits(model: Any, windows: Tensor) -> Tensor:
    """Logits, float32 [W, T, V]."""
    return torch.cat([model(w[None]).logits.float() for w in windows])


def divergence(right: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL of windows in nats per token, and its standard error."""
    per_window = []
    for a, b in zip(right, found, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        per_window.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return float(np.mean(per_window)), float(np.std(per_window, ddof=1) / len(per_window) ** 0.5)


def main() -> None:
    """Measure all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=Path, nargs="*", default=[])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("alphaquant").setLevel(logging.WARNING)
    source = load_source("demo", "cpu", "float32")
    texts = {"calibration": 128, "heldout": args.windows}
    windows = {r: read_text(source, "demo", r, n, 256, 0).tokens for r, n in texts.items()}
    right = model_logits(source.map.model, windows["heldout"])
    bench = Bench(source, windows["calibration"], windows["heldout"], right)
    inventory = source.map.inventory
    ours = QuantSettings()
    rows = []
    for kind in args.types:
        plan = {m.name: kind if m.cols % 256 == 0 else SMALL for m in inventory.matrices}
        name, assignment = f"{kind}, down {SMALL}", Assignment(plan)
        rows.append(bench.row(name, "llama.cpp", assignment, replace(ours, refine_sweeps=0)))
        rows.append(bench.row(name, "ours", assignment, ours))
    for path in args.configs:
        found = resolve(load_config(path), inventory).assignment
        rows.append(bench.row(f"search: {path.parent.name}", "ours", found, ours))
    keys = {"windows": args.windows, "rows": [asdict(row) for row in rows]}
    args.out.write_text(json.dumps(keys | run_facts("cpu"), indent=1) + "\n")
    shown = ["types", "rounding", "bits", "bytes", "output error", "KL", "KL by llama.cpp"]
    cells = [
        [
            *(r.name, r.rounding, f"{r.bits_per_weight:.3f}", str(r.file_bytes)),
            *(f"{r.output_error:.5f}", f"{r.kl:.6f} +- {r.kl_stderr:.6f}"),
            f"{r.served_kl:.6f} +- {r.served_stderr:.6f}",
        ]
        for r in rows
    ]
    print(markdown(shown, cells))


if __name__ == "__main__":
    main()
