"""Bits and bytes of assignments, and the same active bytes as the search counts."""

from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from alphaquant.costs.fisher import unit_costs
from alphaquant.errors import ConfigError, ModelError
from alphaquant.evaluators.base import Evaluated, Subject
from alphaquant.evaluators.footprint import FootprintEvaluator, active_shares
from alphaquant.models.mapping import map_model
from alphaquant.search.problem import make_problem
from alphaquant.search.side.constraints import SideConstraints, is_kept
from alphaquant.spaces.assignment import (
    Assignment,
    assignment_from_units,
    uniform_assignment,
)
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import find_profile, units_of
from alphaquant.spaces.units import Inventory, Kept, Matrix
from alphaquant.testing.cost_cases import COST_FORMATS, make_cost_case
from alphaquant.testing.models import ROUTED_EXPERTS, TOP_K, tiny_model

DENSE = Matrix("model.layers.0.self_attn.o_proj", 16, 32, "attention", 0)
EXPERTS = tuple(
    Matrix(f"model.layers.0.mlp.experts.{e}.down_proj", 16, 32, "expert", 0, e) for e in range(4)
)
INVENTORY = Inventory("tiny", (DENSE, *EXPERTS), (Kept("lm_head.weight", 100, 200),))


def configured(**fields: Any) -> nn.Module:
    """A module with a configuration and nothing else."""
    module: Any = nn.Module()
    module.config = SimpleNamespace(**fields)
    found: nn.Module = module
    return found


def values_of(found: Evaluated) -> dict[str, float]:
    return {score.metric: score.value for score in found.scores}


def test_the_worked_example_by_configuration() -> None:
    subject = Subject(
        configured(num_experts_per_tok=2), INVENTORY, uniform_assignment(INVENTORY, "bf16")
    )
    found = FootprintEvaluator().evaluate(subject)
    assert values_of(found) == {
        "bits_per_weight": 16.0,
        "checkpoint_bytes": 5 * 1024 + 200,
        "active_bytes": 3072.0,
    }
    assert all(score.stderr is None for score in found.scores)
    assert found.details == {
        "shares": "uniform",
        "kept_bytes": 200,
        "kinds": [
            {"kind": "attention", "n_matrices": 1, "bytes": 1024.0, "active_bytes": 1024.0},
            {"kind": "expert", "n_matrices": 4, "bytes": 4096.0, "active_bytes": 2048.0},
        ],
    }


def test_the_worked_example_by_measured_shares() -> None:
    formats = dict(uniform_assignment(INVENTORY, "bf16").formats) | {EXPERTS[0].name: "int8-g32"}
    shares = dict(zip((m.name for m in EXPERTS), (0.75, 0.25, 1.0, 0.0), strict=True))
    subject = Subject(configured(), INVENTORY, Assignment(formats))
    # A share of something that is always on is not asked for and would not count.
    found = FootprintEvaluator(shares | {DENSE.name: 0.5}).evaluate(subject)
    values = values_of(found)
    assert values["active_bytes"] == 2712.0
    assert values["checkpoint_bytes"] == 4 * 1024 + 544 + 200
    assert values["bits_per_weight"] == 8 * (4 * 1024 + 544) / (5 * 512)
    assert found.details["shares"] == "measured"


def test_scores_are_the_metrics_in_their_order() -> None:
    evaluator = FootprintEvaluator()
    subject = Subject(
        configured(num_experts_per_tok=2), INVENTORY, uniform_assignment(INVENTORY, "int4-g32")
    )
    scores = evaluator.evaluate(subject).scores
    assert [(s.metric, s.unit, s.direction) for s in scores] == [
        (m.name, m.unit, m.direction) for m in evaluator.metrics
    ]


@pytest.mark.parametrize("family", sorted(ROUTED_EXPERTS))
def test_shares_by_configuration_are_top_k_of_the_experts(family: str) -> None:
    model = tiny_model(family)
    inventory = map_model(model).inventory
    shares = active_shares(inventory, model, None)
    assert shares.keys() == inventory.by_name.keys()
    for matrix in inventory.matrices:
        routed = TOP_K[family] / ROUTED_EXPERTS[family]
        assert shares[matrix.name] == (routed if matrix.kind == "expert" else 1.0)


