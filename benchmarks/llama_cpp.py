"""GGUF files of ours beside llama.cpp's own types, run by llama.cpp.

    python benchmarks/llama_cpp.py --out benchmarks/results/llama_cpp-demo.json
    python benchmarks/llama_cpp.py --configs RUN/best.json OTHER/best.json --out result.json

Uniform rows: every matrix whose width 256 divides in one type of llama.cpp, the demo's down
projections (128 inputs) in iq4_nl. First by llama.cpp's own code with the diagonal of our Hessians
as importance, then by descent from there on: the same types, the same bytes. Searched rows: the
configurations of `aq-search --profile gguf`.

    python benchmarks/llama_cpp.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw \
        --types --quantizer package/bins/linux-x64 --mixes Q2_K IQ4_XS --out result.json

With `--mixes` of dense models: what llama.cpp's own quantizer (`llama_quantizer.py`) makes of it
with an importance matrix of the calibration windows, its embedding as the mix has it and once
more in bf16, where ours is; then our rounding in the types that it chose for every matrix.
`--text` is cut at articles (`real.py`): calibration and held-out text share none.

Each is written by `--export gguf`, its divergence
from the original measured on held-out text twice: of the dequantized weights by transformers, and
of the file by llama.cpp, which rounds the inputs of quantized matrices to 8 bits.

Prints a table in Markdown and writes JSON with provenance.
"""

import argparse
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_quantizer import LlamaQuantizer, importance_of, tensor_names, types_in
from real import cut_text
from release import run_facts
from torch import Tensor

from alphaquant.evaluators.engines.llama_cpp import logits
from alphaquant.exports.gguf.dialects import find_dialect
from alphaquant.exports.gguf.writer import MODEL_FILE, GgufExport
from alphaquant.exports.writing import export_packed
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.config import load_config, resolve
from alphaquant.spaces.formats import GGML_TWINS
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.inputs import Source, load_source, read_text

logger = logging.getLogger("llama_cpp")

TYPES = ("iq2_xs", "q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")
SMALL = "iq4_nl"
"""For widths that 256 does not divide."""


@dataclass(frozen=True)
class Fit:
    """A model's predictions of held-out text.

    Attributes:
        kl: to the original, nats per token.
        kl_stderr: over windows.
        perplexity: of the next tokens.
    """

    kl: float
    kl_stderr: float
    perplexity: float


@dataclass(frozen=True)
class Row:
    """One GGUF file on held-out text.

    Attributes:
        name: its types, or the configuration.
        rounding: `llama.cpp`, or `ours`.
        bits_per_weight: of the quantizable weights.
        file_bytes: of the file.
        served: of what llama.cpp computes from the file.
        seconds: processor seconds that this process took to make the file; llama.cpp's quantizer
            is another.
        output_error: sum of tr(D H D') over that of tr(W H W'), mean of the matrices; None of
            files that we did not make.
        dequantized: of the dequantized weights in transformers; None likewise.
    """

    name: str
    rounding: str
    bits_per_weight: float
    file_bytes: int
    served: Fit
    seconds: float
    output_error: float | None = None
    dequantized: Fit | None = None


