"""The contract of evaluators, to run over any of them, and subjects to run it on.

    check_evaluator(evaluator, round_model(tiny_model("olmoe"), "int8-g64"))
    check_worse(evaluator, fine, coarse, ("kl",))

Checks raise AssertionError with what was broken.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.evaluators.base import Evaluated, Evaluator, Score, Subject
from alphaquant.models.mapping import map_model
from alphaquant.quant.engine import quantize_layer
from alphaquant.spaces.assignment import uniform_assignment
from alphaquant.specs.quantizer import QuantSettings

_RTN = QuantSettings(method="rtn")


def round_model(model: nn.Module, format_name: str) -> Subject:
    """Round every quantizable matrix of a model to the nearest, in place.

    Args:
        model: a causal language model that the caller gives away.
        format_name: canonical name.

    Returns:
        The model with its inventory and assignment.
    """
    model_map = map_model(model)
    for layer in model_map.layers:
        for item in quantize_layer(model_map, layer, None, [format_name], _RTN):
            model_map.view(item.matrix.name).copy_(item.packed.dequantize())
    inventory = model_map.inventory
    return Subject(model, inventory, uniform_assignment(inventory, format_name))


def check_evaluator(evaluator: Evaluator, subject: Subject) -> None:
    """Run every check of one subject.

    Args:
        evaluator: what is tested.
        subject: what it must be able to measure; left as it was.
    """
    for check in CHECKS:
        check(evaluator, subject)


def check_scores(evaluator: Evaluator, subject: Subject) -> None:
    """One score per metric, in their order, finite, with what is needed to trust it."""
    name, scores = evaluator.name, evaluator.evaluate(subject).scores
    named = [(score.metric, score.unit, score.direction) for score in scores]
    expected = [(metric.name, metric.unit, metric.direction) for metric in evaluator.metrics]
    assert named == expected, f"{name}: scores {named}, metrics {expected}"
    assert len({metric for metric, *_ in expected}) == len(expected) > 0, f"{name}: metrics"
    for score in scores:
        assert math.isfinite(score.value), f"{name}: {score.metric} is {score.value}"
        error = score.stderr
        is_error = error is None or math.isnan(error) or 0 <= error < math.inf
        assert is_error, f"{name}: {score.metric} has the standard error {error}"
        is_single = error is not None and math.isnan(error)
        assert not (is_single and score.n_samples > 1), f"{name}: {score.metric}: NaN from many"
        assert score.n_samples > 0 and score.n_tokens > 0, f"{name}: {score.metric}: no samples"
        assert score.seconds >= 0, f"{name}: {score.metric} took {score.seconds} seconds"
        is_digest = len(score.data_digest) == 64 and set(score.data_digest) <= set(_HEX)
        assert is_digest, f"{name}: {score.metric} has no data digest"


def check_repeats(evaluator: Evaluator, subject: Subject) -> None:
    """Equal subjects give equal scores and details, seconds apart."""
    first, second = (_timeless(evaluator.evaluate(subject)) for _ in range(2))
    assert first == second, f"{evaluator.name}: {first}, then {second}"


def check_details(evaluator: Evaluator, subject: Subject) -> None:
    """Details are strict JSON, and the same after writing and reading."""
    details = evaluator.evaluate(subject).details
    again = json.loads(json.dumps(details, allow_nan=False))
    assert again == details, f"{evaluator.name}: details change in JSON"


def check_left_as_found(evaluator: Evaluator, subject: Subject) -> None:
    """Weights, training and gradient flags, hooks and torch's own state stay as they are.

    They are made unusual first: a module in training mode, a parameter that wants a gradient, a
    hook of the caller's.
    """
    model = subject.model
    odd = list(model.modules())[-1]
    parameter = next(model.parameters())
    found = (odd.training, parameter.requires_grad)
    handle = odd.register_forward_hook(lambda *_: None)
    odd.training, parameter.requires_grad = True, True
    try:
        weights, state = _weights(model), _state(model)
        evaluator.evaluate(subject)
        changed = [n for n, t in _weights(model).items() if not _is_same(weights.get(n), t)]
        assert not changed, f"{evaluator.name}: changed {changed[:3]}"
        after = _state(model)
        differing = [key for key in state if after[key] != state[key]]
        assert not differing, f"{evaluator.name}: left other {differing}"
    finally:
        handle.remove()
        odd.training, parameter.requires_grad = found


CHECKS: tuple[Callable[[Evaluator, Subject], None], ...] = (
    check_scores,
    check_repeats,
    check_details,
    check_left_as_found,
)
"""What every evaluator promises of a subject."""


def check_worse(
    evaluator: Evaluator, better: Subject, worse: Subject, metrics: tuple[str, ...]
) -> None:
    """The worse of two models has the worse scores, by each metric's direction.

    Args:
        evaluator: what is tested.
        better: e.g. rounded to 8 bits.
        worse: e.g. the same model rounded to 2 bits.
        metrics: names of those that must tell; an evaluator may have others.
    """
    fine, coarse = (_by_metric(evaluator.evaluate(s)) for s in (better, worse))
    unknown = set(metrics) - set(fine)
    assert not unknown, f"{evaluator.name} has no {sorted(unknown)}"
    for name in metrics:
        loss = coarse[name].value - fine[name].value
        if fine[name].direction == "maximize":
            loss = -loss
        assert loss > 0, f"{evaluator.name}: {name} {fine[name].value} -> {coarse[name].value}"


_HEX = "0123456789abcdef"

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where torch keeps the hooks of a module."""


def _timeless(found: Evaluated) -> tuple[list[Score], Mapping[str, Any]]:
    """What must repeat; NaN is written as -1, which no standard error is."""
    scores = [
        replace(
            s,
            seconds=0.0,
            stderr=-1.0 if s.stderr is not None and s.stderr != s.stderr else s.stderr,
        )
        for s in found.scores
    ]
    return scores, found.details


def _by_metric(found: Evaluated) -> dict[str, Score]:
    return {score.metric: score for score in found.scores}


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def _is_same(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and before.dtype == after.dtype and torch.equal(before, after)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything but the weights that an evaluation could leave behind."""
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [list(getattr(module, kind)) for kind in _HOOKS]
            for name, module in modules.items()
        },
        "forward functions": {name: vars(m).get("forward") for name, m in modules.items()},
        "gradient flags": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: p.grad is None for name, p in parameters.items()},
        "gradient mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "random state": torch.get_rng_state().tolist(),
    }
