"""What a search is asked to do: one frozen object, from the command line or from Python.

`SearchSpec.facts` covers everything that changes the sequence of trials; how many trials, how long
and where the files go may change between the runs of one study.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from alphaquant.errors import ConfigError
from alphaquant.evaluators.texts import ROLES
from alphaquant.evaluators.tokens import BOS_MODES
from alphaquant.quant.engine import QuantSettings
from alphaquant.search.constraints import SideConstraints
from alphaquant.spaces.budget import parse_budget, parse_byte_budget
from alphaquant.spaces.formats import DEFAULT_MENU, parse_menu
from alphaquant.spaces.profiles import Profile, narrow_menu
from alphaquant.studies.field_types import check_least, check_types

REFERENCE_FORMATS = ("int4-g64", "mxfp4")
"""Uniform formats of exactly 4.25 bits that every search is compared with, whatever its menu."""

DEMO_TEXT = "demo=0.75,demo:code=0.25"
"""Default text of every part of a search: three quarters books, one quarter Python, so that no
expert is starved of the tokens that it is for. Calibrated on books alone the demo's winner has
four times the KL on this mixture (docs/allocation.md)."""

MODES = ("auto", "knobs", "groups")
"""`auto`: sweep, refinement, then sampled knobs; `knobs` and `groups`: sampled knobs of the
allocator, or sampled formats of groups of units, without sweep and refinement."""

SWEEPS = ("auto", "always", "never")
"""`auto`: where random assignments rank unlike their costs."""

SERVING_MENU = (
    *("int4-g128", "int4-g64", "int4-g32", "int8-g128", "int8-row", "fp8-e4m3-row"),
    *("mxfp4", "nvfp4", "bf16"),
)
"""Default menu of the profiles of serving engines, narrowed to what each loads."""

_DEFAULT_QUANT = QuantSettings()


@dataclass(frozen=True)
class DataSpec:
    """The three texts, which must not overlap.

    Attributes:
        calibration: feeds Hessians and costs; `demo`, a data set name or a path, or several
            domains with shares. By default books and code, as are the other two.
        evaluation: the divergence that the search sees.
        heldout: the last comparison, never used before.
        n_calibration: windows of calibration text.
        n_evaluation: windows of evaluation text, at least 2 for a standard error.
        n_heldout: windows of held-out text, at least 2.
        seq_len: tokens per window; None for 256 on the demo model, else 1024 or the model's limit.
        bos: whether texts start with the tokenizer's beginning of text: `auto`, `always`, `never`.
    """

    calibration: str = DEMO_TEXT
    evaluation: str = DEMO_TEXT
    heldout: str = DEMO_TEXT
    n_calibration: int = 128
    n_evaluation: int = 48
    n_heldout: int = 64
    seq_len: int | None = None
    bos: str = "auto"

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the count.
        """
        check_types(self)
        check_least("n_calibration", self.n_calibration, 1)
        check_least("n_evaluation", self.n_evaluation, 2)
        check_least("n_heldout", self.n_heldout, 2)
        check_least("seq_len", self.seq_len, 2)
        if self.bos not in BOS_MODES:
            raise ConfigError(f"bos {self.bos!r} is not known; use one of {', '.join(BOS_MODES)}")

    @property
    def sources(self) -> dict[str, str]:
        """Role -> text, as `alphaquant.evaluators.data` calls them."""
        texts = (self.calibration, self.evaluation, self.heldout)
        return dict(zip(ROLES, texts, strict=True))


@dataclass(frozen=True)
class ScoreSpec:
    """What is measured of every trial; see `alphaquant.studies.objectives`.

    Attributes:
        objectives: what the study optimizes: `bits,kl`, and other scores behind them.
        reported: scores that are measured and written down.
        latency_table: file of measured times, needed for `latency`.
        task_data: folder of MMLU's CSV files, for tasks of lm-eval; None is the hub.
        n_shots: examples before each question of these; None is each task's own number.
        task_limit: only the first so many documents of each task.
    """

    objectives: str = "bits,kl"
    reported: str = ""
    latency_table: str | None = None
    task_data: str | None = None
    n_shots: int | None = None
    task_limit: int = 20

    def __post_init__(self) -> None:
        """Refuse wrong types and counts that make no sense.

        Raises:
            ConfigError: naming the count.
        """
        check_types(self)
        check_least("n_shots", self.n_shots, 0)
        check_least("task_limit", self.task_limit, 1)


