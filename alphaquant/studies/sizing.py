"""Sizes that fit the model: how much text, rounding and how many trials an effort stands for.

Calibration text follows from the model: rounding and costs of a routed expert rest on the tokens
that reach it, n k / E of n, and a Hessian of K inputs needs about as many. The texts that are only
measured on follow from the error that they buy, which does not depend on the model's size: on the
demo 12 288 tokens give the winner's KL with a standard error of 4 %, and it falls with the root of
their number.

Nothing here depends on the machine, so that a search goes on elsewhere; what fits a machine and a
time is `alphaquant.studies.planning`.

Letters: E routed experts of a layer, k of them per token, K inputs of a matrix, n tokens.
"""

from dataclasses import dataclass
from typing import Any

from alphaquant.models.loads import experts_per_token
from alphaquant.models.sites import ModelMap
from alphaquant.spaces.units import Inventory
from alphaquant.specs.flat import replaced
from alphaquant.specs.quantizer import RoundingSpec
from alphaquant.specs.run import EffortName
from alphaquant.specs.search import SearchSpec
from alphaquant.studies.inputs import seq_len_of

MOST_CALIBRATION = 2**17
"""Tokens; more than the embedded text may have, and rounding gains little by then."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What is spent where nothing was asked for.

    Attributes:
        tokens_per_input: calibration tokens of a routed expert for every input of its matrices.
        least_calibration: calibration tokens of models with few or no experts.
        evaluation: tokens of every trial.
        heldout: tokens of the gate.
        n_starts: of the quantizer.
        refine_sweeps: of the quantizer.
        two_sided: whether the quantizer weighs errors by gradients at the outputs.
        trials: at most; None for as many as the gain that is expected is worth.
        n_front_sizes: sizes over the menu that are tried beside the budget.
        n_probes: random assignments that test how costs rank; of a few the rank correlation says
            nothing, so quick has none.
        probe_tokens: on which.
        anchor_bits: bits per weight of the formats that a short bank holds of every matrix, beside
            that of the budget and the format to compare with.
        around: sizes beside the budget, bits per weight, for which it holds what can win.
    """

    tokens_per_input: float
    least_calibration: int
    evaluation: int
    heldout: int
    n_starts: int
    refine_sweeps: int
    two_sided: bool
    trials: int | None
    n_front_sizes: int
    n_probes: int
    probe_tokens: int
    anchor_bits: tuple[float, ...]
    around: tuple[float, ...]


_ANCHORS, _AROUND = (2.25, 6.25), (-0.4, -0.2, 0.0, 0.2, 0.4)

EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(
        tokens_per_input=1,
        least_calibration=2**13,
        evaluation=2**13,
        heldout=2**13,
        n_starts=1,
        refine_sweeps=1,
        two_sided=False,
        trials=10,
        n_front_sizes=3,
        n_probes=0,
        probe_tokens=0,
        anchor_bits=(),
        around=(0.0,),
    ),
    "default": Effort(
        tokens_per_input=2,
        least_calibration=2**15,
        evaluation=12_288,
        heldout=2**14,
        n_starts=2,
        refine_sweeps=3,
        two_sided=True,
        trials=None,
        n_front_sizes=8,
        n_probes=30,
        probe_tokens=2**12,
        anchor_bits=_ANCHORS,
        around=_AROUND,
    ),
    "thorough": Effort(
        tokens_per_input=8,
        least_calibration=2**16,
        evaluation=2**15,
        heldout=2**16,
        n_starts=2,
        refine_sweeps=8,
        two_sided=True,
        trials=None,
        n_front_sizes=16,
        n_probes=60,
        probe_tokens=2**13,
        anchor_bits=_ANCHORS,
        around=_AROUND,
    ),
}


def effort_of(spec: SearchSpec) -> Effort:
    """The effort of a search."""
    return EFFORTS[spec.run.effort]


def sized(spec: SearchSpec, model_map: ModelMap) -> SearchSpec:
    """A specification without open sizes: those that were not given follow from model and effort.

    Worked example: OLMoE has 64 experts, 8 of them per token, and 2048 inputs; by default an
    expert gets 2 tokens for every input, so the text has 2 * 2048 * 64 / 8 = 32768 tokens, 64
    windows of 512.

    Args:
        spec: what was asked.
        model_map: the model.

    Raises:
        DataError: the model cannot take windows of the length asked for.
    """
    effort, texts, rounding = effort_of(spec), spec.texts, spec.quantizer
    seq_len = seq_len_of(spec.checkpoint.model, model_map.model, texts.seq_len)
    calibration = _calibration_tokens(effort, model_map.inventory, model_map.model.config)
    open_sizes: dict[str, Any] = {
        "calibration_samples": -(-calibration // seq_len),
        "evaluation_samples": max(2, -(-effort.evaluation // seq_len)),
        "heldout_samples": max(2, -(-effort.heldout // seq_len)),
        "n_starts": effort.n_starts,
        "refine_sweeps": effort.refine_sweeps,
        "two_sided": effort.two_sided and rounding.method == "gptq",
        "trials": effort.trials,
    }
    given = (texts, rounding, spec.run)
    asked = {
        name: getattr(part, name) for part in given for name in open_sizes.keys() & vars(part)
    }
    found = {
        name: size if asked[name] is None else asked[name] for name, size in open_sizes.items()
    }
    return replaced(spec, seq_len=seq_len, **found)


def size_lines(spec: SearchSpec) -> list[str]:
    """The sizes of a search, for people."""
    texts, rounding = spec.texts, spec.quantizer
    windows = ", ".join(
        f"{n} of {what}"
        for n, what in (
            (texts.calibration_samples, "calibration"),
            (texts.evaluation_samples, "evaluation"),
            (texts.heldout_samples, "held-out text"),
        )
    )
    trials = (
        "as many trials as they are worth"
        if spec.run.trials is None
        else (f"at most {spec.run.trials} trials")
    )
    return [
        f"effort {spec.run.effort}: windows of {texts.seq_len} tokens, {windows}",
        f"rounding {_rounding_words(rounding)}; {trials}",
    ]


def _rounding_words(rounding: RoundingSpec) -> str:
    if rounding.two_sided:
        return f"for inputs and outputs with {rounding.refine_sweeps} sweeps"
    return f"from {rounding.n_starts} starts with {rounding.refine_sweeps} sweeps"


def _calibration_tokens(effort: Effort, inventory: Inventory, config: Any) -> int:
    """Tokens that give the routed experts of the most inputs what the effort asks for."""
    n_tokens = effort.least_calibration
    experts = [m for m in inventory.matrices if m.expert is not None]
    if experts:
        n_experts = 1 + max(m.expert or 0 for m in experts)
        share = experts_per_token(config, n_experts) / n_experts
        n_inputs = max(m.cols for m in experts)
        n_tokens = max(n_tokens, round(effort.tokens_per_input * n_inputs / share))
    return min(n_tokens, MOST_CALIBRATION)
