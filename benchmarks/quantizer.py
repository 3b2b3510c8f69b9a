"""How good the quantizer is at one format: divergence of a uniformly quantized model.

On the demo model, for each format: round-to-nearest, plain GPTQ (no routing weights, no pooling,
no refinement), plain GPTQ with one option changed at a time, the one-sided default in one pass and
with refinement, and two-sided rounding, which is the default of commands; each quantized from
calibration text in its own process through the pipeline, loaded from its packed checkpoint and
measured on held-out text. With `--peer-python` other quantizers are run on the same windows
(`peers.py`), their weights put into our model and measured by the same code. As a smoke run every
family's tiny random model follows, on random tokens.

    python benchmarks/quantizer.py demo --out benchmarks/results/quantizer-demo.json
    python benchmarks/quantizer.py demo --formats int4-g128 --peer-python PYTHON --out result.json
    python benchmarks/quantizer.py demo --quick --out result.json
    python benchmarks/quantizer.py layer --out benchmarks/results/quantizer-layer.json

Prints tables in Markdown and writes JSON with provenance. It searches nothing: that is
`release.py`.
"""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from peers import Clock, peak_memory
from quantizer_layer import LayerShape, layer_text, measure_layer
from quantizer_peers import (
    PEER_METHODS,
    PEER_NOTES,
    PeerError,
    check_weights,
    job_key,
    peer_job,
    peer_versions,
    read_weights,
    run_peer,
)
from release import BOOKS, run_facts
from safetensors.torch import load_file, save_file
from torch import nn

from alphaquant.costs.fisher import CostSettings
from alphaquant.costs.output_gradients import measure_output_hessians
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.teacher import open_teacher, store_teacher
from alphaquant.models.mapping import map_model
from alphaquant.reports.tables import markdown
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.pipeline import PackingJob, quantize_to_checkpoint
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.quantizer import QuantSettings, ScaleSearch
from alphaquant.specs.texts import TextSpec
from alphaquant.studies.inputs import cache_dir, load_source, model_location, read_text
from alphaquant.testing.models import FAMILIES, tiny_model, tiny_tokens
from alphaquant.texts.windows import token_digest

logger = logging.getLogger("quantizer")

FORMATS = tuple(
    parse_format(name).name
    for name in (
        *("int2-g64", "int2-g64-asym", "int3-g128", "int3-g128-asym"),
        *("int4-g128", "int4-g128-asym", "mxfp4", "nvfp4", "mxfp6", "fp8"),
    )
)
PEER_FORMATS = FORMATS[:8]
FAMILY_FORMATS = ("int3-g32-asym", "int4-g128", "mxfp4")
FAMILY_VARIANTS = ("rtn mse", "gptq", "default")
QUICK_VARIANTS = ("rtn mse", "gptq", "default")

ONE_PASS = "default, one pass"
OPTIONS: dict[str, tuple[Any, ...]] = {
    "scale_search": get_args(ScaleSearch),
    "actorder": (False, True),
    "static_groups": (False, True),
    "route_exponent": (0, 1, 2),
    "pooled_tokens": (0, 512),
    "percdamp": (0.01, 0.001, 0.1),
    "sequential": (False, True),
    "refine_sweeps": (0, 1, 3),
    "n_starts": (1, 2),
}
"""Options and their values; plain GPTQ has the first of each, but for scale_search mse."""


@dataclass(frozen=True)
class Row:
    """One quantized model on held-out text.

    Attributes:
        method: name of a variant or a peer's method.
        format: canonical name.
        bits_per_weight: stored bits over the quantized matrices.
        options: settings of ours, options of a peer.
        seconds: wall time of quantization with calibration; ours also writes the checkpoint. None
            if it failed.
        cpu_seconds: processor time of the same, all threads; other work on the machine changes it
            less.
        peak_memory_bytes: of the process until quantization was done.
        memory_before_bytes: the same before it began, imports and model; None for peers.
        kl: to the original, nats per token, with its standard error over windows.
        same_top: share of positions with the same first token.
        perplexity: of the text.
        notes: what else is known, such as fallbacks, versions of a peer, values per group.
        error: why there is no number; empty if there is.
    """

    method: str
    format: str
    bits_per_weight: float
    options: Mapping[str, Any]
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    memory_before_bytes: int | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    same_top: float | None = None
    perplexity: float | None = None
    notes: Mapping[str, Any] | None = None
    error: str = ""


