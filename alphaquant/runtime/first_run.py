"""The first run of a packed checkpoint, from its files, before it is called done.

The reference is the original model with the dequantized weights of one layer at a time written in,
while that layer runs. The packed model runs plain torch. Every layer of it gets the reference's
outputs of the layer before, so that rounding does not add up, and the first layer that differs is
where the fault is.

Tolerance. Both compute the same products in the same dtype, at most in another order. The output
of a layer is a chain of about ten products; in float32 each has a relative error of sqrt(K) 2^-24,
6e-6 for K = 10^4 inputs, so 1e-4 is far above rounding and far below a wrong scale. In a dtype
with machine epsilon e every product is rounded to e / 2 besides: 16 e. A token whose router has a
tie within rounding may go to another expert: one token of 20 may differ.

Letters: T tokens, H hidden size, V words.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alphaquant.errors import ModelError
from alphaquant.models.mapping import device_of
from alphaquant.models.sites import LayerSite, ModelMap
from alphaquant.quant.layerwise import written
from alphaquant.runtime.checkpoint import LayerFile, load, read_layer
from alphaquant.runtime.modules import PackedLinear
from alphaquant.spaces.formats import BF16

N_TOKENS = 128
"""At most so many tokens of a window are run."""

_TIED_SHARE = 0.05
_CRASHES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
"""What a model's own code raises where tensors do not fit."""


@dataclass(frozen=True)
class FirstRun:
    """How it went.

    Attributes:
        n_tokens: run.
        text: `calibration` or `random`.
        device: of the packed model.
        max_relative_error: of any layer's output, or of the logits, of the 95 % of tokens that
            agree best.
        tolerance: what it had to stay within.
        seconds: wall time.
    """

    n_tokens: int
    text: str
    device: str
    max_relative_error: float
    tolerance: float
    seconds: float


@torch.no_grad()
def first_run(
    folder: Path,
    model_map: ModelMap,
    files: Mapping[int, LayerFile],
    tokens: Tensor | None,
) -> FirstRun:
    """Load a checkpoint, run one window and compare it with the dequantized reference.

    Args:
        folder: a complete packed checkpoint.
        model_map: the original model; it has its own weights afterwards.
        files: the checkpoint's layers, by number.
        tokens: calibration windows, int64 [N, T]; without them token ids are drawn.

    Raises:
        ModelError: it cannot be run, gives NaN, or other numbers than the reference.
    """
    started = time.perf_counter()
    window = _random_window(model_map.model) if tokens is None else tokens[:1, :N_TOKENS]
    dtype = next(p.dtype for p in model_map.model.parameters() if p.is_floating_point())
    with _told(folder, "the original model with its weights"):
        reference = _reference(folder, model_map, files, window)
    device = _device_for(folder, model_map.model)
    name = str(dtype).removeprefix("torch.")
    with _told(folder, "it"):
        packed = load(folder, device, name, kernels=False)
        errors = _compare(folder, packed, model_map.layers, reference, window)
    tolerance = 1e-4 + 16 * torch.finfo(dtype).eps
    for place, error in errors.items():
        if not error <= tolerance:
            raise _failure(
                folder,
                f"the output of {place} differs from the reference by {error:.2g} "
                f"(relative, at most {tolerance:.2g} is rounding)",
            )
    text = "random" if tokens is None else "calibration"
    seconds = time.perf_counter() - started
    return FirstRun(window.numel(), text, device, max(errors.values()), tolerance, seconds)


