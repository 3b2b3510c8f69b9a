"""Every evaluator keeps the contract; and the contract notices those that do not."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alphaquant.evaluators.base import Evaluated, Evaluator, Metric, Score, Subject
from alphaquant.evaluators.divergence import DivergenceEvaluator
from alphaquant.evaluators.drift import RoutingDriftEvaluator
from alphaquant.evaluators.footprint import FootprintEvaluator
from alphaquant.evaluators.latency import LatencyEvaluator, LatencyRow, LatencyTable
from alphaquant.evaluators.perplexity import PerplexityEvaluator
from alphaquant.evaluators.routes import keep_routes
from alphaquant.evaluators.teacher import store_teacher
from alphaquant.evaluators.utilization import UtilizationEvaluator
from alphaquant.models.mapping import map_model
from alphaquant.runtime.checkpoint import load
from alphaquant.spaces.menus import MENUS
from alphaquant.studies.inputs import load_source, read_text
from alphaquant.testing.evaluators import check_evaluator, check_worse, round_model
from alphaquant.testing.models import tiny_model, tiny_tokens
from alphaquant.testing.packed import mixed_assignment, save_packed


@dataclass(frozen=True)
class Case:
    """How an evaluator is made of (original, tokens [N, T], folder), and what int2 makes worse."""

    make: Callable[[nn.Module, Tensor, Path], Evaluator]
    worsens: tuple[str, ...] = ()


# A new evaluator adds its line.
CASES: dict[str, Case] = {
    "divergence": Case(
        lambda original, tokens, folder: DivergenceEvaluator(
            tokens, store_teacher(folder / "teacher.safetensors", original, tokens), 2
        ),
        ("kl", "same_top", "perplexity"),
    ),
    "perplexity": Case(
        lambda original, tokens, folder: PerplexityEvaluator(tokens, 2), ("perplexity",)
    ),
    "utilization": Case(lambda original, tokens, folder: UtilizationEvaluator(tokens, 2)),
    "drift": Case(
        lambda original, tokens, folder: RoutingDriftEvaluator(
            tokens, keep_routes(original, tokens, 2)
        ),
        ("router_kl", "expert_overlap"),
    ),
    "footprint": Case(lambda original, tokens, folder: FootprintEvaluator()),
    "latency": Case(lambda original, tokens, folder: LatencyEvaluator(made_up_table(original), 2)),
}


def made_up_table(original: nn.Module) -> LatencyTable:
    """Times of every matrix in every format; nothing was measured."""
    shapes = {(m.rows, m.cols) for m in map_model(original).inventory.matrices}
    names = {*MENUS["all"], "int2-g64", "int8-g64"}
    keys = [(*k, n) for k in itertools.product(names, shapes) for n in (1, 2)]
    rows = tuple(
        LatencyRow(
            device="made-up",
            kernel="none",
            format=name,
            rows=shape[0],
            cols=shape[1],
            tokens=n_tokens,
            microseconds=1.5 * n_tokens,
        )
        for name, shape, n_tokens in keys
    )
    return LatencyTable(rows, "0" * 64)


@dataclass(frozen=True)
class Models:
    """The demo model as it is and rounded to 8 and to 2 bits, and text for it."""

    original: nn.Module
    fine: Subject
    coarse: Subject
    tokens: Tensor


@pytest.fixture(scope="module")
def demo() -> Models:
    source = load_source("demo", "cpu", "auto")
    tokens = read_text(source, "demo", "heldout", 3, 48, 0).tokens  # the last batch is short
    model = source.map.model
    fine, coarse = (round_model(copy.deepcopy(model), f) for f in ("int8-g64", "int2-g64"))
    return Models(model, fine, coarse, tokens)


@pytest.mark.parametrize("name", CASES)
def test_it_keeps_the_contract_on_a_trained_model(demo: Models, name: str, tmp_path: Path) -> None:
    evaluator = CASES[name].make(demo.original, demo.tokens, tmp_path)
    assert evaluator.name == name
    check_evaluator(evaluator, demo.coarse)
    check_worse(evaluator, demo.fine, demo.coarse, CASES[name].worsens)


@pytest.mark.parametrize("name", CASES)
def test_it_keeps_the_contract_on_a_packed_model(name: str, tmp_path: Path) -> None:
    original, tokens = tiny_model("olmoe"), tiny_tokens(1, 7)
    model_map = map_model(original)
    packed = load(save_packed(original, tmp_path / "packed"))
    subject = Subject(packed, model_map.inventory, mixed_assignment(model_map))
    check_evaluator(CASES[name].make(original, tokens, tmp_path), subject)


# The contract itself

GOOD = Score("good", 1.0, "bits", "minimize", None, 2, 8, 0.0, "0" * 64)


@dataclass
class Broken:
    """Returns a score, after doing something to the model; counts its calls."""

    score: Score = GOOD
    act: Callable[[nn.Module, int], object] = lambda model, call: None
    details: Callable[[int], dict[str, Any]] = lambda call: {}
    name: str = "broken"
    metrics: tuple[Metric, ...] = (Metric("good", "bits", "minimize"),)
    calls: int = 0

    def evaluate(self, subject: Subject) -> Evaluated:
        self.calls += 1
        self.act(subject.model, self.calls)
        return Evaluated((self.score,), self.details(self.calls))


def first_linear(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


BREACHES: dict[str, tuple[Broken, str]] = {
    "another metric": (Broken(replace(GOOD, metric="bad")), "metrics"),
    "another unit": (Broken(replace(GOOD, unit="nats")), "metrics"),
    "another direction": (Broken(replace(GOOD, direction="maximize")), "metrics"),
    "NaN": (Broken(replace(GOOD, value=math.nan)), "is nan"),
    "a negative error": (Broken(replace(GOOD, stderr=-0.1)), "standard error"),
    "a NaN error of two windows": (Broken(replace(GOOD, stderr=math.nan)), "NaN from many"),
    "no windows": (Broken(replace(GOOD, n_samples=0)), "no samples"),
    "no digest": (Broken(replace(GOOD, data_digest="")), "no data digest"),
    "details that differ": (Broken(details=lambda call: {"call": call}), "then"),
    "details that are no JSON": (Broken(details=lambda call: {"ids": (1, 2)}), "JSON"),
    "a changed weight": (
        Broken(act=lambda model, call: next(model.parameters()).data.add_(1)),
        "changed",
    ),
    "evaluation mode": (Broken(act=lambda model, call: model.eval()), "training flags"),
    "gradients off": (
        Broken(act=lambda model, call: model.requires_grad_(False)),
        "gradient flags",
    ),
    "a hook": (
        Broken(act=lambda model, call: first_linear(model).register_forward_hook(lambda *_: None)),
        "hooks",
    ),
    "a random number": (Broken(act=lambda model, call: torch.rand(1)), "random state"),
    "another forward": (
        Broken(act=lambda model, call: setattr(first_linear(model), "forward", call)),
        "forward functions",
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_the_contract_notices(name: str) -> None:
    broken, message = BREACHES[name]
    with pytest.raises((AssertionError, ValueError), match=message):
        check_evaluator(broken, Subject(tiny_model("llama")))


def test_the_contract_passes_an_evaluator_that_keeps_it() -> None:
    model = tiny_model("llama")
    check_evaluator(Broken(), Subject(model))
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("direction", "worse"), [("minimize", 2.0), ("maximize", 0.5)])
def test_worse_follows_the_direction(direction: Any, worse: float) -> None:
    values = {"fine": 1.0, "coarse": worse}

    @dataclass(frozen=True)
    class Table:
        name: str = "table"
        metrics: tuple[Metric, ...] = (Metric("good", "bits", direction),)

        def evaluate(self, subject: Subject) -> Evaluated:
            value = values[str(subject.model)]
            return Evaluated((replace(GOOD, value=value, direction=direction),))

    fine, coarse = (Subject(name) for name in values)  # type: ignore[arg-type]
    check_worse(Table(), fine, coarse, ("good",))
    with pytest.raises(AssertionError, match="good"):
        check_worse(Table(), coarse, fine, ("good",))
    with pytest.raises(AssertionError, match="has no"):
        check_worse(Table(), fine, coarse, ("kl",))
