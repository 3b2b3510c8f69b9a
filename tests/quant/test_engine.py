"""Settings of the engine: one check for options, files and callers."""

from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphaquant.errors import ConfigError
from alphaquant.models.mapping import map_model
from alphaquant.quant import engine, factor
from alphaquant.quant.columns.column_loops import NumbaLoops
from alphaquant.quant.layerwise import quantize_layers
from alphaquant.quant.place import Place
from alphaquant.quant.stacks import QuantizedMatrix, Stacks
from alphaquant.spaces.assignment import Assignment, uniform_assignment
from alphaquant.spaces.units import Inventory
from alphaquant.specs.quantizer import QuantSettings
from alphaquant.testing.models import tiny_model, tiny_tokens


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("method", "awq", "method is 'awq' .*; use gptq or rtn"),
        ("method", 3, "method is 3 .*; use gptq or rtn"),
        ("scale_search", "best", "scale_search is 'best' .*; use minmax or mse or hessian"),
        ("percdamp", -0.01, "percdamp is -0.01; must be >= 0"),
        ("percdamp", float("nan"), "percdamp is nan"),
        ("percdamp", float("inf"), "percdamp is inf"),
        ("percdamp", "0.1", "percdamp is '0.1'"),
        ("percdamp", True, "percdamp is True"),
        ("blocksize", 0, "blocksize is 0; must be >= 1"),
        ("blocksize", 1.5, "blocksize is 1.5"),
        ("route_exponent", 3, "route_exponent is 3; must be <= 2"),
        ("route_exponent", -1, "route_exponent is -1"),
        ("route_exponent", True, "route_exponent is True"),
        ("pooled_tokens", -1, "pooled_tokens is -1; must be >= 0"),
        ("refine_sweeps", -1, "refine_sweeps is -1; must be >= 0"),
        ("actorder", 1, "actorder is 1 .*; give bool"),
        ("static_groups", "yes", "static_groups is 'yes'"),
        ("sequential", 0, "sequential is 0"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantSettings(**{field: value})
    with pytest.raises(ConfigError, match=words):
        replace(QuantSettings(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("percdamp", 0),
        ("percdamp", 1),
        ("percdamp", 0.0),
        ("blocksize", 1),
        ("route_exponent", 0),
        ("route_exponent", 2),
        ("pooled_tokens", 0),
        ("refine_sweeps", 0),
        ("scale_search", "minmax"),
        ("actorder", True),
    ],
)
def test_the_ends_of_the_ranges_are_possible(field: str, value: Any) -> None:
    assert getattr(QuantSettings(**{field: value}), field) == value


def test_every_setting_is_checked() -> None:
    for field in fields(QuantSettings):
        with pytest.raises(ConfigError, match=f"{field.name} is "):
            QuantSettings(**{field.name: object()})  # type: ignore[arg-type]


def test_rows_that_are_rounded_apart_have_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows are rounded together, and by how many threads, is speed only."""
    model_map = map_model(tiny_model("olmoe"))
    assignment = uniform_assignment(model_map.inventory, "int3-g32-asym")

    def codes() -> list[Tensor]:
        layers = quantize_layers(model_map, assignment, QuantSettings(), tiny_tokens(4, 16))
        return [item.packed.dequantize() for done in layers for item in done.items]

    whole = codes()
    monkeypatch.setattr(engine, "_ROWS", 7)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, codes(), strict=True))
    n_threads = torch.get_num_threads()
    monkeypatch.undo()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(whole, codes(), strict=True))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(n_threads)


class Together(Place):
    """Three stacks at a time, as on a GPU with little memory."""

    def n_together(self, n_rows: int, n_cols: int) -> int:
        return 3


def together(device: torch.device) -> Place:
    return Together(torch.device("cpu"), NumbaLoops(), is_batched=True)


def mixed(inventory: Inventory, names: tuple[str, ...]) -> Assignment:
    """Formats in turns, so that neighbours, and gate and up of an expert, differ."""
    matrices = enumerate(inventory.matrices)
    return Assignment({m.name: names[(i + i // 5) % len(names)] for i, m in matrices})


@pytest.mark.parametrize("settings", [QuantSettings(), QuantSettings(method="rtn")])
@pytest.mark.parametrize("pooled_tokens", [0, 512])
def test_stacks_that_are_rounded_together_have_the_same_codes_and_records(
    settings: QuantSettings, pooled_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does with experts, one of which saw no token unless they are pooled."""
    model_map = map_model(tiny_model("olmoe"))
    assignment = mixed(model_map.inventory, ("int3-g32-asym", "nvfp4", "bf16", "int4-g16"))
    settings = replace(settings, pooled_tokens=pooled_tokens)

    def quantized() -> dict[str, QuantizedMatrix]:
        layers = quantize_layers(model_map, assignment, settings, tiny_tokens(1, 5))
        return {item.matrix.name: item for done in layers for item in done.items}

    alone = quantized()
    monkeypatch.setattr(engine, "place_of", together)
    found = quantized()
    assert list(found) == list(alone) and len(alone) > 30
    for name, item in alone.items():
        wanted, made = asdict(item.record), asdict(found[name].record)
        floats = {key for key, value in wanted.items() if isinstance(value, float)}
        assert {k: made[k] for k in wanted.keys() - floats} == {
            k: wanted[k] for k in wanted.keys() - floats
        }
        for key in floats:
            assert made[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-9), (name, key)
        tensors = found[name].packed.tensors
        for key, tensor in item.packed.tensors.items():
            assert torch.equal(tensors[key].view(torch.uint8), tensor.view(torch.uint8)), name
    methods = {item.record.fallback for item in alone.values()}
    expected = {None} if pooled_tokens or settings.method == "rtn" else {None, "no_tokens"}
    assert methods == expected


def test_two_starts_are_at_most_the_error_of_either_in_every_matrix() -> None:
    model_map = map_model(tiny_model("qwen2_moe"))
    assignment = uniform_assignment(model_map.inventory, "int3-g32")

    def errors(**changes: Any) -> dict[str, float]:
        settings = QuantSettings(pooled_tokens=0, percdamp=0.001, shrinkage=False, **changes)
        layers = quantize_layers(model_map, assignment, settings, tiny_tokens(8, 16))
        records = [item.record for done in layers for item in done.items]
        return {r.matrix: r.output_error for r in records if r.output_error is not None}

    both, natural = errors(), errors(n_starts=1)
    ordered = errors(n_starts=1, actorder=True)
    assert both.keys() == natural.keys() and len(both) > 40
    assert sum(both.values()) < 0.98 * min(sum(natural.values()), sum(ordered.values()))
    # The damped objective is compared, row by row; the recorded error is that without damping.
    assert all(both[k] <= 1.05 * min(natural[k], ordered[k]) for k in both)
    assert errors(actorder=True) == pytest.approx(both, rel=1e-3)


def test_the_energy_of_outputs_is_right_to_three_digits_where_it_is_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 2048, generator=generator) * torch.linspace(0.1, 2, 2048)
    weights = 0.02 * torch.randn(1, 4, 2048, generator=generator)
    stacks = SimpleNamespace(weights=weights, hessian=(inputs.T @ inputs)[None])
    exact = (inputs @ weights[0].T).square().sum(0)
    for is_fast in (False, True):
        monkeypatch.setattr(factor, "multiplies_bfloat16", lambda is_fast=is_fast: is_fast)
        found: Tensor = Stacks.signals.func(stacks)
        torch.testing.assert_close(found[0], exact, rtol=2e-3, atol=0.0)
