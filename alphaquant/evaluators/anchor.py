"""What changing one matrix of a quantized model costs: both orders of the divergence.

At the original weights KL(teacher || model) has its minimum; at a quantized model, the anchor, it
has a slope. Replacing a matrix W_a of the anchor by Q, with D = Q - W_a, changes the divergence by

    c = E[<g_KL, D>] + 1/2 E[<g_F, D>^2],

g_KL the gradient of the divergence itself, which is known exactly on the given windows, and g_F
that of the log-likelihood of labels drawn from the anchor, whose squares estimate the Gauss-Newton
term of the divergence's second derivative. c is 0 for the format that the matrix has, and negative
where the change is an improvement.

What is measured is stored under the assignment's digest, so a refinement that was stopped resumes.

Letters: M matrices, U units, F formats, D draws of labels, S sequences, T tokens per sequence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alphaquant.errors import ModelError
from alphaquant.evaluators.cost_store import (
    Arrays,
    CostStore,
    LayerCosts,
    TableShape,
    by_format,
    costs_key,
)
from alphaquant.evaluators.divergence import (
    Teacher,
    check_vocabulary,
    check_windows,
    kl_per_position,
)
from alphaquant.evaluators.matrix_costs import (
    TokenSums,
    token_sums,
    trace_matrices,
    weight_errors,
)
from alphaquant.evaluators.sensitivity import (
    COSTS_VERSION,
    CostSettings,
    Floats,
    coupled_fisher,
    unit_rows,
)
from alphaquant.quant.bank import Bank, Progress
from alphaquant.quant.gradients import LayerTrace, SampledLabels, trace_layers
from alphaquant.quant.sites import ModelMap
from alphaquant.quant.walk import batches_of
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.units import Matrix, Unit


@dataclass(frozen=True)
class TeacherDivergence:
    """The divergence to stored predictions, summed over positions, in nats; differentiable.

    Attributes:
        teacher: predictions of the original on the same windows, in the same order.
    """

    teacher: Teacher

    def totals(self, log_probs: Tensor, batch: Tensor, first: int) -> list[Tensor]:
        """One sum over B sequences.

        Raises:
            StoreError: the teacher has another vocabulary.
        """
        check_vocabulary(self.teacher, log_probs.shape[-1])
        stored = next(self.teacher.batches(len(batch), first))
        stored = {name: tensor.to(log_probs.device) for name, tensor in stored.items()}
        return [kl_per_position(log_probs, stored).sum()]


@dataclass(frozen=True)
class AnchorTable:
    """Costs of changing one of M matrices of an anchor to one of F formats.

    Attributes:
        anchor: digest of the assignment whose weights the model had.
        matrices: M names, in inventory order.
        formats: F canonical names.
        first: float64 [M, F], first-order change of the divergence, nats per token; any sign.
        products: float32 [M, F, D * S], inner products of weight change and sequence gradients of
            drawn labels, all sequences of the first draw first.
        token_fisher: float64 [M, F], the second-order change without products of different
            tokens, nats per token.
        n_tokens: float64 [M], tokens that reached the matrix.
        seq_len: T.
        settings: how it was measured.
    """

    anchor: str
    matrices: tuple[str, ...]
    formats: tuple[str, ...]
    first: Floats
    products: npt.NDArray[np.float32]
    token_fisher: Floats
    n_tokens: Floats
    seq_len: int
    settings: CostSettings


@dataclass(frozen=True)
class AnchorCosts:
    """Costs of changing one of U units of an anchor to one of F formats, nats per token.

    Attributes:
        first: float64 [U, F], first-order change of the divergence.
        second: float64 [U, F], second-order change, >= 0.
        token_second: float64 [U, F], the same without products of different tokens.
        n_tokens: float64 [U], tokens that reached the unit's least used matrix.
    """

    first: Floats
    second: Floats
    token_second: Floats
    n_tokens: Floats

    @property
    def change(self) -> Floats:
        """Estimated change of the divergence, float64 [U, F]: `first` + `second`."""
        return self.first + self.second


def anchor_unit_costs(table: AnchorTable, units: Sequence[Unit]) -> AnchorCosts:
    """Add the costs of each unit's matrices; products are added before they are squared.

    Args:
        table: of all matrices.
        units: U units of those matrices.
    """
    rows = unit_rows(table.matrices, units)
    return AnchorCosts(
        first=np.array([table.first[r].sum(0) for r in rows]),
        second=coupled_fisher(table.products, rows, table.seq_len),
        token_second=np.array([table.token_fisher[r].sum(0) for r in rows]),
        n_tokens=np.array([table.n_tokens[r].min() for r in rows]),
    )


def measure_anchor_costs(
    model_map: ModelMap,
    bank: Bank,
    tokens: Tensor,
    teacher: Teacher,
    anchor: Assignment,
    formats: Sequence[str],
    settings: CostSettings,
    *,
    progress: Progress = lambda stage, done, total: None,
) -> AnchorTable:
    """Measure, or read back, what it costs to change any matrix of a quantized model.

    Args:
        model_map: the model, with the weights of `anchor` (`Swapper.apply`).
        bank: holds every format; the weights of `anchor` are from it.
        tokens: windows, int64 [S, T].
        teacher: the original's predictions on those windows.
        anchor: what the weights are.
        formats: canonical names of formats to change to.
        settings: how.
        progress: called with ("anchor", layers done, layers).

    Raises:
        StoreError: a file is damaged, or the teacher belongs to other windows or another
            vocabulary.
        ModelError: the windows did not reach a matrix, or a weight is not that of the anchor.
    """
    check_windows(teacher, tokens)
    store = CostStore(bank.path / "anchors" / _key(tokens, teacher, anchor, settings))
    shape = TableShape(
        sizes=[len(list(layer.matrices())) for layer in model_map.layers],
        formats=tuple(formats),
        shared=("n_tokens",),
        trailing={"first": (), "products": (settings.n_draws * len(tokens),), "token_fisher": ()},
    )

    def traces() -> Iterator[LayerTrace]:
        labels = SampledLabels(settings.n_draws, settings.seed)
        batches = batches_of(tokens, settings.batch_size)
        return trace_layers(model_map, batches, [TeacherDivergence(teacher), labels])

    store.fill(
        shape,
        traces,
        lambda trace, names: _layer_costs(trace, bank, anchor, names),
        lambda done, total: progress("anchor", done, total),
    )
    return AnchorTable(
        anchor=anchor.digest,
        matrices=tuple(m.name for m in bank.inventory.matrices),
        formats=tuple(formats),
        seq_len=tokens.shape[1],
        settings=settings,
        **store.read(shape),
    )


def _key(tokens: Tensor, teacher: Teacher, anchor: Assignment, settings: CostSettings) -> str:
    facts = {
        "anchor": anchor.digest,
        "settings": asdict(settings),
        "teacher": [teacher.path.name, dict(teacher.facts)],
        "version": COSTS_VERSION,
    }
    return costs_key(tokens, facts)


@torch.no_grad()
def _layer_costs(
    trace: LayerTrace, bank: Bank, anchor: Assignment, formats: Sequence[str]
) -> LayerCosts:
    """Costs of one layer."""
    readers = [bank.layer(name, trace.layer.index) for name in formats]
    n_sequences = sum(len(h) for h in trace.hidden)
    n_total = n_sequences * trace.hidden[0].shape[1]
    n_tokens, costs = [], []
    for matrix in trace_matrices(trace):
        n_tokens.append(matrix.n_tokens)
        if readers:
            errors = weight_errors(readers, matrix.matrix, matrix.weight)
            _check_weight(matrix.matrix, dict(zip(formats, errors, strict=True)), anchor)
            costs.append(_matrix_costs(token_sums(errors, matrix, n_sequences), n_total))
    return LayerCosts(
        {"n_tokens": np.array(n_tokens, dtype=np.float64)}, by_format(costs, formats)
    )


def _check_weight(matrix: Matrix, errors: Mapping[str, Tensor], anchor: Assignment) -> None:
    own = anchor.formats[matrix.name]
    if own in errors and bool(errors[own].any()):
        raise ModelError(
            f"{matrix.name} does not have the weights that the bank holds in {own}, the format of "
            "the assignment to measure at; apply the assignment to the model first"
        )


def _matrix_costs(sums: TokenSums, n_total: int) -> Arrays:
    """Arrays [F, ...] of one matrix; the first total is the divergence, the others are draws."""
    found = {
        "first": sums.products[:, 0].sum(-1) / n_total,
        "products": sums.products[:, 1:].flatten(1).float(),  # [F, D * S]
        "token_fisher": 0.5 * sums.squares[:, 1:].mean(-1) / n_total,
    }
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}
