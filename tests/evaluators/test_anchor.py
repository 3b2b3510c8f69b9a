"""Costs at a quantized model against finite differences of the true divergence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alphaquant.errors import ModelError, StoreError
from alphaquant.evaluators import anchor as anchor_module
from alphaquant.evaluators.anchor import (
    AnchorTable,
    TeacherDivergence,
    anchor_unit_costs,
    measure_anchor_costs,
)
from alphaquant.evaluators.divergence import Teacher, store_teacher
from alphaquant.evaluators.matrix_costs import weight_errors
from alphaquant.evaluators.sensitivity import CostSettings
from alphaquant.quant.models import map_model
from alphaquant.quant.swap import Swapper
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.units import Matrix, Unit
from alphaquant.testing.cost_cases import COST_FORMATS, COST_TOKENS, CostCase, make_cost_case

LOW, HIGH = COST_FORMATS


def mixed(case: CostCase) -> Assignment:
    """Every second matrix in few bits."""
    matrices = case.map.inventory.matrices
    return Assignment({m.name: COST_FORMATS[i % 2] for i, m in enumerate(matrices)})


class Anchored:
    """A model that was quantized, and its original's predictions."""

    def __init__(self, folder: Path, top_k: int = 4096, **changes: Any) -> None:
        self.case = make_cost_case(folder, "mixtral", **changes)
        model = self.case.map.model
        self.teacher = store_teacher(
            folder / "teacher.safetensors", model, COST_TOKENS, top_k=top_k
        )
        self.anchor = mixed(self.case)
        Swapper(self.case.map, self.case.bank.read).apply(self.anchor)

    def costs(
        self, formats: tuple[str, ...] = COST_FORMATS, anchor: Assignment | None = None, **s: Any
    ) -> AnchorTable:
        """The table; further settings as in `CostSettings`."""
        anchor = anchor or self.anchor
        return measure_anchor_costs(
            self.case.map,
            self.case.bank,
            COST_TOKENS,
            self.teacher,
            anchor,
            formats,
            CostSettings(**s),
        )


@pytest.fixture
def anchored(tmp_path: Path) -> Anchored:
    return Anchored(tmp_path)


def divergence(case: CostCase, stored: dict[str, Tensor], name: str, change: Tensor) -> float:
    """KL per token in float64 of the model with a matrix changed, with buckets as stored."""
    model = case.map.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        model.double()
        map_model(model).views[name].add_(change)
        q = torch.log_softmax(model(COST_TOKENS, use_cache=False).logits, -1)
    finally:
        model.float().load_state_dict(before)
    p = stored["log_probs"].double()
    if "tokens" not in stored:
        return float((p.exp() * (p - q)).sum(-1).mean())
    top = q.gather(-1, stored["tokens"].long())
    rest_q = torch.log1p(-top.exp().sum(-1))
    rest_p = stored["rest"].double()
    bucket = rest_p.exp() * (rest_p - rest_q)
    return float(((p.exp() * (p - top)).sum(-1) + bucket).mean())


@pytest.mark.parametrize("top_k", [4096, 5], ids=["all tokens", "five tokens and a bucket"])
def test_the_first_order_is_the_slope_of_the_true_divergence(tmp_path: Path, top_k: int) -> None:
    # All experts are chosen, so no token is sent elsewhere within the difference.
    anchored = Anchored(tmp_path, top_k, num_experts_per_tok=4)
    table, case = anchored.costs(batch_size=4), anchored.case
    stored = next(anchored.teacher.batches(len(COST_TOKENS)))
    scale = np.abs(table.first).max()
    for row, name in enumerate(table.matrices):
        other = 1 - COST_FORMATS.index(anchored.anchor.formats[name])
        step = 1e-3 * case.weight_error(name, COST_FORMATS[other]).double()
        rise = divergence(case, stored, name, step) - divergence(case, stored, name, -step)
        # Float32 sums that cancel; the third order of a step of 1e-3 is 1e-6 of the first.
        expected = pytest.approx(rise / 2e-3, rel=1e-3, abs=1e-4 * scale)
        assert table.first[row, other] == expected, name
    assert (table.first < 0).any() and (table.first > 0).any()


def test_the_format_that_a_matrix_has_costs_exactly_nothing(anchored: Anchored) -> None:
    table = anchored.costs()
    for row, name in enumerate(table.matrices):
        own = COST_FORMATS.index(anchored.anchor.formats[name])
        for array in (table.first, table.products, table.token_fisher):
            assert not array[row, own].any()
            assert array[row, 1 - own].any()


def test_a_weight_that_was_rounded_to_bfloat16_has_no_error_in_its_own_format(
    anchored: Anchored,
) -> None:
    case, matrix = anchored.case, anchored.case.map.inventory.matrices[0]
    readers = [case.bank.layer(name, matrix.layer) for name in COST_FORMATS]
    weight = readers[0].read(matrix).dequantize().to(torch.bfloat16)
    assert not torch.equal(weight.float(), readers[0].read(matrix).dequantize())
    errors = weight_errors(readers, matrix, weight)
    assert not errors[0].any()
    assert errors[1].any()


