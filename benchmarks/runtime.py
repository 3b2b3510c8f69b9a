"""What packed models cost to run on the CPU: text made per second, memory, experts by group.

    python benchmarks/runtime.py --out benchmarks/results/runtime-demo.json

Generation: the original, the packed model, and the packed model that keeps dequantized weights up
to some sizes, taking turns at making the same number of tokens greedily. The ratio is the median
over the turns of the quotient to the original within one turn. The packed model has the formats
of the default menu in turns, matrix after matrix, rounded to nearest: speed does not depend on how
well numbers were rounded. Every variant makes the same text once before it is measured, and of the
kept weights what was found and made is counted in the measured turns only. Memory is that of a
process of its own: peak of resident memory while it loads and makes the text of the first batch
size, above what was resident before it; a tiny model made text there first, so that libraries and
their buffers are not counted (Linux).

Experts: one layer of random routing. One call with all tokens, which runs each expert once, beside
a loop that gives the same module one token at a time; both with packed weights, and both with all
weights kept dequantized.

Seconds are the processor's, which other work on the machine changes little; with one thread
they are those of a quiet machine. Prints two tables and writes JSON with provenance.
"""

import argparse
import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from evaluators import extra_memory
from release import parse_with_out, run_facts
from torch import Tensor, nn

from alphaquant.models.loading import load_model
from alphaquant.models.mapping import map_model
from alphaquant.models.sites import ModelMap
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.modules import PackedExperts, cache_dequantized
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.menus import DEFAULT_MENU
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.inputs import load_source, model_location, read_text
from alphaquant.testing.models import VOCABULARY, tiny_model

logger = logging.getLogger("runtime")

ORIGINAL, PACKED = "original", "packed"


@dataclass(frozen=True)
class Speed:
    """Text made by one variant of the model.

    Attributes:
        name: of the variant.
        batch_size: texts at once.
        tokens_per_second: new tokens of all texts, median over the turns.
        ratio: to the original, median over the turns.
        found: share of the uses of a matrix that found its weight; None without kept weights.
        peak_bytes: resident memory, see the top; None where it cannot be measured.
    """

    name: str
    batch_size: int
    tokens_per_second: float
    ratio: float
    found: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Grouping:
    """Experts by group beside a loop over tokens, seconds of the processor.

    Attributes:
        weights: `packed` or `kept`.
        grouped_seconds: of one call with all tokens, median.
        loop_seconds: of one call per token.
        ratio: loop to grouped.
    """

    weights: str
    grouped_seconds: float
    loop_seconds: float
    ratio: float


def write_packed(model_map: ModelMap, target: Path) -> Path:
    """A packed checkpoint with the formats of the default menu in turns, rounded to nearest."""
    matrices = model_map.inventory.matrices
    formats = {m.name: DEFAULT_MENU[i % len(DEFAULT_MENU)] for i, m in enumerate(matrices)}
    settings = QuantSettings(method="rtn")
    return quantize_to_checkpoint(
        PackingJob(model_map, Assignment(formats), settings), target, facts={}
    ).path


def open_variant(name: str, original: str, packed: Path) -> Any:
    """A model by its name: `original`, `packed` or a size such as `8MiB` for the packed one."""
    if name == ORIGINAL:
        return load_model(model_location(original))
    model = load(packed)
    if name != PACKED:
        cache_dequantized(model, name)
    return model


def generate(model: Any, prompts: Tensor, n_new: int) -> Tensor:
    """Greedy text, int64 [B, T + n_new], for prompts int64 [B, T]."""
    made: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
    )
    return made


def measure_speeds(
    models: dict[str, Any], prompts: Tensor, n_new: int, n_turns: int, peaks: dict[str, int | None]
) -> list[Speed]:
    """Speed of every variant on prompts int64 [B, T]; `peaks` holds their memory."""
    stores = {name: store_of(model) for name, model in models.items()}
    texts = {name: generate(model, prompts, n_new) for name, model in models.items()}
    for name in models:
        if name != ORIGINAL and not torch.equal(texts[name], texts[PACKED]):
            raise RuntimeError(f"{name} makes another text than {PACKED}")
    before = {name: (s.n_found, s.n_made) if s else (0, 0) for name, s in stores.items()}
    turns = [
        {n: seconds_of(functools.partial(generate, m, prompts, n_new)) for n, m in models.items()}
        for _ in range(n_turns)
    ]
    rows = []
    for name, store in stores.items():
        found = None
        if store is not None:
            n_found, n_made = store.n_found - before[name][0], store.n_made - before[name][1]
            found = n_found / (n_found + n_made)
        rate = statistics.median(n_new * len(prompts) / turn[name] for turn in turns)
        ratio = statistics.median(turn[ORIGINAL] / turn[name] for turn in turns)
        rows.append(Speed(name, len(prompts), rate, ratio, found, peaks.get(name)))
        logger.info("%s, %d texts: %.1f tokens/s", name, len(prompts), rate)
    return rows


def store_of(model: nn.Module) -> Any:
    """The store of kept weights that a model's modules share, or None."""
    found = (getattr(module, "cache", None) for module in model.modules())
    return next((store for store in found if store is not None), None)


