"""Speed of the kernels on a GPU: packed matrices and layers of experts beside bfloat16.

    python benchmarks/kernel_speed.py --device cuda --out FILE
    python benchmarks/kernel_speed.py --device cuda --out FILE --tune TABLE --formats int4-g128
    python benchmarks/kernel_speed.py --device cpu --dry-run --out FILE

Times are of calls in a CUDA graph on weights that the level 2 cache has lost: median over replays
with quartiles. Each row is also checked against float32 products with the dequantized matrix, and
one that is off by more than 1 % ends the run. `--tune` first times every candidate of
`alphaquant.kernels.tuning.launch_candidates`, writes the table, and measures with it; crossovers
that the rows show are added, and hold from the next run on. Copy the table to
alphaquant/kernels/tuned/, or name it in ALPHAQUANT_KERNEL_TABLE. `--latency-table` writes the
dense times for `aq-search --objectives bits,kl,latency`. `--dry-run` runs every row once with tiny
shapes in Triton's interpreter, and times nothing. Targets are the project's own, not results.

FILE is JSON with provenance, complete after every row. Prints Markdown tables.
"""

import argparse
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kernel_bench import Bench, draw, load_kernels, pack
from kernel_dense import DenseRow, measure_dense
from kernel_grouped import GroupedRow, measure_grouped
from kernel_latency import write_latencies
from kernel_peers import PEERS, Peer, PeerRow, installed, measure_peer
from kernel_shapes import (
    DENSE_FORMATS,
    DENSE_SHAPES,
    DENSE_TOKENS,
    MOE_SHAPES,
    MOE_TOKENS,
    TINY_DENSE,
    TINY_MOE,
    TINY_TOKENS,
    DenseShape,
)
from kernel_tables import (
    DENSE_HEAD,
    GROUPED_HEAD,
    PEER_HEAD,
    dense_cells,
    grouped_cells,
    peer_cells,
)
from kernel_timing import GraphTimer, run_once
from kernel_tune import find_crossover, tune_shape, with_entries
from release import commit, parse_with_out

from alphaquant.files import whole_file
from alphaquant.kernels.tuning import TABLE_VARIABLE, KernelTable, dump_table
from alphaquant.provenance import device_facts, versions
from alphaquant.reports.tables import markdown

logger = logging.getLogger("kernel_speed")

PARTS = ("dense", "grouped", "peers")
# What a peer that does not serve a matrix or a device raises.
PEER_ERRORS = (RuntimeError, ValueError, AssertionError, ImportError, AttributeError, TypeError)


class Record:
    """The result file: complete after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Start an empty file with what all rows depend on."""
        self._path = path
        self._content: dict[str, Any] = {**{part: [] for part in PARTS}, "notes": [], **facts}
        self._write()

    def add(self, part: str, row: DenseRow | GroupedRow | PeerRow) -> None:
        """Add a row to a part."""
        self._content[part].append(asdict(row))
        self._write()

    def note(self, text: str) -> None:
        """Say what was left out and why."""
        logger.info("%s", text)
        self._content["notes"].append(text)
        self._write()

    def _write(self) -> None:
        with whole_file(self._path) as part:
            part.write_text(json.dumps(self._content, indent=1) + "\n")