def test_the_second_order_has_labels_of_the_quantized_model(anchored: Anchored) -> None:
    # The original's statistics, measured on the model as it is now, are those of the anchor.
    table = anchored.costs(seed=3, n_draws=2, batch_size=4)
    same = anchored.case.costs(seed=3, n_draws=2, batch_size=4)
    scale = np.abs(same.products).max(-1, keepdims=True)
    assert (np.abs(table.products - same.products) <= 1e-4 * scale).all()
    assert np.allclose(table.token_fisher, same.token_fisher, rtol=1e-3)
    assert np.array_equal(table.n_tokens, same.n_tokens)


def test_at_the_original_there_is_no_slope(tmp_path: Path) -> None:
    case = make_cost_case(tmp_path, "mixtral")
    teacher = store_teacher(tmp_path / "t.safetensors", case.map.model, COST_TOKENS)
    anchor = uniform_assignment(case.map.inventory, HIGH)
    table = measure_anchor_costs(
        case.map, case.bank, COST_TOKENS, teacher, anchor, (LOW,), CostSettings()
    )
    costs = anchor_unit_costs(table, [Unit(m.name, (m,)) for m in case.map.inventory.matrices])
    assert (costs.second > 0).all()
    assert (np.abs(costs.first) < 1e-4 * costs.second.max()).all()


def hand_table(matrices: tuple[Matrix, ...]) -> AnchorTable:
    return AnchorTable(
        anchor="a",
        matrices=tuple(m.name for m in matrices),
        formats=(LOW,),
        first=np.array([[-1.0], [0.25]]),
        products=np.array([[[1, -1]], [[2, 4]]], dtype=np.float32),
        token_fisher=np.array([[0.5], [5.0]]),
        n_tokens=np.array([7.0, 5.0]),
        seq_len=1,
        settings=CostSettings(),
    )


def test_units_add_slopes_and_square_sums_of_products(anchored: Anchored) -> None:
    a, b = anchored.case.map.inventory.matrices[:2]
    costs = anchor_unit_costs(
        hand_table((a, b)), [Unit("a", (a,)), Unit("b", (b,)), Unit("both", (b, a))]
    )
    assert costs.first.tolist() == [[-1.0], [0.25], [-0.75]]
    assert costs.second.tolist() == [[0.5], [5.0], [4.5]]
    assert costs.token_second.tolist() == [[0.5], [5.0], [5.5]]
    assert costs.change.tolist() == [[-0.5], [5.25], [3.75]]
    assert costs.n_tokens.tolist() == [7.0, 5.0, 5.0]


# Files


def test_an_anchor_is_measured_once_and_other_formats_later(
    anchored: Anchored, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchored.costs((LOW,))
    table = anchored.costs()
    files = sorted((anchored.case.bank.path / "anchors").rglob("*.safetensors"))
    assert len({f.parent for f in files}) == 1
    assert len(files) == 2 * (1 + len(COST_FORMATS))
    monkeypatch.delattr(anchor_module, "trace_layers")
    again = anchored.costs()
    assert again.anchor == anchored.anchor.digest
    for name in ("first", "products", "token_fisher", "n_tokens"):
        assert np.array_equal(getattr(again, name), getattr(table, name))
    monkeypatch.undo()
    other = uniform_assignment(anchored.case.map.inventory, LOW)
    Swapper(anchored.case.map, anchored.case.bank.read).apply(other)
    assert not np.array_equal(anchored.costs(anchor=other).first, table.first)


def test_weights_of_another_assignment_are_an_error(anchored: Anchored) -> None:
    other = uniform_assignment(anchored.case.map.inventory, LOW)
    with pytest.raises(ModelError, match=r"does not have the weights .* in int3-g32-asym"):
        anchored.costs(anchor=other)
    assert not list((anchored.case.bank.path / "anchors").rglob("*.safetensors"))


def test_a_teacher_of_other_windows_is_an_error(anchored: Anchored) -> None:
    folder = anchored.teacher.path.parent
    model = anchored.case.map.model
    anchored.teacher = store_teacher(folder / "other.safetensors", model, COST_TOKENS[:3])
    with pytest.raises(StoreError, match="which are not the 6 windows"):
        anchored.costs()


def test_a_teacher_of_another_vocabulary_is_an_error(anchored: Anchored) -> None:
    facts = {**anchored.teacher.facts, "vocabulary": 97}
    quantity = TeacherDivergence(Teacher(anchored.teacher.path, facts))
    with pytest.raises(StoreError, match="over 97 tokens"):
        quantity.totals(torch.zeros(1, 10, 96), COST_TOKENS[:1], 0)