def seconds_of(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def peak_memory(name: str, original: str, packed: Path, prompts: Tensor, n_new: int) -> int | None:
    """Bytes that a process of its own takes for a variant; None outside Linux."""
    with tempfile.TemporaryDirectory(prefix="alphaquant-runtime-") as folder:
        file = Path(folder) / "prompts.pt"
        torch.save(prompts, file)
        words = ["--memory-of", name, "--packed", str(packed), "--prompts", str(file)]
        done = subprocess.run(
            [sys.executable, __file__, *words, "--model", original, "--new-tokens", str(n_new)],
            capture_output=True,
            text=True,
            check=True,
        )
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def print_memory(args: argparse.Namespace) -> None:
    """Print the bytes of one variant; what the process of `peak_memory` does."""
    prompts = torch.load(args.prompts)
    with tempfile.TemporaryDirectory(prefix="alphaquant-runtime-") as folder:
        tiny = load(write_packed(map_model(tiny_model("olmoe")), Path(folder) / "tiny"))
    generate(tiny, prompts % VOCABULARY, 2)

    def run() -> None:
        model = open_variant(args.memory_of, args.model, Path(args.packed))
        generate(model, prompts, args.new_tokens)

    print(extra_memory(run))


@torch.no_grad()
def measure_grouping(
    folder: Path, n_tokens: int, n_experts: int, hidden: int, n_turns: int
) -> list[Grouping]:
    """One call for all tokens beside one call per token, 8 experts per token.

    Args:
        folder: where a packed layer is written.
        n_tokens: in the call and in the loop.
        n_experts: of the layer.
        hidden: features; experts are half as wide.
        n_turns: how often the one call is measured; the loop runs once.
    """
    model = tiny_model(
        "olmoe",
        hidden_size=hidden,
        intermediate_size=hidden // 2,
        num_experts=n_experts,
        num_experts_per_tok=8,
        num_hidden_layers=1,
    )
    packed = load(write_packed(map_model(model), folder / "layer"))
    experts = next(m for m in packed.modules() if isinstance(m, PackedExperts))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, hidden, generator=generator)
    ids = torch.rand(n_tokens, n_experts, generator=generator).topk(8).indices
    weights = torch.rand(n_tokens, 8, generator=generator)

    def loop() -> None:
        for t in range(n_tokens):
            experts(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])

    rows = []
    for name, size in (("packed", 0), ("kept", 4 * 3 * n_experts * hidden * hidden // 2)):
        cache_dequantized(packed, size)
        experts(x, ids, weights)
        together = functools.partial(experts, x, ids, weights)
        grouped = statistics.median(seconds_of(together) for _ in range(n_turns))
        alone = seconds_of(loop)
        logger.info("%s: one call %.3f s, loop %.3f s", name, grouped, alone)
        rows.append(Grouping(name, grouped, alone, alone / grouped))
    return rows


def speeds_table(rows: list[Speed]) -> str:
    """Speeds as Markdown."""
    head = ["", "texts", "tokens per second", "of the original", "weights found", "peak MB"]
    cells = [
        [
            row.name if row.name in (ORIGINAL, PACKED) else f"packed, {row.name} kept",
            str(row.batch_size),
            f"{row.tokens_per_second:.1f}",
            f"{row.ratio:.2f}",
            "" if row.found is None else f"{100 * row.found:.1f} %",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        ]
        for row in rows
    ]
    return markdown(head, cells)


def grouping_table(rows: list[Grouping]) -> str:
    """Grouped experts as Markdown."""
    head = ["weights", "one call, seconds", "one call per token, seconds", "ratio"]
    cells = [
        [r.weights, f"{r.grouped_seconds:.3f}", f"{r.loop_seconds:.2f}", f"{r.ratio:.1f}"]
        for r in rows
    ]
    return markdown(head, cells)


def parse() -> argparse.Namespace:
    """The command line; the last three are for `peak_memory`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kept", nargs="+", default=["4MiB", "8MiB", "16MiB", "32MiB"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    for name in ("--memory-of", "--packed", "--prompts"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    if "--memory-of" in sys.argv:
        return parser.parse_args()
    return parse_with_out(parser)


def main() -> None:
    """Run and print."""
    args = parse()
    if args.memory_of:
        print_memory(args)
        return
    source = load_source(args.model, "cpu", "auto")
    text = read_text(source, "demo", "heldout", max(args.batch_sizes), args.prompt_tokens, 0)
    names = [ORIGINAL, PACKED, *args.kept]
    with tempfile.TemporaryDirectory(prefix="alphaquant-runtime-") as folder:
        packed = write_packed(source.map, Path(folder) / "packed")
        models = {name: open_variant(name, args.model, packed) for name in names}
        first = text.tokens[: args.batch_sizes[0]]
        peaks = {n: peak_memory(n, args.model, packed, first, args.new_tokens) for n in names}
        speeds: list[Speed] = []
        for size in args.batch_sizes:
            prompts = text.tokens[:size]
            known = peaks if size == args.batch_sizes[0] else {}
            speeds += measure_speeds(models, prompts, args.new_tokens, args.turns, known)
        n_bytes = quantized_bytes(packed)
        sizes = (args.expert_tokens, args.experts, args.hidden)
        grouping = measure_grouping(Path(folder), *sizes, args.turns)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "packed", "prompts")}
    result = {
        "speeds": [asdict(row) for row in speeds],
        "grouping": [asdict(row) for row in grouping],
        "quantized_bytes": n_bytes,
        "quantizable_weights": source.map.inventory.n_weights,
        "settings": settings,
        "model": source.facts(),
        "text": text.provenance(),
        **run_facts("cpu"),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{speeds_table(speeds)}\n\n{grouping_table(grouping)}")


if __name__ == "__main__":
    main()
