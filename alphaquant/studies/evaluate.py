"""`evaluate`: scores of a model or packed checkpoint, beside its reference where one is given."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from alphaquant.errors import ConfigError
from alphaquant.evaluators.base import Score
from alphaquant.evaluators.data import TokenSet
from alphaquant.evaluators.divergence import measure_divergence, store_teacher
from alphaquant.evaluators.perplexity import measure_perplexity
from alphaquant.quant.bank import Progress
from alphaquant.quant.checkpoint import is_packed, load
from alphaquant.quant.models import load_model, load_tokenizer
from alphaquant.studies.sources import default_seq_len_of, find_device, model_location, read_windows

TASKS = ("kl", "ppl")


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
    tasks: tuple[str, ...] = TASKS
    data: str = "demo"
    n_samples: int = 64
    seq_len: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model, those of the reference on the same windows, and what they were measured on."""

    scores: tuple[Score, ...]
    reference_scores: tuple[Score, ...]
    tokens: TokenSet


def evaluate(spec: EvaluateSpec, *, progress: Progress = lambda stage, done, total: None) -> Evaluation:
    """Measure a model.

    Args:
        spec: what to measure.
        progress: called with a stage's name, steps done, steps.

    Raises:
        AlphaQuantError: bad input, see the kinds in `alphaquant.errors`.
    """
    unknown = sorted(set(spec.tasks) - set(TASKS))
    if unknown or not spec.tasks:
        raise ConfigError(f"unknown tasks {', '.join(unknown) or '(none)'}; possible are {', '.join(TASKS)}")
    if "kl" in spec.tasks and spec.reference is None:
        raise ConfigError("kl compares with the original model; give --reference MODEL, or --tasks ppl")
    device = find_device(spec.device)
    progress("load", 0, 1)
    model = open_model(spec.model, device, spec.dtype)
    tokenizer_of = spec.model if is_packed(spec.model) or spec.reference is None else spec.reference
    tokenizer = load_tokenizer(model_location(tokenizer_of))
    seq_len = spec.seq_len or default_seq_len_of(spec.reference or spec.model, model)
    tokens = read_windows(tokenizer, spec.data, "heldout", spec.n_samples, seq_len, spec.seed)
    progress("load", 1, 1)
    if spec.reference is None or "kl" not in spec.tasks:
        score = measure_perplexity(model, tokens.tokens, tokens.digest, batch_size=spec.batch_size)
        return Evaluation((score,), (), tokens)
    return _compare(spec, model, tokens, device, progress)


def open_model(name: str, device: str, dtype: str) -> nn.Module:
    """A packed checkpoint or any model that transformers loads."""
    return load(name, device, dtype) if is_packed(name) else load_model(model_location(name), device, dtype)


def _compare(spec: EvaluateSpec, model: nn.Module, tokens: TokenSet, device: str, progress: Progress) -> Evaluation:
    assert spec.reference is not None
    with tempfile.TemporaryDirectory(prefix="alphaquant-") as folder:
        reference = open_model(spec.reference, device, spec.dtype)
        teacher = store_teacher(
            Path(folder) / "teacher.safetensors", reference, tokens.tokens, batch_size=spec.batch_size, progress=progress
        )
        own = measure_divergence(reference, tokens.tokens, teacher, batch_size=spec.batch_size)
        del reference
        progress("evaluate", 0, 1)
        found = measure_divergence(model, tokens.tokens, teacher, batch_size=spec.batch_size)
        progress("evaluate", 1, 1)
    wanted = {"kl": ("kl", "same_top"), "ppl": ("perplexity",)}
    metrics = {m for task in spec.tasks for m in wanted[task]}
    scores = tuple(s for s in found.scores(tokens.digest) if s.metric in metrics)
    reference_scores = tuple(s for s in own.scores(tokens.digest) if s.metric in metrics)
    return Evaluation(scores, reference_scores, tokens)
