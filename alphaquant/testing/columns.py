"""The contract of column loops, to run over any implementation.

    for name in FORMATS:
        for check in CHECKS:
            check(loops, name, "hessian", Limits())

Each of the three loops of `ColumnLoops` gets what `NumbaLoops` gets, for several stacks at once,
and must give the same scales, codes, errors and objective. Sums come in another order, so where
scales of equal error or ties of rounding fall to another side, a device may differ in a few codes;
`Limits` says how many. A new format adds its name to `FORMATS`.

Letters: S stacks, K columns, B columns of a block, N rows, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphaquant.quant.codecs import nv_global_scale
from alphaquant.quant.columns.column_loops import ColumnLoops, NumbaLoops
from alphaquant.quant.columns.state import Block, Groups, Rounding
from alphaquant.quant.factor import Factor, factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.spaces.formats import parse_format
from alphaquant.specs.scale_search import ScaleSearch
from alphaquant.testing.formats import draw_weights

FORMATS: tuple[str, ...] = (
    "int1-g8",  # signs; groups that are half a panel
    "int2-g10-asym",  # zero points; groups that cross panels
    "int4-g8",  # a tail group of 4
    "int5-g12-asym",
    "int8-row",  # a group larger than the block
    "fp4-e2m1-g8",
    "fp6-e3m2-row",
    "fp8-e5m2-g20",  # one group is the block
    *("mxfp4", "mxfp6-e2m3"),  # powers of two; blocks of 32
    *("nl2-g8", "nl3-row"),  # tables
    *("int3-g16-s256", "nl4-g16-s256"),  # multiples of super-scales
    "nvfp4",  # E4M3 under a scale per matrix; blocks of 16, a tail of 4
)
"""Every kind of rule, with groups smaller than, equal to and larger than a block."""

N_STACKS, N_ROWS, N_COLS, BLOCK = 2, 5, 43, 20
"""Odd sizes; the block lies inside, and is one panel of 16 columns and a quarter."""

_TILE = (1, 4)
"""Rows that know of each other; there are others before and after them."""


@dataclass(frozen=True)
class Limits:
    """How far an implementation may be from the compiled loops of the CPU.

    Attributes:
        codes: part of the codes that may differ.
        relative: of scales and errors, where codes agree, and of the objective of all rows.
        device: where the implementation runs.
    """

    codes: float = 0.0
    relative: float = 1e-5
    device: str = "cpu"


@dataclass(frozen=True)
class _Case:
    """Stacks in a format, on the CPU."""

    weight: Tensor  # [S, K, N]
    hessian: Tensor  # [S, K, K], damped
    factor: Factor
    groups: Groups
    block: Block
    shared: Tensor  # [S, P, N]

    def empty(self) -> Rounding:
        """Scales of one, nothing rounded."""
        n_groups = -(-N_COLS // self.groups.size)
        scales = torch.ones(N_STACKS, n_groups, N_ROWS)
        nothing = torch.zeros_like(self.weight)
        objective = torch.ones(N_STACKS, N_ROWS)
        return Rounding(nothing, nothing.clone(), scales, 0 * scales, self.shared, objective)

    def with_scales(self) -> Rounding:
        """Scales of all groups, nothing rounded."""
        rounding = self.empty()
        NumbaLoops().fit_groups(rounding, self.groups, 0, self.weight, torch.ones(N_COLS))
        return rounding


Move = Callable[[Tensor], Tensor]
"""Copies a tensor to the device of an implementation."""


def check_fitted_groups(
    loops: ColumnLoops, name: str, search: ScaleSearch, limits: Limits
) -> None:
    """Scales and zero points of the last two groups, with columns of unequal weight."""
    case = _case(name, search)
    first = max(0, -(-N_COLS // case.groups.size) - 2)
    start = first * case.groups.size
    columns = case.weight[:, start:].contiguous()
    importance = torch.linspace(0.5, 2.0, N_STACKS * N_COLS).view(N_STACKS, N_COLS)[:, start:]

    def fit(chosen: ColumnLoops, rounding: Rounding, groups: Groups, move: Move) -> None:
        chosen.fit_groups(rounding, groups, first, move(columns), move(importance))

    _compare(loops, case, limits, fit, case.empty(), f"{name}, {search}, groups")


def check_gptq_block(loops: ColumnLoops, name: str, search: ScaleSearch, limits: Limits) -> None:
    """A block with known scales and, if it holds whole groups, with scales that it chooses."""
    case = _case(name, search)
    (upper,) = case.factor.diagonal_inverses([case.block])
    importance = torch.linspace(0.5, 2.0, N_STACKS * BLOCK).view(N_STACKS, BLOCK)
    ahead = (1.01 * case.weight[:, slice(*case.block)]).contiguous()
    for chooses in (False, True)[: 1 + (case.groups.size <= BLOCK)]:

        def round_block(
            chosen: ColumnLoops, rounding: Rounding, groups: Groups, move: Move
        ) -> None:
            """A block of GPTQ."""
            weights = move(importance) if chooses else None  # noqa: B023  (called at once)
            given = move(ahead), move(case.weight), move(upper)
            chosen.gptq_block(rounding, groups, case.block, *given, weights)

        label = f"{name}, {search}, GPTQ, {chooses}"
        _compare(loops, case, limits, round_block, case.with_scales(), label)


def check_sweep_block(loops: ColumnLoops, name: str, search: ScaleSearch, limits: Limits) -> None:
    """A sweep with scales that stay and, where they are free and groups fit, with fitted ones."""
    case = _case(name, search)
    columns, size = slice(*case.block), case.groups.size
    own = case.hessian[:, columns, columns]
    rounded = case.with_scales()
    eye = torch.eye(BLOCK).expand(N_STACKS, -1, -1).contiguous()
    ahead = case.weight[:, columns].contiguous()
    NumbaLoops().gptq_block(rounded, case.groups, case.block, ahead, case.weight, eye, None)
    residual = case.hessian[:, columns] @ rounded.delta
    codes = rounded.centred[:, columns]
    products = torch.zeros_like(codes, memory_format=torch.contiguous_format)
    for first in range(0, BLOCK, size):
        group = slice(first, min(BLOCK, first + size))
        products[:, group] = own[:, group, group] @ codes[:, group]
    for fits in (False, True)[: 1 + (case.groups.rule.fits and size <= BLOCK)]:

        def sweep(chosen: ColumnLoops, rounding: Rounding, groups: Groups, move: Move) -> None:
            """A sweep over a block of columns."""
            known = move(products) if fits else None  # noqa: B023  (called at once)
            chosen.sweep_block(rounding, groups, case.block, move(residual), move(own), known)

        found = _compare(loops, case, limits, sweep, rounded, f"{name}, sweep, {fits}")
        assert not torch.equal(found.centred, rounded.centred), f"{name}: no code was changed"


def check_sweep_rows(loops: ColumnLoops, name: str, search: ScaleSearch, limits: Limits) -> None:
    """A tile of coupled rows in the middle of all, with scales that stay and with fitted ones."""
    case = _case(name, search)
    columns, size, (start, stop) = slice(*case.block), case.groups.size, _TILE
    own = case.hessian[:, columns, columns].contiguous()
    rounded = case.with_scales()
    eye = torch.eye(BLOCK).expand(N_STACKS, -1, -1).contiguous()
    ahead = case.weight[:, columns].contiguous()
    NumbaLoops().gptq_block(rounded, case.groups, case.block, ahead, case.weight, eye, None)
    drawn = torch.randn(N_STACKS, 3 * N_ROWS, N_ROWS, generator=_seeded(6))
    outputs = drawn.mT @ drawn
    shares = outputs / outputs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    residual = (shares @ (rounded.delta.mT @ case.hessian[..., columns]))[:, start:stop]
    codes = rounded.centred[:, columns]
    products = torch.zeros_like(codes, memory_format=torch.contiguous_format)
    for first in range(0, BLOCK, size):
        group = slice(first, min(BLOCK, first + size))
        products[:, group] = own[:, group, group] @ codes[:, group]
    given = residual.contiguous(), shares[:, start:stop, start:stop].contiguous()
    of_tile = products.mT[:, start:stop].contiguous()
    for fits in (False, True)[: 1 + (case.groups.rule.fits and size <= BLOCK)]:
        changed: list[Tensor] = []

        def sweep(chosen: ColumnLoops, rounding: Rounding, groups: Groups, move: Move) -> None:
            """A sweep over the rows of a tile, which are coupled."""
            known = move(of_tile) if fits else None  # noqa: B023  (called at once)
            matrices = move(given[1]), move(own)
            part = case.block, _TILE
            told = chosen.sweep_rows(rounding, groups, part, move(given[0]), matrices, known)
            changed.append(told.cpu())  # noqa: B023

        found = _compare(loops, case, limits, sweep, rounded, f"{name}, coupled rows, {fits}")
        assert not torch.equal(found.centred, rounded.centred), f"{name}: no code was changed"
        moved = (found.delta - rounded.delta)[:, columns, start:stop]
        expected, told = moved.mT @ own, changed[1]
        size_of = float(expected.abs().max()) * max(limits.relative, limits.codes)
        assert torch.allclose(expected, told, rtol=0.0, atol=max(size_of, 1e-4)), (
            f"{name}: changes"
        )


def check_another_order(
    loops: ColumnLoops, name: str, search: ScaleSearch, limits: Limits
) -> None:
    """Stacks with orders of columns of their own: neighbours of a block have other groups."""
    case = _case(name, search)
    order = torch.stack([torch.randperm(N_COLS, generator=_seeded(s)) for s in range(N_STACKS)])
    weight = case.weight.gather(1, order.unsqueeze(-1).expand_as(case.weight))
    (upper,) = case.factor.diagonal_inverses([case.block])
    ahead = weight[:, slice(*case.block)].contiguous()

    def round_block(chosen: ColumnLoops, rounding: Rounding, groups: Groups, move: Move) -> None:
        given = move(ahead), move(weight), move(upper)
        chosen.gptq_block(rounding, groups, case.block, *given, None)

    ordered = replace(case, groups=replace(case.groups, of_columns=case.groups.of_columns[order]))
    label = f"{name}, {search}, another order"
    _compare(loops, ordered, limits, round_block, case.with_scales(), label)


Check = Callable[[ColumnLoops, str, ScaleSearch, Limits], None]
CHECKS: tuple[Check, ...] = (
    check_fitted_groups,
    check_gptq_block,
    check_sweep_block,
    check_sweep_rows,
    check_another_order,
)
"""What every implementation promises for every format."""


def _compare(
    loops: ColumnLoops,
    case: _Case,
    limits: Limits,
    run: Callable[[ColumnLoops, Rounding, Groups, Move], None],
    start: Rounding,
    label: str,
) -> Rounding:
    """Check what an implementation makes of a start; what the compiled loops make of it."""
    results = []
    for chosen, device in ((NumbaLoops(), "cpu"), (loops, limits.device)):

        def move(x: Tensor, device: str = device) -> Tensor:
            """The same numbers on the device, in the same strides."""
            same = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            return same.copy_(x)

        rounding = Rounding(*map(move, start.tensors))
        of_columns = move(case.groups.of_columns)
        run(chosen, rounding, replace(case.groups, of_columns=of_columns), move)
        results.append(Rounding(*(x.cpu() for x in rounding.tensors)))
    expected, found = results
    _assert_close(expected, found, limits, label)
    return expected


def _assert_close(expected: Rounding, found: Rounding, limits: Limits, label: str) -> None:
    is_same = expected.centred == found.centred
    share = 1.0 - float(is_same.float().mean())
    assert share <= limits.codes, f"{label}: {share:.2%} of the codes differ"
    same_scales = torch.isclose(expected.scales, found.scales, rtol=limits.relative, atol=0.0)
    share = 1.0 - float((same_scales & (expected.zeros == found.zeros)).float().mean())
    assert share <= limits.codes, f"{label}: {share:.2%} of the scales or zero points differ"
    if not limits.codes:
        size = limits.relative * float(expected.delta.abs().max())
        assert torch.allclose(expected.delta, found.delta, rtol=0.0, atol=size), f"{label}: delta"
    told, wanted = float(found.objective.sum()), float(expected.objective.sum())
    allowed = max(limits.relative, limits.codes) * wanted
    assert abs(told - wanted) <= allowed, f"{label}: objective {told}, not {wanted}"


def _case(name: str, search: ScaleSearch) -> _Case:
    fmt = parse_format(name)
    weights = [draw_weights(N_ROWS, N_COLS, seed=seed).T for seed in range(N_STACKS)]
    weight = torch.stack(weights).contiguous()
    inputs = torch.randn(N_STACKS, 3 * N_COLS, N_COLS, generator=_seeded(9))
    inputs = inputs @ torch.randn(N_COLS, N_COLS, generator=_seeded(8))
    damped = factorize(inputs.mT @ inputs, 0.01, (False,))
    size = fmt.columns_per_scale(N_COLS)
    n_groups = -(-N_COLS // size)
    # Super-blocks of two groups, so that there are several, the last of them short.
    per_shared = 2 if fmt.super_size else n_groups
    shared = nv_global_scale(weight).expand(N_STACKS, N_ROWS).unsqueeze(1).contiguous()
    if fmt.super_size:
        drawn = torch.rand(N_STACKS, -(-n_groups // 2), N_ROWS, generator=_seeded(7))
        shared = (1e-4 * (0.5 + drawn)).to(torch.float16).float()
    groups = Groups(rule_of(fmt, search), size, torch.arange(N_COLS) // size, per_shared)
    # Where groups are smaller than a block, one begins with it.
    start = size * (BLOCK // size) if size <= BLOCK else 3
    block = (start, start + BLOCK)
    return _Case(weight, damped.matrix, damped.factors[0], groups, block, shared)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
