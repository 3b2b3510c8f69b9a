"""Timing on a GPU: calls in a CUDA graph, weights beyond the cache, median and quartiles.

A timer takes the calls that it is to time in turn, one for each copy of the weights, and returns
the seconds of one call. `GraphTimer` is the one for GPUs. `run_once` times nothing: it lets the
rest of a benchmark run without a GPU.

A call's copy of the weights was last read `len(calls) - 1` calls ago; with enough copies
(`n_copies`) the level 2 cache has long lost it, as in a model of many layers. Activations are the
same in each call and stay in the cache.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CACHES = 3
"""Copies of the weights together are larger than this many level 2 caches."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over replays of a graph.

    Attributes:
        seconds: median.
        lower: first quartile.
        upper: third quartile.
        n_replays: how many replays there were.
        calls_per_replay: calls in the graph.
    """

    seconds: float
    lower: float
    upper: float
    n_replays: int
    calls_per_replay: int


Call = Callable[[], object]
Timer = Callable[[Sequence[Call]], Timing | None]


def summarize(seconds: Sequence[float], n_calls: int) -> Timing:
    """Median and quartiles of one call.

    Args:
        seconds: of each replay, at least two.
        n_calls: calls in a replay.
    """
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median / n_calls, lower / n_calls, upper / n_calls, len(seconds), n_calls)


def n_copies(n_bytes: float, l2_bytes: int) -> int:
    """Copies of what a call reads that together exceed `CACHES` level 2 caches.

    Args:
        n_bytes: that a call reads, at least 1.
        l2_bytes: size of the cache; 0 for one copy.
    """
    return int(CACHES * l2_bytes // n_bytes) + 1


def run_once(calls: Sequence[Call]) -> None:
    """The timer that times nothing: the first call, once."""
    calls[0]()


@dataclass(frozen=True)
class GraphTimer:
    """Replays of a CUDA graph between two events.

    Attributes:
        n_replays: measured ones.
        min_calls: calls in the graph, at least; each copy comes equally often.
    """

    n_replays: int = 30
    min_calls: int = 32

    def __call__(self, calls: Sequence[Call]) -> Timing:
        """Time one call."""
        rounds = -(-self.min_calls // len(calls))
        graph = self._capture(list(calls) * rounds, warm_up=calls)
        seconds = []
        for _ in range(self.n_replays):
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return summarize(seconds, rounds * len(calls))

    def _capture(self, calls: Sequence[Call], warm_up: Sequence[Call]) -> torch.cuda.CUDAGraph:
        """A graph of the calls, after compiling what they need and one replay."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in warm_up:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph
