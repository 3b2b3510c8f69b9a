"""GPTQ of a few experts of OLMoE's size: our processor seconds beside llm-compressor's.

    python benchmarks/gptq_time.py --peer-python PYTHON --out benchmarks/results/gptq-time.json

Weights and inputs are random; the inputs have correlations, so that GPTQ has something to do. Both
get the same weights and the same Hessians and round to int4-g128 on one thread. llm-compressor
does each projection for itself, as it does in a model, and is given its scales (largest value of
a group over 7.5), which it is not timed for. Ours share the factor of gate and up. PYTHON is an
interpreter with llmcompressor; it runs this file with `--worker`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

N_EXPERTS, HIDDEN, WIDTH, N_TOKENS = 4, 2048, 1024, 8192
BITS, GROUP, SEED, REPEATS = 4, 128, 0, 3
FORMAT = f"int{BITS}-g{GROUP}"


@dataclass(frozen=True)
class Timed:
    """One way to round the experts.

    Attributes:
        name: whose.
        cpu_seconds: lowest of `REPEATS`, all threads.
        output_error: tr(D H D') / tr(W H W') over all matrices.
    """

    name: str
    cpu_seconds: float
    output_error: float


def drawn() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by `expert.projection` and Hessians by `expert.inputs`, float32."""
    generator = torch.Generator().manual_seed(SEED)
    weights, hessians = {}, {}
    for expert in range(N_EXPERTS):
        for inputs, n_cols in (("hidden", HIDDEN), ("inner", WIDTH)):
            mix = torch.randn(n_cols, n_cols, generator=generator) / n_cols**0.5
            drawn_inputs = torch.randn(N_TOKENS, n_cols, generator=generator) @ mix
            hessians[f"{expert}.{inputs}"] = drawn_inputs.T @ drawn_inputs
        for name in ("gate", "up", "down"):
            shape = (HIDDEN, WIDTH) if name == "down" else (WIDTH, HIDDEN)
            weights[f"{expert}.{name}"] = 0.02 * torch.randn(*shape, generator=generator)
    return weights, hessians


def inputs_of(name: str) -> str:
    """The Hessian of a matrix."""
    expert, projection = name.split(".")
    return f"{expert}.{'inner' if projection == 'down' else 'hidden'}"


def error_of(found: dict[str, Tensor]) -> float:
    """Relative output error of all matrices together."""
    weights, hessians = drawn()
    lost = signal = 0.0
    for name, weight in weights.items():
        hessian, delta = hessians[inputs_of(name)], weight - found[name].float()
        lost += float(((delta @ hessian) * delta).sum())
        signal += float(((weight @ hessian) * weight).sum())
    return lost / signal


def timed(name: str, run: Any) -> Timed:
    """The lowest time of a few, after one that is not counted, and what was found."""
    found, seconds = run(), []
    for _ in range(REPEATS):
        started = time.process_time()
        found = run()
        seconds.append(time.process_time() - started)
    return Timed(name, min(seconds), error_of(found))


def ours() -> list[Timed]:
    """Plain GPTQ, and what searches do with `--effort quick` and by default (one-sided)."""
    from alphaquant.quant.engine import quantize_batches
    from alphaquant.quant.hessian import HessianBatch
    from alphaquant.spaces.units import Matrix
    from alphaquant.specs.quantizer import QuantSettings

    weights, hessians = drawn()
    matrices = {
        name: Matrix(name, *weight.shape, "expert", 0, int(name[0]))
        for name, weight in weights.items()
    }

    def batch(inputs: str) -> HessianBatch:
        stacks = [
            tuple(m for n, m in matrices.items() if inputs_of(n) == f"{expert}.{inputs}")
            for expert in range(N_EXPERTS)
        ]
        summed = torch.stack([hessians[f"{expert}.{inputs}"] for expert in range(N_EXPERTS)])
        kinds = ("routing_weighted",) * N_EXPERTS
        return HessianBatch(tuple(stacks), summed, (N_TOKENS,) * N_EXPERTS, kinds)

    batches = [batch("hidden"), batch("inner")]

    class Weights:
        def view(self, name: str) -> Tensor:
            return weights[name]

    found = []
    for name, sweeps, starts in (("GPTQ alone", 0, 1), ("quick", 1, 1), ("default", 3, 2)):
        settings = QuantSettings(refine_sweeps=sweeps, n_starts=starts)

        def run(settings: QuantSettings = settings) -> dict[str, Tensor]:
            items = quantize_batches(Weights(), batches, [FORMAT], settings)
            return {item.matrix.name: item.packed.dequantize() for item in items}

        found.append(timed(f"ours, {name}", run))
    return found


def llm_compressor() -> list[Timed]:
    """llm-compressor's function for one or more modules, as its modifier calls it."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    weights, hessians = drawn()
    asked = QuantizationArgs(
        num_bits=BITS, symmetric=True, strategy="group", group_size=GROUP, actorder="static"
    )

    def together(names: list[str]) -> dict[str, Tensor]:
        weight = torch.stack([weights[name] for name in names])
        hessian = torch.stack([hessians[inputs_of(name)] for name in names])
        scale = weight.unflatten(-1, (-1, GROUP)).abs().amax(-1) / 7.5
        zero = torch.zeros_like(scale)
        found = quantize_weight(weight, hessian, scale, zero, None, asked)[0]
        return dict(zip(names, found, strict=True))

    def one_by_one(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: weight for own in names for name, weight in together([own]).items()}

    def batched() -> dict[str, Tensor]:
        wide = [name for name in weights if not name.endswith("down")]
        return together(wide) | together([name for name in weights if name.endswith("down")])

    return [
        timed("llm-compressor, one by one", lambda: one_by_one(weights)),
        timed("llm-compressor, of one shape together", batched),
    ]


def main() -> None:
    """Measure both and print a table."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--worker"]:
        Path(sys.argv[2]).write_text(json.dumps([asdict(row) for row in llm_compressor()]))
        return
    from release import parse_with_out, run_facts

    from alphaquant.reports.tables import markdown

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="an interpreter with llmcompressor")
    args = parse_with_out(parser)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        subprocess.run([args.peer_python, __file__, "--worker", str(file)], check=True)
        rows = [Timed(**row) for row in json.loads(file.read_text())]
    rows = [*ours(), *rows]
    sizes = {"experts": N_EXPERTS, "hidden": HIDDEN, "width": WIDTH, "tokens": N_TOKENS}
    listing = "import importlib.metadata as m; print(m.version('llmcompressor'))"
    peer = subprocess.run(
        [args.peer_python, "-c", listing], capture_output=True, text=True, check=True
    ).stdout.strip()
    facts = {"rows": [asdict(row) for row in rows], "format": FORMAT, "seed": SEED, **sizes}
    facts |= {"llmcompressor": peer, **run_facts("cpu")}
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    least = next(row for row in rows if row.name.startswith("llm-compressor"))
    cells = [
        [
            r.name,
            f"{r.cpu_seconds:.2f}",
            f"{r.cpu_seconds / least.cpu_seconds:.2f}",
            f"{r.output_error:.6f}",
        ]  # fmt: skip
        for r in rows
    ]
    print(markdown(["", "processor seconds", "ratio", "output error"], cells))


if __name__ == "__main__":
    main()
