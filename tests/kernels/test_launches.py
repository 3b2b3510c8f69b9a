"""Launches as the host code makes them, compiled for sm_90 and not run: arguments, binaries.

The other tests either interpret the kernels or compile them with arguments of their own. Here the
host functions run on CPU tensors in a process of its own, on a device that is claimed to be an
H100, and every launch ends after the compiler: what Triton binds, specializes and compiles is what
a GPU would be given. Run as a program, this file prints a line per host call:

    python tests/kernels/test_launches.py
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from alphaquant.kernels.moe.plan import ExpertWeights, GroupedExperts, stack_experts
from alphaquant.kernels.order import KernelWeight
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.testing.kernels import pack_drawn
from alphaquant.testing.machine_code import Launched, claimed_gpu

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

LINEAR = ("int4-g128", "int3-g64-asym", "nvfp4")
TOKENS = (1, 2, 16, 17, 33, 64)
EXPERTS = ("int4-g128", "int2-g128-asym", "mxfp4", "bf16")
HIDDEN, WIDTH = 256, 192


pytestmark = pytest.mark.slow  # compiles for a GPU in another process


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows_of(printed: list[dict[str, Any]], call: str) -> list[dict[str, Any]]:
    return [row for row in printed if row["call"].startswith(call)]


def test_a_linear_has_one_binary_per_format_and_block_of_tokens(
    printed: list[dict[str, Any]],
) -> None:
    rows = rows_of(printed, "linear")
    assert len(rows) == len(LINEAR) * len(TOKENS)
    products = [[k for k in row["compiled"] if k == "packed_linear_kernel"] for row in rows]
    # Blocks of 16, 32 and 64 tokens: the first of 1, 17 and 33 tokens compiles, no other number.
    first_of_block = [1, 0, 0, 1, 1, 0]
    assert [len(names) for names in products] == first_of_block * len(LINEAR)
    assert all("packed_linear_kernel" in row["launched"] for row in rows)


def test_columns_of_few_blocks_are_split_and_added(printed: list[dict[str, Any]]) -> None:
    (row,) = rows_of(printed, "split linear")
    assert row["launched"] == ["packed_linear_kernel", "add_splits_kernel"]


def test_many_tokens_dequantize_first(printed: list[dict[str, Any]]) -> None:
    (row,) = rows_of(printed, "dense linear")
    assert row["launched"] == ["dequantize_kernel"]
    (row,) = rows_of(printed, "dense experts")
    one_format = ["gather_rows_kernel", "dequantize_kernel"]
    both = (one_format + ["gate_kernel"]) * len(EXPERTS)
    down = (one_format + ["weigh_kernel"]) * len(EXPERTS)
    assert row["launched"] == [*both, *down, "add_slots_kernel"]


def test_a_layer_of_experts_has_a_launch_per_format_and_few_more(
    printed: list[dict[str, Any]],
) -> None:
    products = ["gate_up_kernel"] * len(EXPERTS) + ["down_kernel"] * len(EXPERTS)
    for row in rows_of(printed, "experts"):
        launched = [name for name in row["launched"] if name != "gate_kernel"]
        assert launched == ["plan_slots_kernel", *products, "add_slots_kernel"], row
    apart = ["gate_up_kernel"] * 2 * len(EXPERTS) + ["gate_kernel"]
    apart += ["down_kernel"] * len(EXPERTS)
    for row in rows_of(printed, "apart"):
        assert row["launched"] == ["plan_slots_kernel", *apart, "add_slots_kernel"], row


def test_another_number_of_tokens_compiles_no_more_experts(
    printed: list[dict[str, Any]],
) -> None:
    compiled = [row["compiled"] for row in rows_of(printed, "experts")]
    assert len(compiled) == 4 and len(compiled[0]) > 2 * len(EXPERTS)
    assert compiled[1] == compiled[2] == compiled[3] == [], compiled


def draw(name: str, rows: int, cols: int) -> KernelWeight:
    return order_matrix(pack_drawn(name, rows, cols))


def draw_experts(*, is_apart: bool) -> GroupedExperts:
    """Two experts of every format; the up of each has that of the next if they are apart."""
    experts = []
    for number in range(2 * len(EXPERTS)):
        own, other = (EXPERTS[(number + i) % len(EXPERTS)] for i in range(2))
        up = draw(other if is_apart else own, WIDTH, HIDDEN)
        experts.append(ExpertWeights(draw(own, WIDTH, HIDDEN), up, draw(other, HIDDEN, WIDTH)))
    return stack_experts(experts)


def main() -> None:
    """Call the host functions; print what each launched and compiled."""
    with claimed_gpu() as launched:
        call_all(launched)


def call_all(launched: list[Launched]) -> None:
    linear = importlib.import_module("alphaquant.kernels.linear.product_triton")
    grouped = importlib.import_module("alphaquant.kernels.moe.launch_triton")

    def report(call: str, run: Callable[[], object]) -> None:
        launched.clear()
        run()
        names = [launch.kernel for launch in launched]
        new = [launch.kernel for launch in launched if launch.is_new]
        print(json.dumps({"call": call, "launched": names, "compiled": new}), flush=True)

    for name in LINEAR:
        weight = draw(name, 256, 512)
        for n_tokens in TOKENS:
            x = torch.zeros(n_tokens, 512, dtype=torch.bfloat16)
            report(f"linear {name} {n_tokens}", partial(linear.packed_linear, x, weight))
    long = draw("int4-g128", 128, 2048)
    x = torch.zeros(1, 2048, dtype=torch.bfloat16)
    report("split linear", partial(linear.packed_linear, x, long))
    report("dense linear", partial(linear.packed_linear, x, long, dense_rows=1))
    # On a CPU torch multiplies groups in float32 only.
    x, ids = torch.zeros(2, HIDDEN), torch.zeros(2, 2, dtype=torch.int64)
    together = draw_experts(is_apart=False)
    run = partial(grouped.grouped_moe, x, ids, x[:, :2], together, dense_slots=0)
    report("dense experts", run)
    for call, is_apart, counts in (("experts", False, (1, 2, 3, 5)), ("apart", True, (1, 4))):
        experts = draw_experts(is_apart=is_apart)
        for n_tokens in counts:
            x = torch.zeros(n_tokens, HIDDEN, dtype=torch.bfloat16)
            ids, weights = torch.zeros(n_tokens, 2, dtype=torch.int64), torch.zeros(n_tokens, 2)
            run = partial(grouped.grouped_moe, x, ids, weights, experts)
            report(f"{call} {n_tokens}", run)


if __name__ == "__main__":
    main()
