"""Text per second of a whole model on a GPU: bfloat16 in transformers beside packed with kernels.

    python benchmarks/generate.py --device cuda --out FILE
    python benchmarks/generate.py --device cpu --tiny --out FILE

The model is OLMoE-1B-7B's configuration with random weights, made on the device. Packed: four
formats in turns, rounded to nearest, to `--bits` per quantized weight; gate and up of an expert
share a format. More formats (`--formats`) are more launches per layer. Speed does not depend on
the values of weights, except for how evenly a random router loads the experts.

Greedy decoding with a static cache, as transformers compiles it (`compiled`) and without
(`eager`). Prefill is the time to the first new token. Tokens per second are those after it: new
tokens of all texts less one each, in the time of a run less the time to the first token, medians
over the turns. Every variant makes the same text once before it is measured. Peak memory is what
torch had allocated on the device at most, weights included. A variant that cannot run is a row
with its error. With `--tiny` a tiny model takes all the same steps, and nothing is timed: times of
an interpreter on a CPU would mean nothing.

FILE is JSON with provenance, complete after every row. Prints a Markdown table.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from kernel_shapes import UNIFORM
from release import commit, parse_with_out
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from alphaquant.files import whole_file
from alphaquant.models.mapping import map_model
from alphaquant.provenance import device_facts, versions
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load, quantized_bytes
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs.quantizer import QuantSettings

logger = logging.getLogger("generate")

BFLOAT16, PACKED = "bfloat16", "packed"
COMPILED, EAGER = "compiled", "eager"

Clock = Callable[[Callable[[], object]], float | None]


@dataclass(frozen=True)
class Sizes:
    """Texts and how often they are made.

    Attributes:
        prompt_tokens: of each prompt.
        new_tokens: of each text, at least two.
        turns: how often a run is timed.
    """

    prompt_tokens: int
    new_tokens: int
    turns: int


@dataclass(frozen=True)
class Row:
    """One model, way of decoding and batch size; None where nothing was timed.

    Attributes:
        model: `bfloat16` or `packed`.
        mode: `compiled` or `eager`.
        batch_size: texts at once.
        tokens_per_second: of all texts, after the first token of each.
        prefill_seconds: to the first token.
        peak_bytes: on the device.
        is_compiled: whether transformers did compile the model.
        error: why there are no numbers; empty if there are.
    """

    model: str
    mode: str
    batch_size: int
    tokens_per_second: float | None
    prefill_seconds: float | None
    peak_bytes: int | None
    is_compiled: bool | None
    error: str = ""


def olmoe_config(n_experts: int, *, is_tiny: bool) -> OlmoeConfig:
    """The configuration of allenai/OLMoE-1B-7B, with another number of experts, or a tiny one."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_experts": n_experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 50304,
    }
    if is_tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
        sizes |= {"num_experts": 2, "num_experts_per_tok": 1, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 4, "vocab_size": 128}
    # No text ends before its length.
    return OlmoeConfig(**sizes, max_position_embeddings=4096, eos_token_id=None)


