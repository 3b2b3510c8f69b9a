"""Expert sensitivity of a model: load, bank, costs, table; nothing is searched.

Bank and costs are those of a search with the same calibration text and settings, in the same
cache: what one measured, the other reads. The written JSON holds no times, so the same
specification on the same device gives the same bytes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphaquant.errors import StoreError
from alphaquant.evaluators.data import TokenSet, check_sources
from alphaquant.evaluators.expert_sensitivity import (
    ExpertSensitivity,
    SensitiveExpert,
    expert_sensitivity,
    expert_units,
    measured_formats,
    saved_bits,
)
from alphaquant.evaluators.sensitivity import CostSettings, measure_costs
from alphaquant.quant.bank import Bank, Progress
from alphaquant.quant.engine import QuantSettings
from alphaquant.quant.files import whole_file
from alphaquant.quant.loading import named_dtype
from alphaquant.quant.provenance import device_facts, versions
from alphaquant.studies.field_types import check_kind, check_least, check_types
from alphaquant.studies.folder import check_place
from alphaquant.studies.progress import no_progress
from alphaquant.studies.sources import Source, cache_dir, find_device, load_source, read_text
from alphaquant.studies.spec import DataSpec
from alphaquant.studies.stages import fill_source_bank
from alphaquant.studies.tables import aligned

N_SHOWN = 5
"""Experts at either end of the printed table."""


@dataclass(frozen=True)
class SensitivitySpec:
    """What is asked.

    Attributes:
        format: that experts are quantized to.
        model: `demo`, a local directory or a hub id.
        against: format that bits and costs are compared with; bf16 is the original.
        calibration: text for Hessians and costs.
        n_calibration: windows of it.
        seq_len: tokens per window; None as in `DataSpec`.
        bos: what windows start with, as in `DataSpec`.
        seed: of windows and drawn labels.
        n_draws: labels drawn per position.
        quant: how matrices are quantized.
        cache: directory of banks, shared with searches.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the computation.
    """

    format: str
    model: str = "demo"
    against: str = "bf16"
    calibration: str = DataSpec.calibration
    n_calibration: int = DataSpec.n_calibration
    seq_len: int | None = None
    bos: str = "auto"
    seed: int = 0
    n_draws: int = 1
    quant: QuantSettings = QuantSettings()
    cache: Path | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values of the wrong type and numbers that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check_types(self)
        for name, least in (("n_calibration", 1), ("seq_len", 2), ("seed", 0), ("n_draws", 1)):
            check_least(name, getattr(self, name), least)

    def facts(self) -> dict[str, Any]:
        """What decides the numbers, ready for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "cache"}


@dataclass(frozen=True)
class FoundSensitivity:
    """What was measured.

    Attributes:
        spec: what was asked.
        source: the model, with its original weights.
        calibration: the windows.
        bank: every matrix in the format.
        sensitivity: the table.
    """

    spec: SensitivitySpec
    source: Source
    calibration: TokenSet
    bank: Bank
    sensitivity: ExpertSensitivity


def measure_expert_sensitivity(
    spec: SensitivitySpec, *, progress: Progress = no_progress
) -> FoundSensitivity:
    """Measure, or read from the cache, how sensitive the routed experts of a model are.

    Args:
        spec: what to measure.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    check_kind(spec, SensitivitySpec, "measure_expert_sensitivity")
    names = measured_formats(spec.format, spec.against)
    check_sources({"calibration": spec.calibration}, spec.bos)
    if spec.dtype != "auto":
        named_dtype(spec.dtype)
    check_place(cache_dir(spec.cache), "--cache")
    progress("load", 0, 1)
    source = load_source(spec.model, find_device(spec.device), spec.dtype)
    # A dense model, and formats that save nothing, are refused before the long work.
    saved_bits(expert_units(source.map.inventory), spec.format, spec.against)
    calibration = read_text(
        source,
        spec.calibration,
        "calibration",
        spec.n_calibration,
        spec.seq_len,
        spec.seed,
        spec.bos,
    )
    progress("load", 1, 1)
    bank = fill_source_bank(source, calibration, names, spec.quant, spec.cache, progress)
    settings = CostSettings(spec.seed, spec.n_draws)
    table = measure_costs(source.map, bank, calibration.tokens, names, settings, progress=progress)
    found = expert_sensitivity(table, source.map.inventory, spec.format, spec.against)
    return FoundSensitivity(spec, source, calibration, bank, found)


def sensitivity_text(found: FoundSensitivity) -> str:
    """The most and the least sensitive experts and the totals, for people."""
    experts, total = found.sensitivity.experts, found.sensitivity.total
    shown = list(dict.fromkeys([*experts[:N_SHOWN], *experts[-N_SHOWN:]]))
    n_samples, seq_len = found.calibration.tokens.shape
    lines = [
        f"{total.n_experts} experts in {found.sensitivity.format} against "
        f"{found.sensitivity.against}, cost per bit in nats/token per bit/weight",
        aligned(_HEAD, [_cells(experts.index(e) + 1, e) for e in shown]),
        f"sum over experts: Fisher cost {total.fisher:.6f} nats/token, "
        f"{total.saved_bits} bits saved",
        f"{n_samples} windows of {seq_len} tokens of {found.calibration.name}, "
        f"digest {found.calibration.digest[:12]}",
    ]
    return "\n".join(lines)


def sensitivity_json(found: FoundSensitivity) -> dict[str, Any]:
    """The whole table with its provenance, for programs."""
    return {
        **asdict(found.sensitivity),
        "settings": found.spec.facts(),
        **found.source.facts(),
        "runs_as": found.source.runs_as,
        "calibration": found.calibration.provenance(),
        "bank": found.bank.path.name,
        "versions": versions(),
        **device_facts(found.source.runs_as.rsplit("-", 1)[-1]),
    }


def check_target(path: Path) -> None:
    """Refuse a file that cannot be written, before the long work; makes nothing.

    Raises:
        StoreError: a directory is in the way, or the file's own cannot be made or written to.
    """
    if path.is_dir():
        raise StoreError(f"--out {path} is a directory; give the name of a JSON file")
    check_place(path.parent, "--out")


def write_sensitivity(found: FoundSensitivity, path: Path) -> None:
    """Write the table as JSON; the file appears whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(sensitivity_json(found), indent=1) + "\n", encoding="utf-8")


_HEAD = ("rank", "layer", "expert", "tokens", "use %", "cost per bit", "fragility")


def _cells(rank: int, row: SensitiveExpert) -> list[str]:
    fragility = "unseen" if row.fragility is None else f"{row.fragility:.3e}"
    return [
        *(str(n) for n in (rank, row.layer, row.expert, row.n_tokens)),
        f"{100 * row.use:.2f}",
        f"{row.cost_per_bit:.3e}",
        fragility,
    ]
