"""`evaluate`: scores of a model or packed checkpoint, beside its reference where one is given."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from alphaquant.commands.searched import read_searched
from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Evaluator, Score, Subject
from alphaquant.evaluators.engines.protocol import EngineRequest
from alphaquant.evaluators.engines.served import ENGINES, ServedModel, serving, windows_at_once
from alphaquant.evaluators.harness import HarnessEvaluator
from alphaquant.evaluators.harness_tasks import HarnessRequest
from alphaquant.evaluators.local_tasks import check_tasks, is_mmlu, open_harness
from alphaquant.evaluators.predictions import vocabulary_of
from alphaquant.evaluators.registry import EVALUATORS, Ground, find, metrics_of, nearest
from alphaquant.models.gguf.converted import find_gguf, origin_of
from alphaquant.models.loading import load_model, load_skeleton, load_tokenizer
from alphaquant.models.quantization_config import is_packed
from alphaquant.progress import Progress, Stage, no_progress
from alphaquant.runtime.checkpoint import load
from alphaquant.runtime.integrity import verify_checksums
from alphaquant.runtime.mixed.loader import MixedStatistics, load_mixed_precision
from alphaquant.runtime.mixed.mapping_file import MixedPrecisionConfig
from alphaquant.specs.check import check_kind
from alphaquant.specs.evaluate import EvaluateSpec
from alphaquant.studies.inputs import (
    DEMO,
    check_model_name,
    find_device,
    load_windows,
    model_location,
    seq_len_of,
)
from alphaquant.texts.windows import TextRequest, TokenSet, check_sources

logger = logging.getLogger(__name__)

_BY_LOGITS = ("kl", "perplexity")
"""Evaluators that need nothing but a model's logits."""

SEQ_LEN = 2048
"""Tokens per window of models other than the demo, or the model's limit where that is less."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        spec: what was asked.
        scores: of the model.
        reference_scores: of the reference on the same data; empty without one.
        tokens: the windows; None where only tasks of lm-eval were asked.
        gguf: `model` and `reference`, those of them that were GGUF files: see `GgufOrigin`.
        details: tables behind the scores, by evaluator.
        reference_details: those of the reference.
        engine: what ran the model, where it was not this process.
        mixed: what was loaded of `model` and `reference`, those that were mixed_precision files.
        searched: what its search measured of `model`, if its files say, see `read_searched`.
    """

    spec: EvaluateSpec
    scores: tuple[Score, ...]
    reference_scores: tuple[Score, ...]
    tokens: TokenSet | None
    gguf: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reference_details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    mixed: Mapping[str, MixedStatistics] = field(default_factory=dict)
    searched: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class _Chosen:
    """Evaluators, each with the metrics of its that were asked for."""

    evaluators: tuple[tuple[Evaluator, frozenset[str]], ...]
    tokens: TokenSet | None


