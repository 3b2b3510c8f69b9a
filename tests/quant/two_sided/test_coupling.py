"""Two-sided rounding: against plain rounding, plain linear algebra, and its own promises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.quant.codecs import make_grid, nv_global_scale, snap
from alphaquant.quant.columns.column_loops import NumbaLoops
from alphaquant.quant.columns.state import Rounding
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import DampedHessian, factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.two_sided import coupling as coupling_module
from alphaquant.quant.two_sided.coupling import CoupledRounder, Coupling, Couplings
from alphaquant.spaces.formats import parse_format

N, K = 40, 96
KINDS = ("int3-g32", "int2-g32-asym", "int1-g32", "nl3-g32", "nl3-g32-s256", "mxfp4", "nvfp4")
LARGE = ("int4-row", "fp8-e4m3-row", "int3-g128-asym")
"""Groups larger than a block."""


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian_of(n_stacks: int = 1) -> DampedHessian:
    inputs = drawn(n_stacks, 4 * K, K, seed=1) @ drawn(K, K, seed=2)
    return factorize(inputs.mT @ inputs, 0.01, (False,))


def outputs_of(n_stacks: int = 1) -> Tensor:
    gradients = drawn(n_stacks, 2 * N, N, seed=3) @ drawn(N, N, seed=4)
    found = gradients.mT @ gradients
    return found / found.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def rounder_of(name: str, weight: Tensor) -> Rounder:
    fmt = parse_format(name)
    plan = ColumnPlan(K, fmt.columns_per_scale(K), 64, fmt.super_size)
    shared = torch.empty(0)
    if fmt.shared.global_bits:
        shared = nv_global_scale(weight.mT).expand(len(weight), weight.shape[-1])
    return Rounder(rule_of(fmt, "hessian"), plan, shared.contiguous(), NumbaLoops())


def coupled(name: str, weight: Tensor, outputs: Tensor, damped: DampedHessian) -> CoupledRounder:
    rounder = rounder_of(name, weight)
    inverses = damped.factors[0].diagonal_inverses(rounder.plan.blocks)
    return CoupledRounder(rounder, Coupling.of(outputs), damped, tuple(inverses))


def lost(coupled_rounder: CoupledRounder, delta: Tensor) -> float:
    """tr(O D H D') in float64, rows in their natural order, O damped as it was."""
    order, D = coupled_rounder.coupling.order, delta.double()[..., coupled_rounder.coupling.order]
    assert sorted(order.tolist()) == list(range(delta.shape[-1]))
    outputs, H = coupled_rounder.coupling.matrix, coupled_rounder.damped.matrix
    return float(((D @ outputs.double()) * (H.double() @ D)).sum())


@pytest.mark.parametrize("name", [*KINDS, *LARGE])
def test_every_sweep_lowers_what_errors_cost_together(name: str) -> None:
    weight, damped = drawn(1, K, N), hessian_of()
    two_sided = coupled(name, weight, outputs_of(), damped)
    costs = [lost(two_sided, two_sided.round(weight, n, static=False).delta) for n in (0, 1, 2, 4)]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(costs, costs[1:], strict=False)), costs
    assert costs[-1] < 0.99 * costs[0]
    factor = damped.factors[0]
    alone = two_sided.rounder.gptq(weight, factor, two_sided.inverses, static=False)
    alone = two_sided.rounder.refine(alone, damped, 4)
    assert costs[-1] < 0.9 * lost(two_sided, alone.delta), "rows that know of each other gain"


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_scales_give_the_weights(name: str) -> None:
    weight = drawn(1, K, N)
    found = coupled(name, weight, outputs_of(), hessian_of()).round(weight, 2, static=False)
    size = parse_format(name).columns_per_scale(K)
    scales = found.scales.repeat_interleave(size, -2)[:, :K]
    assert torch.allclose(weight - found.delta, found.centred * scales, atol=1e-4)


@pytest.mark.parametrize("name", ["int3-g32", "mxfp4", "int2-g32-asym"])
def test_rows_that_do_not_know_of_each_other_are_rounded_as_alone(name: str) -> None:
    weight, damped = drawn(1, K, N), hessian_of()
    apart = coupled(name, weight, torch.eye(N).unsqueeze(0), damped)
    found = apart.round(weight, 0, static=False)
    alone = apart.rounder.gptq(weight, damped.factors[0], apart.inverses, static=False)
    assert torch.equal(found.centred, alone.centred) and torch.equal(found.scales, alone.scales)
    swept = apart.round(weight, 2, static=False)
    refined = apart.rounder.refine(alone, damped, 2)
    assert float((swept.centred != refined.centred).float().mean()) < 0.01
    assert torch.allclose(swept.objective.sum(), refined.objective.sum(), rtol=1e-3)


