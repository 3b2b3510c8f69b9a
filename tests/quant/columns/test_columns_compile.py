"""The column loops compiled for sm_90, without a GPU: what the compiler made of them.

    python tests/quant/columns/test_columns_compile.py            # the table of docs/kernels.md

Compiling needs kernels that are not interpreted, so it happens in a process of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from alphaquant.quant.columns.state import Groups, Rounding
from alphaquant.quant.descent import ColumnPlan
from alphaquant.quant.format_rules import rule_of
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.machine_code import (
    claimed_gpu,
    instructions_of,
    registers_of,
    shared_bytes_of,
    spilled_bytes_of,
)

FORMATS = (
    *("int1-g128", "int4-g128", "int4-g32", "int3-g64-asym", "int4-g256"),
    *("fp4-e2m1-g128", "mxfp4", "nvfp4", "nl4-g64", "int3-g32-s256", "nl3-g16-s256"),
)
S, K, N, BLOCK = 4, 512, 256, 128
MOST_REGISTERS = 96  # ten programs of 64 threads fit a multiprocessor's 65536 registers


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel is made of.

    Attributes:
        name: the format.
        kernel: its name.
        chooses: whether it chooses or fits scales.
        n_registers: per thread.
        spilled_bytes: per thread.
        shared_bytes: per program.
        n_shuffles: instructions that exchange registers between threads.
        n_wide_loads: loads of 16 bytes, of rows of a matrix.
        n_instructions: in all.
        keeps_subnormals: whether no instruction flushes them.
    """

    name: str
    kernel: str
    chooses: bool
    n_registers: int
    spilled_bytes: int
    shared_bytes: int
    n_shuffles: int
    n_wide_loads: int
    n_instructions: int
    keeps_subnormals: bool


def facts_of(name: str) -> Iterator[Facts]:
    """Every kernel of a format, as `descent.py` launches it."""
    loops = importlib.import_module("alphaquant.quant.columns.columns_triton").TritonLoops()
    fmt = parse_format(name)
    size = fmt.columns_per_scale(K)
    weight, square = torch.zeros(S, K, N), torch.zeros(S, K, K)
    scales = torch.ones(S, -(-K // size), N)
    per_shared = ColumnPlan(K, size, super_size=fmt.super_size).groups_per_shared
    shared = torch.ones(S, -(-scales.shape[1] // per_shared), N)
    codes, objective = (weight.clone(), weight.clone()), torch.zeros(S, N)
    rounding = Rounding(*codes, scales, 0 * scales, shared, objective)
    of_columns = torch.arange(K) // size
    groups = Groups(rule_of(fmt, "hessian"), size, of_columns, per_shared)
    block, fits = (BLOCK, 2 * BLOCK), size <= BLOCK
    ahead, own = weight[:, :BLOCK].contiguous(), square[:, :BLOCK, :BLOCK]
    importance = torch.ones(S, K)[:, :BLOCK] if fits else None
    products = torch.zeros_like(ahead) if fits and fmt.has_groups else None
    upper = own.contiguous()
    with claimed_gpu() as launched:
        loops.fit_groups(rounding, groups, 0, weight, torch.ones(K))
        loops.gptq_block(rounding, groups, block, ahead, weight, upper, None)
        if importance is not None:
            loops.gptq_block(rounding, groups, block, ahead, weight, upper, importance)
        loops.sweep_block(rounding, groups, block, ahead, own, products)
        tile, of_rows = (64, 128), None if products is None else ahead[..., :64].mT.contiguous()
        coupled = torch.zeros(S, 64, BLOCK), (torch.zeros(S, 64, 64), upper), of_rows
        loops.sweep_rows(rounding, groups, (block, tile), *coupled)
    chooses = [True, False, *([True] if fits else []), products is not None, products is not None]
    for launch, does in zip(launched, chooses, strict=True):
        binary = launch.binary
        code = instructions_of(binary)
        yield Facts(
            name=name,
            kernel=launch.kernel,
            chooses=does,
            n_registers=registers_of(binary),
            spilled_bytes=spilled_bytes_of(binary),
            shared_bytes=shared_bytes_of(binary),
            n_shuffles=sum(i.startswith("SHFL") for i in code),
            n_wide_loads=sum(bool(re.match(r"LDG\S*\.128", i)) for i in code),
            n_instructions=len(code),
            keeps_subnormals=".ftz" not in binary.asm["ptx"],
        )


def compile_apart(folder: Path, *names: str) -> list[Facts]:
    """Facts of formats' kernels, from a process that does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Facts(**json.loads(line)) for line in done.stdout.splitlines()]


def check_facts(facts: Facts) -> None:
    """A row stays in its thread: nothing is exchanged, shared or spilled.

    Coupled rows have their columns as threads, and exchange.
    """
    if facts.kernel == "sweep_rows_kernel":
        assert facts.keeps_subnormals and facts.spilled_bytes <= 32, facts
        return
    assert facts.spilled_bytes == 0, facts
    assert facts.shared_bytes == 0 and facts.n_shuffles == 0, facts
    assert facts.n_registers <= MOST_REGISTERS, facts
    assert facts.keeps_subnormals, facts
    # 16 numbers of a row of U or H are four loads.
    assert facts.n_wide_loads >= 4 or facts.kernel == "fit_groups_kernel", facts


@pytest.mark.slow
def test_every_kind_of_format_compiles_without_detours(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    found = compile_apart(tmp_path, *FORMATS)
    kernels = {f"{n}_kernel" for n in ("fit_groups", "gptq_block", "sweep_block", "sweep_rows")}
    for name in FORMATS:
        assert {f.kernel for f in found if f.name == name} == kernels
    for facts in found:
        check_facts(facts)


def print_table() -> None:
    """The rows of docs/kernels.md: registers and instructions of each kernel."""
    for name in FORMATS:
        cells = []
        for facts in facts_of(name):
            check_facts(facts)
            cells.append(f"{facts.n_registers} / {facts.n_instructions}")
        if len(cells) < 4:
            cells.insert(2, "")
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_table()
    for argument in sys.argv[1:]:
        for found in facts_of(argument):
            print(json.dumps(asdict(found)), flush=True)