@dataclass(frozen=True)
class _Measured:
    """Scores and details of one model."""

    scores: tuple[Score, ...] = ()
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def evaluate(spec: EvaluateSpec, *, progress: Progress = no_progress) -> Evaluation:
    """Measure a model.

    The reference comes first and is let go of, so that one model is in memory at a time.

    Args:
        spec: what to measure.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    check_kind(spec, EvaluateSpec, "evaluate")
    device, asked = _check(spec), spec
    spec, origins = _located(spec, progress)
    with tempfile.TemporaryDirectory(prefix="alphaquant-") as scratch:
        folder = Path(scratch)
        engine: Mapping[str, Any] = {}
        harness = _harness(spec)
        if spec.reference is not None:
            _check_names(spec)
        progress(Stage.LOAD, 0, 1)
        mixed: dict[str, MixedStatistics] = {}
        model = open_model(spec, "model" if spec.reference is None else "reference", device, mixed)
        chosen = _choose(spec, model, harness, folder, progress)
        progress(Stage.LOAD, 1, 1)
        n_steps = len(chosen.evaluators) * (1 if spec.reference is None else 2)
        found = _measure(chosen, model, lambda done: progress(Stage.EVALUATE, done, n_steps))
        own = _Measured()
        if spec.reference is not None:
            vocabulary = vocabulary_of(model)
            del model
            own, first = found, len(chosen.evaluators)
            with _opened(spec, device, chosen.tokens, vocabulary, mixed) as model:
                engine = model.facts if isinstance(model, ServedModel) else {}
                found = _measure(
                    chosen, model, lambda done: progress(Stage.EVALUATE, first + done, n_steps)
                )
    return Evaluation(
        *(asked, found.scores, own.scores, chosen.tokens, origins, found.details, own.details),
        *(engine, mixed, read_searched(asked.model)),
    )


def _check_names(spec: EvaluateSpec) -> None:
    """Refuse a wrong name of the model before its reference is measured, which takes long.

    Raises:
        ModelError: there is no such model, or no such engine.
    """
    if spec.engine in ENGINES:
        ENGINES[spec.engine].check(_engine_model(spec), spec.engine_python)
    is_local = Path(spec.model).exists()
    if not is_local or not (spec.engine in ENGINES or is_packed(spec.model)):
        load_skeleton(located(spec.model), quantized=True)


def _engine_model(spec: EvaluateSpec) -> Path:
    """What an engine loads: files and directories as they are."""
    return Path(located(spec.model) if spec.model == DEMO else spec.model)


@contextmanager
def _opened(
    spec: EvaluateSpec,
    device: str,
    tokens: TokenSet | None,
    vocabulary: int | None,
    mixed: dict[str, MixedStatistics],
) -> Iterator[nn.Module]:
    """The model that is measured beside its reference, in this process or in an engine."""
    if spec.engine not in ENGINES:
        yield open_model(spec, "model", device, mixed)
        return
    assert tokens is not None and vocabulary is not None
    model_path = _engine_model(spec)
    request = EngineRequest(model_path, spec.dtype, tokens.tokens.shape[1], spec.engine_python)
    with serving(spec.engine, request, vocabulary) as model:
        yield model


def open_model(
    spec: EvaluateSpec, role: Literal["model", "reference"], device: str, mixed: dict[str, Any]
) -> nn.Module:
    """A packed checkpoint, a mixed_precision file, or any model that transformers loads.

    Packed ones run in plain torch everywhere, so that scores are those of the search's trials.

    Args:
        spec: what to measure.
        role: which of its two models.
        device: `cpu`, `cuda`, ...
        mixed: gets the statistics of a mixed_precision file, by role.

    Raises:
        ModelError: a weight of a mixed_precision file is not found, and it does not allow that.
        StoreError: a file of a packed checkpoint is not what was written.
    """
    name = spec.model if role == "model" or spec.reference is None else spec.reference
    if is_mixed(name):
        loaded = load_mixed_precision(name, device, spec.dtype, allow_missing=spec.allow_missing)
        mixed[role] = loaded.statistics
        return loaded.model
    if is_packed(name):
        verify_checksums(Path(name))
        return load(name, device, spec.dtype, kernels=False)
    return load_model(model_location(name), device, spec.dtype, quantized=True)


def is_mixed(name: str) -> bool:
    """Whether a name is that of a mixed_precision file."""
    return Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()


def located(name: str) -> str:
    """Where the configuration and the tokenizer of a model are.

    Raises:
        ConfigError: a mixed_precision file cannot be read.
    """
    if is_mixed(name):
        return str(MixedPrecisionConfig.from_yaml(name).base_model_path)
    return model_location(name)


def window_tasks(spec: EvaluateSpec) -> list[str]:
    """Those measured on windows of text."""
    return [task for task in spec.names if find(task) is not None]


def harness_tasks(spec: EvaluateSpec) -> tuple[str, ...]:
    """Those of lm-eval."""
    return tuple(task for task in spec.names if find(task) is None)


def _located(
    spec: EvaluateSpec, progress: Progress
) -> tuple[EvaluateSpec, dict[str, Mapping[str, Any]]]:
    """The same with GGUF files as the directories that they are decoded to, and what they were."""
    origins: dict[str, Mapping[str, Any]] = {}
    for role, name in (("model", spec.model), ("reference", spec.reference)):
        if name is None or find_gguf(name) is None or (role == "model" and spec.engine in ENGINES):
            continue
        location = model_location(name, progress=progress)
        origin = origin_of(Path(location))
        assert origin is not None  # it was just converted
        changed: dict[str, Any] = {role: location}
        spec, origins[role] = replace(spec, **changed), asdict(origin)
        for note in origin.notes:
            logger.warning("%s", note)
    return spec, origins


def _check(spec: EvaluateSpec) -> str:
    """Refuse what cannot be measured; the device otherwise."""
    for name, value in (("model", spec.model), ("reference", spec.reference)):
        if value is not None:
            check_model_name(value, name)
    if not spec.names:
        raise ConfigError(f"tasks: none; possible are {_possible()}; name some")
    for name in harness_tasks(spec):
        near = nearest(name)
        if near and not Path(name).exists():
            raise ConfigError(
                f"unknown task {name!r}; possible are {_possible()}; did you mean {near}?"
            )
    if window_tasks(spec):
        check_sources({"heldout": spec.data}, spec.bos)
    entries = {name: EVALUATORS[find(name) or name] for name in window_tasks(spec)}
    counting = [name for name, entry in entries.items() if entry.counts]
    if counting:
        raise ConfigError(
            f"{', '.join(counting)}: an assignment of formats is counted, no model is run; ask "
            "for it with --also of aq-search, or use aq-inspect"
        )
    comparing = [name for name, entry in entries.items() if entry.compares]
    if comparing and spec.reference is None:
        raise ConfigError(
            f"{', '.join(comparing)} asked, which needs the original model, and none is given; "
            "give --reference MODEL, or --tasks perplexity"
        )
    if spec.engine in ENGINES:
        _check_engine(spec)
    if spec.engine_python is not None and spec.engine != "vllm":
        raise ConfigError(
            f"--engine-python {spec.engine_python} given, and --engine {spec.engine} runs in this "
            "process; leave it out, or give --engine vllm"
        )
    only = {"shots": spec.shots, "limit": spec.limit, "task-data": spec.task_data}
    given = [f"--{name} {value}" for name, value in only.items() if value is not None]
    if given and not harness_tasks(spec):
        raise ConfigError(
            f"{', '.join(given)} given, which are for tasks of lm-eval, and the tasks are "
            f"{', '.join(spec.names)}; name a task of lm-eval such as mmlu, or leave them out"
        )
    if spec.task_data is not None and not any(map(is_mmlu, spec.names)):
        raise ConfigError(
            f"--task-data {spec.task_data} given, which is for mmlu and its subjects, and the "
            f"tasks are {', '.join(spec.names)}; add mmlu, or give a task file of your own "
            "(docs/evaluation.md)"
        )
    check_tasks(harness_tasks(spec), spec.task_data)
    return find_device(spec.device)


def _check_engine(spec: EvaluateSpec) -> None:
    """Refuse what an engine's logits do not say."""
    if spec.reference is None:
        raise ConfigError(
            f"--engine {spec.engine} runs the model elsewhere, and its text is read with the "
            "original's tokenizer; give --reference MODEL"
        )
    if is_mixed(spec.model):
        raise ConfigError(
            f"--engine {spec.engine} loads checkpoints, and {spec.model} is a mixed_precision "
            "file, which our own loader reads; use --engine transformers"
        )
    other = [name for name in spec.names if find(name) not in _BY_LOGITS]
    if other:
        raise ConfigError(
            f"{', '.join(other)} cannot be measured with --engine {spec.engine}, which gives "
            f"logits; possible are {', '.join(_BY_LOGITS)}; use --engine transformers for others"
        )


