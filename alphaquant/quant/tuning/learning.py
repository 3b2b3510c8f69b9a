"""Tuning a quantized model end to end: codes stay, the free numbers move.

The quantized model, a copy, learns the predictions of the original: KL(original || quantized) in
nats per token, by Adam on the relative steps of `free_numbers.py`, with a warm-up and a cosine.
The calibration text is gone through once per epoch. After each epoch the divergence on other
windows is measured; of the best state the numbers are rounded to what is stored and it is measured
again. It is kept where that is less than at the start by more than twice the paired standard
error, and otherwise nothing is changed.

Memory holds the original, the copy and the copy's gradients, three times the model.

Sources: EfficientQAT, arXiv 2407.11062, section 3.3 (end-to-end training of scales); DWQ of mlx-lm
(distillation into scales and biases); Adam, arXiv 1412.6980.

Letters: S windows, T tokens, V words.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import (
    checkpoint_dtype,
    device_of,
    kept_state,
    map_model,
    stored_dtype,
)
from alphaquant.models.pages.memory import GIB, free_memory
from alphaquant.models.sites import ModelMap
from alphaquant.quant.matrix import PackedMatrix
from alphaquant.quant.tuning.free_numbers import FreeParameter, FreeScales
from alphaquant.specs.tuning import TuningSettings

_BETAS, _EPS = (0.9, 0.99), 1e-12
_WARM_UP = 8
"""Steps until the step size is reached."""

_MOST_BYTES = 2**28
"""Float32 logits of the windows that are run together."""


@dataclass(frozen=True)
class Tuning:
    """How a model is tuned.

    Attributes:
        settings: what moves, and how far.
        tokens: windows to learn from, int64 [S, T].
        heldback: windows that decide what is kept, int64 [S', T], others than those.
    """

    settings: TuningSettings
    tokens: Tensor
    heldback: Tensor


@dataclass(frozen=True)
class Tuned:
    """What tuning made of a model.

    Attributes:
        packed: the matrices that moved, by name; none where nothing was gained.
        kept: new values of parameters that are stored as they are, by name in the state.
        facts: for the report: divergences before and after, and whether they were kept.
    """

    packed: Mapping[str, PackedMatrix]
    kept: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def tune(
    model_map: ModelMap,
    packed: Mapping[str, PackedMatrix],
    tuning: Tuning,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Move the free numbers of a quantized model so that it predicts what the original does.

    Args:
        model_map: the original model, which is not changed.
        packed: every matrix, by name.
        tuning: how.
        tell: told of every step.

    Raises:
        ModelError: memory does not hold three times the model.
    """
    check_memory(model_map.model)
    student = _Student(model_map, packed, tuning.settings.parts)
    before = _divergences(model_map.model, student.model, tuning.heldback)
    by_epoch = _learn(student, model_map.model, tuning, float(before.mean()), tell)
    moved, kept = student.rounded()
    after = _divergences(model_map.model, student.model, tuning.heldback)
    gain = before - after
    error = float(gain.std() / math.sqrt(len(gain))) if len(gain) > 1 else math.inf
    is_kept = float(gain.mean()) > 2 * error
    facts = {
        **asdict(tuning.settings),
        "n_windows": len(tuning.tokens),
        "heldback_windows": len(tuning.heldback),
        "kl_before": float(before.mean()),
        "kl_by_epoch": by_epoch,
        "kl_after": float(after.mean()),
        "gain": float(gain.mean()),
        "gain_stderr": error,
        "is_kept": is_kept,
        "fixed_matrices": sorted(packed.keys() - moved.keys()),
    }
    return Tuned(moved, kept, facts) if is_kept else Tuned({}, {}, facts)


def _learn(
    student: "_Student",
    original: nn.Module,
    tuning: Tuning,
    kl_before: float,
    tell: Callable[[int, int], None],
) -> list[float]:
    """Take all steps, and go back to the best epoch, or to the start where none is better.

    Args:
        student: what learns.
        original: what it learns from.
        tuning: how.
        kl_before: its divergence at the start.
        tell: told of every step.

    Returns:
        The divergence after each epoch.
    """
    settings, tokens = tuning.settings, tuning.tokens
    n_steps = settings.n_epochs * -(-len(tokens) // settings.windows)
    best, best_kl, by_epoch = student.state(), kl_before, list[float]()
    generator, step = torch.Generator().manual_seed(settings.seed), 0
    for _ in range(settings.n_epochs):
        order = torch.randperm(len(tokens), generator=generator)
        for chosen in torch.split(order, settings.windows):
            tell(step, n_steps)
            student.learn(original, tokens[chosen])
            step += 1
            size = min(step / _WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / (n_steps + 1)))
            student.move(settings.step_size * size, step)
        by_epoch.append(float(_divergences(original, student.model, tuning.heldback).mean()))
        if by_epoch[-1] < best_kl:
            best, best_kl = student.state(), by_epoch[-1]
    tell(n_steps, n_steps)
    student.restore(best)
    return by_epoch


class _Student:
    """A copy of the model with quantized weights, whose free numbers move."""

    def __init__(
        self, original: ModelMap, packed: Mapping[str, PackedMatrix], parts: tuple[str, ...]
    ) -> None:
        self.map = map_model(copy.deepcopy(original.model), include=original.inventory.include)
        self.model: nn.Module = self.map.model
        device = device_of(self.model)
        self._views, self._scales = self.map.views, dict[str, FreeScales]()
        with torch.no_grad():
            for name, matrix in packed.items():
                found = FreeScales.of(matrix, device) if "scales" in parts else None
                if found is not None:
                    self._scales[name] = found
                self._views[name].copy_(matrix.to(device).dequantize())
        self._parameters = self._free_parameters(parts)
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        self._at_weights = self._prepare_gradients()

    @torch.enable_grad()
    def learn(self, original: nn.Module, tokens: Tensor) -> None:
        """Add the gradients of the mean divergence over some windows."""
        n_together = _n_together(original, tokens)
        for part in torch.split(tokens.to(device_of(original)), n_together):
            divergence = _divergence(original, self.model, part).sum() / tokens.numel()
            divergence.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def move(self, size: float, step: int) -> None:
        """Take a step of Adam, and forget the gradients."""
        for name, free in self._scales.items():
            base = free.base()
            gradient = free.gradient(self._at_weights[name], base)
            free.steps -= size * self._direction(name, gradient, step)
            self._views[name].copy_(free.weights(base))
        for parameter in self._parameters:
            own = self.model.get_parameter(parameter.name)
            assert own.grad is not None
            gradient = parameter.gradient(own.grad)
            parameter.steps -= size * self._direction(parameter.name, gradient, step)
            own.copy_(parameter.value())
        for own in self.model.parameters():
            if own.grad is not None:
                own.grad.zero_()

    def state(self) -> list[Tensor]:
        """Copies of all u."""
        return [free.steps.clone() for free in self._free]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to a state; the model's weights follow in `rounded`."""
        for free, steps in zip(self._free, state, strict=True):
            free.steps.copy_(steps)

    @property
    def _free(self) -> list[FreeScales | FreeParameter]:
        """All that moves, in one order."""
        return [*self._scales.values(), *self._parameters]

    @torch.no_grad()
    def rounded(self) -> tuple[dict[str, PackedMatrix], dict[str, Tensor]]:
        """Matrices and parameters as they are stored, which the model then has."""
        packed = {name: free.rounded() for name, free in self._scales.items()}
        for name, matrix in packed.items():
            self._views[name].copy_(matrix.to(self._views[name].device).dequantize())
        kept = {parameter.name: parameter.rounded() for parameter in self._parameters}
        for name, value in kept.items():
            self.model.get_parameter(name).copy_(value)
        return packed, kept

    def _direction(self, name: str, gradient: Tensor, step: int) -> Tensor:
        """Adam's direction, of about unit size."""
        if name not in self._moments:
            self._moments[name] = (torch.zeros_like(gradient), torch.zeros_like(gradient))
        first, second = self._moments[name]
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        mean, power = first / (1 - _BETAS[0] ** step), second / (1 - _BETAS[1] ** step)
        return mean / (power.sqrt() + _EPS)

    def _free_parameters(self, parts: tuple[str, ...]) -> list[FreeParameter]:
        """Norms and biases are vectors, routers what stays with a row for every expert."""
        named, dtype = dict(self.model.named_parameters()), checkpoint_dtype(self.model)
        routers = {
            s.name
            for layer in self.map.layers
            for site in layer.experts
            for s in self.map.staying
            if site.is_routed
            and s.name.startswith(f"{layer.name}.")
            and s.name in named
            and len(named[s.name]) == site.n_experts
        }
        found = []
        for name in kept_state(self.model, self.map.parts).keys() & named.keys():
            tensor = named[name]
            part = "routers" if name in routers else "norms" if tensor.dim() == 1 else None
            if part in parts:
                found.append(FreeParameter.of(name, tensor, stored_dtype(tensor, dtype)))
        return sorted(found, key=lambda parameter: parameter.name)

    def _prepare_gradients(self) -> dict[str, Tensor]:
        """Give parameters that matter a gradient of zeros; that of each matrix, as its view.

        A gradient has the layout of its parameter, so what finds a matrix in the weights finds
        its gradient in the gradients.
        """
        named = {parameter.name for parameter in self._parameters}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in named)
        pointers = {view.untyped_storage().data_ptr() for view in self._views.values()}
        weights = [
            p for p in self.model.parameters() if p.untyped_storage().data_ptr() in pointers
        ]
        for parameter in weights:
            parameter.requires_grad_(True)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        kept = [parameter.data for parameter in weights]
        try:
            for parameter in weights:
                assert parameter.grad is not None
                parameter.data = parameter.grad
            return dict(pair for part in self.map.parts for pair in part.views())
        finally:
            for parameter, data in zip(weights, kept, strict=True):
                parameter.data = data


