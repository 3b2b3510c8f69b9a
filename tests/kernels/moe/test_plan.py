"""Stacks of experts against their matrices."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.errors import FormatError
from alphaquant.kernels import reference
from alphaquant.kernels.moe.plan import ExpertWeights, stack_experts, unstack_expert
from alphaquant.kernels.order import KernelWeight
from alphaquant.kernels.parts import take_apart
from alphaquant.quant.rounding import quantize_rtn
from alphaquant.runtime.kernel_order import order_matrix
from alphaquant.spaces.formats import parse_format
from alphaquant.testing.formats import draw_weights


def drawn(name: str, rows: int, cols: int, seed: int) -> KernelWeight:
    weight = draw_weights(rows, cols, seed)[None]
    return order_matrix(quantize_rtn(weight, parse_format(name), "minmax").pack(0, slice(None)))


def drawn_expert(gate_up: str, down: str, seed: int) -> ExpertWeights:
    """H is 171, I is 70: both have tails."""
    return ExpertWeights(
        drawn(gate_up, 70, 171, seed),
        drawn(gate_up, 70, 171, seed + 1),
        drawn(down, 171, 70, seed),
    )


FORMATS = (("nvfp4", "int4-g64-asym"), ("int3-g32", "nvfp4"), ("nvfp4", "int4-g64-asym"))


def test_stacks_hold_gate_and_up_in_turns_and_down_as_it_is() -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    stacked = stack_experts(experts, first_expert=5)
    sizes = (stacked.width, stacked.hidden, stacked.n_experts, stacked.first_expert)
    assert sizes == (70, 171, 3, 5)
    assert stacked.gate_up[0].formats.sizes == (2, 1) and stacked.down.formats.sizes == (2, 1)
    assert (stacked.gate_up[0].expert_rows, stacked.down.expert_rows) == (256, 256)
    for number, members in enumerate([[0, 2], [1]]):
        stack = stacked.gate_up[0].stacks[number]
        halves = values_of(stack).reshape(len(members), 16, 2, 8, 171)
        for place, expert in enumerate(members):
            for side, weight in enumerate([experts[expert].gate, experts[expert].up]):
                found = halves[place, :, side].reshape(128, 171)[:70]
                assert torch.equal(found, values_of(weight)[:70]), (number, place, side)
        down = values_of(stacked.down.stacks[number]).reshape(len(members), 256, 70)
        for place, expert in enumerate(members):
            assert torch.equal(down[place, :171], values_of(experts[expert].down)[:171])


def values_of(weight: KernelWeight) -> Tensor:
    """Weights without their global scale, padding rows included."""
    rows = int(weight.words.shape[2])
    return reference.dequantize(replace(weight, rows=rows, global_scale=None))


def test_stacks_keep_a_global_scale_per_matrix() -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    stacked = stack_experts(experts)
    scales = [m.global_scale for e in (experts[0], experts[2]) for m in (e.gate, e.up)]
    found = stacked.gate_up[0].stacks[0].global_scale
    assert found is not None and found.tolist() == [float(s) for s in scales if s is not None]
    down = stacked.down.stacks[1].global_scale
    expected = experts[1].down.global_scale
    assert down is not None and expected is not None and torch.equal(down, expected)
    assert stacked.gate_up[0].stacks[1].global_scale is None


def test_gate_and_up_of_other_formats_have_stacks_of_their_own() -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    experts[2] = replace(experts[2], up=drawn("int3-g32", 70, 171, 9))
    stacked = stack_experts(experts)
    assert [stacks.formats.sizes for stacks in stacked.gate_up] == [(2, 1), (1, 2)]
    assert [stacks.expert_rows for stacks in stacked.gate_up] == [128, 128]
    found = values_of(stacked.gate_up[1].stacks[1]).reshape(2, 128, 171)
    for place, expert in enumerate((experts[1], experts[2])):
        assert torch.equal(found[place, :70], values_of(expert.up)[:70])


@pytest.mark.parametrize("up", ["nvfp4", "int4-g32"])
def test_experts_are_taken_out_of_their_stacks_as_they_went_in(up: str) -> None:
    experts = [drawn_expert(*names, seed=3 * i) for i, names in enumerate(FORMATS)]
    experts[0] = replace(experts[0], up=drawn(up, 70, 171, 1))
    stacked = stack_experts(experts, first_expert=5)
    assert len(stacked.gate_up) == (1 if up == "nvfp4" else 2)
    for number, expert in enumerate(experts, 5):
        found = unstack_expert(stacked, number)
        for side in ("gate", "up", "down"):
            one, other = getattr(found, side), getattr(expert, side)
            assert take_apart(one).facts == take_apart(other).facts
            for a, b in zip(take_apart(one).tensors, take_apart(other).tensors, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (number, side)


def test_formats_that_differ_in_one_thing_are_stacked_apart() -> None:
    names = ("int4-g64", "int4-g32", "int4-g64-asym", "int2-g64", "mxfp4", "fp4-e2m1-g32")
    stacked = stack_experts([drawn_expert(name, "int8-row", 0) for name in names])
    assert stacked.gate_up[0].formats.sizes == (1,) * 6
    assert stacked.down.formats.sizes == (6,)


def test_a_stack_is_foldable_if_all_of_its_matrices_are() -> None:
    plain = drawn_expert("mxfp4", "mxfp4", 0)
    folded = ExpertWeights(
        *(replace(m, is_foldable=True) for m in (plain.gate, plain.up, plain.down))
    )
    plain = ExpertWeights(
        *(replace(m, is_foldable=False) for m in (plain.gate, plain.up, plain.down))
    )
    one_side = replace(folded, up=plain.up)
    for experts, expected in (
        ([folded, folded], (True, True)),
        ([folded, plain], (False, False)),
        ([folded, one_side], (False, True)),
    ):
        stacked = stack_experts(experts)
        (both,), (down,) = stacked.gate_up[0].stacks, stacked.down.stacks
        assert (both.is_foldable, down.is_foldable) == expected


def test_groups_longer_than_the_row_are_one_format() -> None:
    expert = drawn_expert("int4-g64", "int4-row", 0)
    longer = replace(expert, down=replace(expert.down, group_size=1 << 30))
    assert stack_experts([expert, longer]).down.formats.sizes == (2,)


def test_experts_that_do_not_fit_are_refused() -> None:
    good = drawn_expert("int4-g64", "int4-g64", 0)
    with pytest.raises(FormatError, match=r"expert 8 are .*\(171, 71\).*equal sizes"):
        stack_experts([good, replace(good, down=drawn("int4-g64", 171, 71, 0))], first_expert=7)
    with pytest.raises(FormatError, match="no experts"):
        stack_experts([])
