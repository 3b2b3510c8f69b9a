"""How seconds and memory grow with the model: random checkpoints through the stages of a search.

    python benchmarks/growth.py --sizes 10m,40m,160m
    python benchmarks/growth.py --sizes olmoe --windows 4
    python benchmarks/growth.py --sizes qwen3-30b --layers 4
    python benchmarks/growth.py --sizes 10m,40m --search --budget 4.25bits
    python benchmarks/growth.py --sizes 160m --search --effort quick

Each model is written (`growth_models.py`), measured and removed. A measurement is a process of its
own: it loads the model with an empty cache (`first`), or again with what that left there
(`again`), finds its matrices and walks a few windows of the demo's text through all layers;
`--search` plans a search and runs it, and tells what its stages were estimated to take beside what
they took. `--effort` takes its sizes instead of `--windows`, `--seq-len` and `--trials`. For each
stage there are wall and processor seconds, and the largest resident memory of the process so far.
Then come the exponents from each size to the next: 1 is growth with the number of weights.
"""

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from growth_models import SHAPES, write_model

from alphaquant.progress import StageTimes
from alphaquant.reports.tables import markdown

MIB = 2**20
_WORKERS = ("walk", "plan", "search")


@dataclass(frozen=True)
class Spent:
    """What a stage took.

    Attributes:
        stage: its name.
        seconds: wall time.
        cpu_seconds: of all threads.
        peak_bytes: largest resident size of the process until its end.
    """

    stage: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


class StageMeter:
    """A `progress` that books wall time, processor time and peak memory to stages."""

    def __init__(self) -> None:
        """Start without a stage."""
        self._wall, self._cpu = StageTimes(), StageTimes()
        self._peaks: dict[str, int] = {}
        self._stage: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """See `alphaquant.progress.Progress`."""
        if self._stage is not None:
            self._peaks[self._stage] = peak_memory()
        self._stage = stage
        self._wall.record(stage, done, total, time.perf_counter())
        self._cpu.record(stage, done, total, time.process_time())

    def spent(self) -> list[Spent]:
        """All stages, in order of first appearance; the last one ends now."""
        self._wall.stop(time.perf_counter())
        self._cpu.stop(time.process_time())
        if self._stage is not None:
            self._peaks[self._stage] = peak_memory()
        return [
            Spent(stage, seconds, self._cpu.seconds[stage], self._peaks[stage])
            for stage, seconds in self._wall.seconds.items()
        ]


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_walk(job: Mapping[str, Any]) -> list[Spent]:
    """Load a model, find its matrices and walk windows through it."""
    import torch

    from alphaquant.models.walk import batches_of, check_walk, walk
    from alphaquant.studies.inputs import load_source, read_text

    meter = StageMeter()
    meter("load", 0, 1)
    source = load_source(
        job["model"], "cpu", job["dtype"], cache=Path(job["cache"]), progress=meter
    )
    meter("load", 1, 1)
    found = read_text(source, "demo", "calibration", job["windows"], job["seq_len"], 0)
    meter("check", 0, 1)
    batches = batches_of(found.tokens, 1)
    check_walk(source.map, batches)
    meter("walk", 0, 1)
    with torch.no_grad():
        for step in walk(source.map, batches):
            hidden = step.run()
            if not all(bool(h.isfinite().all()) for h in hidden):
                raise SystemExit(f"{step.layer.name} gives NaN or infinite numbers")
    return meter.spent()


def measure_plan(job: Mapping[str, Any]) -> list[Spent]:
    """What a search is estimated to take; its processor seconds are not."""
    from alphaquant.commands.search import plan_search

    plan = plan_search(_spec_of(job))
    return [Spent(s.stage, s.seconds, math.nan, s.memory) for s in plan.stages]


def measure_search(job: Mapping[str, Any]) -> list[Spent]:
    """Run a search."""
    from alphaquant.commands.search import search

    meter = StageMeter()
    search(_spec_of(job), progress=meter)
    return meter.spent()


def _spec_of(job: Mapping[str, Any]) -> Any:
    """The search of a job."""
    from alphaquant import SearchSpec

    places = {name: Path(job[name]) for name in ("cache", "out")}
    return SearchSpec.of(model=job["model"], dtype=job["dtype"], **places, **job["search"])


