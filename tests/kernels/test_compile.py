"""The packed linear kernel compiled for sm_90, without a GPU: what the compiler made of it.

    python tests/kernels/test_compile.py            # the table of docs/kernels.md

Compiling needs kernels that are not interpreted, so it happens in a process of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import pack_drawn
from alphaquant.testing.machine_code import (
    claimed_gpu,
    main_loop,
    main_loop_of,
    registers_of,
    spilled_bytes_of,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

FORMATS = (
    *("int1-g128", "int2-g128", "int3-g128", "int4-g128", "int5-g128", "int6-g128", "int8-g128"),
    *("int2-g128-asym", "int3-g128-asym", "int4-g128-asym", "int8-g128-asym"),
    *("int3-g64", "int4-g64", "int5-g64-asym", "fp4-e2m1-g128", "fp6-e3m2-g128", "fp6-e2m3-g128"),
    *("fp8-e4m3-g128", "fp8-e5m2-g128", "fp4-e2m1-g64", "fp8-e4m3-g64"),
    *("mxfp4", "mxfp6", "mxfp8", "nvfp4", "bf16", "nl4-g128", "int4-g32-s256", "nl3-g32-s256"),
)


@dataclass(frozen=True)
class Facts:
    """What one compiled kernel is made of; the loop is the one over tiles of columns.

    Attributes:
        name: the format.
        dtype: fp16 or bf16.
        block_cols: tokens of a block, Z.
        n_registers: per thread.
        spilled_bytes: per thread.
        has_wgmma: whether the PTX multiplies with wgmma.
        weights_from_registers: whether every product takes its weights from registers.
        keeps_subnormals: whether no instruction flushes them; folded floats may be subnormal.
        n_shared_stores: stores to shared memory in the loop.
        per_weight: instructions of a lane in the loop, per weight.
    """

    name: str
    dtype: str
    block_cols: int
    n_registers: int
    spilled_bytes: int
    has_wgmma: bool
    weights_from_registers: bool
    keeps_subnormals: bool
    n_shared_stores: int
    per_weight: float


def compile_linear(name: str, dtype: str, block_cols: int) -> Any:
    """The compiled kernel of a format."""
    linear = importlib.import_module("alphaquant.kernels.linear.product_triton")
    weight = order_matrix(pack_drawn(name, 128, 512))
    x = torch.zeros(block_cols, 512, dtype=DTYPES[dtype])
    with claimed_gpu() as launched:
        linear.packed_linear(x, weight)
    (launch,) = launched
    return launch.binary


def compile_others() -> dict[str, bool]:
    """Whether each of the other kernels, and the linear one without PTX, compiles as meant."""
    linear = importlib.import_module("alphaquant.kernels.linear.product_triton")
    found = {}
    for name in ("int3-g64-asym", "mxfp6", "nvfp4", "bf16"):
        weight = order_matrix(pack_drawn(name, 128, 500))
        older = 89 if name == "nvfp4" else 80
        for capability in (90, older):
            with claimed_gpu(capability) as launched:
                linear.dequantize_packed(weight, torch.bfloat16)
            has_body = capability == 90 and name != "bf16"
            found[f"{name} dequantized on sm_{capability}"] = has_body == (
                "lop3.b32" in launched[0].binary.asm["ptx"]
            )
        x, config = torch.zeros(16, 500, dtype=torch.bfloat16), linear.LinearConfig(64, 4, 2)
        with claimed_gpu(older) as launched:
            linear.packed_linear(x, weight, config=config, n_splits=2)
        product, total = (launch.binary.asm["ptx"] for launch in launched)
        found[f"{name} on sm_{older}"] = "mma.sync" in product
        found[f"{name} keeps subnormals there"] = ".ftz" not in product
        found["sum of the splits"] = "ld.global" in total
    return found


def facts_of(name: str, dtype: str, block_cols: int) -> Facts:
    binary = compile_linear(name, dtype, block_cols)
    loop, ptx = main_loop_of(binary), binary.asm["ptx"]
    products = [i for i in loop if "GMMA" in i]
    return Facts(
        name=name,
        dtype=dtype,
        block_cols=block_cols,
        n_registers=registers_of(binary),
        spilled_bytes=spilled_bytes_of(binary),
        has_wgmma="wgmma.mma_async" in ptx,
        weights_from_registers=bool(products)
        and all(re.search(r"GMMA\S* R\d+, R\d+, gdesc", i) for i in products),
        keeps_subnormals=".ftz" not in ptx,
        n_shared_stores=sum(i.split()[0].startswith("STS") for i in loop),
        per_weight=round(len(loop) * 32 * binary.metadata.num_warps / (128 * 128), 2),
    )


def run_apart(folder: Path, argument: str) -> list[Any]:
    """What this file prints for an argument, in a process that does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, __file__, argument]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_apart(folder: Path, kernels: Sequence[tuple[str, str, int]]) -> list[Facts]:
    """Facts of kernels: format, dtype, tokens of a block."""
    return [Facts(**facts) for facts in run_apart(folder, json.dumps(kernels))]


