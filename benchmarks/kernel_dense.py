"""Packed matrices beside cuBLAS in bfloat16, a copy of the same bytes, and an empty kernel.

Every timing of a row comes from the same run and the same timer. The copy reads and writes its
bytes, so it moves twice as many as a product reads.

Letters: N outputs and K inputs of a matrix, M tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kernel_bench import (
    DTYPE,
    Bench,
    bytes_of,
    check_error,
    copies_of,
    draw,
    pack,
    ratio,
    relative_error,
)
from kernel_shapes import DenseShape, dense_target
from kernel_timing import Call, Timing, n_copies
from torch import Tensor

from alphaquant.kernels import reference
from alphaquant.kernels.order import KernelWeight

PACKED, DENSE = "packed", "dequantized"


@dataclass(frozen=True)
class DenseRow:
    """One matrix, format and number of tokens; timings and what follows are None in a dry run.

    Attributes:
        format: of the weights.
        shape: name.
        rows: N.
        cols: K.
        n_tokens: M.
        n_bytes: of words, scales, zero points and global scale.
        relative_error: of the packed product and of that with dequantized weights, the larger.
        default: which of the two `packed_linear` takes by itself.
        packed: the packed product.
        dequantized: the matrix dequantized, then multiplied by cuBLAS.
        cublas: bfloat16 weights.
        copy: of as many bytes within the device.
        empty: an empty kernel.
        bytes_per_second: `n_bytes` in the time of the packed product.
        share_of_copy: time of the copy in multiples of the packed product's.
        speedup: time of cuBLAS in multiples of the default's.
        target: what `speedup` should be at least.
        is_met: whether it is.
    """

    format: str
    shape: str
    rows: int
    cols: int
    n_tokens: int
    n_bytes: int
    relative_error: float
    default: str
    packed: Timing | None
    dequantized: Timing | None
    cublas: Timing | None
    copy: Timing | None
    empty: Timing | None
    bytes_per_second: float | None
    share_of_copy: float | None
    speedup: float | None
    target: float
    is_met: bool | None


def time_cublas(bench: Bench, shape: DenseShape, x: Tensor) -> Timing | None:
    """bfloat16 weights of a shape times x [M, K], through torch."""

    def calls() -> list[Call]:
        weight = draw(shape.rows, shape.cols, bench.device).to(DTYPE)
        count = n_copies(2 * weight.numel(), bench.l2_bytes)
        copies = [weight.clone() for _ in range(count)]
        return [partial(torch.matmul, x, one.T) for one in copies]

    return bench.time_once(("cublas", shape.rows, shape.cols, len(x)), calls)


def time_copy(bench: Bench, n_bytes: int) -> Timing | None:
    """A copy of so many bytes within the device."""

    def calls() -> list[Call]:
        count = n_copies(2 * n_bytes, bench.l2_bytes)
        sizes = (count, n_bytes)
        source = torch.zeros(sizes, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        return [partial(t.copy_, s) for t, s in zip(target, source, strict=True)]

    return bench.time_once(("copy", n_bytes), calls)


def measure_dense(
    bench: Bench, shape: DenseShape, name: str, tokens: Sequence[int]
) -> Iterator[DenseRow]:
    """A matrix of one shape and format with every number of tokens.

    Raises:
        RuntimeError: a product is wrong.
    """
    weight = pack(draw(shape.rows, shape.cols, bench.device), name)
    copies = copies_of(weight, bench.l2_bytes)
    for n_tokens in tokens:
        x = draw(n_tokens, shape.cols, bench.device, seed=n_tokens).to(DTYPE)
        yield _measure_row(bench, shape, name, copies, x)


def _measure_row(
    bench: Bench, shape: DenseShape, name: str, copies: Sequence[KernelWeight], x: Tensor
) -> DenseRow:
    weight, n_tokens = copies[0], len(x)
    linear = bench.kernels.packed_linear
    rows = {PACKED: n_tokens + 1, DENSE: 1}  # dense_rows that forces either way
    expected = reference.linear(x, weight)
    error = max(relative_error(linear(x, weight, dense_rows=r), expected) for r in rows.values())
    check_error(error, f"{name} {shape.name} with {n_tokens} tokens")
    times = {
        way: bench.timer([partial(linear, x, w, dense_rows=r) for w in copies])
        for way, r in rows.items()
    }
    n_bytes = bytes_of(weight)
    cublas, copy = time_cublas(bench, shape, x), time_copy(bench, n_bytes)
    is_dense = n_tokens >= bench.kernels.default_dense_rows(weight, x.dtype)
    default = DENSE if is_dense else PACKED
    packed, speedup = times[PACKED], ratio(cublas, times[default])
    target = dense_target(weight.element, shape, n_tokens)
    return DenseRow(
        *(name, shape.name, shape.rows, shape.cols, n_tokens, n_bytes, error, default),
        *(
            packed,
            times[DENSE],
            cublas,
            copy,
            bench.time_once(("empty",), lambda: [bench.kernels.empty]),
        ),
        bytes_per_second=None if packed is None else n_bytes / packed.seconds,
        share_of_copy=ratio(copy, packed),
        speedup=speedup,
        target=target,
        is_met=None if speedup is None else speedup >= target,
    )
