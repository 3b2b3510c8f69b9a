"""The environment of every test, and what tests of searches share.

No network, quiet libraries, one thread unless told otherwise: test tensors are tiny, and a second
thread gains nothing; on shared cores it made tests 15 times slower. That is set before torch and
transformers are imported, which read it then.

A tiny random model with short texts and two searches of it, made once per session; and searches
whose model is a table, for what depends on numbers that only a test can choose.
"""

# ruff: noqa: E402

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    "NO_COLOR": "1",
}

import functools
import gc
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import optuna
import pydantic
import pytest
import torch
from alembic.config import Config
from alembic.script import ScriptDirectory
from cyclopts import App
from cyclopts.argument import ArgumentCollection
from gguf import gguf_reader
from sqlalchemy import event
from sqlalchemy.engine import Engine
from torch import nn

from alphaquant import provenance
from alphaquant.commands.search import search
from alphaquant.evaluators.divergence import Divergence
from alphaquant.models import mapping
from alphaquant.models.probe import Probe, probe_model
from alphaquant.progress import StageClock
from alphaquant.search.problem import Problem, make_problem
from alphaquant.spaces.assignment import Assignment
from alphaquant.spaces.budget import parse_budget
from alphaquant.spaces.formats import parse_format
from alphaquant.spaces.profiles import find_profile
from alphaquant.spaces.space import SearchSpace, make_space
from alphaquant.spaces.units import Inventory, Matrix
from alphaquant.specs import flat
from alphaquant.specs.flat import replaced
from alphaquant.specs.limits import LimitSpec
from alphaquant.specs.search import SearchSpec
from alphaquant.specs.texts import TextSpec
from alphaquant.studies.loop import TrialLoop
from alphaquant.studies.objective import Measured
from alphaquant.studies.program import Run
from alphaquant.studies.result import SearchResult
from alphaquant.studies.store.folder import RunFolder
from alphaquant.studies.trials import Proposer, constraints_of
from alphaquant.studies.truth import ChoiceTruth
from alphaquant.testing.checkpoints import save_texts, save_tiny
from alphaquant.texts import sources
from alphaquant.texts.tokens import Tokens, encode

MakeSpec = Callable[..., SearchSpec]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, files that read one finished search share a process, and it."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(super()._split_scope(nodeid))

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@functools.cache
def _scope(file: str) -> str:
    """A file, or what all files share that ask for `found` or `long`."""
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    is_reader = re.search(r'\b(found|long): SearchResult|"found", "long"', text)
    return "a search" if is_reader else file


def pytest_collection_finish() -> None:
    """What was imported stays: `gc.collect()`, which tests call, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """SQLite without waiting for the disk: 9 s instead of 18 for a search of 48 trials.

    What a killed process wrote is there all the same; only a power cut would lose it.
    """

    def stop_waiting(connection: Any, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", stop_waiting)
    yield
    event.remove(Engine, "connect", stop_waiting)


_ASIDE = ("_name_or_path", "architectures", "dtype", "quantization_config")
"""What a configuration says of where the model came from and how it is stored, not of its code."""


def _structure(model: nn.Module, layers: str, experts: Sequence[Any]) -> tuple[Any, ...]:
    """What a probe can depend on: code, configuration, shapes and dtypes; never weights."""
    parts = tuple(
        (name, type(m), getattr(m.forward, "__func__", m.forward), m.training)
        for name, m in model.named_modules()
    )
    tensors = (*model.named_parameters(), *model.named_buffers())
    shapes = tuple((name, t.shape, t.dtype) for name, t in tensors)
    config: Any = model.config
    facts = {k: v for k, v in config.to_dict().items() if k not in _ASIDE}
    sites = tuple((type(site), site.name) for site in experts)
    return parts, shapes, repr(facts), config._attn_implementation, layers, sites


@pytest.fixture(scope="session", autouse=True)
def probed_once() -> Iterator[None]:
    """Models of one structure are probed once: 0.1 s of the 0.16 s that loading a tiny one takes.

    Tests of what a probe finds take it as it is; see the conftest of models.
    """
    known: dict[tuple[Any, ...], Probe] = {}

    def probe(model: nn.Module, layers: str, experts: Sequence[Any]) -> Probe:
        key = _structure(model, layers, experts)
        if key not in known:
            known[key] = probe_model(model, layers, experts)
        return known[key]

    with mock.patch.object(mapping, "probe_model", probe):
        yield


@pytest.fixture(scope="session", autouse=True)
def read_once() -> Iterator[None]:
    """What is installed, and what specifications say of their fields, is read once.

    It is asked for with every model, command and study, and stays as it is while tests run.
    """
    with (
        mock.patch.object(mapping, "entry_points", functools.cache(mapping.entry_points)),
        mock.patch.object(provenance, "version", functools.cache(provenance.version)),
        mock.patch.object(flat, "texts_of", functools.cache(flat.texts_of)),
        mock.patch.object(pydantic, "TypeAdapter", functools.cache(pydantic.TypeAdapter)),
        mock.patch.object(ScriptDirectory, "from_config", _scripts()),
        mock.patch.object(sources, "encode", _encoded()),
        mock.patch.object(App, "assemble_argument_collection", _assembled()),
        mock.patch.object(gguf_reader, "np", _PlainMaps()),
    ):
        yield


def _scripts() -> Callable[[Config], ScriptDirectory]:
    """The migrations of Optuna's tables, which it reads again for every study."""
    read: dict[str | None, ScriptDirectory] = {}
    from_config = ScriptDirectory.from_config

    def known(config: Config) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in read:
            read[place] = from_config(config)
        return read[place]

    return known


