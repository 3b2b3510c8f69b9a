"""Expert sensitivity of a model: load, bank, costs, table; nothing is searched.

Bank and costs are those of a search with the same calibration text and settings, in the same
cache: what one measured, the other reads. The written JSON holds no times, so the same
specification on the same device gives the same bytes.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alphaquant.costs.experts import (
    ExpertSensitivity,
    SensitiveExpert,
    expert_sensitivity,
    expert_units,
    measured_formats,
    saved_bits,
)
from alphaquant.costs.fisher import CostSettings, measure_costs
from alphaquant.errors import StoreError
from alphaquant.files import in_use, whole_file
from alphaquant.models.dtypes import named_dtype
from alphaquant.progress import Progress, Stage, no_progress, of_total
from alphaquant.provenance import device_facts, versions
from alphaquant.quant.bank import Bank
from alphaquant.reports.tables import fitted, wrapped
from alphaquant.specs.check import check_kind
from alphaquant.specs.quantizer import settings_of
from alphaquant.specs.sensitivity import SensitivitySpec
from alphaquant.studies.costing import fill_source_bank
from alphaquant.studies.inputs import (
    SOURCE_STEPS,
    USERS,
    Source,
    cache_dir,
    find_device,
    load_source,
    model_notes,
    read_text,
)
from alphaquant.studies.store.folder import check_place
from alphaquant.texts.balanced import imbalance
from alphaquant.texts.windows import TokenSet, check_sources

logger = logging.getLogger(__name__)

N_SHOWN = 5
"""Experts at either end of the printed table."""


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

    @property
    def imbalance(self) -> float:
        """Of the experts' use on the calibration text, see `alphaquant.texts.balanced`."""
        tables = [self.bank.utilization(layer.index) for layer in self.source.map.layers]
        usage = [torch.tensor([counts]).double() for one in tables for counts in one.values()]
        return float(imbalance(usage, self.calibration.tokens.numel()))


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
    check_sources({"calibration": spec.text.calibration}, spec.text.bos)
    asked = spec.checkpoint
    if asked.dtype != "auto":
        named_dtype(asked.dtype)
    check_place(cache_dir(spec.cache), "--cache")
    with in_use(cache_dir(spec.cache) / USERS, "the cache"):
        return _found(spec, names, progress)


def _found(spec: SensitivitySpec, names: Sequence[str], progress: Progress) -> FoundSensitivity:
    """Load, fill the bank with these formats, and measure."""
    asked, text, n_steps = spec.checkpoint, spec.text, SOURCE_STEPS + 1
    progress(Stage.LOAD, 0, n_steps)
    source = load_source(
        asked.model,
        find_device(asked.device),
        asked.dtype,
        cache=spec.cache,
        rotate=asked.rotate,
        progress=of_total(progress, Stage.LOAD, n_steps),
    )
    for note in model_notes(source.map):
        logger.warning("%s", note)
    # A dense model, and formats that save nothing, are refused before the long work.
    saved_bits(expert_units(source.map.inventory), spec.format, spec.against)
    calibration = read_text(
        source,
        text.calibration,
        "calibration",
        text.calibration_samples,
        text.seq_len,
        spec.seed,
        text.bos,
    )
    progress(Stage.LOAD, n_steps, n_steps)
    quantizer = settings_of(spec.quantizer)
    bank = fill_source_bank(source, calibration, names, quantizer, spec.cache, progress)
    settings = CostSettings(spec.seed)
    table = measure_costs(source.map, bank, calibration.tokens, names, settings, progress=progress)
    found = expert_sensitivity(table, source.map.inventory, spec.format, spec.against)
    return FoundSensitivity(spec, source, calibration, bank, found)


def sensitivity_text(found: FoundSensitivity, width: int | None = None) -> str:
    """The most and the least sensitive experts and the totals, for people.

    Args:
        found: what was measured.
        width: characters of the screen; columns that do not fit are left out. None for all.
    """
    experts, total = found.sensitivity.experts, found.sensitivity.total
    shown = list(dict.fromkeys([*experts[:N_SHOWN], *experts[-N_SHOWN:]]))
    n_samples, seq_len = found.calibration.tokens.shape
    lines = [
        f"{total.n_experts} experts in {found.sensitivity.format} against "
        f"{found.sensitivity.against}, cost per bit in nats/token per bit/weight",
        fitted(_HEAD, [_cells(experts.index(e) + 1, e) for e in shown], width, _SPARE),
        f"sum over experts: Fisher cost {total.fisher:.6f} nats/token, "
        f"{total.saved_bits} bits saved",
        f"{n_samples} windows of {seq_len} tokens of {found.calibration.name}, "
        f"digest {found.calibration.digest[:12]}, imbalance of experts {found.imbalance:.4f}",
    ]
    return "\n".join(wrapped(line, width) for line in lines)


def sensitivity_json(found: FoundSensitivity) -> dict[str, Any]:
    """The whole table with its provenance, for programs."""
    return {
        **asdict(found.sensitivity),
        "settings": found.spec.facts(),
        **found.source.facts(),
        "runs_as": found.source.runs_as,
        "calibration": found.calibration.provenance(),
        "imbalance": found.imbalance,
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
_SPARE = ("use %", "tokens")


def _cells(rank: int, row: SensitiveExpert) -> list[str]:
    fragility = "unseen" if row.fragility is None else f"{row.fragility:.3e}"
    return [
        *(str(n) for n in (rank, row.layer, row.expert, row.n_tokens)),
        f"{100 * row.use:.2f}",
        f"{row.cost_per_bit:.3e}",
        fragility,
    ]
