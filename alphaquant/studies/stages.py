"""The stages of a search before its study: load, teacher, bank, costs.

Each returns plain data for the next. What is expensive is kept in the cache and found again by
digest, so a stage that ran before costs a read.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alphaquant.evaluators.data import TokenSet, check_disjoint
from alphaquant.evaluators.divergence import store_teacher
from alphaquant.evaluators.sensitivity import (
    CostSettings,
    CostTable,
    UnitCosts,
    measure_costs,
    unit_costs,
)
from alphaquant.quant.bank import Bank, bank_key, fill_bank, open_bank
from alphaquant.quant.provenance import versions
from alphaquant.search.problem import Problem, make_problem
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.space import SearchSpace
from alphaquant.studies.objective import EvaluationSet
from alphaquant.studies.progress import StageClock
from alphaquant.studies.sources import Source, cache_dir, read_text
from alphaquant.studies.spec import REFERENCE_FORMATS, SearchSpec


@dataclass(frozen=True)
class Inputs:
    """A model with its three texts.

    Attributes:
        source: the model.
        calibration: for Hessians and costs.
        evaluation: what the search sees.
        heldout: for the gate.
    """

    source: Source
    calibration: TokenSet
    evaluation: TokenSet
    heldout: TokenSet

    def facts(self) -> dict[str, Any]:
        """Provenance of the model and the texts."""
        texts = (self.calibration, self.evaluation, self.heldout)
        return {**self.source.facts(), "data": {t.role: t.provenance() for t in texts}}

    def digests(self) -> dict[str, str]:
        """What trials depend on besides the specification: sha256 of weights and windows."""
        return {
            "weights": self.source.digest,
            "calibration_text": self.calibration.digest,
            "evaluation_text": self.evaluation.digest,
            "heldout_text": self.heldout.digest,
        }


@dataclass(frozen=True)
class Costs:
    """Costs of units in the formats of the bank.

    Attributes:
        table: per matrix, as measured.
        units: per unit of the space.
    """

    table: CostTable
    units: UnitCosts

    def predict_kl(self, space: SearchSpace, assignment: Assignment) -> float:
        """Sum of the Fisher costs of an assignment, nats per token."""
        column = {name: i for i, name in enumerate(self.table.formats)}
        chosen = [column[assignment.formats[u.matrices[0].name]] for u in space.units]
        return float(self.units.fisher[np.arange(len(chosen)), chosen].sum())


def load_inputs(spec: SearchSpec, source: Source) -> Inputs:
    """Read the three texts and check that they share nothing.

    Raises:
        DataError: a text cannot be found, is too short or overlaps with another.
    """
    data = spec.data
    texts = [
        read_text(source, text, role, n_samples, data.seq_len, spec.seed)
        for text, role, n_samples in (
            (data.calibration, "calibration", data.n_calibration),
            (data.evaluation, "search", data.n_evaluation),
            (data.heldout, "heldout", data.n_heldout),
        )
    ]
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            check_disjoint(a, b)
    return Inputs(source, *texts)


def store_teachers(
    spec: SearchSpec, inputs: Inputs, clock: StageClock
) -> tuple[EvaluationSet, ...]:
    """Predictions of the original on the evaluation and the held-out text, in this order.

    Both come before the first swap, which overwrites the original.
    """
    texts = (inputs.evaluation, inputs.heldout)
    total, done = sum(len(t.tokens) for t in texts), 0
    sets = []
    for tokens in texts:
        parts = (inputs.source.digest[:16], tokens.digest[:16], inputs.source.runs_as)
        path = cache_dir(spec.cache) / "teachers" / f"{'-'.join(parts)}.safetensors"
        clock("teacher", done, total)
        progress = clock.shifted(done, total)
        teacher = store_teacher(path, inputs.source.map.model, tokens.tokens, progress=progress)
        sets.append(EvaluationSet(tokens, teacher))
        done += len(tokens.tokens)
    clock("teacher", total, total)
    return tuple(sets)


def bank_formats(space: SearchSpace) -> tuple[str, ...]:
    """What the bank holds: the menu and the formats to compare with, by nominal bits."""
    names = {*space.menu, *REFERENCE_FORMATS}
    return tuple(sorted(names, key=lambda n: (parse_format(n).nominal_bits, n)))


def open_filled_bank(
    spec: SearchSpec, inputs: Inputs, names: tuple[str, ...], clock: StageClock
) -> Bank:
    """The bank of a search with every format in it.

    Raises:
        StoreError: a file of it is damaged.
    """
    source, n_layers = inputs.source, len(inputs.source.map.layers)
    key = bank_key(source.digest, inputs.calibration.digest, spec.quant)
    facts = {
        **source.facts(),
        "calibration": inputs.calibration.provenance(),
        "settings": asdict(spec.quant),
        "versions": versions(),
    }
    clock("bank", 0, n_layers)
    bank = open_bank(cache_dir(spec.cache) / "banks", key, source.map.inventory, facts)
    fill_bank(bank, source.map, inputs.calibration.tokens, names, spec.quant, progress=clock)
    bank.verify(names)
    clock("bank", n_layers, n_layers)
    return bank


def measure_unit_costs(
    spec: SearchSpec, inputs: Inputs, space: SearchSpace, bank: Bank, clock: StageClock
) -> Costs:
    """Costs of every unit in every format of the bank."""
    source, n_layers = inputs.source, len(inputs.source.map.layers)
    clock("costs", 0, n_layers)
    table = measure_costs(
        source.map,
        bank,
        inputs.calibration.tokens,
        bank_formats(space),
        CostSettings(spec.seed, spec.n_draws),
        progress=clock,
    )
    clock("costs", n_layers, n_layers)
    return Costs(table, unit_costs(table, space.units))


def problem_of(space: SearchSpace, costs: Costs) -> Problem:
    """The allocation problem over the menu."""
    columns = [costs.table.formats.index(name) for name in space.menu]
    formats = [parse_format(name) for name in space.menu]
    return make_problem(
        space.units,
        space.menu,
        np.array([[u.storage_bits(f) for f in formats] for u in space.units], dtype=np.int64),
        np.array([[name in space.allowed(u) for name in space.menu] for u in space.units]),
        {"fisher": costs.units.fisher[:, columns], "error": costs.units.error[:, columns]},
        costs.units.n_tokens,
        space.inventory.n_layers,
    )