def _encoded() -> Callable[[str, Any], Tokens]:
    """Long texts, those of the demo: a third of a second each, for every model and search."""
    read: dict[tuple[str, str], Tokens] = {}

    def known(text: str, tokenizer: Any) -> Tokens:
        rust = getattr(tokenizer, "backend_tokenizer", None)
        if rust is None or len(text) < 100_000:
            return encode(text, tokenizer)
        key = (text, rust.to_str())
        if key not in read:
            read[key] = encode(text, tokenizer)
        return read[key]

    return known


class _PlainMaps:
    """numpy for gguf, which cuts its map once per token: a plain array is cut ten times faster."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def memmap(self, *args: Any, **how: Any) -> np.ndarray:
        return np.asarray(np.memmap(*args, **how))


def _assembled() -> Callable[..., ArgumentCollection]:
    """The options of a command, which are assembled seven times before it begins."""
    made: dict[tuple[Any, ...], ArgumentCollection] = {}
    assemble = App.assemble_argument_collection

    def known(app: App, **how: Any) -> ArgumentCollection:
        command: Any = app.default_command
        key = (command.__code__, app.help_flags, app.version_flags, *how.items())
        if key not in made:
            made[key] = assemble(app, **how)
        return _without_tokens(made[key])

    return known


def _without_tokens(options: ArgumentCollection) -> ArgumentCollection:
    """Options as before words of a command line were sorted into them."""
    copies = {id(option): copy(option) for option in options}
    for option in copies.values():
        option.tokens = []
        option.children = ArgumentCollection([copies[id(child)] for child in option.children])
    return ArgumentCollection(copies.values())


@pytest.fixture(scope="session", autouse=True)
def patched_per_launch() -> Iterator[None]:
    """Triton's interpreter replaces its language once per launch, not for every function called.

    That takes half of a kernel's time there, and is done already: functions of ours see the
    language under the same name as the kernel that calls them. Those of Triton's own do not.
    Nor is every sum looked at for overflow, a quarter of what is left; on a GPU none is.
    """
    if find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

    call_patched = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_ours = self.fn.__module__.startswith("alphaquant.")
        return (self.rewrite() if is_ours else partial(call_patched, self))(*args, **kwargs)

    options = replace(interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(InterpretedFunction, "__call__", call),
        mock.patch.object(interpreter_builder, "options", options),
    ):
        yield


@pytest.fixture(scope="session", autouse=True)
def roomy_disk() -> Iterator[None]:
    """A tebibyte of which half is free, whatever this machine has left: plans and copies ask."""
    usage = type(shutil.disk_usage("."))(1 << 40, 1 << 39, 1 << 39)
    with mock.patch.object(shutil, "disk_usage", lambda path: usage):
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for what names none, so that nothing is written at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALPHAQUANT_CACHE", str(tmp_path_factory.mktemp("own-cache")))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the beginnings of the demo's three texts, by part."""
    return save_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def make_spec(tiny: Path, texts: dict[str, Path], cache: Path) -> MakeSpec:
    """Make a small specification: `make_spec(out, budget="4bits")`."""
    texts_spec = TextSpec(
        calibration=str(texts["calibration"]),
        evaluation=str(texts["search"]),
        heldout=str(texts["heldout"]),
        calibration_samples=12,
        evaluation_samples=6,
        heldout_samples=6,
        seq_len=48,
    )

    def make(out: Path, **changes: Any) -> SearchSpec:
        spec = SearchSpec.of(
            model=str(tiny),
            budget="5.2bits",
            formats="int3-g32,int4-g32,int8-row",
            trials=10,
            texts=texts_spec,
            out=out,
            cache=cache,
        )
        return replaced(spec, **changes)

    return make