@dataclass(frozen=True)
class Bench:
    """What every row is measured with."""

    source: Source
    calibration: Tensor
    heldout: Tensor
    right: Tensor

    def row(
        self, name: str, rounding: str, assignment: Assignment, settings: QuantSettings
    ) -> Row:
        """Quantize, write, and run both."""
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            packed = self.write(assignment, settings, Path(folder))
            seconds = time.process_time() - started
            file = packed.with_name(MODEL_FILE)
            report = json.loads((packed / "quantize_report.json").read_text())
            errors = [row["output_error"] for row in report["matrices"]]
            dequantized = self.computed(load(packed, "cpu", "float32"))
            made = Row(
                name,
                rounding,
                assignment.count_bits(self.source.map.inventory).bits_per_weight,
                file.stat().st_size,
                self.served(file),
                seconds,
                float(np.mean([e for e in errors if e is not None])),
                dequantized,
            )
        logger.info("%s", made)
        return made

    def write(self, assignment: Assignment, settings: QuantSettings, folder: Path) -> Path:
        """Our packed checkpoint, with `model.gguf` beside it."""
        job = PackingJob(self.source.map, assignment, settings, self.calibration)
        packed = folder / "packed"
        quantize_to_checkpoint(job, packed, facts={}, tokenizer=self.source.tokenizer)
        export_packed(GgufExport(), packed, folder)
        return packed

    def mix(
        self, name: str, quantizer: LlamaQuantizer, plain: Path, settings: QuantSettings | None
    ) -> list[Row]:
        """A mix of llama.cpp's quantizer with both embeddings, and our rounding in its types.

        Settings of None leave ours out.
        """
        rows = []
        inventory = self.source.map.inventory
        for keep in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / MODEL_FILE
                started = time.process_time()
                quantizer.write(plain, file, name, self.importance, keep)
                seconds = time.process_time() - started
                types = types_in(file)
                plan = {m.name: our_name(types[self.names[m.name]]) for m in inventory.matrices}
                bits = Assignment(plan).count_bits(inventory).bits_per_weight
                text = f"{name}: {counted(plan.values())}, embedding {types['token_embd']}"
                n_bytes = file.stat().st_size
                rows.append(Row(text, "llama.cpp", bits, n_bytes, self.served(file), seconds))
            logger.info("%s", rows[-1])
        if settings is None:
            return rows
        text = f"types of {name}, embedding bf16"
        return [*rows, self.row(text, "ours", Assignment(plan), settings)]

    @cached_property
    def names(self) -> dict[str, str]:
        """How llama.cpp calls the matrices."""
        config: Any = self.source.map.model.config
        matrices = [m.name for m in self.source.map.inventory.matrices]
        return tensor_names(find_dialect(config).name, config.num_hidden_layers, matrices)

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """llama.cpp's importance matrix of the calibration windows."""
        return importance_of(self.source.map.model, self.names, self.calibration)

    def computed(self, model: Any) -> Fit:
        """What transformers computes."""
        return self.fit(lambda w: model_logits(model, w[None])[0])

    def served(self, file: Path) -> Fit:
        """What llama.cpp computes from a file."""
        return self.fit(lambda w: torch.from_numpy(logits(file, [w.tolist()])[0]))

    @torch.no_grad()
    def fit(self, logits_of: Callable[[Tensor], Tensor]) -> Fit:
        """Predictions of the held-out windows beside the original's, one window at a time."""
        kls, losses = [], []
        for window, right in zip(self.heldout, self.right, strict=True):
            p = right.double().log_softmax(-1)
            q = logits_of(window).double().log_softmax(-1)
            kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
            losses.append(float(-q[:-1].gather(1, window[1:, None]).mean()))
        stderr = float(np.std(kls, ddof=1) / len(kls) ** 0.5)
        return Fit(float(np.mean(kls)), stderr, float(np.exp(np.mean(losses))))


def our_name(kind: str) -> str:
    """A type of llama.cpp as our formats call it: `q4_0` is `int4-g32`."""
    return GGML_TWINS.get(kind, kind)


def counted(kinds: Iterable[str]) -> str:
    """How many of which: `180 q4_0, 30 q3_k`."""
    return ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).most_common())


@torch.no_grad()
def model_logits(model: Any, windows: Tensor) -> Tensor:
    """Logits, float32 [W, T, V]."""
    return torch.cat([model(w[None]).logits.float() for w in windows])


def made_bench(args: argparse.Namespace) -> Bench:
    """The model and its texts."""
    source = load_source(args.model, "cpu", "float32", cache=args.cache)
    texts = {"calibration": "demo", "heldout": "demo"}
    with tempfile.TemporaryDirectory() as folder:
        if args.text is not None:
            parts = cut_text(args.text.read_text(encoding="utf-8"))
            for role in texts:
                texts[role] = str(Path(folder) / f"{role}.txt")
                Path(texts[role]).write_text(parts[role], encoding="utf-8")
        counts = {"calibration": args.calibration_samples, "heldout": args.windows}
        windows = {
            role: read_text(source, text, role, counts[role], args.seq_len, 0).tokens
            for role, text in texts.items()
        }
    right = model_logits(source.map.model, windows["heldout"])
    return Bench(source, windows["calibration"], windows["heldout"], right)


