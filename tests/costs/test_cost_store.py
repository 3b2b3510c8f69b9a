"""Files of costs: what is measured again and what is read, damage, and interruptions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from alphaquant.costs import fisher, output_error
from alphaquant.costs.fisher import CostSettings, CostTable, measure_costs
from alphaquant.errors import StoreError
from alphaquant.testing.cost_cases import (
    COST_FAMILIES,
    COST_FORMATS,
    COST_TOKENS,
    CostCase,
    make_cost_case,
)
from tests.damage import flip_a_bit, garble, truncate

ARRAYS = ("products", "token_fisher", "error", "n_tokens", "routing_weight")
ALL_FILES = [
    f"layer-00{layer}.{middle}safetensors"
    for layer in (0, 1)
    for middle in ("int3-g32-asym.", "int8-g32.", "")
]


@pytest.fixture
def case(tmp_path: Path) -> CostCase:
    """Mixtral, with a bank and weights that the test may break."""
    return make_cost_case(tmp_path, "mixtral")


def equal(a: CostTable, b: CostTable) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def names(case: CostCase) -> list[str]:
    return [file.name for file in case.stored()]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """Layers and formats that are measured, in order."""
    calls = []
    layer_costs = fisher.layer_costs

    def record(trace: Any, bank: Any, formats: tuple[str, ...], seed: int) -> Any:
        calls.append((trace.layer.index, tuple(formats)))
        return layer_costs(trace, bank, formats, seed)

    monkeypatch.setattr(fisher, "layer_costs", record)
    return calls


@pytest.mark.parametrize(
    ("lost", "expected", "n_walked"),
    [
        pytest.param(["layer-001.int8-g32"], [(1, COST_FORMATS[1:])], 1, id="last layer"),
        pytest.param(["layer-000.int8-g32"], [(0, COST_FORMATS[1:])], 2, id="first layer"),
        pytest.param(["layer-001"], [(1, ())], 1, id="what formats share"),
        pytest.param(
            ["layer-001.int3-g32-asym", "layer-001.int8-g32", "layer-000.int3-g32-asym"],
            [(1, COST_FORMATS), (0, COST_FORMATS[:1])],
            2,
            id="several",
        ),
    ],
)
def test_only_what_is_missing_is_measured_again(
    case: CostCase,
    measured: list[Any],
    lost: list[str],
    expected: list[Any],
    n_walked: int,
) -> None:
    first = case.costs()
    assert names(case) == ALL_FILES
    for name in lost:
        (case.stored()[0].parent / f"{name}.safetensors").unlink()
    measured.clear()
    steps = []
    again = measure_costs(
        case.map,
        case.bank,
        COST_TOKENS,
        COST_FORMATS,
        CostSettings(),
        progress=lambda *step: steps.append(step),
    )
    assert measured == expected
    assert steps == [*(("costs", done, 2) for done in range(n_walked)), ("costs", 2, 2)]
    for name in ARRAYS:  # a format alone is multiplied in another order
        found, before = getattr(again, name), getattr(first, name)
        assert np.allclose(found, before, rtol=1e-4, atol=1e-5 * np.abs(before).max()), name


def test_a_new_format_is_measured_alone_and_costs_the_same(
    case: CostCase, measured: list[Any], tmp_path: Path
) -> None:
    case.costs(formats=COST_FORMATS[1:])
    both = case.costs()
    assert measured == [(layer, (n,)) for n in COST_FORMATS[::-1] for layer in (1, 0)]
    assert names(case) == ALL_FILES
    together = make_cost_case(tmp_path / "together", "mixtral").costs()
    for name in ARRAYS:
        found, expected = getattr(both, name), getattr(together, name)
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()), name
    swapped = case.costs(formats=COST_FORMATS[::-1])
    assert swapped.formats == COST_FORMATS[::-1]
    assert np.array_equal(swapped.products, both.products[:, ::-1])
    assert np.array_equal(swapped.error, both.error[:, ::-1])


def test_a_complete_table_is_read_without_running_the_model(
    case: CostCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.costs()
    monkeypatch.delattr(fisher, "trace_layers")
    assert equal(first, case.costs())


def test_gemq_is_measured_beside_the_others_and_only_once(
    case: CostCase, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = case.costs()
    assert first.gemq is None
    measured.clear()
    both = case.costs(with_gemq=True)
    assert measured == [] and equal(first, both)
    assert both.gemq is not None and both.gemq.shape == first.error.shape
    assert len(case.stored()) == 2 * len(ALL_FILES)
    monkeypatch.delattr(fisher, "trace_layers")
    again = case.costs(with_gemq=True)
    assert again.gemq is not None and np.array_equal(both.gemq, again.gemq)
    assert case.costs().gemq is None


def test_other_tokens_and_settings_have_a_folder_of_their_own(case: CostCase) -> None:
    case.costs()
    case.costs(seed=1)
    case.costs(n_draws=2)
    case.costs(COST_TOKENS.flip(0))
    case.costs(COST_TOKENS.view(12, 5))
    case.costs(formats=COST_FORMATS[:1])  # another menu has not
    assert len(case.stored()) == 5 * len(ALL_FILES)
    assert len(list((case.bank.path / "costs").iterdir())) == 5


# Damage


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def drop_row(path: Path) -> None:
    save_file({name: tensor[1:] for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [truncate, garble, flip_a_bit, drop_tensor, drop_row])
@pytest.mark.parametrize("stem", ["layer-001", "layer-001.int8-g32"])
def test_a_damaged_file_is_a_store_error(
    case: CostCase, damage: Callable[[Path], None], stem: str
) -> None:
    case.costs()
    damage(case.stored()[0].parent / f"{stem}.safetensors")
    message = rf"{stem}\.safetensors is damaged .*delete .* and run the same"
    with pytest.raises(StoreError, match=message):
        case.costs()


# The model's weights


def weights_of(case: CostCase) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in case.map.model.state_dict().items()}


def assert_weights(case: CostCase, expected: dict[str, Tensor]) -> None:
    for name, tensor in case.map.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not any(p.requires_grad for p in case.map.model.parameters())


@pytest.mark.parametrize("family", COST_FAMILIES)
def test_measuring_leaves_the_weights_as_they_were(family: str, tmp_path: Path) -> None:
    case = make_cost_case(tmp_path, family)
    before = weights_of(case)
    case.costs(seed=11)
    assert_weights(case, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_measurement_leaves_the_model_as_it_was(
    case: CostCase, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = weights_of(case)
    states = []

    def interrupted(*args: Any) -> Tensor:
        states.append(weights_of(case))
        raise error

    monkeypatch.setattr(output_error, "linear", interrupted)
    with pytest.raises(error):
        case.costs()
    # It was interrupted while a linear gave what it would in another format.
    assert all(torch.equal(before[name], states[0][name]) for name in before)
    assert_weights(case, before)
    for module in case.map.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert case.stored() == []
    monkeypatch.undo()
    case.costs()
    assert names(case) == ALL_FILES


def test_a_measurement_that_was_killed_between_files_resumes(
    case: CostCase, monkeypatch: pytest.MonkeyPatch, measured: list[Any]
) -> None:
    file = fisher.CostStore.file

    def killed(store: Any, layer: int, format_name: str | None = None, *part: Any) -> Path:
        path = file(store, layer, format_name, *part)
        if format_name == COST_FORMATS[1] and path.with_name("layer-001.safetensors").exists():
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(fisher.CostStore, "file", killed)
        with pytest.raises(KeyboardInterrupt):
            case.costs()
    assert names(case) == ["layer-001.int3-g32-asym.safetensors", "layer-001.safetensors"]
    measured.clear()
    case.costs()
    assert measured == [(1, COST_FORMATS[1:]), (0, COST_FORMATS)]