@pytest.fixture(scope="session")
def found(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search; read it, do not change its folder."""
    return search(make_spec(tmp_path_factory.mktemp("found") / "out"))


@pytest.fixture(scope="session")
def long(make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A finished search of more trials, with races that end early; read it only.

    It has a cache of its own, so what was measured is what this search measured.
    """
    spec = make_spec(tmp_path_factory.mktemp("long") / "out", trials=20)
    own = tmp_path_factory.mktemp("long-cache")
    return search(replaced(spec, evaluation_samples=24, cache=own))


MENU = ("int2-g32", "int3-g32-asym", "int4-g64", "mxfp4", "int8-row")
FACTORS = np.random.default_rng(5).lognormal(0.0, 0.3, 24)
"""KL of each window in parts of the mean; the same for all assignments."""


def _matrices() -> Iterator[Matrix]:
    """Two layers: odd widths, three experts."""
    for layer in range(2):
        name = f"model.layers.{layer}"
        yield Matrix(f"{name}.self_attn.o_proj", 40, 72, "attention", layer)
        for e in range(3):
            for part, shape in (("gate_proj", (24, 40)), ("up_proj", (24, 40))):
                yield Matrix(f"{name}.mlp.experts.{e}.{part}", *shape, "expert", layer, e)
            yield Matrix(f"{name}.mlp.experts.{e}.down_proj", 40, 24, "expert", layer, e)


INVENTORY = Inventory("tiny", tuple(_matrices()))


def _problem(space: SearchSpace) -> Problem:
    """Costs that fall with bits, by less or more."""
    formats = [parse_format(n) for n in space.menu]
    bits = np.array([[u.storage_bits(f) for f in formats] for u in space.units])
    cost = np.random.default_rng(0).uniform(0.5, 1.0, bits.shape) * 4.0 ** -(bits / 1000)
    share = [2 / 3 if u.kind == "expert" else 1.0 for u in space.units]
    return make_problem(
        space.units,
        space.menu,
        bits,
        np.array([[n in space.allowed(u) for n in space.menu] for u in space.units]),
        {"fisher": cost, "error": cost**1.1},
        np.linspace(0, 90, len(space.units)),
        INVENTORY.n_layers,
        {"active_share": share},
    )


@pytest.fixture(scope="session")
def make_proposer() -> Callable[..., Proposer]:
    """A proposer over a made-up problem: `make_proposer("4bits", menu, "transformers")`."""

    def make(
        budget: str, menu: tuple[str, ...] = MENU, profile: str = "any", **limits: Any
    ) -> Proposer:
        space = make_space(INVENTORY, find_profile(profile), menu, parse_budget(budget))
        return Proposer(
            space, _problem(space), 0, constraints_of(LimitSpec(budget="4bits", **limits))
        )

    return make


@dataclass
class TableObjective:
    """Stands for `SearchObjective`: the KL of an assignment is looked up.

    Attributes:
        kl: mean KL of an assignment.
        calls: digest and windows of every measurement.
        together: digests of what was measured together, and windows.
    """

    kl: Callable[[Assignment], float]
    batch_size: int = 8
    calls: list[tuple[str, int]] = field(default_factory=list)
    together: list[tuple[list[str], int]] = field(default_factory=list)
    model_map: Any = field(default_factory=lambda: SimpleNamespace(inventory=INVENTORY))

    @property
    def n_windows(self) -> int:
        return len(FACTORS)

    def measure(
        self, assignment: Assignment, n_windows: int | None = None, *, is_race: bool = False
    ) -> Measured:
        n = min(n_windows or self.n_windows, self.n_windows)
        self.calls.append((assignment.digest, n))
        kl = torch.tensor(self.kl(assignment) * FACTORS[:n], dtype=torch.float32)
        found = Divergence(kl, torch.full((n,), 0.9), torch.full((n,), 3.0), 16, 0.5)
        return Measured(tuple(found.scores("digest")), found.kl)

    def measure_together(
        self,
        assignments: Sequence[Assignment],
        n_windows: int | None = None,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.together.append(([a.digest for a in assignments], n_windows or self.n_windows))
        tell(1, 1)


@pytest.fixture
def make_run(make_proposer: Callable[..., Proposer], tmp_path: Path) -> Callable[..., Run]:
    """A search whose true costs are a table: `make_run(budget="4bits", trials=30)`.

    The truth is additive, with the Fisher costs of the first layer's experts times three. `study`
    and `objective` may be those of an earlier run.
    """

    def make(
        study: optuna.Study | None = None,
        objective: TableObjective | None = None,
        on_trial: Callable[..., None] = lambda row: None,
        menu: tuple[str, ...] = MENU,
        **changes: Any,
    ) -> Run:
        spec = SearchSpec.of(
            **{"budget": "4bits", "out": tmp_path / "out", "seq_len": 256, **changes}
        )
        limits = ("max_formats_per_layer", "layer_minimum_bits", "active_budget")
        proposer = make_proposer(
            spec.limits.budget, menu, **{n: getattr(spec.limits, n) for n in limits}
        )
        true = proposer.problem.costs["fisher"].copy()
        true[[u.layer == 0 and u.kind == "expert" for u in proposer.problem.units]] *= 3.0
        rows = np.arange(len(true))

        def kl(assignment: Assignment) -> float:
            choice = proposer.choice(assignment)
            assert choice is not None, "trials take formats of the menu"
            return float(true[rows, choice].sum())

        measured: Any = objective or TableObjective(kl)
        study = study or optuna.create_study(directions=["minimize", "minimize"])
        folder, clock = RunFolder(spec.run.out), StageClock(lambda *call: None)
        return Run(
            spec=spec,
            proposer=proposer,
            loop=TrialLoop(spec, study, measured, kl, folder, clock, on_trial),
            truth=ChoiceTruth(measured, proposer.spread),
            clock=clock,
        )

    return make