def variants() -> dict[str, QuantSettings]:
    """Our methods by name: RTN, plain GPTQ, one option changed at a time, the default."""
    known = {f.name for f in fields(QuantSettings)}
    options = {k: v for k, v in OPTIONS.items() if k in known}
    plain = replace(QuantSettings(), **{name: values[0] for name, values in options.items()})
    plain = replace(plain, scale_search="mse")
    found = {
        "rtn minmax": QuantSettings(method="rtn", scale_search="minmax"),
        "rtn mse": QuantSettings(method="rtn", scale_search="mse"),
        "gptq": plain,
    }
    for name, values in options.items():
        for value in values:
            if value != getattr(plain, name):
                found[f"gptq, {name}={value}"] = replace(plain, **{name: value})
    found[ONE_PASS] = QuantSettings(refine_sweeps=0, n_starts=1)
    found["default, one start"] = QuantSettings(n_starts=1)
    found["default"] = QuantSettings()
    found["two-sided"] = QuantSettings(two_sided=True)
    return found


def prepare(model: str, folder: Path, data: TextSpec) -> dict[str, Any]:
    """Write the windows and the original's predictions for the workers; facts for the result."""
    source = load_source(model, "cpu", "auto")
    facts: dict[str, Any] = {"model": source.facts()}
    for role, count in (
        ("calibration", data.calibration_samples),
        ("heldout", data.heldout_samples),
    ):
        text = read_text(source, getattr(data, role), role, count, data.seq_len, 0)
        save_file({"tokens": text.tokens}, folder / f"{role}.safetensors")
        facts[role] = text.provenance()
    store_teacher(folder / "teacher.safetensors", source.map.model, _tokens(folder, "heldout"))
    return facts


def measure(model: str, folder: Path, format_name: str, variant: str) -> Row:
    """Quantize a model in this process and measure its checkpoint.

    Args:
        model: as given to `prepare`.
        folder: that `prepare` filled.
        format_name: of all matrices.
        variant: of `variants()`.
    """
    settings = variants()[variant]
    source = load_source(model, "cpu", "auto")
    assignment = uniform_assignment(source.map.inventory, format_name)
    before = peak_memory()
    with tempfile.TemporaryDirectory(prefix="alphaquant-quantizer-") as scratch:
        target = Path(scratch) / "checkpoint"
        tokens = None if settings.method == "rtn" else _tokens(folder, "calibration")
        clock = Clock()
        measured = None
        if tokens is not None:
            measured = partial(
                measure_output_hessians,
                *(source.map, tokens, Path(scratch) / "outputs", CostSettings()),
            )
        job = PackingJob(source.map, assignment, settings, tokens, outputs=measured)
        done = quantize_to_checkpoint(job, target, facts={})
        clock.stop()
        peak = peak_memory()
        scores = _score(load(target), folder)
    counts = assignment.count_bits(source.map.inventory)
    return Row(
        variant,
        format_name,
        counts.bits_per_weight,
        asdict(settings),
        clock.seconds,
        clock.cpu_seconds,
        peak,
        before,
        **scores,
        notes={"n_fallbacks": len(done.fallbacks), "threads": torch.get_num_threads()},
    )


def measure_apart(model: str, folder: Path, format_name: str, variant: str) -> Row:
    """`measure` in a process of its own, whose peak memory is then that of one quantization."""
    worker = [sys.executable, __file__, "one", "--model", model, "--folder", str(folder)]
    worker += ["--format", format_name, "--variant", variant]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(worker, capture_output=True, text=True, env=environment)
    if done.returncode:
        words = (done.stderr.strip() or "no message").splitlines()
        settings = asdict(variants()[variant])
        return Row(variant, format_name, 0.0, settings, error=" | ".join(words[-2:]))
    return Row(**json.loads(done.stdout.splitlines()[-1]))


class Peers:
    """Other quantizers on the model and the windows of a folder."""

    def __init__(self, python: str, cache: Path, model: str, folder: Path) -> None:
        """Load the model once; its weights are replaced by each peer's in turn.

        Raises:
            PeerError: the interpreter cannot be started.
        """
        self._python, self._cache, self._model, self._folder = python, cache, model, folder
        self._source = load_source(model, "cpu", "auto")
        names = [m.name for m in self._source.map.inventory.matrices]
        self._original = {name: self._source.map.view(name).clone() for name in names}
        self._digests = {
            "model": self._source.digest,
            "tokens": token_digest(_tokens(folder, "calibration")),
        }
        self.versions = peer_versions(python)

    @torch.no_grad()
    def measure(self, method: str, format_name: str) -> Row:
        """One peer in one format; a failure is a row with its error."""
        chosen, fmt = PEER_METHODS[method], parse_format(format_name)
        bits = self._source.map.inventory.storage_bits(fmt) / self._source.map.inventory.n_weights
        job = peer_job(
            chosen,
            Path(model_location(self._model)).resolve(),
            self._folder / "calibration.safetensors",
            fmt,
        )
        key = job_key(job, self._digests, self.versions)
        try:
            result = run_peer(self._python, job, self._cache, key)
            weights = read_weights(result)
            n_values = check_weights(weights, self._original, fmt)
        except PeerError as error:
            return Row(method, format_name, bits, job["options"], error=str(error))
        for name in self._original:
            self._source.map.view(name).copy_(weights[name])
        scores = _score(self._source.map.model, self._folder)
        report = result.report
        notes = {
            "peer": chosen.peer,
            "versions": report["versions"],
            "threads": report["threads"],
            "values_per_group": n_values,
            "cache_key": key,
            "is_cached": result.is_cached,
        }
        return Row(
            method,
            format_name,
            bits,
            job["options"],
            report["seconds"],
            report["cpu_seconds"],
            report["peak_memory_bytes"],
            **scores,
            notes=notes,
        )


