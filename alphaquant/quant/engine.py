"""From one layer's weights and Hessians to packed matrices with a record of how each was made.

The bank asks for every matrix in several formats, the pipeline for each matrix in one; both come
through `quantize_layer`, so the same settings give the same codes. Matrices that share their
inputs share a Hessian and its factors: they are a stack.

On a CPU stacks are rounded one after the other. Rows are independent, so what is rounded at the
same time, one part per thread, is a run of at most `_ROWS` rows in one format; where runs are cut
depends on the matrices alone, so the result does not depend on the number of threads. On a GPU all
stacks of one shape are rounded together, as many as fit (`place.py`), one format after the other.

Letters: S stacks, N rows, K columns.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.models.sites import LayerSite
from alphaquant.quant.codecs import check_finite, nv_global_scale
from alphaquant.quant.columns.state import Block, Rounding, better_rows, join_rows
from alphaquant.quant.descent import ColumnPlan, Rounder
from alphaquant.quant.factor import DampedHessian, factorize
from alphaquant.quant.format_rules import rule_of
from alphaquant.quant.ggml.quantizing import encode_some, encodings
from alphaquant.quant.hessian import HessianBatch
from alphaquant.quant.matrix import RoundedBatch, pack_bf16
from alphaquant.quant.place import Place, place_of
from alphaquant.quant.shrinkage import NO_SHRINKAGE, Shrinkage, choose_shrinkage, shrink
from alphaquant.quant.stacks import MatrixRecord, QuantizedMatrix, Stacks, some
from alphaquant.quant.two_sided.coupling import CoupledRounder, Coupling, Couplings, is_coupled
from alphaquant.spaces.formats import BF16, Format, parse_format
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings

_ROWS = 512
"""Rows that are rounded together: enough for products at full speed, few enough for caches."""


Wanted = Callable[[Matrix, str], bool]


class Weights(Protocol):
    """Where the engine reads weights: a `ModelMap`, or weights that are corrected beforehand."""

    def view(self, name: str) -> Tensor:
        """The weight of a matrix, [N, K]."""


def quantize_layer(
    weights: Weights,
    layer: LayerSite,
    hessians: Sequence[HessianBatch] | None,
    formats: Sequence[str],
    settings: QuantSettings,
    wanted: Wanted = lambda matrix, name: True,
) -> Iterator[QuantizedMatrix]:
    """Quantize the matrices of one layer.

    Args:
        weights: those of the model, which are read and not changed.
        layer: the layer.
        hessians: from `LayerHessians.batches`; None for round-to-nearest without data.
        formats: canonical format names.
        settings: how.
        wanted: which (matrix, format name) pairs to yield; all by default.

    Yields:
        Matrices that share their inputs one format after the other.

    Raises:
        FormatError: a weight is NaN or infinite.
        ModelError: a Hessian cannot be factorized, or holds NaN.
    """
    batches = _without_data(layer) if hessians is None else hessians
    yield from quantize_batches(weights, batches, formats, settings, wanted)


def quantize_batches(
    weights: Weights,
    batches: Iterable[HessianBatch],
    formats: Sequence[str],
    settings: QuantSettings,
    wanted: Wanted = lambda matrix, name: True,
) -> Iterator[QuantizedMatrix]:
    """Quantize the matrices of batches of Hessians; all else as `quantize_layer`."""
    for batch in batches:
        _check_hessians(batch)
        place = place_of(weights.view(batch.stacks[0][0].name).device)
        shrinkage = _shrinkage(weights, batch, settings, place)
        asked = [_asked(stack, formats, wanted) for stack in batch.stacks]
        with _threads(place) as over:
            for numbers in _runs(batch, asked, place):
                own = {b: asked[b] for b in numbers}
                stacks = _gather(weights, batch, own, (settings, shrinkage), place)
                yield from _quantize_stacks(stacks, list(own.values()), settings, over)


Asked = Mapping[str, tuple[int, ...]]
"""Format name -> positions of the matrices of a stack that are asked for in it; never none."""


def _asked(stack: Sequence[Matrix], formats: Sequence[str], wanted: Wanted) -> Asked:
    found = {n: tuple(i for i, m in enumerate(stack) if wanted(m, n)) for n in formats}
    return {name: positions for name, positions in found.items() if positions}


def _runs(batch: HessianBatch, asked: Sequence[Asked], place: Place) -> Iterator[list[int]]:
    """Stacks that are rounded together: neighbours of one shape, all with data or all without."""
    has_data = batch.has_data
    used = [b for b in range(len(batch.stacks)) if asked[b]]

    def kind(b: int) -> tuple[object, ...]:
        return has_data[b], tuple(m.rows for m in batch.stacks[b])

    for _, same in groupby(used, kind):
        left = list(same)
        while left:
            stack = batch.stacks[left[0]]
            n = place.n_together(sum(m.rows for m in stack), stack[0].cols)
            yield left[:n]
            left = left[n:]


Map = Callable[..., Iterator[Any]]
"""`map`, or that of a pool of threads."""


@contextmanager
def _threads(place: Place) -> Iterator[Map]:
    """A `map` over as many threads as torch would use, each of which computes alone meanwhile.

    Where stacks are rounded together, one thread gives the device its work.
    """
    n_threads = torch.get_num_threads()
    if n_threads == 1 or place.is_batched:
        yield map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(n_threads)


def _shrinkage(
    weights: Weights, batch: HessianBatch, settings: QuantSettings, place: Place
) -> Shrinkage:
    """How far the Hessians of a batch are drawn toward their diagonals."""
    if settings.method != "gptq" or not settings.shrinkage:
        return NO_SHRINKAGE

    def weight_of(index: int) -> Tensor:
        views = [weights.view(m.name) for m in batch.stacks[index]]
        return torch.cat(views).to(place.device, torch.float32)

    return choose_shrinkage(batch, weight_of, settings.percdamp, place)


def _gather(
    source: Weights,
    batch: HessianBatch,
    asked: Mapping[int, Asked],
    how: tuple[QuantSettings, Shrinkage],
    place: Place,
) -> Stacks:
    """The stacks of a batch that are asked for, with their factors where those are needed."""
    (settings, shrinkage), numbers = how, list(asked)
    matrices = tuple(batch.stacks[b] for b in numbers)
    views = [source.view(m.name) for stack in matrices for m in stack]
    weights = torch.cat(views).to(place.device, torch.float32)
    if not bool(torch.isfinite(weights).all()):
        for stack in matrices:
            for m in stack:
                check_finite(source.view(m.name), m.name)
    hessian = damped = None
    amounts = tuple(shrinkage.amount(batch.tokens_per_input(b)) for b in numbers)
    if batch.has_data[numbers[0]]:
        own = batch.hessian if len(numbers) == len(batch.stacks) else batch.hessian[numbers]
        hessian = own.to(place.device)
        formats = {parse_format(n) for of_stack in asked.values() for n in of_stack}
        if settings.method == "gptq" and any(f.is_quantized for f in formats):
            is_alone = any(_is_rounded(f.name) and not is_coupled(f) for f in formats)
            n_starts = settings.n_starts if is_alone or not batch.outputs else 1
            orders = (settings.actorder, not settings.actorder)[:n_starts]
            names = [" + ".join(m.name for m in stack) for stack in matrices]
            shrunk = shrink(hessian, torch.tensor(amounts, dtype=torch.float64))
            damped = factorize(shrunk, settings.percdamp, orders, *names)
    return Stacks(
        matrices,
        weights.view(len(matrices), -1, weights.shape[-1]),
        hessian,
        damped,
        amounts,
        shrinkage.heldout_gain,
        tuple(batch.source[b] for b in numbers),
        tuple(batch.n_tokens[b] for b in numbers),
        place,
        _couplings(batch, matrices, place),
    )


def _couplings(
    batch: HessianBatch, matrices: Sequence[Sequence[Matrix]], place: Place
) -> Couplings | None:
    """What is known of the outputs of stacks, None for nothing."""
    if not batch.outputs:
        return None
    blocks = tuple(tuple(batch.outputs[m.name] for m in stack) for stack in matrices)
    return Couplings(blocks, place.device)


@dataclass(frozen=True)
class _Job:
    """Matrices at the same positions of some stacks, rounded to one format.

    Attributes:
        fmt: the format.
        index: int64 [S], the stacks.
        positions: of the matrices in each stack.
    """

    fmt: Format
    index: Tensor
    positions: tuple[int, ...]


def _quantize_stacks(
    stacks: Stacks, asked: Sequence[Asked], settings: QuantSettings, over: Map
) -> Iterator[QuantizedMatrix]:
    """Quantize the matrices of stacks, each in the formats that are asked for."""
    jobs, found = _jobs(stacks, asked), dict[tuple[str, str], QuantizedMatrix]()
    # On a CPU all together, so that there is work for every thread; on a GPU all are large.
    for group in [[job] for job in jobs] if stacks.place.is_batched else [jobs]:
        rounded = _round_jobs(stacks, group, settings, over)
        tasks = [(*done, position) for done in rounded for position in done[0].positions]
        for items in over(lambda task: _pack(stacks, settings, *task), tasks):
            found |= {(item.matrix.name, item.record.format): item for item in items}
    encoded = over(lambda t: encode_some(stacks, settings, *t), list(encodings(stacks, asked)))
    for items in encoded:
        found |= {(item.matrix.name, item.record.format): item for item in items}
    for stack, of_stack, weight in zip(stacks.matrices, asked, stacks.weights, strict=True):
        for name, positions in of_stack.items():
            for position in positions:
                matrix = stack[position]
                if (matrix.name, name) in found:
                    yield found[matrix.name, name]
                else:
                    yield _keep(matrix, weight[stacks.rows_of(position)])


def _jobs(stacks: Stacks, asked: Sequence[Asked]) -> list[_Job]:
    """What is rounded together: all stacks that ask for the same in a format."""
    together: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for s, of_stack in enumerate(asked):
        for name, positions in of_stack.items():
            if _is_rounded(name):
                together.setdefault((name, positions), []).append(s)
    device = stacks.place.device
    return [
        _Job(parse_format(name), torch.tensor(index, device=device), positions)
        for (name, positions), index in together.items()
    ]


@dataclass(frozen=True)
class _Part:
    """Rows that are rounded together.

    Attributes:
        rounder: of the format and the rows.
        weight: float32 [S, K, n].
        damped: of these stacks.
        inverses: of every factor, by the rounder's plan.
        coupling: of the rows, None where they do not know of each other.
    """

    rounder: Rounder
    weight: Tensor
    damped: DampedHessian | None
    inverses: Sequence[Sequence[Tensor]]
    coupling: Coupling | None = None


def _round_jobs(
    stacks: Stacks, jobs: Sequence[_Job], settings: QuantSettings, over: Map
) -> list[tuple[_Job, Rounding]]:
    """Round jobs, each in parts."""
    inverses: dict[tuple[Block, ...], list[list[Tensor]]] = {}
    parts = [list(_parts(stacks, job, settings, inverses)) for job in jobs]
    flat = [part for of_job in parts for part in of_job]
    rounded = iter(list(over(lambda part: _round(part, settings), flat)))
    return [
        (job, join_rows([next(rounded) for _ in of_job]))
        for job, of_job in zip(jobs, parts, strict=True)
    ]


def _parts(
    stacks: Stacks,
    job: _Job,
    settings: QuantSettings,
    inverses: dict[tuple[Block, ...], list[list[Tensor]]],
) -> Iterator[_Part]:
    """Cut the rows of a job into parts, or take them whole where stacks are rounded together.

    Args:
        stacks: those that the job is of.
        job: what is rounded.
        settings: how.
        inverses: of all stacks by blocks; what is not yet known is added.
    """
    fmt, is_whole = job.fmt, len(job.index) == len(stacks.matrices)
    weights = some(stacks.weights, job.index)
    damped = stacks.damped
    if damped is not None and not is_whole:
        damped = damped.stacks(job.index)
    of_matrices = [weights[:, stacks.rows_of(p)] for p in job.positions]
    rows = torch.cat(of_matrices, 1) if len(of_matrices) < len(stacks.matrices[0]) else weights
    shared = torch.empty(0, device=rows.device)
    if fmt.shared.global_bits:
        shared = torch.cat([nv_global_scale(w).expand(w.shape[:2]) for w in of_matrices], 1)
    n_cols = rows.shape[-1]
    size = fmt.columns_per_scale(n_cols)
    plan = ColumnPlan(n_cols, size, settings.blocksize, fmt.super_size)
    rule, factors = rule_of(fmt, settings.scale_search), () if damped is None else damped.factors
    own = inverses.get(plan.blocks, []) if is_whole else []
    if not own:
        own = [f.diagonal_inverses(plan.blocks) for f in factors]
        if is_whole:
            inverses[plan.blocks] = own
    for cut, coupling in _cuts(stacks, job, rows.shape[1]):
        rounder = Rounder(rule, plan, shared[..., cut].contiguous(), stacks.place.loops)
        yield _Part(rounder, rows[:, cut].mT.contiguous(), damped, own, coupling)


def _cuts(stacks: Stacks, job: _Job, n_rows: int) -> Iterator[tuple[slice, Coupling | None]]:
    """Where the rows of a job are cut: at the blocks of output Hessians where these are known."""
    if stacks.couplings is not None and stacks.damped is not None and is_coupled(job.fmt):
        start = 0
        for position in job.positions:
            for rows, coupling in stacks.couplings.of(job.index, position):
                yield slice(start + rows.start, start + rows.stop), coupling
            start += stacks.matrices[0][position].rows
        return
    n_together = n_rows if stacks.place.is_batched else _ROWS
    for start in range(0, n_rows, n_together):
        yield slice(start, start + n_together), None


def _round(part: _Part, settings: QuantSettings) -> Rounding:
    """Round a part: from one or two starts where there is data, to nearest elsewhere."""
    rounder, found = part.rounder, None
    if part.damped is None:
        return rounder.nearest(part.weight)
    if part.coupling is not None:
        coupled = CoupledRounder(rounder, part.coupling, part.damped, tuple(part.inverses[0]))
        return coupled.round(part.weight, settings.refine_sweeps, static=settings.static_groups)
    for factor, own in zip(part.damped.factors, part.inverses, strict=True):
        start = rounder.gptq(part.weight, factor, own, static=settings.static_groups)
        end = rounder.refine(start, part.damped, settings.refine_sweeps)
        found = end if found is None else better_rows(found, end)
    assert found is not None, "there is at least one start"
    return found


def _pack(
    stacks: Stacks, settings: QuantSettings, job: _Job, rounding: Rounding, position: int
) -> list[QuantizedMatrix]:
    """Pack the matrices at a position of a job's stacks; write down how each was made."""
    sizes = [stacks.matrices[0][p].rows for p in job.positions]
    before = sum(sizes[: job.positions.index(position)])
    own = rounding.rows(slice(before, before + stacks.matrices[0][position].rows))
    weights = some(stacks.weights[:, stacks.rows_of(position)], job.index)
    fmt, zeros, shared = job.fmt, None, None
    values = own.centred
    if not fmt.symmetric:
        zeros = own.zeros.mT
        values = own.values(fmt.columns_per_scale(weights.shape[-1]))
    if fmt.shared.global_bits:
        shared = nv_global_scale(weights).expand(weights.shape[:2])
    supers = own.shared.mT if fmt.super_size else None
    packed = RoundedBatch(fmt, values.mT, own.scales.mT, zeros, shared, supers).pack_all()
    matrices = [stacks.matrices[s][position] for s in job.index.tolist()]
    records = _records(stacks, settings, job, position, own, weights)
    return [QuantizedMatrix(*item) for item in zip(matrices, packed, records, strict=True)]