def provenance(device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Versions, commit and device."""
    facts = {
        "settings": settings,
        "versions": versions() | {"triton": version("triton"), "cuda": torch.version.cuda},
        "commit": commit(),
        **device_facts(device),
    }
    if device == "cpu":
        return facts
    found = torch.cuda.get_device_properties(device)
    return facts | {
        "l2_bytes": found.L2_cache_size,
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
    }


def open_bench(device: str) -> Bench:
    """Timing on a GPU, or none at all."""
    if device == "cpu":
        return Bench(load_kernels(), run_once, device, 0)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return Bench(load_kernels(), GraphTimer(), device, l2_bytes)


def tune(
    bench: Bench,
    path: Path,
    shapes: Sequence[DenseShape],
    formats: Sequence[str],
    table: KernelTable,
) -> KernelTable:
    """Time all candidates; the table is written after every matrix and used from then on."""
    for shape in shapes:
        for name in formats:
            table = with_entries(table, launches=list(tune_shape(bench, shape, name)))
            write_table(path, table)
            logger.info("tuned %s %s", name, shape.name)
    os.environ[TABLE_VARIABLE] = str(path)
    return table


def write_table(path: Path, table: KernelTable) -> None:
    """Replace the file of a table."""
    with whole_file(path) as part:
        part.write_text(dump_table(table), encoding="utf-8")


def run_dense(
    bench: Bench, args: argparse.Namespace, record: Record, table: KernelTable | None
) -> list[DenseRow]:
    """All dense rows; their crossovers go into the table, if there is one."""
    rows: list[DenseRow] = []
    for shape in args.dense_shapes:
        for name in args.formats:
            found = list(kept(record, "dense", measure_dense(bench, shape, name, args.tokens)))
            rows += found
            if table is not None:
                weight = pack(draw(shape.rows, shape.cols, bench.device), name)
                table = with_entries(table, dense_rows=find_crossover(found, weight))
                write_table(args.tune, table)
            if args.latency_table:
                device = device_facts(args.device)["device"]
                write_latencies(args.latency_table, device, rows)
    return rows


def run_grouped(bench: Bench, args: argparse.Namespace, record: Record) -> list[GroupedRow]:
    """All rows of layers of experts; a bfloat16 layer that fails is a note."""
    rows: list[GroupedRow] = []
    for shape in args.moe_shapes:
        for row in kept(record, "grouped", measure_grouped(bench, shape, args.moe_tokens)):
            rows.append(row)
            while bench.failures:
                record.note(bench.failures.pop(0))
    return rows


def run_peers(bench: Bench, args: argparse.Namespace, record: Record) -> list[PeerRow]:
    """All rows of peers; one that is missing or fails is a note."""
    rows: list[PeerRow] = []
    for peer in PEERS:
        if installed(peer) is None:
            record.note(f"{peer.name} is left out: it is not installed, or cannot be imported")
            continue
        for shape in args.dense_shapes:
            for name in peer.formats:
                rows += run_peer(bench, args, record, peer, shape, name)
    return rows


def run_peer(
    bench: Bench,
    args: argparse.Namespace,
    record: Record,
    peer: Peer,
    shape: DenseShape,
    name: str,
) -> list[PeerRow]:
    """The rows of a peer with one matrix, as far as it comes."""
    rows: list[PeerRow] = []
    try:
        for row in kept(record, "peers", measure_peer(bench, peer, shape, name, args.tokens)):
            rows.append(row)
    except PEER_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        record.note(f"{peer.name} with {name} {shape.name}: {type(error).__name__}: {text}")
    return rows


def kept(record: Record, part: str, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows, each of them in the file before the next one is measured."""
    for row in rows:
        record.add(part, row)
        logger.info("%s %s, %d tokens", row.format, row.shape, row.n_tokens)
        yield row


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, no times, no GPU")
    parser.add_argument("--tune", type=Path, metavar="TABLE", help="time launches, write them")
    parser.add_argument(
        "--latency-table", type=Path, metavar="FILE", help="dense times for the objective latency"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--formats", nargs="+", default=list(DENSE_FORMATS), help="dense ones")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help="dense shapes and layers")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="dense ones")
    parser.add_argument("--moe-tokens", nargs="+", type=int, metavar="M")
    args = parse_with_out(parser)
    if args.latency_table and (args.dry_run or "dense" not in args.parts):
        parser.error("--latency-table needs measured dense rows: leave out --dry-run, keep dense")
    is_cuda = args.device.startswith("cuda")
    if is_cuda == args.dry_run or (is_cuda and not torch.cuda.is_available()):
        parser.error(
            f"--device {args.device} {'with' if args.dry_run else 'without'} --dry-run cannot run "
            "here: times need a CUDA GPU and --device cuda; without one give --device cpu "
            "--dry-run, which checks results and times nothing"
        )
    choose_shapes(parser, args)
    return args


def choose_shapes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set `dense_shapes`, `moe_shapes` and the numbers of tokens; unknown names are an error."""
    dense, moe = (TINY_DENSE, TINY_MOE) if args.dry_run else (DENSE_SHAPES, MOE_SHAPES)
    known = [shape.name for shape in dense] + [shape.name for shape in moe]
    names = args.shapes or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"--shapes has no {', '.join(unknown)}; choose from {', '.join(known)}")
    args.dense_shapes = [shape for shape in dense if shape.name in names]
    args.moe_shapes = [shape for shape in moe if shape.name in names]
    tokens = (TINY_TOKENS, TINY_TOKENS) if args.dry_run else (DENSE_TOKENS, MOE_TOKENS)
    args.tokens = sorted(args.tokens or tokens[0])
    args.moe_tokens = sorted(args.moe_tokens or tokens[1])


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The command line as JSON."""
    left_out = ("out", "dense_shapes", "moe_shapes")
    found = {k: v for k, v in vars(args).items() if k not in left_out}
    given = {"tune": args.tune is not None, "latency_table": args.latency_table is not None}
    return found | given | {"shapes": args.shapes or "all"}


def run(args: argparse.Namespace) -> None:
    """Measure, write and print what `args` asks for."""
    bench = open_bench(args.device)
    facts = provenance(args.device, settings_of(args))
    record = Record(args.out, facts)
    table = None
    if args.tune:
        stack = facts["versions"]
        table = KernelTable(facts["device"], stack["torch"], stack["triton"], facts["commit"])
        table = tune(bench, args.tune, args.dense_shapes, args.formats, table)
    tables: dict[str, Callable[[], str]] = {
        "dense": lambda: markdown(
            DENSE_HEAD, [dense_cells(row) for row in run_dense(bench, args, record, table)]
        ),
        "grouped": lambda: markdown(
            GROUPED_HEAD, [grouped_cells(row) for row in run_grouped(bench, args, record)]
        ),
        "peers": lambda: markdown(
            PEER_HEAD, [peer_cells(row) for row in run_peers(bench, args, record)]
        ),
    }
    for part in args.parts:
        print(f"{tables[part]()}\n")


def main() -> None:
    """Run and print."""
    args = parse()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are loaded
    run(args)


if __name__ == "__main__":
    main()
