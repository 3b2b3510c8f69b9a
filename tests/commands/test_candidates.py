"""A search among checkpoints that exist already, and what it leaves to be loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from alphaquant.commands.evaluate import evaluate
from alphaquant.commands.quantize import quantize
from alphaquant.commands.search import plan_search, search
from alphaquant.errors import AlphaQuantError, BudgetError, ConfigError
from alphaquant.models.quantized.foreign_files import open_foreign
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.mixed.loader import load_mixed_precision
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.runtime.modules import PackedLinear
from alphaquant.spaces.config import load_config, resolve
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.specs.quantize import QuantizeSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.result import SearchResult
from alphaquant.testing.checkpoints import save_tiny
from alphaquant.testing.foreign.encoders import awq, fp8, gptq, save_foreign

LAYOUTS = {
    "gptq": gptq(4, 32),
    "gptq2": gptq(2, 32, symmetric=False),
    "awq": awq(32),
    "fp8": fp8("row", torch.bfloat16),
}
BUDGET = "4bits"


class Mixed(NamedTuple):
    """A search among candidates with its specification and the folder of the checkpoints."""

    result: SearchResult
    spec: SearchSpec
    root: Path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Path]) -> Mixed:
    root = tmp_path_factory.mktemp("candidates")
    base = save_tiny(root / "base", intermediate_size=64, hidden_size=64)
    for name, layout in LAYOUTS.items():
        # gptq2 has experts only: the rest of it is the original's.
        wanted: Callable[[str], bool] = (
            (lambda m: "experts" in m) if name == "gptq2" else (lambda m: True)
        )
        save_foreign(base, root / name, layout, wanted)
    spec = SearchSpec.of(
        model=str(base),
        budget=BUDGET,
        candidates=",".join(str(root / name) for name in LAYOUTS),
        calibration=str(texts["calibration"]),
        evaluation=str(texts["search"]),
        heldout=str(texts["heldout"]),
        calibration_samples=4,
        evaluation_samples=4,
        heldout_samples=4,
        seq_len=24,
        trials=5,
        out=root / "out",
        cache=root / "cache",
    )
    return Mixed(search(spec), spec, root)


def changed(spec: SearchSpec, **limits: Any) -> SearchSpec:
    return replace(spec, limits=replace(spec.limits, **limits))


def test_the_menu_is_what_candidates_have_and_the_original(mixed: Mixed) -> None:
    menu = {"bf16", "int4-g32", "int2-g32-asym", "int4-g32-asym", "fp8-e4m3-row"}
    assert set(mixed.result.space.menu) == menu
    held = mixed.result.space.held
    assert held is not None
    assert held["model.layers.0.self_attn.q_proj"].keys() == menu - {"int2-g32-asym"}


def test_trials_give_matrices_formats_that_candidates_have(mixed: Mixed) -> None:
    result, held = mixed.result, mixed.result.space.held
    assert held is not None
    for row in result.rows:
        formats = result.folder.load_assignment(row.digest).formats
        assert all(fmt in held[name] for name, fmt in formats.items())


def test_candidates_as_they_are_are_trials_where_they_fit(mixed: Mixed) -> None:
    """All are above 4 bits, gptq2 with the original's attention too, and within 9 bits."""
    loose = changed(mixed.spec, budget="9bits")
    loose = replace(loose, run=replace(loose.run, out=mixed.root / "loose", trials=7))
    rows = search(loose).rows
    found = [row for row in rows if row.origin.startswith("candidate:")]
    assert [Path(row.origin).name for row in found] == list(LAYOUTS)
    assert not any(row.origin.startswith("candidate:") for row in mixed.result.rows)
    by_name = {Path(row.origin).name: row for row in found}
    # Experts with 2.5625 bits (2, a scale and a zero point for 32) beside attention with 16.
    inventory = mixed.result.space.inventory
    experts = sum(m.n_weights for m in inventory.matrices if m.kind == "expert")
    others = inventory.n_weights - experts
    mean = (2.5625 * experts + 16 * others) / inventory.n_weights
    assert by_name["gptq2"].bits_per_weight == pytest.approx(mean)