def check_memory(model: nn.Module) -> None:
    """Refuse a model that is too large beside its copy and the gradients of that.

    Raises:
        ModelError: saying how much there is.
    """
    device = device_of(model)
    n_bytes = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if n_bytes > free:
        raise ModelError(
            f"tuning needs a copy of the model and its gradients, {n_bytes / GIB:.1f} GiB more, "
            f"and {free / GIB:.1f} GiB are free; leave --tune out, or use a machine with more"
        )


def _n_together(model: nn.Module, tokens: Tensor) -> int:
    """Windows whose logits are within `_MOST_BYTES`, one at least."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    return max(1, _MOST_BYTES // (4 * tokens.shape[1] * vocabulary))


@torch.no_grad()
def _divergences(original: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
    """Mean divergence per token of every window, float64 [S]."""
    parts = torch.split(tokens.to(device_of(original)), _n_together(original, tokens))
    found = [_divergence(original, student, part).double().mean(-1) for part in parts]
    return torch.cat(found).cpu()


def _divergence(original: nn.Module, student: nn.Module, tokens: Tensor) -> Tensor:
    """KL(original || student) at every position, float32 [S, T]."""
    with torch.no_grad():
        p = torch.log_softmax(original(tokens, use_cache=False).logits.float(), -1)
    q = torch.log_softmax(student(tokens, use_cache=False).logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1)