def measure_apart(worker: str, job: Mapping[str, Any]) -> list[Spent]:
    """Measure in a process of its own.

    Args:
        worker: one of `_WORKERS`.
        job: see the workers.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, __file__, "--worker", worker, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{worker} of {job['model']} failed:\n{done.stderr[-3000:]}")
    return [Spent(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def exponents(rows: Sequence[tuple[int, Mapping[str, Spent]]]) -> list[list[str]]:
    """Exponents of processor seconds and peak memory between sizes, by stage.

    Args:
        rows: number of weights and what each stage took, by size.

    Returns:
        Stage, then an exponent pair for each step from one size to the next.
    """
    stages = [s for s in rows[0][1] if all(s in spent for _, spent in rows)]
    table = []
    for stage in stages:
        cells = [stage]
        for (n, a), (m, b) in zip(rows, rows[1:], strict=False):
            grown = math.log(m / n)
            times = a[stage].cpu_seconds, b[stage].cpu_seconds
            peaks = a[stage].peak_bytes, b[stage].peak_bytes
            pair = [
                math.log(y / x) / grown if min(x, y) > 0 else math.nan for x, y in (times, peaks)
            ]
            cells.append(f"{pair[0]:.2f}, {pair[1]:.2f}")
        table.append(cells)
    return table


def measure_size(
    name: str, args: argparse.Namespace, folder: Path
) -> tuple[int, dict[str, Spent]]:
    """Write, measure and remove one model.

    Returns:
        Its number of weights, and what each stage took.
    """
    shape = SHAPES[name]
    if args.layers is not None:
        shape = replace(shape, n_layers=args.layers)
    n_weights = write_model(folder / name, shape)
    job = {
        "model": str(folder / name),
        "cache": str(folder / "cache"),
        "out": str(folder / "out"),
        "dtype": args.dtype,
        "windows": args.windows,
        "seq_len": args.seq_len,
        "search": {"budget": args.budget, **_sizes_of(args)},
    }
    found = {}
    try:
        for run in ("first", "again"):
            found |= {f"{run} {s.stage}": s for s in measure_apart("walk", job)}
        if args.search:
            planned = {s.stage: s for s in measure_apart("plan", job)}
            found |= {f"search {s.stage}": s for s in measure_apart("search", job)}
    finally:
        for made in (name, "cache", "out"):
            shutil.rmtree(folder / made, ignore_errors=True)
    if args.search:
        print(f"\n{name}, planned and measured\n")
        head = ["stage", "planned s", "seconds", "ratio", "planned MiB", "peak MiB"]
        print(markdown(head, _beside(planned, found)), flush=True)
    print(f"\n{name}: {n_weights} weights, {2 * n_weights / MIB:.0f} MiB in bfloat16\n")
    cells = [
        [s, f"{x.seconds:.2f}", f"{x.cpu_seconds:.2f}", f"{x.peak_bytes / MIB:.0f}"]
        for s, x in found.items()
    ]
    print(markdown(["stage", "seconds", "processor seconds", "peak MiB"], cells), flush=True)
    return n_weights, found


def _beside(planned: Mapping[str, Spent], found: Mapping[str, Spent]) -> list[list[str]]:
    """Estimates of stages, beside what they took; peaks are of the process so far."""
    took = {name: found[f"search {name}"] for name in planned if f"search {name}" in found}
    rows = [(name, planned[name], spent) for name, spent in took.items()]
    sums = [Spent("", sum(x.seconds for x in side), math.nan, max(x.peak_bytes for x in side))
            for side in ([r[1] for r in rows], [r[2] for r in rows])]  # fmt: skip
    return [
        [
            *(name, f"{a.seconds:.1f}", f"{b.seconds:.1f}", f"{b.seconds / a.seconds:.2f}"),
            *(f"{a.peak_bytes / MIB:.0f}", f"{b.peak_bytes / MIB:.0f}"),
        ]
        for name, a, b in [*rows, ("all", *sums)]
    ]


def _sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the search that say how much is computed."""
    if args.effort is not None:
        return {"effort": args.effort}
    samples = [f"{text}_samples" for text in ("calibration", "evaluation", "heldout")]
    sizes = dict.fromkeys(samples, args.windows)
    return {**sizes, "seq_len": args.seq_len, "trials": args.trials}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10m,40m,160m", help=", ".join(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the models' own")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--search", action="store_true", help="run a search too")
    parser.add_argument("--effort", choices=("quick", "default", "thorough"))
    parser.add_argument("--budget", default="4.25bits")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="for the models; default a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure all sizes and print tables."""
    if sys.argv[1:2] == ["--worker"]:
        workers = {"walk": measure_walk, "plan": measure_plan, "search": measure_search}
        worker = workers[sys.argv[2]]
        print(json.dumps([asdict(s) for s in worker(json.loads(sys.argv[3]))]))
        return
    args = parse()
    names = args.sizes.split(",")
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        rows = [measure_size(name, args, Path(made)) for name in names]
    if len(rows) > 1:
        steps = [f"{a} to {b}" for a, b in zip(names, names[1:], strict=False)]
        print("\nExponents of processor seconds and of peak memory in the number of weights\n")
        print(markdown(["stage", *steps], exponents(rows)))
    if args.out is not None:
        facts = [
            {"size": name, "n_weights": n, "stages": {k: asdict(s) for k, s in found.items()}}
            for name, (n, found) in zip(names, rows, strict=True)
        ]
        args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