def uniform_rows(bench: Bench, kinds: Iterable[str], settings: QuantSettings) -> list[Row]:
    """Every type by llama.cpp's own code, and by descent from there on."""
    rows = []
    for kind in kinds:
        matrices = bench.source.map.inventory.matrices
        plan = {m.name: kind if m.cols % 256 == 0 else SMALL for m in matrices}
        name, assignment = f"{kind}, down {SMALL}", Assignment(plan)
        plain = replace(settings, refine_sweeps=0)
        rows.append(bench.row(name, "llama.cpp", assignment, plain))
        rows.append(bench.row(name, "ours", assignment, settings))
    return rows


def mixed_rows(bench: Bench, args: argparse.Namespace, settings: QuantSettings) -> list[Row]:
    """What llama.cpp's own quantizer makes, and ours in the same types."""
    if not args.mixes:
        return []
    plain = {m.name: "bf16" for m in bench.source.map.inventory.matrices}
    with tempfile.TemporaryDirectory() as folder:
        bench.write(Assignment(plain), QuantSettings(method="rtn"), Path(folder))
        quantizer = LlamaQuantizer(args.quantizer)
        file = Path(folder) / MODEL_FILE
        ours = None if args.no_ours else settings
        rows = [bench.mix(name, quantizer, file, ours) for name in args.mixes]
    return [row for of_mix in rows for row in of_mix]


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""

    def fit(found: Mapping[str, Any] | None) -> str:
        return "" if found is None else f"{found['kl']:.6f} +- {found['kl_stderr']:.6f}"

    error = row["output_error"]
    return [
        *(row["name"], row["rounding"], f"{row['bits_per_weight']:.3f}", str(row["file_bytes"])),
        "" if error is None else f"{error:.5f}",
        *(fit(row["dequantized"]), fit(row["served"]), f"{row['served']['perplexity']:.2f}"),
        f"{row['seconds']:.0f}",
    ]


HEAD = ("types", "rounding", "bits", "bytes", "output error", "KL", "KL by llama.cpp") + (
    "perplexity by llama.cpp",
    "CPU s",
)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--cache", type=Path, help="of decoded GGUF files; the default is ours")
    parser.add_argument("--text", type=Path, help="plain text; default: the demo's books")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--configs", type=Path, nargs="*", default=[])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--mixes", nargs="*", default=[], help="of llama-quantize: Q2_K, IQ4_XS")
    parser.add_argument("--quantizer", type=Path, help="folder of libllama, for --mixes")
    parser.add_argument("--no-ours", action="store_true", help="mixes of llama.cpp alone")
    parser.add_argument("--n-starts", type=int, default=2, help="of our quantizer")
    parser.add_argument("--refine-sweeps", type=int, default=3, help="of our quantizer")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.mixes and args.quantizer is None:
        parser.error("--mixes needs --quantizer")
    return args


def main() -> None:
    """Measure all rows."""
    args = parsed()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("alphaquant").setLevel(logging.WARNING)
    bench = made_bench(args)
    ours = QuantSettings(n_starts=args.n_starts, refine_sweeps=args.refine_sweeps)
    rows = [*uniform_rows(bench, args.types, ours), *mixed_rows(bench, args, ours)]
    for path in args.configs:
        plan = resolve(load_config(path), bench.source.map.inventory).assignment
        rows.append(bench.row(path.parent.name, "ours", plan, ours))
    original = bench.computed(bench.source.map.model)
    settings = {k: str(v) for k, v in vars(args).items()}
    found = {
        **{"model": bench.source.facts(), "windows": args.windows, "settings": settings},
        "original_perplexity": original.perplexity,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(found | run_facts("cpu"), indent=1)
    # places on this machine are no facts
    for path in map(Path, (args.model, args.text or "", args.quantizer or "", *args.configs)):
        text = text.replace(f"{path.parent}/", "") if path.is_absolute() else text
    args.out.write_text(text + "\n")
    print(markdown(list(HEAD), [cells(row) for row in found["rows"]]))


if __name__ == "__main__":
    main()