def check_facts(facts: Facts) -> None:
    """What makes the layout worth having: no weight goes through shared memory or is spilled."""
    assert facts.has_wgmma, facts
    # Unquantized ones need no unpacking, so that the tensor core reads them where they land.
    assert facts.weights_from_registers or facts.name == "bf16", facts
    assert facts.keeps_subnormals, facts
    assert facts.n_shared_stores <= 2, facts  # the scales and the zero points of a tile
    assert facts.spilled_bytes == 0, facts
    if facts.block_cols == 16:
        # Three programs of four warps fit a multiprocessor's 65536 registers.
        assert facts.n_registers <= 168, facts
        assert facts.per_weight <= most_per_weight(facts), facts


def most_per_weight(facts: Facts) -> float:
    """Five percent above the figures of docs/kernels.md."""
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{facts.name}` \|(.*)\|$", page, re.MULTILINE)
    assert row is not None, f"{facts.name} is not in the table of docs/kernels.md"
    cells = [float(cell) for cell in row[1].split("|")]
    return 1.05 * cells[1 if facts.dtype == "fp16" else 3]


@pytest.mark.slow
def test_weights_reach_the_tensor_core_from_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    kernels = (
        *(("int4-g128", "fp16", 16), ("int3-g128-asym", "bf16", 16), ("mxfp4", "bf16", 16)),
        ("bf16", "bf16", 16),
    )
    found = compile_apart(tmp_path, kernels)
    assert [(f.name, f.dtype, f.block_cols) for f in found] == list(kernels)
    for facts in found:
        check_facts(facts)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 78 kernels at about two seconds each, on a core of its own
def test_every_format_compiles_without_detours(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    small = [(name, dtype, 16) for name in FORMATS for dtype in DTYPES]
    large = [(name, "bf16", 64) for name in FORMATS]
    for facts in compile_apart(tmp_path, small + large):
        check_facts(facts)


@pytest.mark.slow
def test_all_kernels_compile_also_without_ptx_and_for_older_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")
    (found,) = run_apart(tmp_path, "others")
    assert len(found) == 17 and all(found.values()), found


def test_a_loop_is_found_and_counted() -> None:
    sass = """
        /*0000*/                   MOV R1, R2 ;       /* 0x00 */
        /*0010*/                   LDS R3, [R1] ;     /* 0x00 */
        /*0020*/              @!P0 HGMMA.64x16x16.F32 R8, R40, gdesc[UR4], R8 ;  /* 0x00 */
        /*0030*/               @P2 BRA 0x10 ;         /* 0xfffffff0 */
        /*0040*/                   BRA 0x40;          /* 0xfffffff0 */
    """
    assert [i.split()[0] for i in main_loop(sass)] == ["LDS", "HGMMA.64x16x16.F32", "BRA"]


def print_table() -> None:
    """The rows of docs/kernels.md."""
    for name in FORMATS:
        cells = []
        for dtype in DTYPES:
            facts = facts_of(name, dtype, 16)
            cells += [f"{facts.n_registers}", f"{facts.per_weight:.2f}"]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print_table()
    elif sys.argv[1] == "others":
        print(json.dumps(compile_others()))
    else:
        for kernel in json.loads(sys.argv[1]):
            print(json.dumps(asdict(facts_of(*kernel))), flush=True)