def _possible() -> str:
    known = ", ".join(name for name, entry in EVALUATORS.items() if not entry.counts)
    return f"{known}, one of their metrics, and any task, task file or folder of these of lm-eval"


def _harness(spec: EvaluateSpec) -> HarnessEvaluator | None:
    """The evaluator of lm-eval's tasks, with their documents; None where none are asked."""
    tasks = harness_tasks(spec)
    if not tasks:
        return None
    tokenizer = load_tokenizer(located(spec.reference or spec.model))
    request = HarnessRequest(tasks, None, spec.shots, spec.limit, spec.batch_size)
    return open_harness(request, tokenizer, spec.bos, spec.task_data)


def _windows(spec: EvaluateSpec, name: str, model: nn.Module) -> TokenSet:
    """The windows, by the tokenizer and length limit of a model."""
    asked = spec.seq_len
    if asked is None and name != DEMO:
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        asked = SEQ_LEN if limit is None else min(SEQ_LEN, int(limit))
    seq_len = seq_len_of(name, model, asked)
    request = TextRequest(spec.data, "heldout", spec.samples, seq_len, spec.seed, spec.bos)
    return load_windows(request, name, model, load_tokenizer(located(name)))


def _choose(
    spec: EvaluateSpec,
    model: nn.Module,
    harness: HarnessEvaluator | None,
    folder: Path,
    progress: Progress,
) -> _Chosen:
    """The evaluators asked for; `model` is the first one that is measured.

    Divergence gives perplexity in the same pass, so with both asked the model runs once.
    """
    chosen: list[tuple[Evaluator, frozenset[str]]] = []
    tokens = None
    if window_tasks(spec):
        tokens = _windows(spec, spec.reference or spec.model, model)
        batch_size = spec.batch_size
        if spec.engine in ENGINES:  # an engine gives all logits of a batch at once
            most = windows_at_once(tokens.tokens.shape[1], vocabulary_of(model) or 1)
            batch_size = min(batch_size, most)
        ground = Ground(model, tokens.tokens, batch_size, folder, progress=progress)
        asked: dict[str, set[str]] = {}
        for name in window_tasks(spec):
            known = find(name) or name
            with_kl = known == "perplexity" and any(find(n) == "kl" for n in spec.names)
            metrics = {metric.name for metric in metrics_of(name)}
            asked.setdefault("kl" if with_kl else known, set()).update(metrics)
        for name, metrics in asked.items():
            chosen.append((EVALUATORS[name].make(ground), frozenset(metrics)))
    if harness is not None:
        chosen.append((harness, frozenset(metric.name for metric in harness.metrics)))
    return _Chosen(tuple(chosen), tokens)


def _measure(chosen: _Chosen, model: nn.Module, progress: Callable[[int], None]) -> _Measured:
    """Scores and details of one model by every evaluator."""
    scores: list[Score] = []
    details: dict[str, Mapping[str, Any]] = {}
    progress(0)
    for done, (evaluator, metrics) in enumerate(chosen.evaluators, 1):
        found = evaluator.evaluate(Subject(model))
        scores += [score for score in found.scores if score.metric in metrics]
        if found.details:
            details[evaluator.name] = found.details
        progress(done)
    return _Measured(tuple(scores), details)