def test_the_best_mix_loads_with_the_weights_that_were_measured(mixed: Mixed) -> None:
    """The file names a candidate for every matrix that is not the original's."""
    folder, inventory = mixed.result.folder.path, mixed.result.space.inventory
    config = MixedPrecisionConfig.from_yaml(folder / "best.yaml")
    model, statistics = load_mixed_precision(config, dtype="float32")
    formats = mixed.result.published.formats
    taken = {name for name, fmt in formats.items() if fmt != "bf16"}
    assert statistics["loaded"] == statistics["total"] == len(taken)
    assert {name.removesuffix(".weight") for name in config.weight_mapping} == taken
    for name in taken:
        linear = model.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        assert linear.format.name == formats[name]
        source = open_foreign(config.sources[config.weight_mapping[f"{name}.weight"]])
        right = source.read(source.find(inventory.by_name[name])).dequantize()
        assert torch.equal(linear.dequantized(torch.float32), right)


def test_the_loaded_mix_is_as_far_from_the_original_as_the_search_says(mixed: Mixed) -> None:
    row = mixed.result.gate.published_row
    spec = EvaluateSpec(
        model=str(mixed.result.folder.path / "best.yaml"),
        reference=mixed.spec.checkpoint.model,
        data=str(mixed.spec.texts.heldout),
        samples=4,
        seq_len=24,
        tasks="kl",
        dtype="float32",
    )
    kl = {score.metric: score.value for score in evaluate(spec).scores}["kl"]
    assert kl == pytest.approx(row.kl, rel=1e-4)


def quantize_spec(mixed: Mixed, out: Path, cache: Path) -> QuantizeSpec:
    return QuantizeSpec(
        model=mixed.spec.checkpoint.model,
        config=mixed.result.folder.path / "best.json",
        out=out,
        cache=cache,
    )


def test_a_packed_checkpoint_of_the_mix_has_its_bits_and_its_numbers(
    mixed: Mixed, tmp_path: Path
) -> None:
    made = quantize(quantize_spec(mixed, tmp_path / "packed", mixed.root / "cache"))
    inventory = mixed.result.space.inventory
    assert 8 * made.quantized_bytes == mixed.result.published.storage_bits(inventory)
    model = load(tmp_path / "packed", kernels=False)
    other, _ = load_mixed_precision(mixed.result.folder.path / "best.yaml", dtype="float32")
    name = next(n for n, fmt in mixed.result.published.formats.items() if fmt != "bf16")
    one, two = model.get_submodule(name), other.get_submodule(name)
    assert isinstance(one, PackedLinear) and isinstance(two, PackedLinear)
    assert torch.equal(one.dequantized(torch.float32), two.dequantized(torch.float32))


def test_a_mix_without_its_bank_is_not_quantized_in_another_way(
    mixed: Mixed, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is a mix of candidates, and their matrices are not in"):
        quantize(quantize_spec(mixed, tmp_path / "packed", tmp_path / "cache"))


def test_configurations_say_which_candidates_they_are_of(mixed: Mixed) -> None:
    config = load_config(mixed.result.folder.path / "best.json")
    assert config.summary is not None
    stated = config.summary["candidates"]
    assert stated["directories"] == [str(mixed.root / name) for name in LAYOUTS]
    plan = resolve(config, mixed.result.space.inventory, strict=True)
    assert plan.assignment == mixed.result.published


def test_the_same_search_again_measures_nothing(mixed: Mixed) -> None:
    again = search(mixed.spec)
    assert [row.digest for row in again.rows] == [row.digest for row in mixed.result.rows]
    assert again.n_passes == 0


def test_the_plan_counts_what_candidates_have(mixed: Mixed) -> None:
    assert plan_search(mixed.spec).stages


@pytest.mark.parametrize(
    ("limits", "error", "said"),
    [
        ({"formats": "int4-g128"}, ConfigError, "candidates have formats of their own"),
        ({"budget": "2bits"}, BudgetError, "cannot be reached; the formats at hand reach from"),
    ],
)
def test_what_cannot_be_searched_is_told(
    mixed: Mixed, limits: dict[str, Any], error: type[AlphaQuantError], said: str
) -> None:
    with pytest.raises(error, match=said):
        plan_search(changed(mixed.spec, **limits))


def test_a_short_bank_is_refused(mixed: Mixed) -> None:
    short = replace(mixed.spec, proposals=replace(mixed.spec.proposals, bank="short"))
    with pytest.raises(ConfigError, match="--bank short.*leave one of the two out"):
        plan_search(short)