def test_blocks_of_other_sizes_have_other_shares() -> None:
    matrices = [
        Matrix(f"model.layers.{layer}.mlp.experts.{e}.{part}", 8, 8, "expert", layer, e)
        for layer, n_experts in ((0, 2), (1, 8))
        for e in range(n_experts)
        for part in ("up_proj", "down_proj")
    ]
    shares = active_shares(
        Inventory("tiny", tuple(matrices)), configured(num_experts_per_tok=2), None
    )
    assert {m.layer: shares[m.name] for m in matrices} == {0: 1.0, 1: 0.25}


def test_a_dense_model_reads_everything() -> None:
    model = tiny_model("llama")
    inventory = map_model(model).inventory
    subject = Subject(model, inventory, uniform_assignment(inventory, "int4-g32"))
    values = values_of(FootprintEvaluator().evaluate(subject))
    assert values["active_bytes"] == values["checkpoint_bytes"] - inventory.kept_bytes


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("profile", ["any", "vllm"])
def test_active_bytes_are_those_that_a_search_limits(
    family: str, profile: str, tmp_path: Path
) -> None:
    case = make_cost_case(tmp_path, family)
    inventory, table = case.map.inventory, case.costs()
    units = units_of(inventory, find_profile(profile))
    costs = unit_costs(table, units)
    bits = [[u.storage_bits(parse_format(f)) for f in COST_FORMATS] for u in units]
    problem = make_problem(
        units,
        COST_FORMATS,
        bits,
        np.ones((len(units), 2), dtype=np.bool_),
        {"fisher": costs.fisher, "error": costs.error},
        costs.n_tokens,
        inventory.n_layers,
        {"active_share": costs.active_share},
    )
    choice = np.random.default_rng(3).integers(0, 2, len(units))
    assignment = assignment_from_units(inventory, units, problem.choice_names(choice))
    shares = dict(zip(table.matrices, table.active_share.tolist(), strict=True))
    found = FootprintEvaluator(shares).evaluate(Subject(case.map.model, inventory, assignment))
    n_bits = 8 * values_of(found)["active_bytes"]
    picked = problem.bits[np.arange(len(units)), choice]
    # Both add a few hundred float64 numbers, in another order and in units of matrices.
    assert n_bits == pytest.approx(float(costs.active_share @ picked), rel=1e-13)
    assert is_kept(problem, choice, SideConstraints(active_bits=ceil(n_bits)))
    assert not is_kept(problem, choice, SideConstraints(active_bits=int(0.999 * n_bits)))


def test_measured_and_uniform_shares_agree_where_experts_have_one_format(tmp_path: Path) -> None:
    case = make_cost_case(tmp_path, "mixtral")
    inventory, table = case.map.inventory, case.costs()
    subject = Subject(case.map.model, inventory, uniform_assignment(inventory, "int3-g32-asym"))
    shares = dict(zip(table.matrices, table.active_share.tolist(), strict=True))
    assert len(set(shares.values())) > 2
    measured = values_of(FootprintEvaluator(shares).evaluate(subject))
    uniform = values_of(FootprintEvaluator().evaluate(subject))
    assert measured["active_bytes"] == pytest.approx(uniform["active_bytes"], rel=1e-13)


UNIFORM = uniform_assignment(INVENTORY, "int4-g32")


@pytest.mark.parametrize(
    ("subject", "words"),
    [
        (Subject(configured()), "footprint .* not known"),
        (Subject(configured(), INVENTORY), "not known"),
        (Subject(configured(), None, UNIFORM), "not known"),
        (Subject(configured(), INVENTORY, Assignment({DENSE.name: "bf16"})), "4 matrices.*0.down"),
    ],
)
def test_a_subject_without_formats_is_refused(subject: Subject, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FootprintEvaluator().evaluate(subject)


@pytest.mark.parametrize("share", [None, -0.1, 1.5, float("nan")])
def test_shares_that_are_none_are_refused(share: float | None) -> None:
    shares = {m.name: 0.5 for m in EXPERTS} | {EXPERTS[2].name: share}
    given: Any = {name: value for name, value in shares.items() if value is not None}
    with pytest.raises(ConfigError, match=r"1 of 4 .*experts\.2\.down_proj"):
        FootprintEvaluator(given).evaluate(Subject(configured(), INVENTORY, UNIFORM))


@pytest.mark.parametrize("module", [nn.Module(), configured(hidden_size=3)])
def test_a_model_that_does_not_say_how_many_experts_it_uses_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok"):
        FootprintEvaluator().evaluate(Subject(module, INVENTORY, UNIFORM))