@dataclass(frozen=True)
class SearchSpec:
    """A search.

    Attributes:
        model: `demo`, a local directory or a hub id.
        budget: `4.25bits`, `13GiB`, ...
        formats: menu and format names separated by commas; `auto` for the profile's default menu.
        profile: what the serving engine can load.
        mode: which trials are run, see `MODES`.
        grouping: what shares a format in mode `groups`, see `alphaquant.search.groups`.
        sweep: whether mode `auto` sweeps between blocks on the true divergence, of `SWEEPS`.
        allocator: run this allocator alone, beside uniform; None for the mode's trials.
        max_formats_per_layer: at most so many formats among a layer's routed experts; None for
            any.
        layer_minimum_bits: every layer gets at least so many stored bits per weight; None for
            none.
        active_budget: bytes of quantizable weights that a token may read in the mean, such as
            `600MiB`; None for any.
        trials: evaluated assignments, planned ones included.
        timeout: seconds after which no further trial starts; None for no limit.
        seed: of text windows, drawn labels and proposals.
        data: the texts.
        scores: what is measured of every trial.
        quant: how matrices are quantized.
        n_draws: labels drawn per position for the Fisher costs.
        sampler: `tpe`, `gp`, `nsga2` or `random`.
        storage: Optuna storage URL; None for SQLite in `out`.
        study: name of the Optuna study.
        out: directory of results.
        cache: directory of banks and teachers, shared by searches.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the computation; `auto` is float32 on the CPU, else the checkpoint's.
        overwrite: replace `out` if it belongs to another search.
    """

    model: str = "demo"
    budget: str = "4.25bits"
    formats: str = "auto"
    profile: str = "any"
    mode: str = "auto"
    grouping: str = "layer"
    sweep: str = "auto"
    allocator: str | None = None
    max_formats_per_layer: int | None = None
    layer_minimum_bits: float | None = None
    active_budget: str | None = None
    trials: int = 48
    timeout: float | None = None
    seed: int = 0
    data: DataSpec = DataSpec()
    scores: ScoreSpec = ScoreSpec()
    quant: QuantSettings = QuantSettings()
    n_draws: int = 1
    sampler: str = "tpe"
    storage: str | None = None
    study: str = "aq-search"
    out: Path = Path("aq-out")
    cache: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse wrong types, counts and settings that make no sense.

        Raises:
            ConfigError: naming the field.
        """
        check_types(self)
        if self.quant.sequential:
            raise ConfigError(
                "sequential quantization needs the formats of the layers before, which a search "
                "does not have when it fills its bank; use it with aq-quantize"
            )
        for name, value, known in (("mode", self.mode, MODES), ("sweep", self.sweep, SWEEPS)):
            if value not in known:
                raise ConfigError(f"{name} {value!r} is not known; use one of {', '.join(known)}")
        if not self.study.strip():
            raise ConfigError("the study has no name; give --study NAME, or leave it out")
        check_least("trials", self.trials, 1)
        check_least("n_draws", self.n_draws, 1)
        check_least("timeout", self.timeout, 0)
        check_least("seed", self.seed, 0)

    @property
    def constraints(self) -> SideConstraints:
        """What every assignment keeps besides the budget.

        Raises:
            AlphaQuantError: a limit that no assignment could keep.
        """
        active_bits = None
        if self.active_budget is not None:
            active_bits = 8 * parse_byte_budget(self.active_budget, "active budget")
        return SideConstraints(self.max_formats_per_layer, self.layer_minimum_bits, active_bits)

    def facts(self) -> dict[str, Any]:
        """What decides the sequence of trials, ready for JSON; equal budgets read the same."""
        free = ("trials", "timeout", "out", "cache", "overwrite", "storage", "study")
        found = {k: v for k, v in asdict(self).items() if k not in free}
        if self.data.bos == "auto":  # as studies of versions without the field
            del found["data"]["bos"]
        return found | {"budget": parse_budget(self.budget).canonical}


def quant_settings(base: QuantSettings = _DEFAULT_QUANT, /, **changes: Any) -> QuantSettings:
    """Settings with some fields changed, as options of a command line ask.

    Args:
        base: what holds for fields that are not changed.
        changes: fields of `QuantSettings`; None leaves a field as it is.

    Raises:
        ConfigError: a field that does not exist, or a value out of its range.
    """
    asked = {name: value for name, value in changes.items() if value is not None}
    known = {f.name for f in fields(QuantSettings)}
    unknown = sorted(asked.keys() - known)
    if unknown:
        raise ConfigError(
            f"unknown quantization settings {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}; correct or remove them"
        )
    return replace(base, **asked)


def menu_of(formats: str, profile: Profile) -> tuple[str, ...]:
    """The menu that `--formats` stands for under a profile.

    Raises:
        FormatError: unknown names, or nothing that the profile loads.
    """
    if formats != "auto":
        return narrow_menu(parse_menu(formats), profile)
    default = DEFAULT_MENU if profile.is_own_runtime else SERVING_MENU
    return narrow_menu(parse_menu(",".join(default)), profile)
