"""The first stages of a search: its model and texts, and what the original predicts.

Each returns plain data for the next. What is expensive is kept in the cache and found again by
digest, so a stage that ran before costs a read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from alphaquant.evaluators.base import Score
from alphaquant.evaluators.divergence import measure_divergence
from alphaquant.evaluators.scores import ScorePlan, plan_scores
from alphaquant.evaluators.teacher import TOP_K, Teacher, store_teacher
from alphaquant.evaluators.teacher_parts import store_teacher_by
from alphaquant.models.walk import releasing
from alphaquant.progress import Progress, Stage, StageClock, no_progress
from alphaquant.quant.foreign.candidates import Candidates
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import SOURCE_STEPS, Source, cache_dir, read_text
from alphaquant.studies.objective import EvaluationSet
from alphaquant.studies.sizing import sized
from alphaquant.texts.windows import TokenSet, check_disjoint, shuffled

LOAD_STEPS = SOURCE_STEPS + 4
"""Steps of loading: those of the model, three texts, the output directory with its study."""


@dataclass(frozen=True)
class Inputs:
    """A model with its three texts.

    Attributes:
        source: the model that is quantized.
        calibration: for Hessians and costs.
        evaluation: what the search sees.
        heldout: for the gate.
        scores: what is measured on the evaluation text besides bits and KL.
        candidates: checkpoints to choose from; None where formats are made.
        original: the model as it was, where that which is quantized is a rotated copy.
    """

    source: Source
    calibration: TokenSet
    evaluation: TokenSet
    heldout: TokenSet
    scores: ScorePlan = field(default_factory=ScorePlan)
    candidates: Candidates | None = None
    original: Source | None = None

    @property
    def reference(self) -> Source:
        """The model that all others are compared with."""
        return self.original or self.source

    def text_facts(self) -> dict[str, Mapping[str, Any]]:
        """Provenance of the texts, by role."""
        texts = (self.calibration, self.evaluation, self.heldout)
        return {text.role: text.provenance() for text in texts}

    def digests(self) -> dict[str, str]:
        """What trials depend on besides the specification: sha256 of weights and windows."""
        return {
            "weights": self.source.digest,
            **({} if self.original is None else {"original_weights": self.original.digest}),
            "calibration_text": self.calibration.digest,
            "evaluation_text": self.evaluation.digest,
            "heldout_text": self.heldout.digest,
            **self.scores.facts(),
            **({} if self.candidates is None else {"candidate_files": self.candidates.digest}),
        }


def load_inputs(spec: SearchSpec, source: Source, progress: Progress = no_progress) -> Inputs:
    """Find the scores that are asked for, read the three texts, check that they share nothing.

    Args:
        spec: what was asked; open sizes are those of its effort.
        source: the model.
        progress: called with ("load", steps done, `LOAD_STEPS`) after each text.

    Raises:
        ConfigError: a score that does not exist.
        DataError: a text cannot be found, is too short or overlaps with another.
    """
    data = sized(spec, source.map).texts
    scores = plan_scores(spec.scores, source.tokenizer, data.bos)
    texts: list[TokenSet] = []
    for text, role, n_samples in (
        (data.calibration, "calibration", data.calibration_samples),
        (data.evaluation, "search", data.evaluation_samples),
        (data.heldout, "heldout", data.heldout_samples),
    ):
        assert n_samples is not None, "no size is open now"
        texts.append(
            read_text(
                *(source, text, role, n_samples, data.seq_len, spec.proposals.seed, data.bos),
                progress=progress,
            )
        )
        progress(Stage.LOAD, SOURCE_STEPS + len(texts), LOAD_STEPS)
    for i, a in enumerate(texts):
        for b in texts[i + 1 :]:
            check_disjoint(a, b)
    calibration, evaluation, heldout = texts
    return Inputs(source, calibration, shuffled(evaluation), heldout, scores)


@dataclass(frozen=True)
class Teachers:
    """Predictions of the original; all come before the first swap, which overwrites it.

    Attributes:
        evaluation: what the search sees.
        heldout: for the gate.
        rotated: KL of the rotated weights in their stored dtype on the latter; None where nothing
            is rotated.
    """

    evaluation: EvaluationSet
    heldout: EvaluationSet
    rotated: Score | None = None


def _store_teacher(path: Path, source: Source, tokens: Tensor, progress: Progress) -> Teacher:
    """The original's predictions of a text, by workers where there are some."""
    if source.workers is not None:
        return store_teacher_by(source.workers, path, tokens, TOP_K, progress)
    model_map = source.map
    return store_teacher(
        *(path, model_map.model, tokens),
        top_k=TOP_K,
        model_map=model_map,
        progress=progress,
    )


def store_teachers(spec: SearchSpec, inputs: Inputs, clock: StageClock) -> Teachers:
    """Compute the original's predictions, or open those of an earlier run."""
    texts = (inputs.evaluation, inputs.heldout)
    total, done = sum(len(t.tokens) for t in texts), 0
    sets, reference = [], inputs.reference
    for tokens in texts:
        facts = (reference.digest[:16], tokens.digest[:16], reference.runs_as, str(TOP_K))
        path = cache_dir(spec.run.cache) / "teachers" / f"{'-'.join(facts)}.safetensors"
        clock(Stage.TEACHER, done, total)
        progress = clock.shifted(done, total)
        teacher = _store_teacher(path, reference, tokens.tokens, progress)
        sets.append(EvaluationSet(tokens, teacher))
        done += len(tokens.tokens)
    clock(Stage.TEACHER, total, total)
    evaluation, heldout = sets
    return Teachers(evaluation, heldout, _rotated_kl(inputs, heldout))


def _rotated_kl(inputs: Inputs, heldout: EvaluationSet) -> Score | None:
    """What rounding the rotated weights to their stored dtype costs alone."""
    if inputs.original is None:
        return None
    model_map, tokens = inputs.source.map, heldout.tokens
    with releasing(model_map):
        found = measure_divergence(model_map.model, tokens.tokens, heldout.teacher)
    return next(s for s in found.scores(tokens.digest) if s.metric == "kl")
