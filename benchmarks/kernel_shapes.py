"""What the benchmark of the kernels runs on: shapes of models, formats, a mix, and targets.

Letters: N outputs and K inputs of a matrix, M tokens, E experts.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from random import Random

from alphaquant.spaces.formats import parse_format

MAX_ERROR = 1e-2
"""Relative error that fails a row. bfloat16 results alone are off by up to 2^-9 = 0.002, weights
rounded after scaling by as much again, and the two products of an expert by both twice."""


@dataclass(frozen=True)
class DenseShape:
    """A matrix.

    Attributes:
        name: of the model and the matrices of this size.
        rows: N.
        cols: K.
    """

    name: str
    rows: int
    cols: int


@dataclass(frozen=True)
class MoeShape:
    """A layer of experts.

    Attributes:
        name: of the model.
        n_experts: E.
        n_choices: experts per token.
        hidden: inputs and outputs of an expert.
        width: its features in between.
    """

    name: str
    n_experts: int
    n_choices: int
    hidden: int
    width: int

    @property
    def weights_per_expert(self) -> int:
        """Weights of gate, up and down."""
        return 3 * self.hidden * self.width


SQUARE = DenseShape("8192", 8192, 8192)
DENSE_SHAPES: tuple[DenseShape, ...] = (
    SQUARE,
    DenseShape("olmoe-qkvo", 2048, 2048),
    DenseShape("qwen3-30b-q", 4096, 2048),
    DenseShape("qwen3-30b-kv", 512, 2048),
    DenseShape("qwen3-30b-o", 2048, 4096),
    DenseShape("mixtral-llama3-qo", 4096, 4096),
    DenseShape("mixtral-llama3-kv", 1024, 4096),
    DenseShape("llama3-8b-gate-up", 14336, 4096),
    DenseShape("llama3-8b-down", 4096, 14336),
)
MOE_SHAPES: tuple[MoeShape, ...] = (
    MoeShape("olmoe-1b-7b", 64, 8, 2048, 1024),
    MoeShape("qwen3-30b-a3b", 128, 8, 2048, 768),
    MoeShape("mixtral-8x7b", 8, 2, 4096, 14336),
)
TINY_DENSE = (DenseShape("tiny", 130, 256), DenseShape("tiny-odd", 3, 171))
TINY_MOE = (MoeShape("tiny-layer", 5, 2, 128, 64),)

DENSE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MOE_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TINY_TOKENS = (1, 17)

DENSE_FORMATS = (
    *("int1-g128", "int2-g128", "int3-g128", "int4-g128", "int5-g128", "int6-g128", "int8-g128"),
    *("int4-g128-asym", "int4-g64", "fp4-e2m1-g128", "fp6-e3m2-g128", "fp8-e4m3-g128"),
    *("mxfp4", "mxfp8", "nvfp4", "bf16"),
)
UNIFORM = ("int2-g128", "int3-g128", "int4-g128", "int8-g128")
"""The uniform formats of grouped layers, and what the mix is made of."""

MIX_BITS = 4.25
FLOOR = 0.95
"""No product may be slower than this part of cuBLAS's speed in bfloat16, at any M."""

SPEEDUPS: dict[str, tuple[float, float]] = {
    "int8": (1.6, 1.3),
    "e4m3": (1.6, 1.3),
    "e5m2": (1.6, 1.3),
    "int6": (1.85, 1.4),
    "int4": (2.2, 1.55),
    "int3": (2.25, 1.5),
    "int2": (2.5, 1.7),
}
"""Targets with 8192 x 8192 weights, in multiples of cuBLAS's speed: M up to 16, M = 64."""

MOE_SPEEDUP, MOE_SPEEDUP_TOKENS = 2.0, 16
"""Target of the mix: multiples of the fastest bfloat16 layer's speed, up to so many tokens."""

MIX_RATIO = 1.15
"""Target of the mix: most of its time in multiples of the slowest uniform format's."""


def dense_target(element: str, shape: DenseShape, n_tokens: int) -> float:
    """The speed that a product should reach, in multiples of cuBLAS's in bfloat16.

    Args:
        element: of the weights.
        shape: of the matrix.
        n_tokens: M.
    """
    if (shape.rows, shape.cols) == (SQUARE.rows, SQUARE.cols) and element in SPEEDUPS:
        few, many = SPEEDUPS[element]
        if n_tokens <= 16:
            return few
        if n_tokens == 64:
            return many
    return FLOOR


def mix_counts(n_experts: int, bits: float = MIX_BITS) -> Counter[str]:
    """How many experts have each of the formats of `UNIFORM`, all of them at least once.

    Worked example: 8 experts at 4.25 bits are 2, 3, 1 and 2 of 2.125, 3.125, 4.125 and 8.125:
    4.25 + 9.375 + 4.125 + 16.25 = 34 bits = 8 x 4.25.

    Args:
        n_experts: at least one per format.
        bits: per weight, scales included; the nearest possible number is taken, of equal ones
            that with the smallest largest count.
    """
    each = [parse_format(name).nominal_bits for name in UNIFORM]
    best: tuple[float, int, tuple[int, ...]] | None = None
    for first in product(range(1, n_experts), repeat=len(UNIFORM) - 1):
        counts = (*first, n_experts - sum(first))
        if counts[-1] < 1:
            continue
        total = sum(n * b for n, b in zip(counts, each, strict=True))
        found = (abs(total / n_experts - bits), max(counts), counts)
        best = found if best is None else min(best, found)
    if best is None:
        raise ValueError(f"{n_experts} experts cannot have {len(UNIFORM)} formats")
    return Counter(dict(zip(UNIFORM, best[2], strict=True)))


def mix_formats(n_experts: int) -> tuple[str, ...]:
    """The format of each expert of the mix, in an order that depends on the number only."""
    names = sorted(mix_counts(n_experts).elements())
    Random(n_experts).shuffle(names)
    return tuple(names)
