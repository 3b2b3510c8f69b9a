"""The grouped MoE kernels against dense experts in float32: mixed formats, ids, sizes, types.

Without a GPU they run in Triton's interpreter, where they unpack without PTX; with one, the same
tests run on it. What sm_90 gets is compiled in a process of its own, because the interpreter
replaces the compiler where it is on. Run as a program, this file prints what the compiler makes:

    python tests/kernels/test_grouped_triton.py 16 int4-g128 mxfp4
"""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.moe_plan import ExpertWeights, GroupedExperts, stack_experts
from alphaquant.kernels.order import KernelWeight
from alphaquant.quant.gptq import quantize_rtn
from alphaquant.quant.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights
from alphaquant.testing.machine_code import disassemble, main_loop

pytest.importorskip("triton", reason="the kernels need triton, which is for Linux only")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MIXED = (  # gate and up, down: every expert another pair, and some formats several times
    *(("int2-g64", "int8-row"), ("int2-g32-asym", "mxfp4"), ("int3-g128", "int2-g64-asym")),
    *(("int3-g64-asym", "nvfp4"), ("int4-g128", "int3-g64"), ("int4-g64-asym", "fp8-e4m3-row")),
    *(("int8-row", "int4-g32"), ("int8-g64-asym", "int4-g128"), ("mxfp4", "int8-g128-asym")),
    *(("fp8-e4m3-row", "int4-g128-asym"), ("nvfp4", "int3-g128-asym"), ("int4-g128", "nvfp4")),
    *(("nvfp4", "int2-g64"), ("int2-g64", "nvfp4")),
)

# Of the largest output. Where a type is narrow, a scale or a scaled weight, the gated row, the
# weighted output and the sum are each rounded once: 4 half units, twice that with second orders.
# In float32 what differs is the order of sums.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4 * 2.0**-10, torch.bfloat16: 4 * 2.0**-7}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    interpreted = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    with mock.patch.dict(os.environ, interpreted):
        module = importlib.import_module("alphaquant.kernels.grouped_triton")
    assert (DEVICE == "cpu") == module.IS_INTERPRETED
    return module