def measure_families(
    families: Sequence[str] = tuple(FAMILIES),
    formats: Sequence[str] = FAMILY_FORMATS,
    names: Sequence[str] = FAMILY_VARIANTS,
) -> list[dict[str, Any]]:
    """Smoke run on tiny random models and random tokens, in this process."""
    rows = []
    settings = variants()
    for family in families:
        with tempfile.TemporaryDirectory(prefix="alphaquant-quantizer-") as scratch:
            folder = Path(scratch)
            save_file({"tokens": tiny_tokens(4, 32, seed=1)}, folder / "heldout.safetensors")
            model_map = map_model(tiny_model(family))
            store_teacher(
                folder / "teacher.safetensors", model_map.model, _tokens(folder, "heldout")
            )
            for format_name in formats:
                assignment = uniform_assignment(model_map.inventory, format_name)
                for name in names:
                    target = folder / "checkpoint"
                    job = PackingJob(model_map, assignment, settings[name], tiny_tokens(8, 32))
                    quantize_to_checkpoint(job, target, facts={}, overwrite=True)
                    scores = _score(load(target), folder)
                    rows.append(
                        {"family": family, "format": format_name, "method": name, **scores}
                    )
    return rows


def table(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    """Methods by formats in Markdown; the default in one pass is bold."""
    formats = list(dict.fromkeys(r.format for r in rows))
    cells = {(r.method, r.format): "failed" if r.error else cell(r) for r in rows}
    lines = []
    for method in dict.fromkeys(r.method for r in rows):
        name = f"**{method}**" if method == ONE_PASS else method
        lines.append([name, *(cells.get((method, f), "") for f in formats)])
    return markdown(["method", *formats], lines)


def families_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Families by format and method."""
    heads = list(dict.fromkeys(f"{r['format']} {r['method']}" for r in rows))
    by_family: dict[str, dict[str, str]] = {}
    for r in rows:
        by_family.setdefault(r["family"], {})[f"{r['format']} {r['method']}"] = f"{r['kl']:.3f}"
    lines = [[family, *(cells[h] for h in heads)] for family, cells in by_family.items()]
    return markdown(["family", *heads], lines)


def measure_peers(
    args: argparse.Namespace, folder: Path, formats: Sequence[str]
) -> tuple[list[Row], dict[str, str]]:
    """Rows of the peers asked for, and the versions that their interpreter has."""
    cache = args.peer_cache or cache_dir(None) / "benchmark-peers"
    peers = Peers(args.peer_python, cache, args.model, folder)
    rows = []
    for format_name in [f for f in formats if f in PEER_FORMATS]:
        for method in args.peers:
            if parse_format(format_name).family in PEER_METHODS[method].families:
                rows.append(peers.measure(method, format_name))
                logger.info("%s", _line(rows[-1]))
    return rows, peers.versions


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    """All methods on one model; prints the tables and returns the result."""
    data = replace(BOOKS, calibration_samples=8, heldout_samples=4) if args.quick else BOOKS
    wanted = args.variants or (QUICK_VARIANTS if args.quick else tuple(variants()))
    asked = args.formats or (("int4-g128",) if args.quick else FORMATS)
    formats = [parse_format(name).name for name in asked]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="alphaquant-quantizer-") as scratch:
        folder = Path(scratch)
        facts = prepare(args.model, folder, data)
        for format_name in formats:
            for variant in wanted:
                rows.append(measure_apart(args.model, folder, format_name, variant))
                logger.info("%s", _line(rows[-1]))
        if args.peer_python:
            found, peer_versions_found = measure_peers(args, folder, formats)
            rows += found
            facts |= {"peer_versions": peer_versions_found, "peer_notes": list(PEER_NOTES)}
    names = () if args.no_families else ("llama", "olmoe") if args.quick else tuple(FAMILIES)
    families = measure_families(names)
    print(demo_text(rows, families))
    return {
        "rows": [asdict(r) for r in rows],
        "families": families,
        "best_single_pass": ONE_PASS,
        **facts,
    }


def demo_text(rows: Sequence[Row], families: Sequence[Mapping[str, Any]]) -> str:
    """All tables in Markdown."""

    def cost(row: Row) -> str:
        return f"{row.cpu_seconds:.1f} / {(row.peak_memory_bytes or 0) / 2**20:.0f}"

    parts = [
        "KL to the original, nats per token",
        table(rows, lambda r: f"{r.kl:.5f} +- {r.kl_stderr:.5f}"),
        "Processor seconds / peak MiB",
        table(rows, cost),
    ]
    if families:
        parts += ["Tiny random models, KL on random tokens", families_table(families)]
    return "\n\n".join(parts)


def run_layer(args: argparse.Namespace) -> dict[str, Any]:
    """One decoder layer of full size; prints the stages and returns the result."""
    shape = LayerShape(n_windows=args.windows, seq_len=args.seq_len)
    if args.quick:
        shape = LayerShape(64, 32, 8, 2, 4, 2, 16)
    result = measure_layer(shape, args.format, QuantSettings(), args.device)
    print(layer_text(result))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("alphaquant").setLevel(logging.WARNING)
    if args.command == "one":
        row = measure(args.model, args.folder, args.format, args.variant)
        print(json.dumps(asdict(row)))
        return
    result = {"demo": run_demo, "layer": run_layer}[args.command](args)
    words = list(sys.argv[1:] if arguments is None else arguments)
    result |= {
        "command": shlex.join(["python", "benchmarks/quantizer.py", *_public(words)]),
        "is_quick": args.quick,
        **run_facts(getattr(args, "device", "cpu")),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="all methods on the demo model")
    demo.add_argument("--model", default="demo", help="'demo' or a directory")
    demo.add_argument("--formats", nargs="+", metavar="FORMAT")
    demo.add_argument("--variants", nargs="+", metavar="NAME", choices=list(variants()))
    demo.add_argument("--peer-python", help="interpreter that has other quantizers installed")
    demo.add_argument(
        "--peers",
        nargs="+",
        metavar="NAME",
        choices=list(PEER_METHODS),
        default=list(PEER_METHODS),
    )
    demo.add_argument("--peer-cache", type=Path, help="folder of the peers' results")
    demo.add_argument("--no-families", action="store_true", help="skip the tiny random models")
    one = commands.add_parser("one", help="one method in one format, as JSON; the worker of demo")
    one.add_argument("--model", required=True)
    one.add_argument("--folder", type=Path, required=True)
    one.add_argument("--format", required=True)
    one.add_argument("--variant", required=True, choices=list(variants()))
    layer = commands.add_parser("layer", help="one decoder layer of OLMoE's size")
    layer.add_argument("--format", default="int4-g128")
    layer.add_argument("--windows", type=int, default=16)
    layer.add_argument("--seq-len", type=int, default=2048)
    layer.add_argument("--device", default="cpu", help="cpu or cuda; where the layer is")
    for command in (demo, layer):
        command.add_argument("--quick", action="store_true", help="a smoke run of seconds")
        command.add_argument("--out", type=Path, required=True)
    return parser


def _tokens(folder: Path, role: str) -> torch.Tensor:
    return load_file(folder / f"{role}.safetensors")["tokens"]


def _score(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The scores of a row: KL with its error, same-top, perplexity."""
    tokens = _tokens(folder, "heldout")
    teacher = open_teacher(folder / "teacher.safetensors")
    found = measure_divergence(model, tokens, teacher).scores(token_digest(tokens))
    scores = {s.metric: s for s in found}
    return {
        "kl": scores["kl"].value,
        "kl_stderr": scores["kl"].stderr,
        "same_top": scores["same_top"].value,
        "perplexity": scores["perplexity"].value,
    }


def _line(row: Row) -> str:
    if row.error:
        return f"{row.format}, {row.method}: failed: {row.error}"
    return f"{row.format}, {row.method}: KL {row.kl:.6f}, {row.cpu_seconds:.1f} s"


def _public(words: Sequence[str]) -> list[str]:
    """The command line without the places of this machine."""
    hidden = {"--peer-python": "PYTHON", "--peer-cache": "FOLDER", "--out": "FILE"}
    pairs = zip(["", *words], words, strict=False)
    return [hidden.get(before, word) for before, word in pairs]


if __name__ == "__main__":
    main()
