"""A search by workers: is it the same, what does it cost, and what would 8 GPUs make of it?

    python benchmarks/workers.py compare --modes alone,1,2,4,ray2 --json OUT -- --effort quick
    python benchmarks/workers.py schedule --workers 8

`compare` runs the demo's search in a cache of its own for each mode: `alone` in one process, N
with `--workers N`, rayN on a simulated cluster of N nodes with one core each on this machine. What
stands behind `--` is given to aq-search. Printed are digests of the trials and the front, and of
all files of banks, costs and predictions; the processor seconds of driver and workers, and those
of the tasks alone, which `--debug` tells. Wall time says nothing where cores are fewer than
workers.

`schedule` plans the default search of OLMoE-1B-7B's shape with speeds that are measured here, cuts
bank and costs into the tasks that workers would get, and hands these to workers one after the
other, each to the first that is free. Hidden states and gradients are made once for both rounds
of the bank, where one process makes them in each. The speed-up is the time of one process over
that of the last worker to end. Communication, files and the start of workers are left out.
"""

import argparse
import hashlib
import heapq
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SEARCH = """
import time
from types import SimpleNamespace
from alphaquant import progress
from alphaquant.cli.search import main
progress.time = SimpleNamespace(perf_counter=time.process_time)
main()
"""
"""Stages are booked in processor seconds of the driver."""
_SHARED = ("teacher", "hessians", "bank", "costs", "planned", "probe", "study", "gate")
"""Stages whose work is that of tasks."""
TASK = re.compile(r"^DEBUG (.+): ([\d.]+) s$", re.MULTILINE)
"""What `--debug` says of a task that is finished."""
SMALL_STORE = {"object_store_memory": 80 * 2**20}
"""Of a Ray node: tasks hand on little."""
_OWN_FACTS = {"seconds", "n_measured", "n_passes", "stages", "versions"}
_OLMOE = {
    **{"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16},
    **{"num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16},
    **{"vocab_size": 50304, "max_position_embeddings": 4096, "pad_token_id": 0},
}
_TRACED_AGAIN = 0.4
"""Part of the passes of the costs that is spent once more, because layers are traced twice: in
`compare` gradients and costs took workers 3.5 and 6.5 s, and one process 8.7 s: 1.3 more."""


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        mode: who did the work.
        results: digest of trials and front.
        files: digest of banks, costs and predictions.
        cpu_seconds: of driver and workers.
        task_seconds: of the tasks among them, by kind; of one process by stage.
    """

    mode: str
    results: str
    files: str
    cpu_seconds: float
    task_seconds: dict[str, float]


def compare(modes: Sequence[str], options: Sequence[str]) -> Iterator[Run]:
    """Run the demo's search in each mode."""
    for mode in modes:
        with tempfile.TemporaryDirectory() as place, cluster_of(mode) as given:
            root = Path(place)
            own = ["--cache", str(root / "cache"), "--out", str(root / "out"), "--debug"]
            command = [sys.executable, "-c", _SEARCH, "--budget", "4.25bits", *own, *given]
            before = children_seconds()
            done = subprocess.run(
                [*command, *options], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{mode}: {done.stderr[-2000:]}")
            seconds = children_seconds() - before
            tasks = tasks_of(done.stderr) if given else stages_of(root)
            yield Run(mode, results_of(root), files_of(root), seconds, tasks)


@contextmanager
def cluster_of(mode: str) -> Iterator[list[str]]:
    """The options of a mode, with its cluster running meanwhile."""
    if not mode.startswith("ray"):
        yield [] if mode == "alone" else ["--workers", mode]
        return
    with ray_nodes(int(mode.removeprefix("ray"))) as cluster:
        yield ["--cluster", cluster.address]


@contextmanager
def ray_nodes(n_nodes: int) -> Iterator[Any]:
    """A Ray cluster of nodes of one core each on this machine, beside a head without cores."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, **SMALL_STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(n_nodes):
            cluster.add_node(num_cpus=1, **SMALL_STORE)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def children_seconds() -> float:
    """Processor seconds of all processes that were started from here and have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def tasks_of(log: str) -> dict[str, float]:
    """Processor seconds of tasks by the beginning of their names."""
    found: dict[str, float] = {}
    for name, seconds in TASK.findall(log):
        kind = re.split(r" \d+| on batches| of batches", name)[0]
        found[kind] = found.get(kind, 0.0) + float(seconds)
    return {kind: round(seconds, 2) for kind, seconds in found.items()}


def stages_of(root: Path) -> dict[str, float]:
    """Processor seconds of the stages that workers would share."""
    found = json.loads((root / "out" / "front.json").read_text())["seconds"]
    return {stage: found[stage] for stage in _SHARED if stage in found}


def results_of(root: Path) -> str:
    """Digest of the front, the configurations and every trial, without what time it took."""
    out = root / "out"
    rows = [line.split(",") for line in (out / "trials.csv").read_text().splitlines()]
    kept = [i for i, name in enumerate(rows[0]) if "seconds" not in name and "time" not in name]
    trials = [[row[i] for i in kept] for row in rows]
    front = without_own(json.loads((out / "front.json").read_text()))
    configs = [without_own(json.loads(p.read_text())) for p in sorted(out.rglob("configs/*.json"))]
    text = json.dumps([trials, front, configs], sort_keys=True).replace(str(root), "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_of(root: Path) -> str:
    """Digest of banks, costs and predictions."""
    total = hashlib.sha256()
    for path in sorted((root / "cache").rglob("*.safetensors")):
        if "weights" not in path.parts:
            total.update(str(path.relative_to(root)).encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def without_own(content: Any) -> Any:
    """JSON without what two runs of the same search may differ in: times, places, work done."""
    if isinstance(content, dict):
        return {k: without_own(v) for k, v in content.items() if k not in _OWN_FACTS}
    return [without_own(v) for v in content] if isinstance(content, list) else content


@dataclass(frozen=True)
class Phase:
    """Tasks that wait for those of the phase before.

    Attributes:
        name: of the stage.
        alone: seconds in one process, which may do less.
        tasks: seconds of each.
    """

    name: str
    alone: float
    tasks: tuple[float, ...]


def last_end(tasks: Sequence[float], n_workers: int) -> float:
    """When the last task ends, each given to the first worker that is free.

    Worked example: tasks of 3, 2 and 2 s on two workers end after 4 s.
    """
    free = [0.0] * n_workers
    for seconds in tasks:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def phases() -> list[Phase]:
    """Bank and costs of the default search of OLMoE's shape, with speeds of this machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from alphaquant.models.mapping import map_model
    from alphaquant.progress import Stage
    from alphaquant.quant.filling import BATCH_WINDOWS
    from alphaquant.spaces.budget import parse_budget
    from alphaquant.spaces.menus import menu_of
    from alphaquant.spaces.profiles import find_profile
    from alphaquant.spaces.space import make_space
    from alphaquant.specs.quantizer import settings_of
    from alphaquant.specs.search import SearchSpec
    from alphaquant.studies.planning.estimate import plan_stages
    from alphaquant.studies.planning.needs import Needs
    from alphaquant.studies.planning.pilot import Pilot
    from alphaquant.studies.sizing import sized

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **_OLMOE))
    model_map, profile = map_model(model), find_profile("any")
    spec = sized(SearchSpec.of(budget="4.25bits", model="olmoe"), model_map)
    menu = menu_of(spec.limits.formats, profile)
    space = make_space(model_map.inventory, profile, menu, parse_budget("4.25bits"))
    needs = Needs(spec, model_map, space, 4)
    rates = Pilot(needs, torch.float32, torch.device("cpu")).measure(settings_of(spec.quantizer))
    plan = plan_stages(needs, rates, has_copy=True)
    seconds = {stage.stage: stage.seconds for stage in plan.stages}
    n_layers, rounds = len(model_map.layers), needs.n_rounds
    walk = needs.calibration * needs.active * rates.layer  # once through all layers
    passes = needs.cost_passes * (walk + needs.calibration * rates.head)
    n_windows = needs.calibration // needs.seq_len
    n_walks, n_backs = -(-n_windows // BATCH_WINDOWS), -(-n_windows // 8)
    bank = seconds[Stage.HESSIANS] + seconds[Stage.BANK]
    costs = seconds[Stage.COSTS]
    return [
        Phase("hidden states", 0.0, (walk / n_walks,) * n_walks),
        Phase("bank", bank, (bank / n_layers,) * n_layers),
        Phase("gradients", 0.0, (passes / rounds / n_backs,) * n_backs),
        Phase("costs", costs, ((costs - passes + _TRACED_AGAIN * passes) / n_layers,) * n_layers),
    ]


def schedule(n_workers: int) -> list[str]:
    """Lines: every phase alone and shared, and the speed-up of all."""
    lines, alone, shared = [], 0.0, 0.0
    for phase in phases():
        end = last_end(phase.tasks, n_workers)
        alone, shared = alone + phase.alone, shared + end
        lines.append(
            f"{phase.name:14} {len(phase.tasks):3} tasks  alone {phase.alone / 60:8.1f} min  "
            f"{n_workers} workers {end / 60:8.1f} min"
        )
    return [*lines, f"speed-up with {n_workers} workers: {alone / shared:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Do as the command line says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("compare", "schedule"))
    parser.add_argument("--modes", default="alone,1,2,4,ray2")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(given[: given.index("--")] if "--" in given else given)
    if asked.what == "schedule":
        print("\n".join(schedule(asked.workers)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for all modes
    from alphaquant.provenance import device_facts, versions

    found = []
    for run in compare(asked.modes.split(","), options):
        found.append(asdict(run))
        tasks = sum(run.task_seconds.values())
        print(
            f"{run.mode:6} results {run.results} files {run.files} "
            f"processor {run.cpu_seconds:.1f} s, tasks {tasks:.1f} s",
            flush=True,
        )
        if asked.json is not None:
            facts = {"options": options, "versions": versions(), **device_facts("cpu")}
            asked.json.write_text(json.dumps({**facts, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