def make_model(config: OlmoeConfig, device: str) -> Any:
    """Random weights in bfloat16, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train(False)


def mixed_formats(inventory: Inventory, bits: float, menu: Sequence[str]) -> Assignment:
    """Formats of the menu in turns, so that the stored bits per weight come close to a number.

    While there are more bits than that so far, the next matrix gets the next format of those with
    at most as many; else of the others. Gate and up of an expert get the same.

    Args:
        inventory: of the model.
        bits: per weight, scales and zero points included.
        menu: names of formats, some with at most and some with more than `bits`.

    Raises:
        ValueError: all formats are on one side of `bits`.
    """
    low = [name for name in menu if parse_format(name).nominal_bits <= bits]
    high = [name for name in menu if name not in low]
    if not low or not high:
        raise ValueError(f"{', '.join(menu)} cannot be mixed to {bits:g} bits")
    turns = {True: cycle(low), False: cycle(high)}
    chosen: dict[tuple[object, ...], str] = {}
    formats: dict[str, str] = {}
    n_bits = n_weights = 0
    for matrix in inventory.matrices:
        key = _coupled(matrix)
        if key not in chosen:
            chosen[key] = next(turns[n_bits > bits * n_weights])
        formats[matrix.name] = chosen[key]
        n_bits += matrix.storage_bits(parse_format(chosen[key]))
        n_weights += matrix.n_weights
    return Assignment(formats)


def _coupled(matrix: Matrix) -> tuple[object, ...]:
    """What must have one format: gate and up of an expert, or a matrix by itself."""
    is_gated = matrix.projection in ("gate_proj", "up_proj")
    if matrix.expert is None or not is_gated:
        return (matrix.name,)
    return (matrix.layer, matrix.expert)


def device_clock(run: Callable[[], object]) -> float:
    """Seconds of a call until the device has done its work."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def no_clock(run: Callable[[], object]) -> None:
    """Runs and times nothing."""
    run()


def decode(model: Any, prompts: Tensor, mode: str, n_new: int) -> Tensor:
    """Greedy text, int64 [B, T + n_new], for prompts int64 [B, T]."""
    made: Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=mode == EAGER,
    )
    return made


def measure(
    name: str, model: Any, clock: Clock, sizes: Sizes, batch_sizes: Sequence[int]
) -> Iterator[Row]:
    """Every batch size, eager and then compiled; errors of the device and compiler are rows."""
    for mode in (EAGER, COMPILED):
        for batch_size in batch_sizes:
            try:
                yield _measure_row(name, model, mode, clock, sizes, batch_size)
            except RuntimeError as error:
                text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                yield Row(name, mode, batch_size, None, None, None, None, text)


