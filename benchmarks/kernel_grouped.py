"""Layers of routed experts: one format for all, a mix of formats, and bfloat16 beside them.

bfloat16 is measured three ways: the two products of `torch.nn.functional.grouped_mm` with slots
that are already sorted, and two of transformers' implementations of experts, which also sort or
gather and add up. Targets compare with the fastest of transformers' two, which do the same work as
ours. Every call of a graph has a routing of its own: each token chooses its experts evenly.

Letters: n tokens, k experts per token, E experts, H hidden size, I expert width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from kernel_bench import (
    DTYPE,
    Bench,
    bytes_of,
    check_error,
    deep_copy,
    draw,
    pack,
    ratio,
    relative_error,
)
from kernel_shapes import (
    MIX_RATIO,
    MOE_SPEEDUP,
    MOE_SPEEDUP_TOKENS,
    UNIFORM,
    MoeShape,
    mix_formats,
)
from kernel_timing import Call, Timing, n_copies
from torch import Tensor
from torch.nn.functional import grouped_mm, silu
from transformers import OlmoeConfig
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from alphaquant.kernels import reference
from alphaquant.kernels.moe.plan import ExpertWeights, stack_experts
from alphaquant.spaces.formats import parse_format

MIX = "mix"
MAX_GATHERED_BYTES = 8 * 2**30
"""transformers' `batched_mm` gathers a copy of gate, up and down per slot; beyond this it is left
out, and its timing is None."""


@dataclass(frozen=True)
class Routing:
    """Which experts tokens go to.

    Attributes:
        ids: int64 [n, k], different ones per token.
        weights: bfloat16 [n, k], sum 1 per token.
    """

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True)
class GroupedRow:
    """One layer, format and number of tokens; timings and what follows are None in a dry run.

    Attributes:
        format: of all experts, or `mix`.
        shape: name of the layer.
        n_tokens: n.
        bits_per_weight: stored bits, scales included.
        n_bytes: of the experts that a call needs, mean over its routings.
        relative_error: of the layer's output.
        packed: the layer.
        products: bfloat16, grouped_mm on sorted slots, without the rest of the layer.
        grouped: bfloat16, transformers' `grouped_mm`.
        batched: bfloat16, transformers' `batched_mm`; None also if it needs too much memory. Any
            of the three is None where it failed, which is a note in the result file.
        bytes_per_second: `n_bytes` in the time of the layer.
        speedup: time of the fastest of the last two in multiples of the layer's.
        target: what `speedup` should be at least; None where there is no target.
        is_met: whether it is.
        of_slowest: of the mix, its time in multiples of that of the slowest uniform format, which
            counts as if it had as many bytes as the mix: its time times the quotient of the bytes.
        is_even: whether `of_slowest` is at most `MIX_RATIO`.
    """

    format: str
    shape: str
    n_tokens: int
    bits_per_weight: float
    n_bytes: float
    relative_error: float
    packed: Timing | None
    products: Timing | None
    grouped: Timing | None
    batched: Timing | None
    bytes_per_second: float | None
    speedup: float | None
    target: float | None
    is_met: bool | None
    of_slowest: float | None
    is_even: bool | None


@dataclass(frozen=True)
class Layer:
    """The weights of a layer in bfloat16.

    Attributes:
        shape: sizes.
        gate_up: [E, 2 I, H], gate above up.
        down: [E, H, I].
    """

    shape: MoeShape
    gate_up: Tensor
    down: Tensor


def draw_layer(shape: MoeShape, device: str) -> Layer:
    """Normal weights, scaled as `draw` does."""
    up, down = (2 * shape.width, shape.hidden), (shape.hidden, shape.width)
    experts = range(shape.n_experts)
    gate_up = torch.stack([draw(*up, device, seed=2 * e).to(DTYPE) for e in experts])
    return Layer(
        shape,
        gate_up,
        torch.stack([draw(*down, device, seed=2 * e + 1).to(DTYPE) for e in experts]),
    )


def draw_routings(shape: MoeShape, n_tokens: int, count: int, device: str) -> list[Routing]:
    """Routings of n tokens, every set of k experts equally likely."""
    generator = torch.Generator(device=device).manual_seed(n_tokens)
    found = []
    for _ in range(count):
        scores = torch.rand(n_tokens, shape.n_experts, generator=generator, device=device)
        best = scores.topk(shape.n_choices)
        found.append(Routing(best.indices, best.values.softmax(-1).to(DTYPE)))
    return found


def pack_experts(layer: Layer, names: Sequence[str]) -> list[ExpertWeights]:
    """The experts of a layer, each with a format of its own."""
    experts = []
    for gate_up, down, name in zip(layer.gate_up, layer.down, names, strict=True):
        gate, up = (pack(half.to(torch.float32), name) for half in gate_up.chunk(2))
        experts.append(ExpertWeights(gate, up, pack(down.to(torch.float32), name)))
    return experts


def bytes_of_expert(expert: ExpertWeights) -> int:
    """Bytes of its three matrices."""
    return sum(map(bytes_of, (expert.gate, expert.up, expert.down)))


def expected_output(x: Tensor, routing: Routing, experts: Sequence[ExpertWeights]) -> Tensor:
    """The layer in float32 on dequantized weights, [n, H]."""
    x, out = x.to(torch.float32), torch.zeros_like(x, dtype=torch.float32)
    for number, expert in enumerate(experts):
        tokens, choices = (routing.ids == number).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gated = silu(reference.linear(x[tokens], expert.gate))
        gated *= reference.linear(x[tokens], expert.up)
        weights = routing.weights[tokens, choices].to(torch.float32)
        out.index_add_(0, tokens, weights[:, None] * reference.linear(gated, expert.down))
    return out


def measure_grouped(
    bench: Bench, shape: MoeShape, tokens: Sequence[int], formats: Sequence[str] = UNIFORM
) -> Iterator[GroupedRow]:
    """Every uniform format, then the mix, with every number of tokens.

    Raises:
        RuntimeError: an output is wrong.
    """
    layer = draw_layer(shape, bench.device)
    uniform: dict[int, list[GroupedRow]] = {n: [] for n in tokens}
    for name in (*formats, MIX):
        names = mix_formats(shape.n_experts) if name == MIX else (name,) * shape.n_experts
        experts = pack_experts(layer, names)
        for n_tokens in tokens:
            row = _measure_row(bench, layer, name, experts, n_tokens)
            if name == MIX:
                row = with_slowest(row, uniform[n_tokens])
            else:
                uniform[n_tokens].append(row)
            yield row


def _measure_row(
    bench: Bench, layer: Layer, name: str, experts: Sequence[ExpertWeights], n_tokens: int
) -> GroupedRow:
    shape = layer.shape
    n_active = min(n_tokens * shape.n_choices, shape.n_experts)
    total = sum(map(bytes_of_expert, experts))
    count = n_copies(total * n_active / shape.n_experts, bench.l2_bytes)
    routings = draw_routings(shape, n_tokens, count, bench.device)
    x = shape.hidden**0.5 * draw(n_tokens, shape.hidden, bench.device, seed=n_tokens).to(DTYPE)
    stacked = stack_experts(experts)
    run = bench.kernels.grouped_moe
    found = run(x, routings[0].ids, routings[0].weights, stacked)
    error = relative_error(found, expected_output(x, routings[0], experts))
    check_error(error, f"{name} {shape.name} with {n_tokens} tokens")
    copies = [stacked] + [deep_copy(stacked) for _ in range(count - 1)]
    packed = bench.timer(
        [partial(run, x, r.ids, r.weights, c) for r, c in zip(routings, copies, strict=True)]
    )
    n_bytes = active_bytes(experts, routings)
    half = time_bfloat16(bench, layer, x)
    both = [t for t in (half["grouped"], half["batched"]) if t is not None]
    speedup = ratio(min(both, key=lambda t: t.seconds, default=None), packed)
    target = MOE_SPEEDUP if name == MIX and n_tokens <= MOE_SPEEDUP_TOKENS else None
    return GroupedRow(
        *(name, shape.name, n_tokens),
        bits_per_weight=mean_bits(experts, name, shape),
        n_bytes=n_bytes,
        relative_error=error,
        packed=packed,
        products=half["products"],
        grouped=half["grouped"],
        batched=half["batched"],
        bytes_per_second=None if packed is None else n_bytes / packed.seconds,
        speedup=speedup,
        target=target,
        is_met=None if speedup is None or target is None else speedup >= target,
        of_slowest=None,
        is_even=None,
    )


def mean_bits(experts: Sequence[ExpertWeights], name: str, shape: MoeShape) -> float:
    """Stored bits per weight of a layer, scales included."""
    names = mix_formats(len(experts)) if name == MIX else (name,) * len(experts)
    sizes = ((shape.width, shape.hidden), (shape.width, shape.hidden), (shape.hidden, shape.width))
    bits: int = sum(parse_format(one).storage_bits(*size) for one in names for size in sizes)
    return bits / (shape.n_experts * shape.weights_per_expert)


def with_slowest(row: GroupedRow, uniform: Sequence[GroupedRow]) -> GroupedRow:
    """The mix's row beside the uniform ones of the same layer and number of tokens."""
    if row.packed is None:
        return row
    scaled = [
        one.packed.seconds * row.n_bytes / one.n_bytes for one in uniform if one.packed is not None
    ]
    if not scaled:
        return row
    of_slowest = row.packed.seconds / max(scaled)
    return replace(row, of_slowest=of_slowest, is_even=of_slowest <= MIX_RATIO)


