"""How many kernels quantizing one layer of OLMoE-1B-7B's shape launches on a GPU.

    python benchmarks/quantizer_launches.py --formats int4-g128 int4-g32 mxfp4

The engine runs as it would on a GPU, all experts together, on the CPU and with few rows and
experts: neither changes what is launched. Triton's kernels are counted and not run
(`alphaquant.testing.without_gpu.launches`); products, factorizations and packing are torch's.
Prints, for every format, what is launched once per layer (Hessians, factors, the choice of
shrinkage), what for each format, and how much that is in 16 formats of its kind beside the earlier
engine.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from alphaquant.quant import engine, factor
from alphaquant.quant.columns.column_loops import triton_loops
from alphaquant.quant.engine import quantize_layer
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.place import Place
from alphaquant.reports.tables import markdown
from alphaquant.spaces.formats import Format, parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.formats import FORMATS
from alphaquant.testing.without_gpu.launches import counted_launches

EARLIER = 1.25e8
"""Launches per layer, in 16 formats, of the engine that went through columns with operations of
torch: 97 to 181 per column, format and one or two experts."""
N_FORMATS = 16
_HELD = 4
"""Experts for which held-back tokens are summed apart, as in a real layer."""


@dataclass(frozen=True)
class Shape:
    """Sizes that decide how much is launched, and two that do not.

    Attributes:
        hidden_size: K of gate and up, and of attention.
        expert_width: K of down.
        has_attention: whether q, k, v and o are quantized too.
        n_experts: rounded together.
        n_rows: of every matrix.
    """

    hidden_size: int = 2048
    expert_width: int = 1024
    has_attention: bool = True
    n_experts: int = 2
    n_rows: int = 8


@dataclass(frozen=True)
class DrawnLayer:
    """Stands for a layer of a model: stacks of random weights and their Hessians.

    Attributes:
        batches: attention's q, k, v and its o; gate and up of all experts; their downs.
        weights: float32 [N, K] by name.
    """

    batches: tuple[HessianBatch, ...]
    weights: Mapping[str, Tensor]

    def view(self, name: str) -> Tensor:
        """A weight, as `ModelMap` gives it."""
        return self.weights[name]


def draw_layer(shape: Shape) -> DrawnLayer:
    """Random weights and Hessians."""
    hidden, width, n_rows = shape.hidden_size, shape.expert_width, shape.n_rows
    experts = range(shape.n_experts)

    def stack(names: Sequence[str], cols: int, expert: int | None = None) -> tuple[Matrix, ...]:
        kind = "attention" if expert is None else "expert"
        return tuple(Matrix(name, n_rows, cols, kind, 0, expert) for name in names)

    stacks = [
        ((stack(("q", "k", "v"), hidden)),),
        ((stack(("o",), hidden)),),
        tuple(stack((f"{e}.gate", f"{e}.up"), hidden, e) for e in experts),
        tuple(stack((f"{e}.down",), width, e) for e in experts),
    ]
    if not shape.has_attention:
        stacks = stacks[2:]
    generator = torch.Generator().manual_seed(0)
    batches = []
    for of_batch in stacks:
        n_cols = of_batch[0][0].cols
        inputs = torch.randn(len(of_batch), n_cols + 8, n_cols, generator=generator)
        n_tokens = (2 * n_cols,) * len(of_batch)
        hessian, source = inputs.mT @ inputs, ("plain",) * len(of_batch)
        held = {b: 0.25 * hessian[b] for b in range(min(_HELD, len(of_batch)))}
        batches.append(HessianBatch(of_batch, hessian, n_tokens, source, held=held))
    matrices = [m for of_batch in stacks for one in of_batch for m in one]
    weights = {m.name: torch.randn(m.rows, m.cols, generator=generator) for m in matrices}
    return DrawnLayer(tuple(batches), weights)


class _AllTogether(Place):
    """Memory without an end."""

    def n_together(self, n_rows: int, n_cols: int) -> int:
        """All there are."""
        return 1_000_000


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let the engine round as on a GPU: in Triton, all stacks together, products in bfloat16."""
    place = _AllTogether(torch.device("cpu"), triton_loops(), is_batched=True)
    with (
        mock.patch.object(engine, "place_of", lambda device: place),
        mock.patch.object(factor, "multiplies_bfloat16", lambda: True),
    ):
        yield


def count(shape: Shape, formats: Sequence[str], settings: QuantSettings) -> Counter[str]:
    """Launches of quantizing a layer.

    Args:
        shape: of the layer.
        formats: canonical names.
        settings: of the engine.
    """
    layer: Any = draw_layer(shape)
    with as_on_a_gpu(), counted_launches() as counts:
        for _ in quantize_layer(layer, layer, layer.batches, formats, settings):
            pass
    return counts


@dataclass(frozen=True)
class Launches:
    """Launches of a layer.

    Attributes:
        once: for all formats together.
        per_format: for each.
        columns: of these, Triton's, which go through columns.
    """

    once: int
    per_format: int
    columns: int

    def of_formats(self, n_formats: int) -> int:
        """In a number of formats."""
        return self.once + n_formats * self.per_format


def launches_of(shape: Shape, name: str, settings: QuantSettings) -> Launches:
    """Launches of a layer, told apart by quantizing it in one and in two formats of one kind.

    Args:
        shape: of the layer.
        name: the format; the other has another number of the kind, which launches the same.
        settings: of the engine.
    """
    fmt = parse_format(name)
    others = (n for n in FORMATS if n != name and is_alike(fmt, parse_format(n)))
    one = count(shape, [name], settings)
    both = count(shape, [name, next(others)], settings)
    added = both - one
    columns = sum(n for kernel, n in added.items() if kernel.endswith("_kernel"))
    return Launches(one.total() - added.total(), added.total(), columns)


def is_alike(first: Format, second: Format) -> bool:
    """Whether formats have scales and zero points of one kind in groups of one size."""
    kinds = [(f.group_size, f.symmetric, f.shared, bool(f.element)) for f in (first, second)]
    return kinds[0] == kinds[1] and second.is_quantized


def main() -> None:
    """Print the launches of a layer by format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--formats", nargs="+", default=["int4-g128"])
    parser.add_argument("--experts", type=int, default=Shape.n_experts)
    parser.add_argument("--rows", type=int, default=Shape.n_rows)
    args = parser.parse_args()
    rows = []
    for name in args.formats:
        for has_attention in (False, True):
            shape = Shape(n_experts=args.experts, n_rows=args.rows, has_attention=has_attention)
            found = launches_of(shape, name, QuantSettings())
            total = found.of_formats(N_FORMATS)
            rows.append(
                [
                    f"`{name}`",
                    "layer" if has_attention else "experts",
                    *map(str, (found.once, found.per_format, found.columns, total)),
                    f"1/{EARLIER / total:.0f}",
                ]
            )
    columns = ["format", "part", "once", "per format", "of these Triton", "16 formats", "earlier"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