def _measure_row(
    name: str, model: Any, mode: str, clock: Clock, sizes: Sizes, batch_size: int
) -> Row:
    generator = torch.Generator().manual_seed(batch_size)
    shape = (batch_size, sizes.prompt_tokens)
    high = model.config.vocab_size
    prompts = torch.randint(1, high, shape, generator=generator).to(model.device)
    run = partial(decode, model, prompts, mode)
    made = run(sizes.new_tokens)
    if made.shape != (batch_size, sizes.prompt_tokens + sizes.new_tokens):
        raise RuntimeError(f"made {list(made.shape)} tokens")
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = [
        (clock(partial(run, 1)), clock(partial(run, sizes.new_tokens))) for _ in range(sizes.turns)
    ]
    timed = [(first, whole) for first, whole in seconds if first is not None and whole is not None]
    rate = prefill = None
    if timed:
        prefill = statistics.median(first for first, _ in timed)
        decoding = statistics.median(whole for _, whole in timed) - prefill
        rate = batch_size * (sizes.new_tokens - 1) / decoding
    peak = None
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
    # What transformers keeps of a model that it compiled.
    is_compiled = mode == COMPILED and hasattr(model, "_compiled_call")
    return Row(name, mode, batch_size, rate, prefill, peak, is_compiled)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with the ratio to bfloat16 in the same mode and batch size."""
    base = {(r.mode, r.batch_size): r.tokens_per_second for r in rows if r.model == BFLOAT16}
    head = ["model", "decoding", "texts", "tokens per second", "of bfloat16"]
    head += ["prefill ms", "peak GB", ""]
    cells = []
    for row in rows:
        rate, other = row.tokens_per_second, base.get((row.mode, row.batch_size))
        prefill, peak = row.prefill_seconds, row.peak_bytes
        cells.append(
            [
                *(row.model, row.mode, str(row.batch_size)),
                "" if rate is None else f"{rate:.1f}",
                "" if rate is None or other is None else f"{rate / other:.2f}",
                "" if prefill is None else f"{1e3 * prefill:.1f}",
                "" if peak is None else f"{peak / 1e9:.2f}",
                row.error
                or ("not compiled" if row.mode == COMPILED and not row.is_compiled else ""),
            ]
        )
    return markdown(head, cells)


_SIZES = {"batch_sizes": [1, 8, 32], "prompt_tokens": 128, "new_tokens": 128, "turns": 3}
# Triton's interpreter takes seconds per token.
_TINY_SIZES = {"batch_sizes": [1, 2], "prompt_tokens": 4, "new_tokens": 3, "turns": 1}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny model; on a CPU without times")
    parser.add_argument("--experts", type=int, default=64, help="per layer")
    parser.add_argument("--bits", type=float, default=4.25, help="per quantized weight")
    parser.add_argument("--formats", nargs="+", default=list(UNIFORM))
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="default 1 8 32, tiny 1 2")
    parser.add_argument("--prompt-tokens", type=int, help="default 128, tiny 4")
    parser.add_argument("--new-tokens", type=int, help="default 128, tiny 3")
    parser.add_argument("--turns", type=int, help="default 3, tiny 1")
    args = parse_with_out(parser)
    for name, value in (_TINY_SIZES if args.tiny else _SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    is_cuda = args.device.startswith("cuda")
    if (not is_cuda and not args.tiny) or (is_cuda and not torch.cuda.is_available()):
        parser.error(
            f"--device {args.device} cannot be timed here: a CUDA GPU and --device cuda are "
            "needed; without one give --device cpu --tiny, which runs every step and times nothing"
        )
    if args.new_tokens < 2:
        parser.error(f"--new-tokens is {args.new_tokens}; at least 2, or there is no decoding")
    return args


def prepare(args: argparse.Namespace, target: Path) -> tuple[Any, dict[str, Any]]:
    """The bfloat16 model, a packed checkpoint of it at `target`, and what the rows depend on."""
    model = make_model(olmoe_config(args.experts, is_tiny=args.tiny), args.device)
    model_map = map_model(model)
    assignment = mixed_formats(model_map.inventory, args.bits, args.formats)
    settings = QuantSettings(method="rtn")
    quantize_to_checkpoint(PackingJob(model_map, assignment, settings), target, facts={})
    return model, provenance(args) | {
        "bits_per_weight": assignment.count_bits(model_map.inventory).bits_per_weight,
        "quantized_weights": model_map.inventory.n_weights,
        "quantized_bytes": quantized_bytes(target),
        "bfloat16_experts": model.config._experts_implementation,
    }


def run(args: argparse.Namespace) -> list[Row]:
    """Measure one model after the other, and write after every row."""
    is_cuda = args.device.startswith("cuda")
    clock: Clock = device_clock if is_cuda else no_clock
    sizes = Sizes(args.prompt_tokens, args.new_tokens, args.turns)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="alphaquant-generate-") as folder:
        packed = Path(folder) / "packed"
        model, facts = prepare(args, packed)
        for name in (BFLOAT16, PACKED):
            if name == PACKED:
                del model  # its memory is not the packed one's
                gc.collect()
                if is_cuda:
                    torch.cuda.empty_cache()
                model = load(packed, args.device, kernels=True)
            for row in measure(name, model, clock, sizes, args.batch_sizes):
                logger.info("%s, %s, %d texts", row.model, row.mode, row.batch_size)
                rows.append(row)
                write(args.out, rows, facts)
    return rows


def write(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Replace the result file."""
    with whole_file(path) as part:
        part.write_text(
            json.dumps({"rows": [asdict(row) for row in rows], **facts}, indent=1) + "\n"
        )


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Settings, versions, commit and device."""
    return {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "versions": versions() | {"triton": version("triton"), "cuda": torch.version.cuda},
        "commit": commit(),
        **device_facts(args.device),
    }


def main() -> None:
    """Run and print."""
    args = parse()
    if not args.device.startswith("cuda"):
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are loaded
    print(table(run(args)))


if __name__ == "__main__":
    main()