def active_bytes(experts: Sequence[ExpertWeights], routings: Sequence[Routing]) -> float:
    """Bytes of the experts that a call reads, mean over the routings."""
    each = [bytes_of_expert(expert) for expert in experts]
    totals: list[int] = [sum(each[e] for e in set(r.ids.flatten().tolist())) for r in routings]
    return sum(totals) / len(totals)


def time_bfloat16(bench: Bench, layer: Layer, x: Tensor) -> dict[str, Timing | None]:
    """The three bfloat16 layers on x [n, H], by the names of `GroupedRow`."""
    shape, n_slots = layer.shape, len(x) * layer.shape.n_choices
    n_active = min(n_slots, shape.n_experts)
    count = n_copies(2 * shape.weights_per_expert * n_active, bench.l2_bytes)
    runs = {
        "products": multiply_sorted,
        "grouped": grouped_mm_experts_forward,
        "batched": batched_mm_experts_forward,
    }

    def calls(run: Any) -> list[Call]:
        routings = draw_routings(shape, len(x), count, bench.device)
        modules = [experts_module(layer)]
        modules += [experts_module(deep_copy(layer)) for _ in range(count - 1)]
        if run is multiply_sorted:
            return [sorted_call(m, x, r) for m, r in zip(modules, routings, strict=True)]
        return [
            partial(run, m, x, r.ids, r.weights) for m, r in zip(modules, routings, strict=True)
        ]

    found: dict[str, Timing | None] = {}
    for name, run in runs.items():
        gathers = 2 * shape.weights_per_expert * n_slots
        if name == "batched" and gathers > MAX_GATHERED_BYTES:
            found[name] = None
            continue
        key = (name, shape.name, len(x))
        try:
            found[name] = bench.time_once(key, partial(calls, run))
        except RuntimeError as error:
            found[name] = bench.known[key] = None
            text = " ".join(str(error).split())[:200]
            bench.failures.append(f"bfloat16 {name} {shape.name}, {len(x)} tokens: {text}")
    return found


def experts_module(layer: Layer) -> Any:
    """The experts of transformers' OLMoE with the weights of a layer."""
    shape = layer.shape
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_experts=shape.n_experts,
        num_experts_per_tok=shape.n_choices,
    )
    with torch.device("meta"):
        module: Any = OlmoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(layer.gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(layer.down, requires_grad=False)
    return module


def sorted_call(module: Any, x: Tensor, routing: Routing) -> Call:
    """`multiply_sorted` on the slots of a routing, sorted before it is timed."""
    order = routing.ids.flatten().argsort(stable=True)
    counts = routing.ids.flatten().bincount(minlength=len(module.down_proj))
    rows = x[order // routing.ids.shape[1]]  # [n k, H]
    return partial(multiply_sorted, module, rows, counts.cumsum(0).to(torch.int32))


def multiply_sorted(module: Any, x: Tensor, ends: Tensor) -> Tensor:
    """Both products of sorted slots x [n k, H]; `ends`: int32 [E], where each expert's end."""
    gate, up = grouped_mm(x, module.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, -1)
    return grouped_mm(silu(gate) * up, module.down_proj.transpose(1, 2), offs=ends)
