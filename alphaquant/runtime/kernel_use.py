"""Which modules of a packed model the GPU kernels run, and putting them in place.

    use_kernels(model)      kernels wherever they can, plain torch elsewhere
    kernel_uses(model)      which module runs how, and why

Kernels are tried before they are trusted: one matrix of every format, and experts with every
format of gate, of up and of down, must give on this device what dequantized weights give in
float32.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alphaquant.errors import FormatError, ModelError
from alphaquant.kernels.order import check_super, layout_of, span_of
from alphaquant.models.quantization_config import QUANT_METHOD
from alphaquant.models.sites import ExpertsSite
from alphaquant.runtime.activations import fake_quantize
from alphaquant.runtime.kernel_modules import (
    PROJECTIONS,
    KernelExperts,
    KernelLinear,
    linears_of,
)
from alphaquant.runtime.modules import PackedExpert, PackedExperts, PackedLinear
from alphaquant.spaces.formats import Format

logger = logging.getLogger(__name__)

IMPLEMENTATION = QUANT_METHOD
"""Name of the kernels among transformers' implementations of experts."""

_BF16 = "torch multiplies by bf16 matrices"
_LEAST_CAPABILITY = (8, 0)
_E4M3_CAPABILITY = (8, 9)
_N_TRIED = 4
"""Tokens of a comparison."""

_ALLOWED_ERROR = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}
"""Relative to the largest output; rounding of inputs and weights alone gives about half of it."""


@dataclass(frozen=True)
class KernelUse:
    """How one packed module runs.

    Attributes:
        name: of the module.
        is_kernel: whether kernels run it.
        reason: why plain torch does, else empty.
    """

    name: str
    is_kernel: bool
    reason: str = ""


class _Place(NamedTuple):
    """Where a format is used: in a linear, or in a projection of an expert."""

    projection: str
    format: Format


def use_kernels(model: nn.Module) -> list[KernelUse]:
    """Let kernels run the packed modules of a model, in place; what they cannot stays in torch.

    Args:
        model: with packed modules, all on their devices; with expert parallelism, divided.

    Returns:
        What `kernel_uses` gives afterwards.

    Raises:
        ModelError: kernels cannot run here, or the model has no packed modules; it is as it was.
            Or a kernel fails or gives other numbers than torch, when modules before it have been
            replaced: load the model again.
    """
    names = [name for name, _ in _packed_modules(model)]
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no packed matrices for kernels to run; give a model "
            "loaded from a checkpoint of aq-quantize"
        )
    problem = _problem_of(model)
    if problem is not None:
        raise ModelError(f"kernels were asked for, but {problem}; or load with kernels=False")
    import_module("alphaquant.kernels.ops_triton")
    checked: set[_Place] = set()
    for name in names:  # names only: a module that is replaced must not stay in memory
        _replace(model, name, checked)
    uses = kernel_uses(model)
    _log(uses)
    return uses


def use_kernels_where_possible(model: nn.Module) -> None:
    """`use_kernels` on GPUs; where kernels cannot run there, the log says why."""
    devices = {_device(module) for _, module in _packed_modules(model)}
    if not devices or any(device.type != "cuda" for device in devices):
        return
    problem = _problem_of(model)
    if problem is None:
        use_kernels(model)
    else:
        logger.warning("packed matrices run in plain torch: %s", problem)


def kernel_uses(model: nn.Module) -> list[KernelUse]:
    """How the packed modules of a model run; the matrices of an experts module are one row."""
    return [
        KernelUse(name, True)
        if is_kernel(module)
        else KernelUse(name, False, why_torch(module) or "kernels are not in use: use_kernels")
        for name, module in _packed_modules(model)
    ]


def can_compile(model: nn.Module) -> bool:
    """Whether `torch.compile` takes a model with kernels in one graph.

    Not where experts run one by one: packed ones in plain torch, and those in a ModuleList.
    """
    modules = list(model.modules())
    one_by_one = any(
        _is_expert_list(m) or (isinstance(m, PackedExperts) and not is_kernel(m)) for m in modules
    )
    return any(map(is_kernel, modules)) and not one_by_one