def _records(
    stacks: Stacks,
    settings: QuantSettings,
    job: _Job,
    position: int,
    rounding: Rounding,
    weights: Tensor,
) -> list[MatrixRecord]:
    """How each matrix at a position of a job's stacks was made."""
    is_nearest = stacks.damped is None
    energy = weights.square().sum((-1, -2)).clamp(min=1e-30)  # [S]
    weight_errors = (rounding.delta.square().sum((-1, -2)) / energy).tolist()
    outputs: list[float] | None = None
    if stacks.hessian is not None:
        signals = some(stacks.signals[:, stacks.rows_of(position)], job.index).sum(-1)
        errors = stacks.output_errors(job.index, rounding).sum(-1)
        outputs = (errors / signals.clamp(min=1e-30)).tolist()
    found = []
    for i, s in enumerate(job.index.tolist()):
        matrix = stacks.matrices[s][position]
        lost = weight_errors[i], None if outputs is None else outputs[i]
        method = "rtn" if is_nearest else "gptq"
        found.append(stacks.record(s, matrix, job.fmt, method, lost, settings))
    return found


def _is_rounded(name: str) -> bool:
    """Whether a format is one that the column loops round to."""
    fmt = parse_format(name)
    return fmt.is_quantized and not fmt.is_ggml


def _keep(matrix: Matrix, weight: Tensor) -> QuantizedMatrix:
    record = MatrixRecord(matrix.name, BF16.name, 16.0, "none")
    return QuantizedMatrix(matrix, pack_bf16(weight.cpu()), record)


def _check_hessians(batch: HessianBatch) -> None:
    """Inputs with NaN or infinity would otherwise look like no inputs at all."""
    sums = batch.hessian.diagonal(dim1=-2, dim2=-1).sum(-1)  # [B]
    for stack, total in zip(batch.stacks, sums.tolist(), strict=True):
        if not math.isfinite(total):
            raise ModelError(
                f"the inputs of {stack[0].name} hold NaN or infinite numbers on the calibration "
                "text; the model is broken, or its dtype too narrow: use --dtype float32 or "
                "bfloat16"
            )


def _without_data(layer: LayerSite) -> Iterator[HessianBatch]:
    """Batches with zero Hessians: plain matrices one by one, all experts of a module at once."""
    stacks: list[tuple[tuple[Matrix, ...], ...]] = [((site.matrix,),) for site in layer.plain]
    for experts in layer.experts:
        stacks.append(tuple(map(experts.inner, range(experts.n_experts))))
        stacks.append(tuple((m,) for m in experts.down))
    for group in stacks:
        zeros = torch.zeros(1, 1, 1).expand(len(group), group[0][0].cols, group[0][0].cols)
        yield HessianBatch(group, zeros, (0,) * len(group), ("none",) * len(group))