def swept_plainly(two_sided: CoupledRounder, start: Rounding) -> Tensor:
    """Codes after one sweep of codes alone, number by number in float64; columns, rows."""
    fmt, rounder = parse_format("mxfp4"), two_sided.rounder
    O, H = two_sided.coupling.matrix[0].double(), two_sided.damped.matrix[0].double()  # noqa: E741
    D, codes, grid = start.delta[0].double(), start.centred[0].clone(), make_grid(fmt)
    for first, last in rounder.plan.blocks:
        for i in range(N):
            for k in range(first, last):
                scale = start.scales[0, k // fmt.group_size, i]
                pull = (O[i] @ D.T @ H[:, k]) / (O[i, i] * H[k, k])
                best = codes[k, i] * scale + pull.float()
                code = snap(grid, best, scale, None)
                D[k, i] -= float((code - codes[k, i]) * scale)
                codes[k, i] = code
    return codes


def test_a_sweep_is_that_of_a_plain_loop_over_rows_and_columns() -> None:
    weight, damped = drawn(1, K, N), hessian_of()
    two_sided = coupled("mxfp4", weight, outputs_of(), damped)
    order = two_sided.coupling.order
    start = two_sided.round(weight, 0, static=False)
    ordered = Rounding(*(x[..., order].contiguous() for x in start.tensors))
    expected = swept_plainly(two_sided, ordered)
    swept = two_sided.round(weight, 1, static=False)
    found = swept.centred[0][:, order]
    assert not torch.equal(expected, ordered.centred[0])
    assert float((found != expected).float().mean()) < 0.002  # ties, in float32


def test_what_rows_before_a_tile_did_is_made_up_for_as_well_as_can_be() -> None:
    coupling, done = Coupling.of(outputs_of()), 16
    outputs, R = coupling.matrix[0].double(), coupling.lower[0].double()
    assert torch.allclose(R.T @ R, outputs, atol=1e-5) and torch.equal(R, R.tril())
    before = drawn(done, seed=5).double()
    # Errors of all later rows may be any numbers: the best are those that make the shift zero.
    best = -torch.linalg.solve(outputs[done:, done:], outputs[done:, :done] @ before)
    tile = slice(done, done + 16)
    shift = torch.linalg.solve(R[tile, tile], R[tile, :done] @ before)
    assert torch.allclose(best[:16], -shift, atol=1e-6)


def test_outputs_that_rounding_made_indefinite_are_damped_until_they_are_not() -> None:
    """Two tokens, and some outputs whose gradients are far larger than all others."""
    gradients = drawn(2, 512, seed=2)
    gradients[:, :32] *= 1000
    exact = gradients.mT @ gradients
    stored = (exact / exact.diagonal().mean()).half().float()
    assert float(torch.linalg.eigvalsh(stored.double()).min()) < -0.02
    both = torch.stack([torch.eye(512), stored])
    found = Coupling.of(both)
    ordered = both[:, found.order][..., found.order]
    added = (found.matrix - ordered).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(added[0], torch.tensor(0.02), atol=1e-6)
    assert torch.allclose(added[1], torch.tensor(0.2), atol=1e-4)
    assert torch.allclose(found.damp, torch.tensor([0.02, 0.2]))
    assert torch.allclose(found.lower.mT @ found.lower, found.matrix, atol=1e-3)


def test_outputs_that_no_damping_makes_positive_are_refused() -> None:
    with pytest.raises(ModelError, match="more or other calibration text, or --no-two-sided"):
        Coupling.of(torch.zeros(1, 8, 8))


def test_stacks_do_not_know_of_each_other() -> None:
    weight, damped, outputs = drawn(2, K, N), hessian_of(2), outputs_of(2)
    together = coupled("int3-g32", weight, outputs, damped).round(weight, 1, static=False)
    for s in range(2):
        index = torch.tensor([s])
        own = coupled("int3-g32", weight[index], outputs[index], damped.stacks(index))
        alone = own.round(weight[index], 1, static=False)
        assert float((alone.centred[0] != together.centred[s]).float().mean()) < 0.01


def test_weights_near_the_end_of_bfloat16_are_rounded_row_by_row() -> None:
    weight = drawn(2, K, N)
    weight[0, :, 3] *= 1e38
    found = coupled("int4-g32", weight, outputs_of(2), hessian_of(2)).round(
        weight, 1, static=False
    )
    assert bool(torch.isfinite(found.delta).all()) and bool(torch.isfinite(found.scales).all())


def test_neighbouring_rows_fall_into_different_tiles() -> None:
    coupling = Coupling.of(torch.eye(70).unsqueeze(0))
    for tile in torch.split(coupling.order, coupling_module.START_ROWS):
        assert not {b - a for a, b in zip(tile, tile[1:], strict=False)} & {1, -1}


def test_formats_share_what_is_known_of_the_outputs() -> None:
    blocks = (((torch.eye(8), torch.eye(4)),), ((torch.eye(8), torch.eye(4)),))
    couplings = Couplings(blocks, torch.device("cpu"))
    first = list(couplings.of(torch.tensor([0, 1]), 0))
    again = list(couplings.of(torch.tensor([0, 1]), 0))
    assert [rows for rows, _ in first] == [slice(0, 8), slice(8, 12)]
    assert all(a is b for (_, a), (_, b) in zip(first, again, strict=True))
    assert first[0][1].matrix.shape == (2, 8, 8)
    assert [couplings.damp_of(stack, 0) for stack in (0, 1)] == pytest.approx([0.02, 0.02])


def test_a_start_that_is_better_than_what_sweeps_make_of_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = drawn(1, K, N)
    two_sided = coupled("int3-g32", weight, outputs_of(), hessian_of())
    start = two_sided.round(weight, 0, static=False)
    monkeypatch.setattr(
        CoupledRounder,
        "_swept",
        lambda self, start, n: replace(start, delta=start.delta * 2, centred=0 * start.centred),
    )
    found = two_sided.round(weight, 3, static=False)
    assert torch.equal(found.centred, start.centred)
