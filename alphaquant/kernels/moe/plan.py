"""Experts of a grouped MoE layer, stacked by format, and taken out of their stacks again.

The first and the second matrix of an expert may have different formats, so each of the two
products has its own stacks. Where gate and up have equal formats in every expert their rows
alternate, so that one program computes both; else each of them has its own stacks.

Letters: E experts of this rank, F formats, H hidden size, I expert width; P, T, N, Q, S, C as in
`alphaquant.kernels.order`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels.order import KernelWeight

HALF_ROWS = 8
"""Rows of gate, then rows of up, that alternate in a stack.

With eight, every lane of a warp holds equal rows of both after wgmma, whose lanes hold the rows r
and r + 8 of 16: gating moves nothing between lanes, in programs of 64 and of 128 rows.
"""


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of one expert in kernel order.

    Attributes:
        gate: [I, H].
        up: [I, H].
        down: [H, I].
    """

    gate: KernelWeight
    up: KernelWeight
    down: KernelWeight


@dataclass(frozen=True)
class FormatOrder:
    """Experts in the order of their formats.

    Attributes:
        order: int64 [E], the experts of format 0, then those of format 1, and so on.
        places: int32 [E], which one of its format each expert of `order` is.
        last: int64 [F], index in `order` of the last expert of each format.
        sizes: experts of each format.
    """

    order: Tensor
    places: Tensor
    last: Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ExpertStacks:
    """One matrix of every expert, those of equal format below each other.

    Attributes:
        stacks: per format a weight with the padded rows of all its experts; its global scale, if
            any, has one number per matrix.
        formats: which expert is where.
        expert_rows: rows of one expert in a stack, a multiple of 128.
    """

    stacks: tuple[KernelWeight, ...]
    formats: FormatOrder
    expert_rows: int


@dataclass(frozen=True)
class GroupedExperts:
    """The experts of a layer, or of one rank of it, as grouped kernels take them.

    Attributes:
        gate_up: one whose rows of gate and up alternate, `HALF_ROWS` of each; or, where they have
            formats of their own in any expert, gate, then up.
        down: as they are.
        hidden: H.
        width: I.
        first_expert: number of the first one; the others follow it.
        n_experts: E.
    """

    gate_up: tuple[ExpertStacks, ...]
    down: ExpertStacks
    hidden: int
    width: int
    first_expert: int
    n_experts: int


def stack_experts(experts: Sequence[ExpertWeights], first_expert: int = 0) -> GroupedExperts:
    """Copy experts into the layout of the grouped kernels.

    Args:
        experts: E of them, at least one, on one device.
        first_expert: number of the first one in the whole layer.

    Raises:
        FormatError: no expert, or different sizes.
    """
    if not experts:
        raise FormatError("no experts to stack; a rank without experts has nothing to compute")
    width, hidden = experts[0].gate.rows, experts[0].gate.cols
    for number, expert in enumerate(experts, first_expert):
        _check_expert(number, expert, width, hidden)
    return GroupedExperts(
        gate_up=_stack_gate_up(experts),
        down=_stack([expert.down for expert in experts]),
        hidden=hidden,
        width=width,
        first_expert=first_expert,
        n_experts=len(experts),
    )


def unstack_expert(experts: GroupedExperts, number: int) -> ExpertWeights:
    """Undo `stack_experts` for one expert: copies of its matrices.

    Args:
        experts: of a layer.
        number: of the expert, as the layer counts.
    """
    index = number - experts.first_expert
    taken, width = [_take(stacks, index) for stacks in experts.gate_up], experts.width
    if len(taken) == 1:
        taken = [_half(taken[0], half) for half in range(2)]
    gate, up = (replace(weight, rows=width) for weight in taken)
    return ExpertWeights(gate, up, replace(_take(experts.down, index), rows=experts.hidden))


def order_by_format(formats: Sequence[int], device: torch.device) -> FormatOrder:
    """Put experts of equal format beside each other.

    Args:
        formats: number of each expert's format, each of 0 .. F - 1 at least once.
        device: of the tensors.
    """
    order = sorted(range(len(formats)), key=lambda expert: formats[expert])
    sizes = tuple(formats.count(number) for number in range(max(formats) + 1))
    places = [place for size in sizes for place in range(size)]
    last = torch.tensor(sizes).cumsum(0) - 1
    return FormatOrder(
        torch.tensor(order, device=device),
        torch.tensor(places, dtype=torch.int32, device=device),
        last.to(device),
        sizes,
    )


def _check_expert(number: int, expert: ExpertWeights, width: int, hidden: int) -> None:
    shapes = [(m.rows, m.cols) for m in (expert.gate, expert.up, expert.down)]
    wanted = [(width, hidden), (width, hidden), (hidden, width)]
    if shapes != wanted:
        raise FormatError(
            f"gate, up and down of expert {number} are {shapes}; the first expert needs {wanted}: "
            "stack experts of equal sizes"
        )


def _stack_gate_up(experts: Sequence[ExpertWeights]) -> tuple[ExpertStacks, ...]:
    if all(_format_key(expert.gate) == _format_key(expert.up) for expert in experts):
        return (_stack([_alternate(expert.gate, expert.up) for expert in experts]),)
    return (_stack([expert.gate for expert in experts]), _stack([expert.up for expert in experts]))