def _reference(
    folder: Path, model_map: ModelMap, files: Mapping[int, LayerFile], window: Tensor
) -> dict[str, Tensor]:
    """Outputs of the layers, by name, and `logits`, on the CPU."""
    found: dict[str, Tensor] = {}
    stack, ends = ExitStack(), model_map.ends

    def enter(layer: LayerSite) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            weights = read_layer(folder, files[layer.index], layer)
            stack.enter_context(written(model_map, weights))

        return hook

    def leave(layer: LayerSite) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            stack.close()
            found[layer.name] = _hidden(output).cpu()

        return hook

    handles = [layer.module.register_forward_pre_hook(enter(layer)) for layer in model_map.layers]
    handles += [layer.module.register_forward_hook(leave(layer)) for layer in model_map.layers]
    beside = {} if ends is None else read_layer(folder, files[ends.index], ends)
    try:
        with written(model_map, beside):
            found["logits"] = _logits(model_map.model, window).cpu()
    finally:
        stack.close()
        for handle in handles:
            handle.remove()
    for place, output in found.items():
        if not output.isfinite().all():
            raise _failure(
                folder,
                f"NaN or infinite numbers come out of {place}, in the original model with "
                "the dequantized weights too: the model is broken, or its dtype too narrow (use "
                "--dtype float32 or bfloat16)",
            )
    return found


def _compare(
    folder: Path,
    packed: nn.Module,
    layers: tuple[LayerSite, ...],
    reference: Mapping[str, Tensor],
    window: Tensor,
) -> dict[str, float]:
    """Relative error by place, in the order of the layers; the weights alone are compared.

    Where inputs are rounded the model runs once more with that, and must give numbers.
    """
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            hidden = _hidden(output)
            errors[name] = relative_error(hidden.cpu(), reference[name])
            expected = reference[name].to(hidden)
            return (expected, *output[1:]) if isinstance(output, tuple) else expected

        return hook

    handles = [
        packed.get_submodule(layer.name).register_forward_hook(compare(layer.name))
        for layer in layers
    ]
    rounding = [
        module
        for module in packed.modules()
        if isinstance(module, PackedLinear) and module.activation.is_quantized
    ]
    with _unrounded(rounding):
        try:
            logits = _logits(packed, window).cpu()
        finally:
            for handle in handles:
                handle.remove()
    errors["logits"] = relative_error(logits, reference["logits"])
    if rounding and not _logits(packed, window).isfinite().all():
        raise _failure(folder, "its logits are NaN or infinite where inputs are rounded")
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| of the worst token among the best 95 %.

    Args:
        found: [B, T, H]; NaN and infinity make it infinite.
        expected: finite, of the same shape.
    """
    if found.shape != expected.shape or not found.isfinite().all():
        return math.inf
    a, b = (t.to(torch.float64).flatten(0, -2) for t in (found, expected))  # [B * T, H]
    errors = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    n_tied = int(_TIED_SHARE * len(errors))
    return float(errors.sort().values[len(errors) - 1 - n_tied])


@contextmanager
def _unrounded(modules: list[PackedLinear]) -> Iterator[None]:
    activations = [module.activation for module in modules]
    for module in modules:
        module.activation = BF16
    try:
        yield
    finally:
        for module, activation in zip(modules, activations, strict=True):
            module.activation = activation


@contextmanager
def _told(folder: Path, what: str) -> Iterator[None]:
    """Turn what a model's code raises into one line."""
    try:
        yield
    except _CRASHES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _failure(folder, f"{what} cannot be run ({lines[0][:200]})") from error


def _failure(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"the checkpoint was written and its first run failed: {what}; it is kept in {folder} to "
        "look at, please report the architecture; remove the folder above it to start anew"
    )


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    logits: Tensor = model(window.to(device_of(model)), use_cache=False).logits
    return logits


def _hidden(output: Any) -> Tensor:
    """What a layer hands on, [B, T, H]."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _random_window(model: nn.Module) -> Tensor:
    """Token ids drawn with a fixed seed, int64 [1, 64]."""
    config: Any = model.config
    n_words = int(config.get_text_config().vocab_size)
    return torch.randint(n_words, (1, 64), generator=torch.Generator().manual_seed(0))


def _device_for(folder: Path, model: nn.Module) -> str:
    """The model's device if the checkpoint fits there beside the model, else the CPU."""
    device = device_of(model)
    if device.type != "cuda":
        return str(device)
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free, _ = torch.cuda.mem_get_info(device)
    return str(device) if 1.2 * n_bytes + 2**30 < free else "cpu"
