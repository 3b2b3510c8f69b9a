"""Rows of the benchmark of the kernels as Markdown."""

from kernel_dense import DenseRow
from kernel_grouped import GroupedRow
from kernel_peers import PeerRow
from kernel_timing import Timing


def dense_cells(row: DenseRow) -> list[str]:
    """A row as text, for the table with `DENSE_HEAD`."""
    times = (row.packed, row.dequantized, row.cublas, row.copy, row.empty)
    rate = None if row.bytes_per_second is None else row.bytes_per_second / 1e9
    return [
        *(row.format, row.shape, str(row.n_tokens), row.default),
        *(microseconds(timing) for timing in times),
        *(number(rate, ".0f"), number(row.share_of_copy, ".2f"), number(row.speedup, ".2f")),
        *(f"{row.target:.2f}", verdict(row.is_met), f"{row.relative_error:.1e}"),
    ]


DENSE_HEAD = [
    *("format", "shape", "tokens", "default"),
    *("packed us", "dequantized us", "cuBLAS bf16 us", "copy us", "empty us"),
    *("GB/s", "copy / packed", "speedup", "target", "", "error"),
]


GROUPED_HEAD = [
    *("format", "layer", "tokens", "bits", "packed us", "grouped_mm products us"),
    *("transformers grouped_mm us", "transformers batched_mm us", "GB/s"),
    *("speedup", "target", "", "of slowest uniform", "", "error"),
]


def grouped_cells(row: GroupedRow) -> list[str]:
    """A row as text, for the table with `GROUPED_HEAD`."""
    times = (row.packed, row.products, row.grouped, row.batched)
    rate = None if row.bytes_per_second is None else row.bytes_per_second / 1e9
    return [
        *(row.format, row.shape, str(row.n_tokens), f"{row.bits_per_weight:.3f}"),
        *(microseconds(timing) for timing in times),
        *(number(rate, ".0f"), number(row.speedup, ".2f"), number(row.target, ".2f")),
        *(verdict(row.is_met), number(row.of_slowest, ".2f"), verdict(row.is_even)),
        f"{row.relative_error:.1e}",
    ]


PEER_HEAD = [
    *("peer", "version", "like our", "shape", "tokens"),
    *("peer us", "cuBLAS bf16 us", "speedup", "error"),
]


def peer_cells(row: PeerRow) -> list[str]:
    """A row as text, for the table with `PEER_HEAD`."""
    return [
        *(row.peer, row.version, row.format, row.shape, str(row.n_tokens)),
        *(microseconds(row.timing), microseconds(row.cublas)),
        *(number(row.speedup, ".2f"), f"{row.relative_error:.1e}"),
    ]


def microseconds(timing: Timing | None) -> str:
    """Median and quartiles; empty if there was no timing."""
    if timing is None:
        return ""
    median, lower, upper = (1e6 * t for t in (timing.seconds, timing.lower, timing.upper))
    return f"{median:.1f} ({lower:.1f}-{upper:.1f})"


def number(value: float | None, spec: str) -> str:
    """A number; empty if there is none."""
    return "" if value is None else format(value, spec)


def verdict(is_met: bool | None) -> str:
    """A target in a word; empty if nothing was timed."""
    return "" if is_met is None else "met" if is_met else "missed"
