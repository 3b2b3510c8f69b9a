"""What the benchmarks of the kernels share: kernels, timings, weights, and how wrong a result is.

Letters: N outputs and K inputs of a matrix.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from kernel_shapes import MAX_ERROR
from kernel_timing import Call, Timer, Timing, n_copies
from torch import Tensor

from alphaquant.kernels.order import KernelWeight, order_bfloat16
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Kernels:
    """What is measured; loaded late, because Triton decides at import whether it interprets.

    Attributes:
        packed_linear: `alphaquant.kernels.linear.product_triton.packed_linear`.
        default_dense_rows: from the same file.
        grouped_moe: `alphaquant.kernels.moe.launch_triton.grouped_moe`.
        empty: a kernel that does nothing, with its grid as the index.
    """

    packed_linear: Callable[..., Tensor]
    default_dense_rows: Callable[[KernelWeight, torch.dtype], int]
    grouped_moe: Callable[..., Tensor]
    empty: Any


@dataclass(frozen=True)
class Bench:
    """Where and how everything is timed.

    Attributes:
        kernels: what is measured.
        timer: of calls.
        device: cuda or cpu.
        l2_bytes: size of the level 2 cache; 0 for one copy of everything.
        known: timings that several rows share, by what was timed.
        failures: what others' code could not do, for the result file.
    """

    kernels: Kernels
    timer: Timer
    device: str
    l2_bytes: int
    known: dict[tuple[object, ...], Timing | None] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def time_once(
        self, key: tuple[object, ...], calls: Callable[[], Sequence[Call]]
    ) -> Timing | None:
        """A timing that other rows may have asked for already; None in a dry run."""
        if key not in self.known:
            self.known[key] = self.timer(calls())
        return self.known[key]


def load_kernels() -> Kernels:
    """The kernels, interpreted if TRITON_INTERPRET is 1 when they are first loaded."""
    linear = importlib.import_module("alphaquant.kernels.linear.product_triton")
    grouped = importlib.import_module("alphaquant.kernels.moe.launch_triton")
    empty = importlib.import_module("empty_triton").empty_kernel
    return Kernels(
        linear.packed_linear, linear.default_dense_rows, grouped.grouped_moe, empty[(1,)]
    )


def draw(rows: int, cols: int, device: str, seed: int = 0) -> Tensor:
    """Normal numbers, float32 [rows, cols]; divided by sqrt(cols), so products stay near 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    numbers = torch.randn(rows, cols, generator=generator, device=device)
    return numbers.div_(cols**0.5)


def pack(weight: Tensor, name: str) -> KernelWeight:
    """A float32 matrix [N, K] rounded to nearest in a format, in kernel order on its device."""
    fmt = parse_format(name)
    if not fmt.is_quantized:
        return order_bfloat16(weight.to(torch.bfloat16))
    matrix = quantize_rtn(weight[None], fmt, "minmax").pack(0, slice(None))
    return order_matrix(matrix).to(weight.device)


def deep_copy(thing: Any) -> Any:
    """The same dataclass, or tuple of such, with tensors in memory of their own."""
    if isinstance(thing, Tensor):
        return thing.clone()
    if isinstance(thing, tuple):
        return type(thing)(map(deep_copy, thing))
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: deep_copy(getattr(thing, f.name)) for f in fields(thing)})
    return thing


def copies_of(weight: KernelWeight, l2_bytes: int) -> list[KernelWeight]:
    """The matrix and as many copies as it takes to exceed the cache; see `n_copies`."""
    count = n_copies(bytes_of(weight), l2_bytes)
    return [weight, *(deep_copy(weight) for _ in range(count - 1))]


def bytes_of(weight: KernelWeight) -> int:
    """Bytes that a product reads of a matrix, padding included."""
    parts = (weight.words, weight.scales, weight.zeros, weight.global_scale)
    return sum(t.numel() * t.element_size() for t in parts if t is not None)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference in multiples of the norm of what is expected."""
    difference = found.to(torch.float32) - expected
    return float(difference.norm() / expected.norm())


def check_error(error: float, what: str) -> float:
    """The error, if it is small enough; NaN is not.

    Raises:
        RuntimeError: it is not.
    """
    if not error <= MAX_ERROR:
        raise RuntimeError(f"{what}: relative error {error:.3g} is above {MAX_ERROR:g}")
    return error


def ratio(one: Timing | None, other: Timing | None) -> float | None:
    """Seconds of one in multiples of the other's; None if either was not timed."""
    return None if one is None or other is None else one.seconds / other.seconds
