"""Tables of launches: every candidate timed, and where dequantizing becomes faster.

Letters: M tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from kernel_bench import DTYPE, Bench, copies_of, draw, pack
from kernel_dense import DenseRow
from kernel_shapes import DenseShape

from alphaquant.kernels.order import KernelWeight
from alphaquant.kernels.tuning import (
    DenseKey,
    KernelTable,
    Launch,
    LaunchKey,
    crossover,
    dense_key,
    launch_candidates,
    launch_key,
)

TUNED_TOKENS = (16, 32, 64)
"""One M per size of block that the kernel has: all of its rows are used."""


def tune_shape(
    bench: Bench, shape: DenseShape, name: str, tokens: Sequence[int] = TUNED_TOKENS
) -> Iterator[tuple[LaunchKey, Launch]]:
    """The fastest launch for each size of block; nothing where the timer times nothing.

    Args:
        bench: with the kernels and the timer.
        shape: of the matrix.
        name: of its format.
        tokens: M, one per size of block.
    """
    weight = pack(draw(shape.rows, shape.cols, bench.device), name)
    copies = copies_of(weight, bench.l2_bytes)
    for n_tokens in tokens:
        x = draw(n_tokens, shape.cols, bench.device, seed=n_tokens).to(DTYPE)
        found = []
        for launch in launch_candidates(weight.n_tiles):
            given = {"config": launch.config, "n_splits": launch.n_splits}
            run = partial(bench.kernels.packed_linear, x, dense_rows=n_tokens + 1, **given)
            timing = bench.timer([partial(run, w) for w in copies])
            if timing is not None:
                found.append((timing.seconds, launch))
        if found:
            yield launch_key(weight, DTYPE, n_tokens), min(found, key=lambda pair: pair[0])[1]


def find_crossover(rows: Sequence[DenseRow], weight: KernelWeight) -> list[tuple[DenseKey, int]]:
    """From how many tokens on one matrix and format should be dequantized; empty if not timed.

    Args:
        rows: of that matrix and format, by ascending number of tokens.
        weight: any such matrix.
    """
    times = [(r.n_tokens, r.packed, r.dequantized) for r in rows]
    timed = [(n, p.seconds, d.seconds) for n, p, d in times if p and d]
    if not timed:
        return []
    n_tokens, packed, dense = zip(*timed, strict=True)
    return [(dense_key(weight, DTYPE), crossover(n_tokens, packed, dense))]


def with_entries(
    table: KernelTable,
    launches: Sequence[tuple[LaunchKey, Launch]] = (),
    dense_rows: Sequence[tuple[DenseKey, int]] = (),
) -> KernelTable:
    """The table with more entries; of equal keys the later one stays."""
    return replace(
        table,
        launches={**table.launches, **dict(launches)},
        dense_rows={**table.dense_rows, **dict(dense_rows)},
    )
