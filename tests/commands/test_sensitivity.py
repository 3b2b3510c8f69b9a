"""Expert sensitivity of a tiny model: repeatable, shared with a search, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphaquant.commands.sensitivity import (
    FoundSensitivity,
    measure_expert_sensitivity,
    sensitivity_json,
    sensitivity_text,
    write_sensitivity,
)
from alphaquant.errors import AlphaQuantError, ConfigError, DataError, FormatError, ModelError
from alphaquant.progress import StageClock, no_progress
from alphaquant.specs.flat import replaced
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.studies.costing import measure_unit_costs, open_filled_bank
from alphaquant.studies.inputs import load_source
from alphaquant.studies.stages import load_inputs
from alphaquant.testing.checkpoints import save_tiny


@pytest.fixture(scope="module")
def spec(
    tiny: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> SensitivitySpec:
    """The tiny model, which has two layers of four experts, two per token."""
    return SensitivitySpec.of(
        format="int3-g32",
        model=str(tiny),
        calibration=str(texts["calibration"]),
        calibration_samples=6,
        seq_len=32,
        cache=tmp_path_factory.mktemp("sensitivity-cache"),
    )


@pytest.fixture(scope="module")
def found(spec: SensitivitySpec) -> FoundSensitivity:
    return measure_expert_sensitivity(spec)


def test_all_experts_are_ranked(found: FoundSensitivity) -> None:
    experts = found.sensitivity.experts
    assert {(e.layer, e.expert) for e in experts} == {(n, e) for n in range(2) for e in range(4)}
    costs = [e.cost_per_bit for e in experts]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0
    assert found.sensitivity.total.n_tokens == 2 * 2 * 6 * 32


def test_the_same_specification_gives_the_same_bytes(
    spec: SensitivitySpec, found: FoundSensitivity, tmp_path: Path
) -> None:
    write_sensitivity(found, tmp_path / "a.json")
    write_sensitivity(measure_expert_sensitivity(spec), tmp_path / "b.json")
    anew = measure_expert_sensitivity(replaced(spec, cache=tmp_path / "cache"))
    write_sensitivity(anew, tmp_path / "c.json")
    first = (tmp_path / "a.json").read_bytes()
    assert first == (tmp_path / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes()


def test_another_seed_draws_other_labels(spec: SensitivitySpec, found: FoundSensitivity) -> None:
    other = measure_expert_sensitivity(replaced(spec, seed=1))
    assert other.sensitivity.total.fisher != found.sensitivity.total.fisher


def test_json_carries_digests_seed_and_versions(
    spec: SensitivitySpec, found: FoundSensitivity
) -> None:
    content = json.loads(json.dumps(sensitivity_json(found), allow_nan=False))
    assert content["model"] == spec.checkpoint.model
    assert content["model_digest"] == found.source.digest
    assert content["calibration"]["digest"] == found.calibration.digest
    assert 0.0 < content["imbalance"] == found.imbalance
    assert content["calibration"]["seed"] == content["settings"]["seed"] == 0
    assert content["versions"]["torch"]
    assert (content["format"], content["against"]) == ("int3-g32", "bf16")
    assert len(content["experts"]) == content["total"]["n_experts"] == 8
    assert sum(t["saved_bits"] for t in content["layers"]) == content["total"]["saved_bits"]
    assert "cache" not in content["settings"]


def test_text_shows_both_ends_and_no_expert_twice(found: FoundSensitivity) -> None:
    lines = sensitivity_text(found).splitlines()
    assert [line.split()[0] for line in lines[2:-2]] == [str(n) for n in range(1, 9)]
    experts = found.sensitivity.experts
    many = replace(found.sensitivity, experts=experts + tuple(_renamed(e) for e in experts))
    text = sensitivity_text(replace(found, sensitivity=many))
    ranks = [line.split()[0] for line in text.splitlines()[2:-2]]
    assert ranks == [str(n) for n in (*range(1, 6), *range(12, 17))]
    assert found.calibration.digest[:12] in lines[-1]
    assert f"imbalance of experts {found.imbalance:.4f}" in lines[-1]
    narrow = sensitivity_text(found, 50).splitlines()
    assert all(len(line) <= 50 or str(found.spec.text.calibration) in line for line in narrow)
    assert any("fragility" in line for line in narrow)


def _renamed(expert: Any) -> Any:
    return replace(expert, name=f"{expert.name}.other", fragility=None, use=0.0)


def test_an_expert_without_tokens_is_called_unseen(found: FoundSensitivity) -> None:
    experts = tuple(_renamed(e) for e in found.sensitivity.experts)
    text = sensitivity_text(
        replace(found, sensitivity=replace(found.sensitivity, experts=experts))
    )
    assert text.count("unseen") == 8


def test_a_search_reads_what_was_measured(
    spec: SensitivitySpec, found: FoundSensitivity, texts: dict[str, Path], make_spec: Any
) -> None:
    search = make_spec(Path("unused"), calibration_samples=6, seq_len=32, cache=spec.cache)
    inputs = load_inputs(search, load_source(spec.checkpoint.model, "cpu", "auto"))
    before = _written(found)
    stages: list[str] = []
    clock = StageClock(lambda stage, done, total: stages.append(stage))
    bank = open_filled_bank(search, inputs, ("int3-g32",), clock)
    assert bank.path == found.bank.path
    assert "hessians" not in stages  # nothing was quantized
    space: Any = _Space(inputs.source.map.inventory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alphaquant.studies.costing.bank_formats", lambda space: ("int3-g32",))
        costs = measure_unit_costs(search, inputs, space, bank, StageClock(no_progress))
    assert costs.table.formats == ("int3-g32",)
    assert _written(found) == before


class _Space:
    """Units of a search space: none are needed."""

    def __init__(self, inventory: Any) -> None:
        from alphaquant.spaces.profiles import find_profile, units_of

        self.units = units_of(inventory, find_profile("any"))


def _written(found: FoundSensitivity) -> dict[Path, int]:
    """Files of the bank and when they were written."""
    return {p: p.stat().st_mtime_ns for p in found.bank.path.rglob("*") if p.is_file()}


def test_a_quantized_reference_is_measured_too(spec: SensitivitySpec) -> None:
    found = measure_expert_sensitivity(replaced(spec, against="int8-g32")).sensitivity
    assert found.against == "int8-g32"
    assert all(e.added_fisher != e.fisher for e in found.experts)
    assert found.experts[0].added_fisher > 0.9 * found.experts[0].fisher


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format": "int9"}, FormatError, "int9"),
        ({"format": "bf16"}, ConfigError, "keeps the weights"),
        ({"against": "int2-g32"}, ConfigError, "no fewer bits"),
        ({"model": "/nowhere"}, ModelError, "/nowhere"),
        ({"calibration": "nothing.txt"}, DataError, "nothing.txt"),
        ({"calibration_samples": 100_000}, DataError, "too short"),
        ({"device": "quantum"}, ModelError, "quantum"),
    ],
)
def test_bad_input_is_refused(
    changes: dict[str, Any], error: type[AlphaQuantError], words: str, spec: SensitivitySpec
) -> None:
    with pytest.raises(error, match=words):
        measure_expert_sensitivity(replaced(spec, **changes))


def test_what_cannot_be_compared_is_refused_before_the_long_work(
    spec: SensitivitySpec, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    dense = str(save_tiny(tmp_path / "dense", "llama"))
    with pytest.raises(ModelError, match="no routed experts"):
        measure_expert_sensitivity(replaced(spec, model=dense, cache=cache))
    with pytest.raises(ConfigError, match="no fewer bits"):
        measure_expert_sensitivity(replaced(spec, against="int2-g32", cache=cache))
    assert not (cache / "banks").exists()
