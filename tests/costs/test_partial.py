"""Costs of a bank that holds some matrices in a format and not others."""

from pathlib import Path

import numpy as np
import pytest

from alphaquant.costs import fisher
from alphaquant.costs.fisher import CostSettings, measure_costs
from alphaquant.quant.bank import open_bank
from alphaquant.quant.filling import BankRequest, fill_bank
from alphaquant.spaces.units import Matrix
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.cost_cases import COST_FORMATS, COST_TOKENS, make_cost_case


def test_what_the_bank_lacks_has_no_cost_until_it_is_there(tmp_path: Path) -> None:
    whole = make_cost_case(tmp_path / "whole", "mixtral")
    expected = whole.costs()
    case = make_cost_case(tmp_path / "part", "mixtral")
    names = [matrix.name for matrix in case.map.inventory.matrices]
    held = frozenset(names[::3])
    bank = open_bank(tmp_path / "other", "key", case.map.inventory, {})

    def fill(wanted: frozenset[str]) -> None:
        fill_bank(
            bank,
            case.map,
            COST_TOKENS,
            BankRequest(
                COST_FORMATS,
                QuantSettings(method="rtn"),
                wanted=lambda matrix, name: name == COST_FORMATS[0] or matrix.name in wanted,
            ),
        )

    fill(held)
    part = measure_costs(case.map, bank, COST_TOKENS, COST_FORMATS, CostSettings())
    is_held = np.array([name in held for name in names])
    assert np.isnan(part.token_fisher[~is_held, 1]).all()
    assert np.isfinite(part.token_fisher[is_held]).all() and np.isfinite(part.error[:, 0]).all()
    fill(frozenset(names))
    found = measure_costs(case.map, bank, COST_TOKENS, COST_FORMATS, CostSettings())
    for name in ("products", "token_fisher", "error"):
        a, b = getattr(found, name), getattr(expected, name)
        assert np.allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()), name


def test_a_bank_that_has_grown_does_not_change_what_was_measured_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_cost_case(tmp_path / "case", "mixtral")  # its bank holds everything
    names = [matrix.name for matrix in case.map.inventory.matrices]
    listed = frozenset(names[::3])

    def wanted(matrix: Matrix, name: str) -> bool:
        return name == COST_FORMATS[0] or matrix.name in listed

    given = (case.map, case.bank, COST_TOKENS, COST_FORMATS, CostSettings())
    some = measure_costs(*given, wanted=wanted)
    assert np.isnan(some.token_fisher[names.index(names[1]), 1])
    measure_costs(*given)
    monkeypatch.setattr(fisher, "trace_layers", None)  # nothing is traced again
    again = measure_costs(*given, wanted=wanted)
    assert np.array_equal(again.products, some.products, equal_nan=True)
