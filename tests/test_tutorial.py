"""The tutorial runs as it is written, and does what it says."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alphaquant import demo
from alphaquant.commands.api import Study
from alphaquant.spaces.formats import parse_format

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.fixture(scope="module", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def ran(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """The names that all blocks leave, with `here`, the folder that they ran in.

    With the model of every search test in the demo's place, which takes a tenth of the time.
    """
    here = tmp_path_factory.mktemp("tutorial")
    names: dict[str, Any] = {"here": here}
    model = tiny if request.param == "tiny" else demo.model_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(demo, "model_path", lambda: model)
        for block in re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.M | re.S):
            exec(compile(block, str(TUTORIAL), "exec"), names)
    return names


def test_the_front_is_a_table_of_points_that_beat_uniform(ran: dict[str, Any]) -> None:
    front = ran["front"]
    assert isinstance(front, pd.DataFrame)
    assert front.is_best.sum() == 1
    compared = front.dropna(subset=["uniform_kl"])
    assert len(compared) and (compared.kl <= compared.uniform_kl).all()
    points = zip(front.bits_per_weight, front.kl, strict=True)
    assert ran["smallest"] == min(bits for bits, kl in points if kl < 0.1)
    assert ran["within"].bits_per_weight.max() <= 3.25
    assert all((ran["here"] / path).is_file() for path in front.config)


def test_the_checkpoint_is_the_winner_and_has_its_size(ran: dict[str, Any]) -> None:
    study: Study = ran["study"]
    counts = study.result.counts
    made = (ran["made"].quantized_bytes, ran["made"].checkpoint_bytes)
    assert made == (counts.quantized_bytes, counts.checkpoint_bytes)
    assert sum(ran["formats"].values()) == len(study.result.space.inventory.matrices)
    assert {parse_format(name).name for name in ran["formats"]} <= set(study.result.space.menu)


def test_the_measured_kl_is_that_of_the_held_out_comparison_in_size(ran: dict[str, Any]) -> None:
    best = ran["front"][ran["front"].is_best].iloc[0]
    assert ran["scores"]["kl"].value == pytest.approx(best.kl, rel=0.5)  # other windows


def test_a_second_search_reuses_what_the_first_one_made(ran: dict[str, Any]) -> None:
    first, second = ran["study"].result, ran["smaller"].result
    assert first.provenance.bank == second.provenance.bank
    assert second.limit < first.limit
    seconds = {name: s.seconds for name, s in (("first", first), ("second", second))}
    stages = ("hessians", "bank")
    assert sum(seconds["second"].get(s, 0.0) for s in stages) < sum(
        seconds["first"].get(s, 0.0) for s in stages
    )


def test_a_notebook_shows_the_front(ran: dict[str, Any]) -> None:
    shown = ran["study"]._repr_html_()
    assert all(f"<th>{name}</th>" in shown for name in ran["front"].index)
    assert "best.json" in shown and "held-out KL" in shown