def _format_key(weight: KernelWeight) -> tuple[object, ...]:
    """What matrices have in common that one launch serves."""
    return (
        weight.element,
        min(weight.group_size, weight.cols),
        weight.scales.dtype,
        "symmetric" if weight.zeros is None else "asymmetric",
        "own scales" if weight.global_scale is None else "global scale",
        weight.super_size,
    )


def _stack(weights: Sequence[KernelWeight]) -> ExpertStacks:
    """One stack per format, in the order in which formats first appear."""
    keys = [_format_key(weight) for weight in weights]
    distinct = list(dict.fromkeys(keys))
    formats = order_by_format([distinct.index(key) for key in keys], weights[0].words.device)
    members = [[w for w, own in zip(weights, keys, strict=True) if own == key] for key in distinct]
    stacks = tuple(_below_each_other(group) for group in members)
    return ExpertStacks(stacks, formats, int(weights[0].words.shape[2]))


def _below_each_other(weights: Sequence[KernelWeight]) -> KernelWeight:
    first = weights[0]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    shared = [weight.global_scale for weight in weights if weight.global_scale is not None]
    supers = [weight.super_scales for weight in weights if weight.super_scales is not None]
    scales = torch.cat([_as_bytes(weight.scales) for weight in weights], -2)
    return replace(
        first,
        is_foldable=all(weight.is_foldable for weight in weights),
        rows=len(weights) * int(first.words.shape[2]),
        words=torch.cat([weight.words for weight in weights], -2),
        scales=scales.view(first.scales.dtype),
        zeros=torch.cat(zeros, -2) if zeros else None,
        global_scale=torch.cat(shared) if shared else None,
        super_scales=torch.cat(supers, -2) if supers else None,
    )


def _alternate(gate: KernelWeight, up: KernelWeight) -> KernelWeight:
    """Rows of both: eight of gate, eight of up, the next eight of gate, and so on."""

    def mix(one: Tensor, other: Tensor) -> Tensor:
        """[.., N, C] twice -> [.., 2 N, C], any dtype."""
        shape = (*one.shape[:-2], one.shape[-2] // HALF_ROWS, HALF_ROWS, -1)
        halves = [_as_bytes(part).reshape(shape) for part in (one, other)]
        return torch.stack(halves, -3).flatten(-4, -2).view(one.dtype)

    zeros = None if gate.zeros is None or up.zeros is None else mix(gate.zeros, up.zeros)
    shared = [m.global_scale for m in (gate, up) if m.global_scale is not None]
    supers = [m.super_scales for m in (gate, up) if m.super_scales is not None]
    return replace(
        gate,
        is_foldable=gate.is_foldable and up.is_foldable,
        rows=2 * gate.rows,
        words=mix(gate.words, up.words),
        scales=mix(gate.scales, up.scales),
        zeros=zeros,
        global_scale=torch.cat(shared) if shared else None,
        super_scales=mix(*supers) if supers else None,
    )


def _take(stacks: ExpertStacks, index: int) -> KernelWeight:
    """The part of a stack that belongs to one expert, with padded rows."""
    formats = stacks.formats
    position = formats.order.tolist().index(index)
    number = int(torch.searchsorted(formats.last, position))
    stack, place = stacks.stacks[number], int(formats.places[position])
    rows = slice(place * stacks.expert_rows, (place + 1) * stacks.expert_rows)

    def cut(values: Tensor) -> Tensor:
        return _as_bytes(values)[..., rows, :].contiguous().view(values.dtype)

    shared = stack.global_scale
    if shared is not None:
        shared = shared.reshape(formats.sizes[number], -1)[place].clone()
    return replace(
        stack,
        rows=stacks.expert_rows,
        words=cut(stack.words),
        scales=cut(stack.scales),
        zeros=None if stack.zeros is None else cut(stack.zeros),
        global_scale=shared,
        super_scales=None if stack.super_scales is None else cut(stack.super_scales),
    )


def _half(both: KernelWeight, half: int) -> KernelWeight:
    """Gate (0) or up (1) out of their alternating rows, with padded rows."""

    def cut(values: Tensor) -> Tensor:
        """[.., 2 N, C] -> [.., N, C], any dtype."""
        flat = _as_bytes(values)
        blocks = flat.reshape(*flat.shape[:-2], -1, 2, HALF_ROWS, flat.shape[-1])
        return blocks[..., half, :, :].flatten(-3, -2).contiguous().view(values.dtype)

    shared = both.global_scale
    return replace(
        both,
        words=cut(both.words),
        scales=cut(both.scales),
        zeros=None if both.zeros is None else cut(both.zeros),
        global_scale=None if shared is None else shared[half : half + 1].clone(),
        super_scales=None if both.super_scales is None else cut(both.super_scales),
    )


def _as_bytes(values: Tensor) -> Tensor:
    """The same memory as bytes: torch does not join tensors of every small float."""
    return values.contiguous().view(torch.uint8)