@dataclass(frozen=True)
class Layer:
    """Experts, and what their matrices stand for."""

    experts: tuple[ExpertWeights, ...]
    dense: tuple[tuple[Tensor, Tensor, Tensor], ...]

    def stacked(self, owned: range | None = None) -> GroupedExperts:
        owned = range(len(self.experts)) if owned is None else owned
        return stack_experts([self.experts[e] for e in owned], owned.start)

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One slot after the other, float32; ids of no expert add nothing."""
        wide = x.to(torch.float32)
        out = torch.zeros_like(wide)
        for token, chosen in enumerate(ids.tolist()):
            for j, expert in enumerate(chosen):
                if 0 <= expert < len(self.dense):
                    gate, up, down = self.dense[expert]
                    gated = torch.nn.functional.silu(gate @ wide[token]) * (up @ wide[token])
                    out[token] += weights[token, j].to(torch.float32) * (down @ gated)
        return out


def draw(name: str, rows: int, cols: int, seed: int) -> KernelWeight:
    # Wider than those of a model, so that gates bend.
    weight = 10 * draw_weights(rows, cols, seed)[None]
    rounded = quantize_rtn(weight, parse_format(name), "minmax")
    return order_matrix(rounded.pack(0, slice(None))).to(DEVICE)


def draw_layer(names: Sequence[tuple[str, str]], hidden: int, width: int) -> Layer:
    experts = tuple(
        ExpertWeights(
            draw(gate_up, width, hidden, 3 * e),
            draw(gate_up, width, hidden, 3 * e + 1),
            draw(down, hidden, width, 3 * e + 2),
        )
        for e, (gate_up, down) in enumerate(names)
    )
    dense = tuple(
        (reference.dequantize(e.gate), reference.dequantize(e.up), reference.dequantize(e.down))
        for e in experts
    )
    return Layer(experts, dense)


@pytest.fixture(scope="module")
def mixed() -> Layer:
    """H = 200 and I = 136: both end within a tile, and I within a block of 64 rows."""
    return draw_layer(MIXED, hidden=200, width=136)


@pytest.fixture(scope="module")
def small() -> Layer:
    names = (("int4-g64", "nvfp4"), ("mxfp4", "int4-g64"), ("int4-g64", "int4-g64"))
    return draw_layer(names, hidden=128, width=70)


def draw_tokens(ids: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Activations and routing weights for the ids, float32."""
    generator = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids), hidden, generator=generator)
    weights = torch.rand(ids.shape, generator=generator)
    return x.to(DEVICE), weights.to(DEVICE)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    error = float((found.to(torch.float32) - expected).abs().max())
    assert error <= TOLERANCES[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_mixed_experts_give_what_dense_ones_give(
    kernels: ModuleType, mixed: Layer, dtype: torch.dtype
) -> None:
    ids = (torch.arange(21, device=DEVICE) % len(MIXED)).reshape(7, 3)  # every expert is chosen
    x, weights = draw_tokens(ids, 200)
    x = x.to(dtype)
    found = kernels.grouped_moe(x, ids, weights, mixed.stacked())
    assert_near(found, mixed.expected(x, ids, weights), dtype)


@pytest.mark.parametrize(("gate_up", "down"), MIXED, ids=lambda name: str(name))
def test_an_expert_alone_gives_what_it_gives_dense(
    kernels: ModuleType, mixed: Layer, gate_up: str, down: str
) -> None:
    """A wrong expert would hide in the tolerance of the sum over all; here it cannot."""
    expert = MIXED.index((gate_up, down))
    ids = torch.tensor([[expert]], device=DEVICE)
    x, weights = draw_tokens(ids, 200)
    found = kernels.grouped_moe(x, ids, weights, mixed.stacked(range(expert, expert + 1)))
    assert_near(found, mixed.expected(x, ids, weights), torch.float32)


@pytest.mark.parametrize(
    ("purpose", "ids"),
    [
        ("one token, one choice", [[2]]),
        ("all tokens to the same two experts", [[0, 2]] * 20),
        ("one expert gets more than a block, one gets nothing", [[0]] * 33 + [[1]]),
        ("one token twice to one expert", [[1, 1], [1, 0]]),
        ("padding beside choices", [[3, 1], [0, 99]]),
        ("negative ids", [[-1, 1]]),
        ("a token with nothing but padding", [[3, 3], [0, 1]]),
        ("nothing but padding", [[7], [3]]),
    ],
)
def test_any_routing_gives_what_dense_experts_give(
    kernels: ModuleType, small: Layer, purpose: str, ids: list[list[int]]
) -> None:
    chosen = torch.tensor(ids, device=DEVICE)
    x, weights = draw_tokens(chosen, 128)
    expected = small.expected(x, chosen, weights)
    weights[(chosen < 0) | (chosen >= 3)] = torch.nan  # never to be read
    with uninitialized_memory_is_nan():
        found = kernels.grouped_moe(x, chosen, weights, small.stacked())
    assert_near(found, expected, torch.float32)
    nothing = ((chosen < 0) | (chosen >= 3)).all(1)
    assert torch.equal(found[nothing], torch.zeros_like(found[nothing])), purpose


def uninitialized_memory_is_nan() -> Any:
    """Make torch fill what kernels have to write."""
    make = Tensor.new_empty

    def make_nan(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = make(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return mock.patch.object(Tensor, "new_empty", make_nan)


@pytest.mark.parametrize("block_slots", [16, 32, 64])
def test_blocks_of_every_size_give_the_same_and_always_the_same_bits(
    kernels: ModuleType, small: Layer, block_slots: int
) -> None:
    ids = torch.tensor([[0, 1]] * 35 + [[2, 0]] * 5, device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    found = kernels.grouped_moe(x, ids, weights, small.stacked(), block_slots=block_slots)
    assert_near(found, small.expected(x, ids, weights), torch.float32)
    again = kernels.grouped_moe(x, ids, weights, small.stacked(), block_slots=block_slots)
    assert torch.equal(again, found)


def test_parts_of_ranks_add_up_to_the_whole(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [1, 3]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    ranks = [small.stacked(owned) for owned in (range(0, 1), range(1, 3))]
    parts = [kernels.grouped_moe(x, ids, weights, rank) for rank in ranks]
    assert all(bool(part.any()) for part in parts)
    assert_near(parts[0] + parts[1], small.expected(x, ids, weights), torch.float32)


def test_ids_and_weights_of_other_types_give_the_same(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 1], [2, 9]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    half = weights.to(torch.bfloat16)
    found = kernels.grouped_moe(x, ids.to(torch.int32), half, small.stacked())
    assert torch.equal(found, kernels.grouped_moe(x, ids, half.to(torch.float32), small.stacked()))


def test_activations_and_choices_need_not_be_contiguous(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 2, 1], [1, 0, 9]], device=DEVICE).T
    x, weights = draw_tokens(ids, 128)
    strided, turned = x.T.contiguous().T, weights.T.contiguous().T
    found = kernels.grouped_moe(strided, ids, turned, small.stacked())
    assert_near(found, small.expected(x, ids, weights), torch.float32)


def test_gates_far_from_zero_stay_finite(kernels: ModuleType, small: Layer) -> None:
    ids = torch.tensor([[0, 1], [2, 0]], device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    x *= 1000
    expected = small.expected(x, ids, weights)
    assert float(small.dense[0][0].matmul(x[0]).min()) < -1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kernels.grouped_moe(x, ids, weights, small.stacked())
    assert_near(found, expected, torch.float32)


def test_no_tokens_give_none(kernels: ModuleType, small: Layer) -> None:
    ids = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    assert kernels.grouped_moe(x, ids, weights, small.stacked()).shape == (0, 128)


def test_arguments_that_do_not_fit_are_refused(kernels: ModuleType, small: Layer) -> None:
    ids = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    x, weights = draw_tokens(ids, 128)
    stacked = small.stacked()
    for bad in (x[:, :127], x[0], x.double()):
        with pytest.raises(FormatError, match=r"take \[tokens, 128\]"):
            kernels.grouped_moe(bad, ids, weights, stacked)
    for bad_ids, bad_weights in ((ids[:2], weights[:2]), (ids, weights[:, :1]), (ids[:, 0],) * 2):
        with pytest.raises(FormatError, match="3 tokens"):
            kernels.grouped_moe(x, bad_ids, bad_weights, stacked)


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a kernel for sm_90; the loop is the one over tiles of columns.

    Attributes:
        kernel: its name.
        format: of its matrix.
        weights_from_registers: whether every product is wgmma with weights from registers.
        registers: per thread.
        spilled_bytes: of stack per thread.
        shared_bytes: of shared memory per program.
        instructions_per_weight: of all lanes, in the loop.
        stores_in_loop: to shared memory, other than asynchronous copies of what is loaded.
        spills_in_loop: to or from local memory.
    """

    kernel: str
    format: str
    weights_from_registers: bool
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions_per_weight: float
    stores_in_loop: int
    spills_in_loop: int


COMPILED = ("int3-g128-asym", "int4-g128", "mxfp4")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[Figures]:
    """Those of both kernels for each of the formats; takes no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, __file__, "16", *COMPILED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [Figures(**json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["gate_up_kernel", "down_kernel"])
@pytest.mark.parametrize("name", COMPILED)
def test_sm_90_multiplies_weights_from_registers(
    figures: list[Figures], name: str, kernel: str
) -> None:
    (found,) = [f for f in figures if (f.format, f.kernel) == (name, kernel)]
    assert found.weights_from_registers, found
    assert found.spilled_bytes == found.spills_in_loop == 0, found
    # Scales and zero points are turned in shared memory; 128 x 128 weights would be 32 or more.
    assert found.stores_in_loop <= 2, found
    assert found.registers <= 168, found  # three programs per multiprocessor


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> Any:
    """Compile for sizes that are multiples of 16; what has no type holds 32-bit integers."""
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        default = "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
        is_small = name in ("number", "n_choices", "n_tiles", "tiles_per_step")
        if name not in constants and not is_small:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def figures_of(kernel: Any, weight: KernelWeight, name: str, block_slots: int) -> Figures:
    linear = importlib.import_module("alphaquant.kernels.linear_triton")
    constants = linear.constants_of(weight, torch.bfloat16, use_asm=True)
    types = {
        **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"),
        **dict.fromkeys(("words_ptr", "zeros_ptr"), "*u8"),
        **dict.fromkeys(("global_ptr", "weights_ptr"), "*fp32"),
        "scales_ptr": "*u8" if weight.scales.element_size() == 1 else "*fp16",
    }
    compiled = compile_kernel(kernel, constants | {"EVEN": True, "Z": block_slots}, types)
    usage = disassemble(compiled.asm["cubin"], "-res-usage")
    loop = main_loop(disassemble(compiled.asm["cubin"], "-sass"))
    products = [op for op in loop if "GMMA" in op]
    return Figures(
        kernel=kernel.__name__,
        format=name,
        weights_from_registers=all(re.search(r"GMMA\S* R\d+, R\d+, gd", op) for op in products),
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled_bytes=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared_bytes=compiled.metadata.shared,
        instructions_per_weight=round(len(loop) * 128 / (128 * 128), 2),
        stores_in_loop=sum(op.startswith("STS") for op in loop),
        spills_in_loop=sum(op.startswith(("STL", "LDL")) for op in loop),
    )


def main(block_slots: int, names: Sequence[str]) -> None:
    """Print the figures of both products for each format, a line of JSON each."""
    kernels = importlib.import_module("alphaquant.kernels.grouped_triton")
    sums = {"slots_ptr": "*bf16", "ids_ptr": "*i64", "out_ptr": "*bf16"}
    compile_kernel(kernels.add_slots_kernel, {"BLOCK": 1024}, sums)
    for name in names:
        gate, down = draw(name, 128, 256, 0), draw(name, 256, 128, 0)
        stacked = stack_experts([ExpertWeights(gate, gate, down)])
        for kernel, stacks in (
            (kernels.gate_up_kernel, stacked.gate_up),
            (kernels.down_kernel, stacked.down),
        ):
            print(json.dumps(vars(figures_of(kernel, stacks.stacks[0], name, block_slots))))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