def _is_expert_list(module: nn.Module) -> bool:
    """Whether a module is a list of experts, each with three packed matrices of its own."""
    return isinstance(module, nn.ModuleList) and any(
        sum(isinstance(child, PackedLinear) for child in member.children()) == 3
        for member in module
    )


def is_kernel(module: nn.Module) -> bool:
    """Whether kernels run a packed module."""
    return isinstance(module, (KernelLinear, KernelExperts))


def kernels_problem(device: torch.device) -> str | None:
    """Why no kernel can run on a device; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'aq-search[triton]' (Linux)"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "they are for NVIDIA GPUs only: use plain torch"
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"{device} has compute capability {capability}; they need {_LEAST_CAPABILITY}"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"the model is on {device.type}; they run on cuda: load with device='cuda', or set "
        "TRITON_INTERPRET=1 before Python starts to try them on the CPU, slowly"
    )


def _problem_of(model: nn.Module) -> str | None:
    """Why no kernel can run a packed model; None if they can."""
    dtype = _dtype_of(model)
    if dtype not in _ALLOWED_ERROR:
        return f"the model is in {dtype}; they take bfloat16, float16 and float32"
    devices = {_device(module) for _, module in _packed_modules(model)}
    problems = sorted(filter(None, map(kernels_problem, devices)))
    return problems[0] if problems else None


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.bfloat16)


def why_torch(module: PackedLinear | PackedExperts) -> str | None:
    """Why kernels cannot run a packed module; None if they can."""
    if isinstance(module, PackedLinear):
        return _why_not_matrix(module) if module.format.is_quantized else _BF16
    site = module.site
    if not len(module.owned):
        return "it holds no experts"
    if site.bias_names:
        return "its experts have biases"
    if not site.gate:
        return "its experts have no gate"
    if not _is_silu_gated(site):
        return "its gating function is not silu(gate) * up"
    for number in module.owned:
        reason = _why_not_expert(module.expert(number))
        if reason is not None:
            return f"expert {number}: {reason}"
    return None


def _why_not_expert(expert: PackedExpert) -> str | None:
    for part in linears_of(expert):
        if part.activation.is_quantized:
            return f"its inputs are rounded to {part.activation.name}"
        reason = _why_not_matrix(part)
        if reason is not None:
            return reason
    return None


def _why_not_matrix(linear: PackedLinear) -> str | None:
    return why_no_kernel(linear.format, linear.cols, _device(linear))


def why_no_kernel(fmt: Format, cols: int, device: torch.device) -> str | None:
    """Why no kernel multiplies by a matrix of a format; None if one does.

    Args:
        fmt: the format.
        cols: inputs of the matrix.
        device: where it is.
    """
    if not fmt.is_quantized:
        return None
    if fmt.is_ggml:
        return f"{fmt.name} is a type of llama.cpp; kernels have no order for its blocks"
    try:
        layout_of(fmt.code)
        span_of(fmt.columns_per_scale(cols), cols)
        if fmt.super_size:
            check_super(fmt.super_size, cols)
    except FormatError as error:
        return str(error)
    if fmt.shared.scale == "e4m3" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _E4M3_CAPABILITY:
            return f"{fmt.name} needs compute capability {_E4M3_CAPABILITY}, not {capability}"
    return None


def _is_silu_gated(site: ExpertsSite) -> bool:
    """Whether the gating function is silu(gate) * up; found by trying it."""
    gate = torch.linspace(-40.0, 40.0, 64)
    up = gate.roll(23)
    found = site.apply_gate(torch.cat([gate, up])[None])
    return torch.allclose(found[0], nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-30)


def _packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedLinear | PackedExperts]]:
    """Experts modules, and linears that are not in one."""
    inside = ""
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            inside = f"{name}."
            yield name, module
        elif isinstance(module, PackedLinear) and not (inside and name.startswith(inside)):
            yield name, module


def _device(module: PackedLinear | PackedExperts) -> torch.device:
    return next((t.device for t in module.buffers()), torch.device("cpu"))


def _replace(model: nn.Module, name: str, checked: set[_Place]) -> None:
    """Put a kernel in the place of a packed module, if one can run it and is right."""
    module = model.get_submodule(name)
    assert isinstance(module, (PackedLinear, PackedExperts))
    if is_kernel(module) or why_torch(module) is not None:
        return
    made = KernelLinear(module) if isinstance(module, PackedLinear) else KernelExperts(module)
    _check(name, module, made, _dtype_of(model), checked)
    model.set_submodule(name, made)


@torch.no_grad()
def _check(
    name: str,
    module: PackedLinear | PackedExperts,
    made: KernelLinear | KernelExperts,
    dtype: torch.dtype,
    checked: set[_Place],
) -> None:
    """Compare a kernel with dequantized weights, in places where formats were not compared before.

    Raises:
        ModelError: it gives other numbers.
    """
    for places, trial in _trials(module, made, dtype):
        if checked.issuperset(places):
            continue
        checked.update(places)
        names = ", ".join(place.format.name for place in places)
        kernel = f"{name}: the kernel of {names} on {_device(module)}"
        check_trial(kernel, dtype, trial, "load with kernels=False, and report this")


def check_trial(
    kernel: str, dtype: torch.dtype, trial: Callable[[], tuple[Tensor, Tensor]], advice: str
) -> None:
    """Compare what a kernel gives with what is expected.

    Args:
        kernel: what is tried and where, for messages.
        dtype: of the inputs, bfloat16, float16 or float32.
        trial: gives the kernel's outputs and the expected ones in float32.
        advice: what to do where they differ, for messages.

    Raises:
        ModelError: it fails or gives other numbers.
    """
    limit = _ALLOWED_ERROR[dtype]
    try:
        found, expected = trial()
    except Exception as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise ModelError(f"{kernel} fails with {what}; {advice}") from problem
    error = float((found.float() - expected).abs().max())
    largest = float(expected.abs().max())
    if not error <= limit * largest:
        raise ModelError(
            f"{kernel} gives other numbers than torch: {error:.3g} off beside outputs up to "
            f"{largest:.3g} in {dtype}, where {limit:.3g} of these is allowed; {advice}"
        )


def _trials(
    module: PackedLinear | PackedExperts,
    made: KernelLinear | KernelExperts,
    dtype: torch.dtype,
) -> Iterator[tuple[tuple[_Place, ...], Callable[[], tuple[Tensor, Tensor]]]]:
    """What is tried, and what gives a kernel's outputs and the expected ones on drawn inputs."""
    if isinstance(made, KernelLinear):
        assert isinstance(module, PackedLinear)
        yield (_Place("linear", module.format),), partial(_try_linear, module, made, dtype)
        return
    assert isinstance(module, PackedExperts)
    for number in module.owned:
        expert = module.expert(number)
        parts = zip(PROJECTIONS, linears_of(expert), strict=True)
        places = tuple(_Place(projection, part.format) for projection, part in parts)
        yield places, partial(_try_expert, expert, number, made, dtype)


