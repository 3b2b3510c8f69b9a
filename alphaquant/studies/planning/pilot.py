"""How fast this machine does what a search consists of, measured in seconds on random numbers.

The real functions run on matrices of the model's own shapes: products in its dtype, the quantizer
on one stack of each shape, table dequantization, sha256. No weight of the model is needed.
"""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from alphaquant.models.sites import ModelMap
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.studies.planning.needs import Needs, Stack

_FORMATS = ("int4-g64", "int3-g128", "int2-g128")
_ROWS = 1024
"""Rows of a matrix that the quantizer is measured on, at most."""
_LEAST_SECONDS = 0.2
_HASHED = 2**26


@dataclass(frozen=True)
class Rates:
    """Speeds of one machine.

    Attributes:
        products: multiplications a second in the dtype of the computation, with as many tokens as
            an expert sees of a batch.
        float32: multiplications a second in float32.
        once: seconds that a stack takes whatever the number of its formats, by (rows, columns).
        per_format: seconds of a stack in one format more.
        dequantized: weights a second.
        hashed: bytes a second, read from memory.
    """

    products: float
    float32: float
    once: Mapping[tuple[int, int], float]
    per_format: Mapping[tuple[int, int], float]
    dequantized: float
    hashed: float


UNKNOWN = Rates(math.inf, math.inf, defaultdict(float), defaultdict(float), math.inf, math.inf)
"""No time at all: for a plan of memory and disk alone."""


def measure_rates(needs: Needs, settings: QuantSettings, dtype: torch.dtype) -> Rates:
    """Speeds of this machine for a search.

    Args:
        needs: of the search; its shapes are taken.
        settings: of the quantizer.
        dtype: of the computation.
    """
    device = next(needs.model_map.model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    once, per_format = {}, {}
    packed: PackedMatrix | None = None
    for stack in needs.stacks:
        key = (stack.n_rows, stack.n_cols)
        once[key], per_format[key], packed = _quantizer(stack, settings)
    assert packed is not None, "a model has matrices"
    largest = max(needs.stacks, key=lambda s: s.count * s.n_rows * s.n_cols)
    n_tokens = _tokens_together(needs, largest)
    n_weights = packed.rows * packed.cols
    content = bytes(_HASHED)
    return Rates(
        products=_products(n_tokens, largest, dtype, device),
        float32=_products(n_tokens, largest, torch.float32, device),
        once=once,
        per_format=per_format,
        dequantized=n_weights / _seconds(packed.dequantize),
        hashed=_HASHED / _seconds(lambda: hashlib.sha256(content).digest()),
    )


def _tokens_together(needs: Needs, stack: Stack) -> int:
    """Tokens that go through a matrix of a stack at once, with 8 windows in a batch."""
    n_batch = 8 * needs.seq_len
    if stack.matrices[0].expert is None:
        return n_batch
    share = needs.active / needs.space.inventory.n_weights
    return max(1, round(n_batch * share))


def _products(n_tokens: int, stack: Stack, dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications a second."""
    matrix = stack.matrices[0]
    weight = torch.randn(matrix.rows, matrix.cols, device=device).to(dtype)
    inputs = torch.randn(n_tokens, matrix.cols, device=device).to(dtype)

    def run() -> Tensor:
        found = torch.nn.functional.linear(inputs, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return found

    return n_tokens * matrix.n_weights / _seconds(run)


def _seconds(run: Callable[[], Any]) -> float:
    """Seconds of a call: the mean of as many as take a fifth of a second, after a first one."""
    run()
    n_runs, started = 0, time.perf_counter()
    while True:
        run()
        n_runs += 1
        taken = time.perf_counter() - started
        if taken >= _LEAST_SECONDS:
            return taken / n_runs


def _quantizer(stack: Stack, settings: QuantSettings) -> tuple[float, float, PackedMatrix]:
    """Seconds of one stack of a shape: once, per format; and a packed matrix of it."""
    parts = _cut(stack.matrices)
    weights = {m.name: torch.randn(m.rows, m.cols) * m.cols**-0.5 for m in parts}
    inputs = torch.randn(2 * stack.n_cols, stack.n_cols)
    batch = HessianBatch((parts,), (inputs.T @ inputs)[None], (len(inputs),), ("plain",))
    weights_of = cast(ModelMap, _Weights(weights))
    found: list[PackedMatrix] = []

    def run(formats: Sequence[str]) -> float:
        started = time.perf_counter()
        items = quantize_layer(weights_of, cast(Any, None), [batch], formats, settings)
        found.extend(item.packed for item in items)
        return time.perf_counter() - started

    run(_FORMATS[:1])  # compiles the column loops where nobody has
    one, all_of_them = run(_FORMATS[:1]), run(_FORMATS)
    scale = stack.n_rows / sum(m.rows for m in parts)
    per_format = max(all_of_them - one, 0.1 * one) / (len(_FORMATS) - 1)
    return max(one - per_format, 0.0), per_format * scale, found[0]


def _cut(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    """The same with fewer rows: rows are independent."""
    most = max(1, _ROWS // len(matrices))
    return tuple(
        Matrix(m.name, min(m.rows, most), m.cols, m.kind, m.layer, m.expert) for m in matrices
    )


@dataclass(frozen=True)
class _Weights:
    """What the engine asks a model for."""

    weights: Mapping[str, Tensor]

    def view(self, name: str) -> Tensor:
        return self.weights[name]
