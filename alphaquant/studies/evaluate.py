"""`evaluate`: scores of a model or packed checkpoint, beside its reference where one is given."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Score
from alphaquant.evaluators.data import TextRequest, TokenSet, load_tokens
from alphaquant.evaluators.divergence import measure_divergence, store_teacher
from alphaquant.evaluators.perplexity import measure_perplexity
from alphaquant.quant.bank import Progress
from alphaquant.quant.checkpoint import is_packed, load
from alphaquant.quant.loading import load_model, load_skeleton, load_tokenizer
from alphaquant.quant.provenance import versions
from alphaquant.studies.progress import no_progress
from alphaquant.studies.sources import find_device, model_location, seq_len_of
from alphaquant.studies.tables import aligned

TASKS = {"kl": ("kl", "same_top"), "ppl": ("perplexity",)}
"""What can be measured, and the metrics that each task gives."""


@dataclass(frozen=True)
class EvaluateSpec:
    """An evaluation.

    Attributes:
        model: packed checkpoint, directory, hub id or `demo`.
        reference: the original model; needed for `kl`.
        tasks: of `TASKS`; `kl` also gives same-top.
        data: text; `demo` is the embedded held-out text.
        n_samples: windows.
        seq_len: tokens per window; None as in `DataSpec`.
        seed: of the windows.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the computation.
        batch_size: windows per forward pass.
    """

    model: str
    reference: str | None = None
    tasks: tuple[str, ...] = tuple(TASKS)
    data: str = "demo"
    n_samples: int = 64
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        spec: what was asked.
        scores: of the model.
        reference_scores: of the reference on the same windows; empty without one.
        tokens: the windows.
    """

    spec: EvaluateSpec
    scores: tuple[Score, ...]
    reference_scores: tuple[Score, ...]
    tokens: TokenSet


def evaluate(spec: EvaluateSpec, *, progress: Progress = no_progress) -> Evaluation:
    """Measure a model.

    The reference comes first and is let go of, so that one model is in memory at a time.

    Args:
        spec: what to measure.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    device = _check(spec)
    if spec.reference is None or "kl" not in spec.tasks:
        progress("load", 0, 1)
        model = open_model(spec.model, device, spec.dtype)
        tokens = _windows(spec, spec.model, model)
        progress("load", 1, 1)
        score = measure_perplexity(model, tokens.tokens, tokens.digest, batch_size=spec.batch_size)
        return Evaluation(spec, (score,), (), tokens)
    if not is_packed(spec.model):
        load_skeleton(model_location(spec.model))  # a wrong name is told before the long work
    with tempfile.TemporaryDirectory(prefix="alphaquant-") as folder:
        return _compare(spec, spec.reference, device, Path(folder), progress)


def open_model(name: str, device: str, dtype: str) -> nn.Module:
    """A packed checkpoint or any model that transformers loads."""
    if is_packed(name):
        return load(name, device, dtype)
    return load_model(model_location(name), device, dtype, quantized=True)


def evaluation_text(found: Evaluation) -> str:
    """The scores for people, one per line."""
    reference = {s.metric: s for s in found.reference_scores}
    rows = []
    for score in found.scores:
        stderr = "" if score.stderr is None else f"+- {score.stderr:.6f}"
        beside = reference.get("perplexity") if score.metric == "perplexity" else None
        original = "" if beside is None else f"original {beside.value:.6f}"
        rows.append([score.metric, f"{score.value:.6f}", stderr, score.unit, original])
    head = ("metric", "value", "stderr", "unit", "")
    n_samples, seq_len = found.tokens.tokens.shape
    windows = (
        f"{n_samples} of {found.tokens.n_available} windows of {seq_len} tokens of "
        f"{found.tokens.name}, digest {found.tokens.digest[:12]}"
    )
    return f"{aligned(head, rows, left=('metric', 'unit', ''))}\n{windows}"


def evaluation_json(found: Evaluation) -> dict[str, Any]:
    """The scores with their provenance, for programs."""
    return {
        "model": found.spec.model,
        "reference": found.spec.reference,
        "scores": [asdict(s) for s in found.scores],
        "reference_scores": [asdict(s) for s in found.reference_scores],
        "data": found.tokens.provenance(),
        "versions": versions(),
    }


def _check(spec: EvaluateSpec) -> str:
    """Refuse what cannot be measured; the device otherwise."""
    unknown = sorted(set(spec.tasks) - set(TASKS))
    if unknown or not spec.tasks:
        asked = ", ".join(unknown) or "none"
        raise ConfigError(f"unknown tasks: {asked}; possible are {', '.join(TASKS)}; name some")
    if "kl" in spec.tasks and spec.reference is None:
        raise ConfigError(
            "kl compares with the original model and none is given; give --reference MODEL, or "
            "--tasks ppl"
        )
    if spec.batch_size < 1:
        raise ConfigError(f"batch_size is {spec.batch_size}; use 1 or more")
    return find_device(spec.device)


def _windows(spec: EvaluateSpec, name: str, model: nn.Module) -> TokenSet:
    """The windows, by the tokenizer and length limit of a model."""
    seq_len = seq_len_of(name, model, spec.seq_len)
    request = TextRequest(spec.data, "heldout", spec.n_samples, seq_len, spec.seed)
    return load_tokens(request, load_tokenizer(model_location(name)))


def _compare(
    spec: EvaluateSpec, reference_name: str, device: str, folder: Path, progress: Progress
) -> Evaluation:
    """Scores of the model and of its reference on the same windows."""
    progress("load", 0, 1)
    reference = open_model(reference_name, device, spec.dtype)
    tokens = _windows(spec, reference_name, reference)
    progress("load", 1, 1)
    size = spec.batch_size
    path = folder / "teacher.safetensors"
    teacher = store_teacher(path, reference, tokens.tokens, batch_size=size, progress=progress)
    own = measure_divergence(reference, tokens.tokens, teacher, batch_size=size)
    del reference
    progress("evaluate", 0, 1)
    model = open_model(spec.model, device, spec.dtype)
    found = measure_divergence(model, tokens.tokens, teacher, batch_size=size)
    progress("evaluate", 1, 1)
    metrics = {metric for task in spec.tasks for metric in TASKS[task]}
    scores, own_scores = (
        tuple(s for s in d.scores(tokens.digest) if s.metric in metrics) for d in (found, own)
    )
    return Evaluation(spec, scores, own_scores, tokens)
