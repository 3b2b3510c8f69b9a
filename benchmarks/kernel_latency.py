"""Measured times as the table that predicts decoding steps (`alphaquant.evaluators.latency`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from kernel_dense import DenseRow

from alphaquant.evaluators.latency import LatencyRow
from alphaquant.files import whole_file

KERNEL, CUBLAS = "alphaquant packed_linear", "cublas bf16"


def latency_rows(device: str, rows: Sequence[DenseRow]) -> Iterator[LatencyRow]:
    """One row per measured product, and per shape and number of tokens one in bf16.

    Args:
        device: name.
        rows: with timings; those of a dry run give nothing.
    """
    seen: set[tuple[int, int, int]] = set()
    for row in rows:
        size = (row.rows, row.cols, row.n_tokens)
        timed = row.packed if row.default == "packed" else row.dequantized
        if timed is not None:
            yield _row(device, KERNEL, row.format, size, timed.seconds)
        if row.cublas is not None and size not in seen:
            seen.add(size)
            yield _row(device, CUBLAS, "bf16", size, row.cublas.seconds)


def write_latencies(path: Path, device: str, rows: Sequence[DenseRow]) -> None:
    """Write the table as JSON lines, whole or not at all."""
    lines = [row.model_dump_json() for row in latency_rows(device, rows)]
    with whole_file(path) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _row(
    device: str, kernel: str, name: str, size: tuple[int, int, int], seconds: float
) -> LatencyRow:
    n_rows, n_cols, n_tokens = size
    return LatencyRow(
        device=device,
        kernel=kernel,
        format=name,
        rows=n_rows,
        cols=n_cols,
        tokens=n_tokens,
        microseconds=1e6 * seconds,
    )