def _try_linear(
    module: PackedLinear, made: KernelLinear, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = _draw(module, dtype)
    bias = None if module.bias is None else module.bias.float()
    rounded = fake_quantize(x, module.activation).float()
    return made(x), nn.functional.linear(rounded, module.packed().dequantize(), bias)


def _try_expert(
    expert: PackedExpert, number: int, made: KernelExperts, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    x = _draw(expert.up_proj, dtype)
    ids = torch.full((len(x), 1), number, device=x.device)
    found = made.add_experts(x, ids, torch.ones_like(ids, dtype=torch.float32))
    gate, up, down = (part.packed().dequantize() for part in linears_of(expert))
    inputs = x.float()
    return found, (nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T


def _draw(linear: PackedLinear, dtype: torch.dtype) -> Tensor:
    """Inputs of a linear, the same for the same sizes."""
    generator = torch.Generator().manual_seed(linear.cols)
    drawn = torch.randn(_N_TRIED, linear.cols, generator=generator)
    return drawn.to(dtype).to(_device(linear))


def _log(uses: Sequence[KernelUse]) -> None:
    reasons = Counter(use.reason for use in uses if not use.is_kernel)
    logger.info("kernels run %d of %d packed modules", len(uses) - reasons.total(), len(uses))
    for reason, count in reasons.items():
        level = logging.INFO if reason == _BF16 else logging.WARNING
        logger.log(level, "plain torch runs %d packed modules: %s", count, reason)
