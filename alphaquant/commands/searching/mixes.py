"""The results of a search among candidates as `mixed_precision` files.

Beside every configuration `NAME.json` stands `NAME.yaml`: which matrix comes from which candidate.
`alphaquant.load_mixed_precision` and `aq-eval --model` load it. Matrices in bf16 are the original
model's, so they are not named; a result of bf16 alone has no file.
"""

from pathlib import Path

from alphaquant.quant.foreign.candidates import ORIGINAL
from alphaquant.reports.front import config_name
from alphaquant.reports.report import assignment_of
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.spaces.assignment import Assignment
from alphaquant.studies.result import SearchResult


def write_mixes(result: SearchResult, base: Path | None) -> None:
    """Write a file for every published point, and `best.yaml`; older ones are removed.

    Args:
        result: of a search among candidates.
        base: directory of the original model; None where it is on the hub only.
    """
    folder = result.folder
    for old in (folder.path / "configs").glob("*.yaml"):
        old.unlink()
    for row in result.gate.points:
        text = _mix(result, assignment_of(result, row), base)
        if text is None:
            continue
        folder.write_text(str(Path(config_name(row)).with_suffix(".yaml")), text)
        if result.gate.is_best(row):
            folder.write_text("best.yaml", text)


def _mix(result: SearchResult, assignment: Assignment, base: Path | None) -> str | None:
    """The file of an assignment; None where every matrix is the original's."""
    held, names = result.space.held, {}
    assert held is not None, "the search was among candidates"
    for number, directory in enumerate(result.spec.limits.candidate_names, 1):
        names[directory] = f"candidate_{number}"
    places = {name: held[name][fmt] for name, fmt in assignment.formats.items()}
    mapping = {
        f"{name}.weight": names[place] for name, place in places.items() if place != ORIGINAL
    }
    if base is None or not mapping:
        return None
    used = {place for place in places.values() if place != ORIGINAL}
    sources = {names[place]: Path(place).absolute() for place in names if place in used}
    return MixedPrecisionConfig(base.absolute(), sources, mapping).to_yaml()
